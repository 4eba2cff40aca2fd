"""Expected signal-to-noise ratio of gradient samples."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pwm_fast.ops.types import ESNR


def esnr(grads: Sequence[Sequence[Tensor]], eps: float, debias: bool) -> ESNR:
    """Centred, in float64: the difference of totals ``E|g|^2 - |mu|^2`` would cancel."""
    samples = len(grads)
    signals, noises = [], []
    for tensors in zip(*grads, strict=True):
        stacked = torch.stack([g.double() for g in tensors])
        mean = stacked.mean(0)
        signals.append(mean.square().sum())
        noises.append((stacked - mean).square().sum() / samples)
    signal, noise = torch.stack(signals), torch.stack(noises)
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
    )
