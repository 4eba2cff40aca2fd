"""The table of rounding errors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench import errors


def test_errors_grow_with_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(errors.SIZES, "tiny", (32, 40))
    result = errors.measure(torch.device("cpu"), ["tiny"], [1])
    found = result["cases"][0]["errors"]
    for kind in (0, 1):  # latents, actor's gradient
        assert found["PyTorch fp32"][kind] < 1e-5 < found["fast, emulated"][kind]
        assert found["fast, emulated"][kind] < found["PyTorch bf16 autocast"][kind] < 0.2
    lines = errors.table(result).splitlines()
    assert lines[0] == "| precision | tiny, K = 1: latent | actor gradient |"
    assert len(lines) == 2 + len(found)


def test_docs(tmp_path: Path) -> None:
    page = tmp_path / "ops.md"
    page.write_text(f"before\n{errors.BEGIN}\nold\n{errors.END}\nafter\n")
    errors.write_docs("new", page)
    assert page.read_text() == f"before\n{errors.BEGIN}\nnew\n{errors.END}\nafter\n"
    page.write_text("nothing")
    with pytest.raises(ValueError, match=r"ops\.md must hold"):
        errors.write_docs("new", page)
