"""The table of rounding errors of trained dynamics."""

from __future__ import annotations

import pytest

from bench import errors_trained


@pytest.mark.parametrize("precision", errors_trained.HALVES)
def test_the_fold_errs_no_more_than_autocast(
    precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Why trained dynamics are folded by default: the 2x rule, weight gradients as on a GPU."""
    monkeypatch.setitem(errors_trained.SIZES, "tiny", (32, 30, 3))
    found = errors_trained.measure("tiny", precision, 2)
    assert {"start", "weight 0 of tau", "weight 1", "bias 2"} <= found["folded"].keys()
    assert max(found["folded"].values()) < 2.0
    lines = errors_trained.table({("tiny", precision): found}).splitlines()
    assert len(lines) == 3 and lines[2].startswith(f"| tiny, {precision} | ")
