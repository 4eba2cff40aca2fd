"""Links, paths, modules and make targets that README, CONTRIBUTING and docs name exist."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FOLDERS = ["bench", "configs", "csrc", "docs", "findings", "kernels", "pwm_fast", "tests"]
# Endings of files that pages name without their folder.
CODE = ["cpp", "cu", "def", "h", "md", "py", "pyi", "sbatch", "toml"]
# Modules that pages have a reader install first.
OTHERS = ["build"]

# Not behind a slash or a dot, as in URLs and links; not before a placeholder's "<" or "*".
PATH = re.compile(rf"(?<![\w./-])(?:{'|'.join(FOLDERS)})/[\w./-]*(?![\w./<*{{-])")
FILE = re.compile(rf"`([\w-]+\.(?:{'|'.join(CODE)}))`")
LINK = re.compile(r"\]\((?!https?:)([^)#]*)(#[^)]*)?\)")
MODULE = re.compile(r"\bpython[\d.]* -m ([\w.]+)")
NAME = re.compile(r"`((?:pwm_fast|bench|tests)\.[\w.]+)")
TARGET = re.compile(r"(?:^|`)make ([a-z][a-z-]*)(?=`|$| +[A-Z#])", re.MULTILINE)


def anchors(page: Path) -> list[str]:
    """The anchors that GitHub makes of a page's headings, in their order."""
    headings = re.findall(r"^#+ (.*)$", page.read_text("utf-8"), re.MULTILINE)
    return ["#" + re.sub(r"[^\w\s-]", "", h).strip().lower().replace(" ", "-") for h in headings]


def missing_links(page: Path, text: str) -> list[str]:
    """Relative links to no file, or to no heading of theirs."""
    found = []
    for path, anchor in LINK.findall(text):
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            found.append(path + anchor)
    return found


def missing_paths(text: str) -> list[str]:
    """Paths of this repository, and files of code named by their name alone.

    Capitals in a path, as in NAME, stand for a word that the reader picks.
    """
    paths = {m.rstrip(".") for m in PATH.findall(text) if not re.search("[A-Z]{4}", m)}
    files = {f for f in FILE.findall(text) if not (ROOT / f).exists()}
    return [p for p in sorted(paths) if not (ROOT / p).exists()] + [
        f for f in sorted(files) if not any(any((ROOT / d).rglob(f)) for d in FOLDERS)
    ]


def runs(module: str) -> bool:
    """Whether ``python -m module`` finds something to run."""
    if module in OTHERS:
        return True
    if module.partition(".")[0] not in FOLDERS:
        return importlib.util.find_spec(module) is not None
    path = ROOT / module.replace(".", "/")
    return path.with_suffix(".py").exists() or (path / "__main__.py").exists()


def exists(name: str) -> bool:
    """Whether a dotted name is a module, or a word in the source of one. Nothing is imported."""
    parts = name.rstrip(".").split(".")
    for count in range(len(parts), 0, -1):
        path = ROOT.joinpath(*parts[:count])
        for file in (path.with_suffix(".py"), path.with_suffix(".pyi"), path / "__init__.py"):
            if file.exists():
                source = file.read_text("utf-8")
                return all(re.search(rf"\b{part}\b", source) for part in parts[count:])
    return False


def missing_in_kernels(text: str) -> list[str]:
    """Names like ``plan.TILES`` that are not in their module of ``kernels/``."""
    found = sorted(set(re.findall(r"`((\w+)\.\w+)`", text)))
    ours = [name for name, module in found if (ROOT / "kernels" / f"{module}.py").exists()]
    return [name for name in ours if not exists(f"kernels.{name}")]


def missing(page: Path, text: str) -> list[str]:
    """All that a page names and that is not there."""
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    return [
        *missing_links(page, text),
        *missing_paths(text),
        *(missing_in_kernels(text) if page.name == "kernels.md" else ()),
        *(f"python -m {m}" for m in sorted(set(MODULE.findall(text))) if not runs(m)),
        *(name for name in sorted(set(NAME.findall(text))) if not exists(name)),
        *(f"make {target}" for target in TARGET.findall(text) if target not in targets),
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_names_exists(page: Path) -> None:
    assert not missing(page, page.read_text("utf-8"))


@pytest.mark.parametrize(
    "broken",
    [
        "[a page](none.md)",
        "[a heading](ops.md#none)",
        "[a heading of this page](#none)",
        "`pwm_fast/none.py`",
        "see kernels/none",
        "`none.cpp`",
        "`python -m pwm_fast.none`",
        "`python -m pwm_fast.envs`",
        "`pwm_fast.ops.none`",
        "`make none`",
    ],
)
def test_what_is_not_there_is_found(broken: str) -> None:
    assert len(missing(ROOT / "docs" / "performance.md", broken)) == 1


def test_a_name_that_left_its_kernel_module_is_found() -> None:
    text = "`plan.TILES` `plan.nowhere` `ops.none`"
    assert missing(ROOT / "docs" / "kernels.md", text) == ["plan.nowhere"]


def test_what_is_there_is_not_reported() -> None:
    text = """[ops](ops.md#rules) [home](../README.md) [web](https://example.org/docs/none.md)
    `kernels/tuned/<gpu>.json` `bench/results/speed_NAME.json` pwm_fast/ops. `setup.py` `simd.h`
    `python -m pwm_fast.train` python3.12 -m pytest `pwm_fast.ops.mlp(...)` `make test ARGS=1`
    """
    assert missing(ROOT / "docs" / "performance.md", text) == []


def test_ratios_in_the_readme_s_text_stand_in_its_table() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    before, table = text.split("<!-- speed:begin -->")
    quoted = re.findall(r"\d+\.\d+x", before)
    assert quoted
    assert set(quoted) <= set(re.findall(r"\d+\.\d+x", table))


def words_of(message: str) -> str:
    """The longest part of an error message that does not depend on what went wrong."""
    return max(re.split(r"\S*[\d=.']\S*", message), key=len).strip()


def test_messages_of_the_troubleshooting_guide_are_the_code_s() -> None:
    files = [*(ROOT / "pwm_fast").rglob("*.py"), ROOT / "setup.py", ROOT / "Makefile"]
    source = " ".join(file.read_text("utf-8") for file in files)
    source = re.sub(r"[\"']\s*\\?\s+f?[\"']", "", source)  # literals that go on in the next line
    rows = (ROOT / "docs" / "guides" / "troubleshooting.md").read_text("utf-8").splitlines()
    symptoms = [row.split(" | ")[0] for row in rows if row.startswith("| ") and " | " in row]
    messages = [m for symptom in symptoms for m in re.findall("`([^`]+)`", symptom) if " " in m]
    assert len(messages) > 30
    assert [m for m in messages if words_of(m) not in source] == []
