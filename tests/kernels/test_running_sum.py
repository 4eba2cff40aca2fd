"""Sums over steps against torch.cumsum in float64."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from pwm_fast.kernels.running_sum import running_sum
from tests.helpers import assert_2x


@pytest.mark.interpreted
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(("steps", "shape"), [(1, (1, 1)), (3, (5, 7)), (4, (2, 300)), (0, (2, 3))])
def test_sums(steps: int, shape: tuple[int, int], backward: bool) -> None:
    start, x = torch.randn(shape), torch.randn(steps, *shape)
    order = x.flip(0) if backward else x
    truth, theirs = ((start.to(d) + order.to(d).cumsum(0)) for d in (torch.float64, torch.float32))
    if backward:
        truth, theirs = truth.flip(0), theirs.flip(0)
    assert_2x(running_sum(start, x, backward=backward), theirs, truth)
    out = torch.full_like(x, float("nan"))
    assert_2x(running_sum(None, x, backward=backward, out=out), theirs - start, truth - start)


def test_wrong_arguments_are_named() -> None:
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="start must be"):
        running_sum(x, x)
    with pytest.raises(ValueError, match="x must be float32"):
        running_sum(None, x.double())
    with pytest.raises(ValueError, match="out must be"):
        running_sum(None, x, out=x[:1])
