"""Sums over the steps of a rollout: latents from their increments, and their adjoints backwards."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pwm_fast.kernels.aot import Case, signature
from pwm_fast.kernels.launch import launch

_BLOCK = 512


@triton.jit(do_not_specialize=["steps"])
def running_sum_kernel(
    start_ptr, x_ptr, out_ptr, steps, n, BACKWARD: tl.constexpr, BLOCK: tl.constexpr
):
    """``out[t] = start + x[0] + ... + x[t]``, or with ``x[T - 1] + ... + x[t]``; one order."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    total = tl.load(start_ptr + i, mask=inside, other=0.0)
    size = tl.full([1], n, tl.int64)
    for number in range(steps):
        t = number
        if BACKWARD:
            t = steps - 1 - number
        total += tl.load(x_ptr + t * size + i, mask=inside, other=0.0)
        tl.store(out_ptr + t * size + i, total, mask=inside)


def running_sum(start: Tensor, x: Tensor, *, backward: bool = False) -> Tensor:
    """``out[t]``: ``start`` plus all of ``x`` up to and with ``x[t]`` (or from the end down to it).

    Args:
        start: ``[B, D]`` float32.
        x: ``[T, B, D]`` float32.
        backward: sum from the last step to the first.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    if x.dim() < 1 or x.shape[1:] != start.shape:
        raise ValueError(f"x must be [T, *start], got {list(x.shape)} for {list(start.shape)}")
    if x.dtype != torch.float32 or start.dtype != torch.float32:
        raise ValueError(f"x and start must be float32, got {x.dtype} and {start.dtype}")
    start, x = start.contiguous(), x.contiguous()
    out = torch.empty_like(x)
    n = start.numel()
    if x.shape[0]:
        launch(
            running_sum_kernel,
            (triton.cdiv(n, _BLOCK),),
            start,
            x,
            out,
            x.shape[0],
            n,
            BACKWARD=backward,
            BLOCK=_BLOCK,
        )
    return out


def cases() -> list[Case]:
    """Both directions."""
    types = dict.fromkeys(("start_ptr", "x_ptr", "out_ptr"), "*fp32")
    types |= dict.fromkeys(("steps", "n"), "i32")
    found = []
    for backward in (False, True):
        constants = {"BACKWARD": backward, "BLOCK": _BLOCK}
        found.append(
            Case(
                f"running_sum {'backward' if backward else 'forward'}",
                running_sum_kernel,
                signature(running_sum_kernel, types, constants),
                constants,
                unaligned=frozenset({"steps"}),
            )
        )
    return found
