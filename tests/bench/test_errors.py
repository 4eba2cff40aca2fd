"""The table of rounding errors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench import errors, pages


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
    page.write_text("before\n<!-- errors:begin -->\nold\n<!-- errors:end -->\nafter\n")
    assert pages.write(page, "errors", "new") and not pages.write(page, "errors", "new")
    wanted = "before\n<!-- errors:begin -->\nnew\n<!-- errors:end -->\nafter\n"
    assert page.read_text() == wanted
    page.write_text("nothing")
    with pytest.raises(ValueError, match=r"ops\.md: there is no <!-- errors:begin"):
        pages.write(page, "errors", "new")
