"""Stored results, and the pages that show them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench.pages import put


def stored(path: Path) -> dict[str, Any]:
    """A result as its benchmark wrote it."""
    result: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return result


def check_page(page: Path, name: str, section: str) -> None:
    """The section of that name stands in the page as it is."""
    text = page.read_text("utf-8")
    assert put(text, name, section) == text
