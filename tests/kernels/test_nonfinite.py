"""Unscaling of gradients, and the flag that says whether one is not finite."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from pwm_fast.kernels.nonfinite import unscale
from tests.native.esnr_cases import misaligned

SIZES = (5, 0, 4097, 1)
BAD = [float("nan"), float("inf"), -float("inf")]


def run(dtype: torch.dtype, device: str) -> None:
    """With a factor and without; a bad number at the start, at the end, in a small tensor."""
    clean = [torch.randn(n).to(dtype).to(device) for n in SIZES]
    quarter = torch.tensor(0.25, device=device)
    for factor in (None, quarter):
        grads = [misaligned(g) if i == 2 else g.clone() for i, g in enumerate(clean)]
        found = torch.zeros((), device=device)
        unscale(grads, found, factor)
        assert found == 0.0
        for got, before in zip(grads, clean, strict=True):
            assert torch.equal(got, before if factor is None else before * 0.25)
    for bad in BAD:
        for tensor, where in ((2, 0), (2, 4096), (3, 0)):
            grads = [g.clone() for g in clean]
            grads[tensor][where] = bad
            unscale(grads, found)
            assert found == 1.0
            found.zero_()
    found.fill_(1.0)  # of an earlier list: it stays
    unscale(clean, found)
    assert found == 1.0


@pytest.mark.interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_in_the_interpreter(dtype: torch.dtype) -> None:
    run(dtype, "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_on_a_gpu(dtype: torch.dtype) -> None:
    run(dtype, "cuda")


@pytest.mark.interpreted
def test_overflow_of_the_product_is_found() -> None:
    """What is finite only in the scaled gradient counts as it is after unscaling."""
    for dtype, value, factor in ((torch.float32, 1e19, 1e20), (torch.float16, 3e4, 4.0)):
        found = torch.zeros(())
        unscale([torch.full((3,), value, dtype=dtype)], found, torch.tensor(factor))
        assert found == 1.0


def test_strided_gradients_are_refused() -> None:
    with pytest.raises(ValueError, match=r"grads\[1\] must be contiguous, got strides \(1, 2\)"):
        unscale([torch.zeros(2), torch.zeros(3, 2).t()], torch.zeros(()))


def test_no_gradients() -> None:
    found = torch.zeros(())
    unscale([], found)
    assert found == 0.0
