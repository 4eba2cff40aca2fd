"""Sums over rows, for gradients of a layer's vectors: the second of two stages.

The programs of a backward kernel each leave the sums of their rows, float32; these are added here
in a fixed order, in float64. So a result is the same to the bit whenever it is repeated, on any
GPU: nothing depends on which program comes first.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from pwm_fast.kernels.launch import launch

PARTS, COLUMNS = 128, 16


@triton.jit
def _add(out, offset, x, mask):
    if out is not None:
        tl.store(out + offset, tl.load(out + offset, mask=mask) + x, mask=mask)


@triton.jit
def column_sums_kernel(
    partial, out0, out1, out2, parts, n, PARTS: tl.constexpr, COLS: tl.constexpr
):
    """``out[i, member] += sum(partial[i, member, :parts], 0)``; an output may be None."""
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)
    member = tl.program_id(1)
    which = tl.program_id(2)
    base = (which * tl.num_programs(1) + member).to(tl.int64) * parts * n
    total = tl.zeros([PARTS, COLS], tl.float64)
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)
        inside = (part < parts)[:, None] & (cols < n)[None, :]
        at = base + part.to(tl.int64)[:, None] * n + cols[None, :]
        total += tl.load(partial + at, mask=inside, other=0.0).to(tl.float64)
    sums = tl.sum(total, axis=0)
    offset = member * n + cols
    _add(out0, offset, sums, (cols < n) & (which == 0))
    _add(out1, offset, sums, (cols < n) & (which == 1))
    _add(out2, offset, sums, (cols < n) & (which == 2))


def partial_sums(
    like: Tensor, members: int, blocks: int, outs: Sequence[Tensor | None]
) -> tuple[int, Tensor | None]:
    """How many programs share a member's ``blocks`` blocks of rows, and room for their sums.

    That is ``[3, E, P, n]`` float32, or None where nothing is asked for. There are enough programs
    to fill a GPU of 132 multiprocessors, and few against the rows they sum. Their number does not
    depend on the GPU, so neither do results.
    """
    if not members * blocks or all(out is None for out in outs):
        return blocks, None
    parts = min(blocks, max(128, min(triton.cdiv(blocks, 8), 1024)))
    shape = 3, members, parts, like.shape[1]
    return parts, torch.empty(shape, dtype=torch.float32, device=like.device)


def add_column_sums(partial: Tensor, outs: Sequence[Tensor | None]) -> None:
    """Add partial sums ``[3, E, P, n]`` float32 to float64 ``[E, n]`` or ``[n]`` each, or None."""
    count, members, parts, n = partial.shape
    # What nobody asked for lies last, or is skipped in the kernel.
    while count and outs[count - 1] is None:
        count -= 1
    launch(
        column_sums_kernel,
        (triton.cdiv(n, COLUMNS), members, count),
        partial,
        *outs,
        parts,
        n,
        PARTS=PARTS,
        COLS=COLUMNS,
    )
