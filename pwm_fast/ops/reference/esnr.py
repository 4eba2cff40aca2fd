"""Expected signal-to-noise ratio of gradient samples."""

from __future__ import annotations

import torch
from torch import Tensor

from pwm_fast.ops.types import ESNR


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
