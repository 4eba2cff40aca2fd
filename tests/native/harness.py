"""What the tests of the raw kernels share: rows in poisoned memory, and the 2x rule."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.helpers import assert_2x

_C = pytest.importorskip("pwm_fast._C", reason="the native extension is not built")

WIDTHS = (1, 7, 8, 64, 510, 617, 777, 1788)
BATCHES = (0, 1, 199)
ACTS = ("none", "mish", "simnorm")

_POISON = {  # NaNs that no arithmetic makes
    torch.float32: (torch.int32, 0x7FC0DEAD),
    torch.bfloat16: (torch.int16, 0x7FDE),
    torch.float64: (torch.int64, 0x7FF8DEADDEADDEAD),
}
_GUARD = 19  # elements before and after; odd, so that rows are not aligned to vectors

Values = dict[str, Tensor]


class Rows:
    """A matrix whose rows lie ``gap`` elements apart, amid NaNs that must stay as they are."""

    def __init__(self, rows: int, n: int, dtype: torch.dtype = torch.float32, gap: int = 3) -> None:
        ints, poison = _POISON[dtype]
        self._bits = torch.full((2 * _GUARD + rows * (n + gap),), poison, dtype=ints)
        self._poison = poison
        inner = self._bits[_GUARD : _GUARD + rows * (n + gap)]
        self.tensor = inner.view(dtype).view(rows, n + gap)[:, :n]
        self._inside = torch.zeros_like(self._bits, dtype=torch.bool)
        self._inside[_GUARD : _GUARD + rows * (n + gap)].view(rows, n + gap)[:, :n] = True

    @classmethod
    def of(cls, values: Tensor, dtype: torch.dtype = torch.float32, gap: int = 3) -> Rows:
        """Rows that hold ``values``."""
        made = cls(*values.shape, dtype, gap)
        made.tensor.copy_(values)
        return made

    def written(self) -> Tensor:
        """The rows, after a check that nothing beside them was written."""
        assert (self._bits[~self._inside] == self._poison).all(), "written past a row"
        return self.tensor


def parameters(given: Values, *names: str) -> dict[str, Tensor | None]:
    """Those parameters in poisoned memory; None for one that is not given."""
    return {
        name: Rows.of(given[name].reshape(1, -1), gap=0).tensor.view(given[name].shape)
        if name in given
        else None
        for name in names
    }


def check(
    ours: Values,
    reference: Callable[[Values, torch.dtype], Values],
    inputs: Values,
    what: str,
    floors: dict[str, float] | None = None,
) -> None:
    """Compare with fp64 by the 2x rule; PyTorch's own error is that of its fp32 composition.

    Args:
        ours: results, by name; one in bf16 is measured against PyTorch's fp32 result in bf16.
        reference: the same in PyTorch, from inputs of the dtype that it is given.
        inputs: exact values of what the kernel was given.
        what: named in the message.
        floors: errors allowed by name, for sums whose terms are larger than they are.
    """

    def pair(given: Values) -> tuple[Values, Values]:
        same = reference({k: v.float() for k, v in given.items()}, torch.float32)
        return same, reference({k: v.float().double() for k, v in given.items()}, torch.float64)

    generator = torch.Generator().manual_seed(1)

    @functools.cache
    def near(draw: int) -> tuple[Values, Values]:
        return pair(
            {
                name: value * (1.0 + 1e-3 * torch.randn(value.shape, generator=generator))
                for name, value in inputs.items()
            }
        )

    same, truth = pair(inputs)
    assert ours.keys() <= truth.keys()
    for name, value in ours.items():
        if floors and name in floors:
            assert (value - truth[name]).abs().max() <= floors[name], f"{what}: {name}"
            continue
        dtype = torch.bfloat16 if value.dtype == torch.bfloat16 else torch.float32
        nearby = ((near(i)[0][name].to(dtype), near(i)[1][name]) for i in range(3))
        theirs, title = same[name].to(dtype), f"{what}: {name}"
        assert_2x(value.to(dtype), theirs, truth[name], title, nearby)


def activate(u: Tensor, act: str, group: int) -> Tensor:
    """The activation in PyTorch."""
    if act == "mish":
        return torch.nn.functional.mish(u)
    if act == "simnorm":
        return torch.softmax(u.unflatten(-1, (-1, group)), dim=-1).flatten(-2)
    return u


def group_of(n: int) -> int:
    """A SimNorm group that divides ``n``: 8 where it does."""
    return next(group for group in (8, 6, 7, 4, 3, n) if n % group == 0)
