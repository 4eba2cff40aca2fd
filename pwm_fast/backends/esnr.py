"""What a device provides for ESNR, and its plain PyTorch form.

A streamed estimate keeps, of T tensors, the first sample as the origin, the running sum of the
samples' distances from it, and their summed squares ``[T]``; the latter two in float64, which holds
the square of every float32 number: no scale of the samples overflows or underflows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


def moments(grads: Sequence[Sequence[Tensor]]) -> tuple[Tensor, Tensor]:
    """Signal and noise of each tensor, ``[T]``.

    Centred, in float64: the difference of totals ``E|g|^2 - |mu|^2`` would cancel.
    """
    signals, noises = [], []
    for tensors in zip(*grads, strict=True):
        stacked = torch.stack([g.double() for g in tensors])
        mean = stacked.mean(0)
        signals.append(mean.square().sum())
        noises.append((stacked - mean).square().sum() / len(grads))
    return torch.stack(signals), torch.stack(noises)


class EsnrReduction(Protocol):
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

        Origins and sums are contiguous; sums are float64.
        """

    def result(
        self, origins: Sequence[Tensor], sums: Sequence[Tensor], squares: Tensor, samples: int
    ) -> tuple[Tensor, Tensor]:
        """Signal and noise ``[T]``, float64, of the samples taken, the origin among them."""


class TorchEsnr:
    """The kernels in plain PyTorch: any device, any floating dtypes."""

    def moments(self, grads: Sequence[Tensor], samples: int) -> tuple[Tensor, Tensor]:
        """See :class:`EsnrReduction`."""
        count = len(grads) // samples
        return moments([grads[s * count : (s + 1) * count] for s in range(samples)])

    def update(
        self,
        grads: Sequence[Tensor],
        origins: Sequence[Tensor],
        sums: Sequence[Tensor],
        squares: Tensor,
    ) -> None:
        """See :class:`EsnrReduction`."""
        for t, (g, origin, total) in enumerate(zip(grads, origins, sums, strict=True)):
            distance = g.double() - origin.double()
            total += distance
            squares[t] += distance.square().sum()

    def result(
        self, origins: Sequence[Tensor], sums: Sequence[Tensor], squares: Tensor, samples: int
    ) -> tuple[Tensor, Tensor]:
        """See :class:`EsnrReduction`."""
        signal, noise = [], []
        for t, (origin, total) in enumerate(zip(origins, sums, strict=True)):
            way = total / samples
            signal.append((origin.double() + way).square().sum())
            noise.append(squares[t] / samples - way.square().sum())
        return torch.stack(signal), torch.stack(noise).clamp_min(0.0)
