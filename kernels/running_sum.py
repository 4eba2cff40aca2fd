"""Sums over the steps of a rollout: latents from their increments, and their gradients."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pwm_fast.kernels.launch import launch

BLOCK = 512


@triton.jit(do_not_specialize=["steps"])
def running_sum_kernel(
    start_ptr, x_ptr, out_ptr, steps, n, BACKWARD: tl.constexpr, BLOCK: tl.constexpr
):
    """``out[t] = start + x[0] + ... + x[t]``, or with ``x[T - 1] + ... + x[t]``; one order."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    total = tl.zeros([BLOCK], tl.float32)
    if start_ptr is not None:
        total = tl.load(start_ptr + i, mask=inside, other=0.0)
    size = tl.full([1], n, tl.int64)
    for number in range(steps):
        t = number
        if BACKWARD:
            t = steps - 1 - number
        total += tl.load(x_ptr + t * size + i, mask=inside, other=0.0)
        tl.store(out_ptr + t * size + i, total, mask=inside)


def running_sum(
    start: Tensor | None, x: Tensor, *, backward: bool = False, out: Tensor | None = None
) -> Tensor:
    """``out[t]``: ``start`` plus all of ``x`` up to and with ``x[t]`` (or from the end down to it).

    Args:
        start: ``[B, D]`` float32; None for zeros.
        x: ``[T, B, D]`` float32.
        backward: sum from the last step to the first.
        out: contiguous tensor like ``x`` to write to.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    if x.dtype != torch.float32 or x.dim() < 1:
        raise ValueError(f"x must be float32 [T, ...], got {x.dtype} {list(x.shape)}")
    if start is not None and (start.shape != x.shape[1:] or start.dtype != torch.float32):
        raise ValueError(
            f"start must be float32 {list(x.shape[1:])}, got {start.dtype} {list(start.shape)}"
        )
    x = x.contiguous()
    if out is None:
        out = torch.empty_like(x)
    elif out.shape != x.shape or out.dtype != torch.float32 or not out.is_contiguous():
        raise ValueError(f"out must be a contiguous float32 {list(x.shape)}, got {list(out.shape)}")
    if x.numel():
        n = x[0].numel()
        launch(
            running_sum_kernel,
            (triton.cdiv(n, BLOCK),),
            None if start is None else start.contiguous(),
            x,
            out,
            x.shape[0],
            n,
            BACKWARD=backward,
            BLOCK=BLOCK,
        )
    return out
