"""Sections of README and docs made from results, between ``<!-- NAME:begin -->`` and its end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bench.environment import ROOT

README = ROOT / "README.md"
DATA, ENVIRONMENTS, OPS, PERFORMANCE, PRETRAINING, VIDEOS = (
    ROOT / "docs" / f"{name}.md"
    for name in ("data", "environments", "ops", "performance", "pretraining", "videos")
)


def put(text: str, name: str, section: str) -> str:
    """A page's text with another section of that name.

    Raises:
        ValueError: it has no such section.
    """
    first, last = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, begin, rest = text.partition(first)
    _, end, after = rest.partition(last)
    if not begin or not end:
        raise ValueError(f"there is no {first} ... {last}")
    return f"{before}{first}\n{section}\n{last}{after}"


def publish(text: str, page: Path | None, name: str) -> None:
    """Print a text and, if a page is given, put it into the page's section."""
    print(text)
    if page is not None:
        write(page, name, text)


def write(page: Path, name: str, section: str) -> bool:
    """Put a section into a page; False if it stood there already.

    Raises:
        ValueError: the page has no such section; the message names both.
    """
    old = page.read_text("utf-8")
    try:
        new = put(old, name, section)
    except ValueError as error:
        raise ValueError(f"{page}: {error}") from error
    if new != old:
        page.write_text(new, "utf-8")
    return new != old


def markdown(head: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [head, ["---"] * len(head), *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
