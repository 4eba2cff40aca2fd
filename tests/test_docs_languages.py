"""The pages in Traditional Chinese have the commands, keys, numbers and links of the English ones.

Both are read block by block, so a sentence about a key has to stand in the same paragraph, row or
item. What the words between say is not compared.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.test_docs_paths import LINK, ROOT, anchors

DOCS = ROOT / "docs"
CHINESE = DOCS / "zh-TW"
NAMES = [
    "guides/quickstart",
    "guides/comparison",
    "guides/troubleshooting",
    "guides/implementation",
    "clusters",
]
PAIRS = {DOCS / f"{name}.md": CHINESE / f"{Path(name).name}.md" for name in NAMES}
OTHER = PAIRS | {chinese: english for english, chinese in PAIRS.items()}

FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
ITEM = re.compile(r"^(?=- |\d+\. )", re.MULTILINE)
CODE = re.compile(r"`([^`]+)`")
NUMBER = re.compile(r"\d[\d,.]*(?<![,.])")
#: Not "# @package", which Hydra reads.
COMMENT = re.compile(r"\s*(?<!\S)# (?!@).*")


def target(page: Path, path: str, anchor: str) -> tuple[Path, str]:
    """Where a link leads. Headings of pages in both languages are counted, others named."""
    to = (page.parent / path).resolve() if path else page
    return to, str(anchors(to).index(anchor)) if anchor and to in OTHER else anchor


def named(page: Path, text: str) -> list[object]:
    """Code, links and numbers of a piece of text, in no language's order."""
    links = [target(page, *found) for found in LINK.findall(text)]
    code = [" ".join(found.split()) for found in CODE.findall(text)]
    numbers = NUMBER.findall(LINK.sub("", CODE.sub("", text)))
    return [*sorted(code), *sorted(links), *sorted(numbers)]


def blocks(page: Path, text: str) -> list[tuple[object, ...]]:
    """What each heading, paragraph, list, table and fence names, as (kind, part, part...)."""
    found: list[tuple[object, ...]] = []
    start = 0
    for fence in [*FENCE.finditer(text), None]:
        for block in text[start : fence.start() if fence else None].strip().split("\n\n"):
            heading = re.match("#+ ", block)
            if heading:
                found.append((heading[0], named(page, block)))
            elif block.startswith("|"):
                rows = [row.strip("|").split(" | ") for row in block.splitlines()]
                found.append(("table", *([named(page, cell) for cell in row] for row in rows)))
            elif ITEM.match(block):
                found.append(("list", *(named(page, item) for item in ITEM.split(block) if item)))
            elif block:
                found.append(("paragraph", named(page, block)))
        if fence:
            found.append(("code", *(COMMENT.sub("", line) for line in fence[0].splitlines())))
            start = fence.end()
    return found


def swapped(found: object) -> object:
    """The same, with links to pages of one language as links to those of the other."""
    if isinstance(found, Path):
        return OTHER.get(found, found)
    if isinstance(found, (list, tuple)):
        return type(found)(swapped(part) for part in found)
    return found


def differences(english: Path, text: str) -> list[tuple[object, object]]:
    """Blocks of an English page and of a text for its translation that name different things."""
    ours = blocks(english, english.read_text("utf-8"))
    theirs = [swapped(block) for block in blocks(PAIRS[english], text)]
    missing: list[object] = [None] * abs(len(ours) - len(theirs))
    return [(a, b) for a, b in zip([*ours, *missing], [*theirs, *missing], strict=False) if a != b]


@pytest.mark.parametrize("english", PAIRS, ids=lambda page: page.stem)
def test_both_languages_name_the_same(english: Path) -> None:
    assert differences(english, PAIRS[english].read_text("utf-8")) == []


@pytest.mark.parametrize("english", PAIRS, ids=lambda page: page.stem)
def test_each_page_links_its_other_language_below_the_title(english: Path) -> None:
    for page in (english, PAIRS[english]):
        assert blocks(page, page.read_text("utf-8"))[1] == ("paragraph", [(OTHER[page], "")])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("`launch.jobs` |", "`launch.job` |"),  # a key in a table
        ("`launch.wait=false`", "`launch.wait`"),  # a key in a sentence
        ("| `launch.signal_s` | 120 |", "| `launch.signal_s` | 60 |"),
        ("| `launch.max_jobs` | 256 | 同時進行的工作數 |\n", ""),
        ("--tasks ant,hopper", "--tasks ant"),  # a command
        ("gpu_type: h100", "gpu_type: a100"),
        ("# @package _global_\n", ""),
        ("### 批次指令稿", "## 批次指令稿"),
        ("\n- `--wait` ", " `--wait` "),
        ("[見下文](#一次執行用多張-gpu)", "[見下文](#批次指令稿)"),
        ("[English](../clusters.md)", "[English](../data.md)"),
    ],
)
def test_a_difference_is_found(old: str, new: str) -> None:
    text = (CHINESE / "clusters.md").read_text("utf-8")
    assert text.count(old) == 1
    assert differences(DOCS / "clusters.md", text.replace(old, new))


def test_comments_and_words_may_differ() -> None:
    text = (CHINESE / "clusters.md").read_text("utf-8")
    for old, new in (("# 沒有 GPU，用 gloo", "# no GPU: gloo"), ("在登入節點上", "在那裡")):
        assert old in text
        assert not differences(DOCS / "clusters.md", text.replace(old, new))


def test_every_chinese_page_is_compared() -> None:
    assert {*CHINESE.glob("*.md")} == {*PAIRS.values(), CHINESE / "index.md"}
