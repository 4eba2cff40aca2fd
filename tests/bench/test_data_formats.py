"""bench.data_formats: what it stores, and that the page shows it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import data_formats
from bench.pages import DATA
from tests.bench.stored import check_page, stored


def test_the_table_in_the_docs_is_the_stored_result() -> None:
    check_page(DATA, "data_formats", data_formats.table(stored(data_formats.OUT)))


def test_memory_is_bounded() -> None:
    """Of files of a gigabyte and more as of small ones."""
    cases = stored(data_formats.OUT)["cases"]
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
