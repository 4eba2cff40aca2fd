"""bench.data_formats: what it stores, and that the page shows it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench import data_formats
from bench.pages import DATA, put


def stored() -> dict[str, Any]:
    result: dict[str, Any] = json.loads(data_formats.OUT.read_text("utf-8"))
    return result


def test_the_table_in_the_docs_is_the_stored_result() -> None:
    page = DATA.read_text("utf-8")
    assert put(page, "data_formats", data_formats.table(stored())) == page


def test_memory_is_bounded() -> None:
    """Of files of a gigabyte and more as of small ones."""
    cases = stored()["cases"]
    sizes = [(c["format"], c["episodes"]) for c in cases]
    assert sizes == [(kind, n) for kind, pair in data_formats.SIZES.items() for n in pair]
    assert max(c["bytes"] for c in cases) > 1e9
    assert max(c["memory_bytes"] for c in cases) < 40e6


@pytest.mark.slow
def test_measuring(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("h5py", reason="needs pip install 'pwm-fast[minari]'")
    out = tmp_path / "out.json"
    assert data_formats.main(["--divide=500", f"--out={out}"]) == 0
    result = json.loads(out.read_text("utf-8"))
    assert [c["episodes"] for c in result["cases"]] == [8, 64, 2, 8, 2, 8]
    assert data_formats.table(result) in capsys.readouterr().out
