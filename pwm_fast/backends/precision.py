"""Precisions of GEMMs: the dtype that their operands are rounded to."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Precision(NamedTuple):
    """A mode. State, LayerNorm, sums, losses and accumulators are float32 in all of them.

    Attributes:
        name: of :data:`BY_NAME`.
        compute: the compute dtype, of GEMMs' operands; None for the state's own.
        scaled: 16-bit gradients have row scales (see :mod:`pwm_fast.backends.base`).
        tf32: fp32 GEMMs may round their operands to tf32 (CUDA).
    """

    name: str
    compute: torch.dtype | None = None
    scaled: bool = False
    tf32: bool = False

    def dtype(self, state: torch.dtype) -> torch.dtype:
        """The compute dtype where the state has dtype ``state``."""
        return state if self.compute is None else self.compute


EXACT = Precision("exact")
TF32 = Precision("tf32", tf32=True)
BF16 = Precision("bf16", torch.bfloat16)
FAST = Precision("fast", torch.float16, scaled=True)
BY_NAME = {p.name: p for p in (EXACT, TF32, BF16, FAST)}
NAMES = ("auto", *BY_NAME)  # what users ask for
