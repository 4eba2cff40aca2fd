"""docs/architecture.md: the picture is the code's, and what the page names is there."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("grimp")

from tests import architecture


def test_the_picture_is_the_codes() -> None:
    """Else: python -m tests.architecture."""
    assert architecture.stored() == architecture.drawn()


def test_arrows_go_down() -> None:
    order = [architecture.box(m) for layer in architecture.layers() for m in layer]
    found = architecture.arrows()
    assert len(found) > 15
    for importer, imported in found:
        assert order.index(importer) < order.index(imported), (importer, imported)


def test_files_of_the_two_ways_are_there() -> None:
    text = architecture.PAGE.read_text("utf-8")
    links = re.findall(r"\]\((\.\./[^)]+)\)", text)
    assert len(links) > 25
    assert [link for link in links if not (architecture.PAGE.parent / link).exists()] == []
