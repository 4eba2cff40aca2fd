"""What a device provides for ESNR, and its plain PyTorch form.

A streamed estimate keeps, of T tensors, the first sample as the origin, the running sum of the
samples' distances from it (in :func:`sum_dtype`), and their summed squares ``[T]``, float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from pwm_fast.ops.reference import esnr as reference


class EsnrKernels(Protocol):
    """What a device provides; T tensors, at least one, of one dtype."""

    def moments(self, grads: Sequence[Tensor], samples: int) -> tuple[Tensor, Tensor]:
        """Signal and noise ``[T]``, float64; ``grads`` holds sample after sample."""

    def update(
        self,
        grads: Sequence[Tensor],
        origins: Sequence[Tensor],
        sums: Sequence[Tensor],
        squares: Tensor,
    ) -> None:
        """Take a sample: its distances from the origins into ``sums`` and ``squares``.

        Origins and sums are contiguous.
        """

    def result(
        self, origins: Sequence[Tensor], sums: Sequence[Tensor], squares: Tensor, samples: int
    ) -> tuple[Tensor, Tensor]:
        """Signal and noise ``[T]``, float64, of the samples taken, the origin among them."""


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of a running sum of samples: at least float32."""
    return torch.promote_types(dtype, torch.float32)


class TorchEsnr:
    """The kernels in plain PyTorch: any device, any floating dtypes."""

    def moments(self, grads: Sequence[Tensor], samples: int) -> tuple[Tensor, Tensor]:
        """See :class:`EsnrKernels`."""
        count = len(grads) // samples
        return reference.moments([grads[s * count : (s + 1) * count] for s in range(samples)])

    def update(
        self,
        grads: Sequence[Tensor],
        origins: Sequence[Tensor],
        sums: Sequence[Tensor],
        squares: Tensor,
    ) -> None:
        """See :class:`EsnrKernels`."""
        for t, (g, origin, total) in enumerate(zip(grads, origins, sums, strict=True)):
            distance = g.to(total.dtype) - origin.to(total.dtype)
            total += distance
            squares[t] += distance.double().square().sum()

    def result(
        self, origins: Sequence[Tensor], sums: Sequence[Tensor], squares: Tensor, samples: int
    ) -> tuple[Tensor, Tensor]:
        """See :class:`EsnrKernels`."""
        signal, noise = [], []
        for t, (origin, total) in enumerate(zip(origins, sums, strict=True)):
            way = total.double() / samples
            signal.append((origin.double() + way).square().sum())
            noise.append(squares[t] / samples - way.square().sum())
        return torch.stack(signal), torch.stack(noise).clamp_min(0.0)
