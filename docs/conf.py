"""The documentation's site: ``make docs`` builds it, with Sphinx, into build/docs.

The pages are Markdown that GitHub shows as it is. What the site needs beyond that is done here:
a page's list of links is its part of the navigation, links that leave docs/ are pointed elsewhere,
and pictures in Mermaid's words are drawn by Graphviz, so that no page needs the network.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, ClassVar

from docutils import nodes
from docutils.parsers.rst import Directive
from pygments.lexers.special import TextLexer
from sphinx.application import Sphinx

import pwm_fast

DOCS = Path(__file__).parent
ROOT = DOCS.parent

project = "pwm_fast"
author = "pwm_fast contributors"
copyright = author
version = release = pwm_fast.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["figures"]

# Slugs are GitHub's, so links to headings work in both places.
myst_heading_anchors = 4
myst_fence_as_directive = ["mermaid"]

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 88
autosummary_generate = False
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # else attributes are described twice

html_theme = "pydata_sphinx_theme"
html_title = project
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_show_sphinx = False
html_theme_options = {
    "logo": {"text": project},
    "header_links_before_dropdown": 7,
    "navigation_with_keys": False,
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": [],
}

#: Where the repository's files are shown, such as https://github.com/OWNER/pwm_fast/blob/main.
#: Without it, the site holds the files that its pages link to, to download.
REPOSITORY = os.environ.get("DOCS_REPOSITORY", "").rstrip("/")

#: Pages of the repository that stand in the site under another name.
PAGES = {
    ROOT / "README.md": DOCS / "index.md",
    ROOT / "CONTRIBUTING.md": DOCS / "contributing.md",
    ROOT / "CHANGELOG.md": DOCS / "changelog.md",
}
#: Those whose whole text stands there, in place of the page that only refers to it.
WHOLE = {"contributing": ROOT / "CONTRIBUTING.md", "changelog": ROOT / "CHANGELOG.md"}

#: Pages whose lists of links are the navigation below them.
GROUPS = {
    "index",
    "guides/index",
    "results_index",
    "reference/index",
    "internals",
    "zh-TW/index",
}

_LINK = re.compile(r"\[([^\]]*)\]\((?!https?:|#)([^)#\s]+)(#[^)]*)?\)")
_ITEM = re.compile(r"^- \[[^\]]*\]\(([^)#]+)\.(?:md|rst)\)", re.MULTILINE)


def _relinked(text: str, written: Path, shown: Path) -> str:
    """Markdown whose links lead to where their targets are in the site.

    Args:
        text: Markdown.
        written: the file that it stands in, which its links are relative to.
        shown: the page of docs/ that shows it.
    """

    def link(found: re.Match[str]) -> str:
        words, anchor = found[1], found[3] or ""
        target = Path(os.path.normpath(written.parent / found[2]))
        if target in PAGES:
            # The README's headings are not those of the site's first page.
            anchor = "" if target.name == "README.md" else anchor
            target = PAGES[target]
        elif not target.is_relative_to(DOCS) and REPOSITORY:
            return f"[{words}]({REPOSITORY}/{target.relative_to(ROOT)}{anchor})"
        elif target.is_dir():  # cannot be downloaded
            return words
        return f"[{words}]({os.path.relpath(target, shown.parent)}{anchor})"

    return _LINK.sub(link, text)


def read(app: Sphinx, name: str, source: list[str]) -> None:
    """Markdown as GitHub shows it, made ready for Sphinx."""
    page = Path(app.env.doc2path(name))
    if page.suffix != ".md":
        return
    text, written = source[0], page
    if name in WHOLE:
        written = WHOLE[name]
        text = written.read_text("utf-8")
        app.env.note_dependency(written)
    text = _relinked(text, written, page)
    if name in GROUPS:
        text += "\n\n```{toctree}\n:hidden:\n\n" + "\n".join(_ITEM.findall(text)) + "\n```\n"
    source[0] = text


def skip(app: Sphinx, what: str, name: str, found: object, skipped: bool, options: Any) -> bool:
    """Leave out the fields of named tuples: their class's docstring describes them."""
    return skipped or type(found).__name__ == "_tuplegetter"


def localize(app: Sphinx, name: str, template: str, context: dict[str, Any], page: object) -> None:
    """Tell browsers which pages are in Chinese: the forms of its characters depend on that."""
    if name.startswith("zh-TW/"):
        context["language"] = "zh-TW"


class Mermaid(Directive):
    """A flowchart of ``A --> B`` lines: drawn where Graphviz is installed, else shown as words."""

    has_content: ClassVar[bool] = True

    def run(self) -> list[nodes.Node]:
        """The picture, in the colour of the page's text."""
        text = "\n".join(self.content)
        if shutil.which("dot") is None:
            return [nodes.literal_block(text, text, language="text")]
        head, *lines = self.content
        if head != "flowchart TD" or not all(re.fullmatch(r" *\w+( --> \w+)?", x) for x in lines):
            raise self.error(f"only flowchart TD with lines A and A --> B is drawn, got {text!r}")
        graph = "\n".join(x.replace("-->", "->") for x in lines)
        style = 'bgcolor=none; node [shape=box, style=rounded, fontname="sans-serif"]'
        drawn = subprocess.run(
            ["dot", "-Tsvg"],
            input=f"digraph {{ {style}\n{graph} }}",
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        svg = drawn[drawn.index("<svg") :].replace("black", "currentColor")
        svg = svg.replace("<text ", '<text fill="currentColor" ')
        return [nodes.raw("", f'<div class="drawn">{svg}</div>', format="html")]


def setup(app: Sphinx) -> dict[str, Any]:
    """Sphinx's entry."""
    app.connect("source-read", read)
    app.connect("autodoc-skip-member", skip)
    app.connect("html-page-context", localize)
    app.add_directive("mermaid", Mermaid)
    app.add_lexer("csv", TextLexer)  # Pygments has none
    return {"parallel_read_safe": True, "parallel_write_safe": True}
