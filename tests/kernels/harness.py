"""What the tests of the element kernels share: poisoned rows, and the 2x rule against float64.

The tests run twice: in Triton's interpreter on CPU tensors (marked ``interpreted``) and on a GPU,
where there is one (marked ``gpu``).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers import assert_2x

_GPU = (
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
)


def gpu(test: Callable[..., None]) -> Callable[..., None]:
    """Mark a test as one that needs a CUDA GPU."""
    for mark in _GPU:
        test = mark(test)
    return test


_MARKS = (("cpu", pytest.mark.interpreted), ("cuda", _GPU))
#: Parametrise a test by it: ``@pytest.mark.parametrize("device", DEVICES)``.
DEVICES = [pytest.param(device, marks=marks) for device, marks in _MARKS]
#: Rows and features for the interpreter: real widths, in few rows.
WIDE = [(3, 510), (1, 617), (0, 777), (2, 1788)]


def on_devices(cpu: Iterable[tuple[Any, ...]], cuda: Iterable[tuple[Any, ...]]) -> list[Any]:
    """Parameters of a test, after its ``device``: what the interpreter runs, and what a GPU.

    So the GPU's tests have run before they meet one. The interpreter takes few rows, as its time
    goes by programs and operations and hardly by how wide they are, and no bfloat16.
    """
    return [
        pytest.param(device, *values, marks=marks)
        for (device, marks), each in zip(_MARKS, (cpu, cuda), strict=True)
        for values in each
    ]


def multiprocessors(device: str) -> int:
    """Those of the GPU, or of an H100."""
    if device == "cpu":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count


_GUARD = 19  # odd: rows are not aligned to vectors
_POISON = 12345.0

Values = dict[str, Tensor]


class Rows:
    """A matrix whose rows lie ``gap`` elements apart, amid numbers that must stay as they are."""

    def __init__(
        self, rows: int, n: int, dtype: torch.dtype, device: str = "cpu", gap: int = 0
    ) -> None:
        size = 2 * _GUARD + rows * (n + gap)
        self._all = torch.full((size,), _POISON, dtype=dtype, device=device)
        self._inside = torch.zeros(size, dtype=torch.bool, device=device)
        self.tensor = self._rows(self._all, rows, n, gap)
        self._rows(self._inside, rows, n, gap).fill_(True)
        self.tensor.fill_(float("nan"))

    @staticmethod
    def _rows(flat: Tensor, rows: int, n: int, gap: int) -> Tensor:
        return flat[_GUARD : _GUARD + rows * (n + gap)].view(rows, n + gap)[:, :n]

    @classmethod
    def of(cls, values: Tensor, dtype: torch.dtype, device: str = "cpu", gap: int = 0) -> Rows:
        """Rows that hold ``values``."""
        made = cls(*values.shape, dtype, device, gap)
        made.tensor.copy_(values)
        return made

    def written(self) -> Tensor:
        """The rows on the CPU, after a check that nothing beside them was written."""
        outside = self._all[~self._inside]
        assert (outside == torch.full_like(outside, _POISON)).all(), "written past a row"
        return self.tensor.cpu()


def check(
    ours: Values,
    reference: Callable[[Values, torch.dtype], Values],
    inputs: Values,
    what: str,
) -> None:
    """Compare with float64 by the 2x rule; PyTorch's own error is that of its float32 composition.

    Args:
        ours: results on the CPU, by name; 16-bit ones are measured against PyTorch's float32 result
            in 16 bits, float64 ones (sums of float32 rows) as float32.
        reference: the same in PyTorch, from inputs of the dtype that it is given.
        inputs: exact values of what the kernel was given.
        what: named in the message.
    """
    generator = torch.Generator().manual_seed(1)

    @functools.cache
    def pair(draw: int) -> tuple[Values, Values]:
        """PyTorch's results and the truth, at the inputs and then nearby."""
        nudge = 1e-3 if draw else 0.0
        near = {
            name: value.float() * (1.0 + nudge * torch.randn(value.shape, generator=generator))
            for name, value in inputs.items()
        }
        truth = reference({k: v.double() for k, v in near.items()}, torch.float64)
        return reference(near, torch.float32), truth

    same, truth = pair(0)
    assert ours.keys() <= truth.keys()
    for name, value in ours.items():
        dtype = torch.float32 if value.dtype == torch.float64 else value.dtype
        # A few draws of PyTorch's own error say little of its range in a tensor of few numbers.
        nearby = ((pair(i)[0][name].to(dtype), pair(i)[1][name]) for i in range(1, 17))
        theirs, title = same[name].to(dtype), f"{what}: {name}"
        assert_2x(value.to(dtype), theirs, truth[name], title, nearby)


def activate(u: Tensor, act: str, group: int) -> Tensor:
    """The activation in PyTorch."""
    if act == "mish":
        return torch.nn.functional.mish(u)
    if act == "simnorm":
        return torch.softmax(u.unflatten(-1, (-1, group)), dim=-1).flatten(-2)
    return u


def pullback(f: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor) -> Tensor:
    """Gradient of ``f`` at ``x`` by autograd."""
    x = x.detach().requires_grad_()
    return torch.autograd.grad(f(x), x, dy)[0]


def assert_row_scales(scaled: Tensor, scale: Tensor, true: Tensor) -> None:
    """Scales are the powers of two that bring the rows' largest entries into (0.5, 1]."""
    exponent = scale.double().log2()
    assert torch.equal(exponent, exponent.round())
    largest = true.abs().amax(-1)
    zero = largest == 0
    assert torch.equal(scale[zero], torch.ones_like(scale[zero]))
    top = scaled[~zero].double().abs().amax(-1)
    assert ((top > 0.499) & (top <= 1.0)).all(), top  # fp16 may round the largest to a half
