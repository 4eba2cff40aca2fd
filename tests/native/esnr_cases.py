"""What the tests of the ESNR kernels share: samples, their truth, and views that lie badly."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pwm_fast.backends.esnr import moments

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SAMPLES = (1, 2, 3, 4, 7, 8, 9, 16, 17, 64, 65)
# Empty, shorter than a vector, one element past a chunk of 4096, of several chunks.
SIZES = (5, 0, 4097, 1, 9000, 777)
# Spreads of samples with ESNR 1e5, 1e7, 1e8 and 1e12, and the share of the noise that a difference
# of float32 totals gets wrong at least.
AGREEING = ((10**-2.5, 1e-5), (10**-3.5, 1e-3), (1e-4, 0.1), (1e-6, 0.5))
RTOL = 2e-7  # sums of float32 numbers in float64, centred exactly


def grads(
    samples: int,
    dtype: torch.dtype = torch.float32,
    sizes: Sequence[int] = SIZES,
    spread: float = 1.0,
    device: str = "cpu",
) -> list[Tensor]:
    """Sample after sample; they agree to about ``spread`` of their size, which is about 1."""
    centres = [1.0 + torch.rand(n, dtype=torch.float64) for n in sizes]
    return [
        (c * (1.0 + spread * torch.randn(c.shape, dtype=torch.float64))).to(dtype).to(device)
        for _ in range(samples)
        for c in centres
    ]


def truth(given: Sequence[Tensor], samples: int) -> tuple[Tensor, Tensor]:
    """Signal and noise in float64."""
    count = len(given) // samples
    double = [g.double().cpu() for g in given]
    return moments([double[s * count : (s + 1) * count] for s in range(samples)])


def difference_of_totals(given: Sequence[Tensor], samples: int) -> float:
    """The noise as the difference of float32 totals, which cancels."""
    count = len(given) // samples
    stacked = torch.stack(
        [torch.cat([g.float() for g in given[s * count :][:count]]) for s in range(samples)]
    )
    mean = stacked.mean(0)
    return (stacked.square().sum(1).mean() - mean.square().sum()).item()


def misaligned(x: Tensor) -> Tensor:
    """The same numbers, contiguous, one element past an aligned address."""
    buffer = torch.full((x.numel() + 9,), float("nan"), dtype=x.dtype, device=x.device)
    view = buffer[1 : 1 + x.numel()].view(x.shape)
    return view.copy_(x)


def assert_close(got: Tensor, wanted: Tensor, rtol: float = RTOL) -> None:
    torch.testing.assert_close(got.cpu(), wanted, rtol=rtol, atol=0.0)
