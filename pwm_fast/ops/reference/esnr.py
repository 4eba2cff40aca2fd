"""Expected signal-to-noise ratio of gradient samples."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pwm_fast.ops.types import ESNR


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


def summarize(signal: Tensor, noise: Tensor, samples: int, eps: float, debias: bool) -> ESNR:
    """The result of tensors' signals and noises ``[T]``."""
    total_signal, total_noise = signal.sum(), noise.sum()
    if debias:
        signal = (signal - noise / samples).clamp_min(0.0)
        total_signal = (total_signal - total_noise / samples).clamp_min(0.0)
    ratio = total_signal / total_noise.clamp_min(eps)
    return ESNR(
        total_signal,
        total_noise,
        ratio,
        10.0 * torch.log10(ratio),
        signal / noise.clamp_min(eps),
        signal,
        noise,
    )
