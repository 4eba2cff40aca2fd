"""Lambda returns, a program for some columns over all steps; and their gradient.

Source: Sutton and Barto, 2nd edition, section 12.1 and equation 12.20.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pwm_fast.kernels.launch import launch

BLOCK = 128


@triton.jit
def _mixed(value, total, lam):
    """``(1 - lam) value + lam total``; at the ends of lam one of them alone."""
    mixed = (1.0 - lam) * value + lam * total
    return tl.where(lam == 0.0, value, tl.where(lam == 1.0, total, mixed))


@triton.jit
def _finite(x):
    return tl.abs(x) < float("inf")  # a NaN is not below


@triton.jit(do_not_specialize=["steps"])
def returns_fwd_kernel(
    rewards, values, continues, out, steps, n, gamma, lam, LAST: tl.constexpr, BLOCK: tl.constexpr
):
    """``out[t] = r[t] + gamma c[t] ((1 - lam) V[t + 1] + lam out[t + 1])``, ``out[H] = V[H]``.

    ``LAST``: ``values`` holds ``V[H]`` alone, and lam is 1; ``continues`` may be None. What has a
    weight of 0 is left out, finite or not.
    """
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    size = tl.full([1], n, tl.int64)
    if LAST:
        value = tl.load(values + i, mask=inside, other=0.0)
    else:
        value = tl.load(values + steps * size + i, mask=inside, other=0.0)
    total = value
    for number in range(steps):
        t = steps - 1 - number
        bootstrap = total
        if not LAST:
            value = tl.load(values + (t + 1) * size + i, mask=inside, other=0.0)
            bootstrap = _mixed(value, total, lam)
        discount = tl.zeros([BLOCK], tl.float32) + gamma
        if continues is not None:
            discount *= tl.load(continues + t * size + i, mask=inside, other=0.0)
        later = tl.where(discount == 0.0, 0.0, discount * bootstrap)
        total = tl.load(rewards + t * size + i, mask=inside, other=0.0) + later
        tl.store(out + t * size + i, total, mask=inside)


@triton.jit(do_not_specialize=["steps"])
def returns_bwd_kernel(
    dout,
    values,
    continues,
    out,
    drewards,
    dvalues,
    dcontinues,
    steps,
    n,
    gamma,
    lam,
    LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradients of :func:`returns_fwd_kernel`; ``dcontinues`` is None where ``continues`` is.

    A product of 0 and what is not finite is 0 here.
    """
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    size = tl.full([1], n, tl.int64)
    carried = tl.zeros([BLOCK], tl.float32)  # to out[t], by way of out[t - 1]
    if not LAST:
        tl.store(dvalues + i, carried, mask=inside)
    for t in range(steps):
        d = tl.load(dout + t * size + i, mask=inside, other=0.0) + carried
        tl.store(drewards + t * size + i, d, mask=inside)
        discount = tl.zeros([BLOCK], tl.float32) + gamma
        if continues is not None:
            discount *= tl.load(continues + t * size + i, mask=inside, other=0.0)
        if dcontinues is not None:
            if LAST:
                later = tl.load(values + i, mask=inside, other=0.0)
            else:
                later = tl.load(values + (t + 1) * size + i, mask=inside, other=0.0)
            total = later
            if t + 1 < steps:
                total = tl.load(out + (t + 1) * size + i, mask=inside, other=0.0)
            bootstrap = total
            if not LAST:
                bootstrap = _mixed(later, total, lam)
            none = (d == 0.0) | (discount == 0.0)
            towards = gamma * d * bootstrap
            towards = tl.where(none & ~_finite(towards), 0.0, towards)
            tl.store(dcontinues + t * size + i, towards, mask=inside)
        carried = discount * d
        none = (d == 0.0) | (discount == 0.0)
        carried = tl.where(none & ~_finite(carried), 0.0, carried)
        if not LAST:
            # The last step bootstraps from its value alone.
            share = tl.where(t + 1 < steps, 1.0 - lam, 1.0)
            tl.store(dvalues + (t + 1) * size + i, share * carried, mask=inside)
            carried = lam * carried
    if LAST:
        tl.store(dvalues + i, carried, mask=inside)


def returns_fwd(
    rewards: Tensor, values: Tensor, continues: Tensor | None, gamma: float, lam: float
) -> Tensor:
    """Targets ``[H, N]`` of rewards ``[H, N]``, all contiguous float32, H at least 1.

    Args:
        rewards: ``[H, N]``.
        values: ``[H + 1, N]``; or ``[1, N]``, the last ones, with ``lam = 1``.
        continues: ``[H, N]`` or None.
        gamma: discount.
        lam: lambda.
    """
    out = torch.empty_like(rewards)
    _run(returns_fwd_kernel, (rewards, values, continues, out), rewards, values, gamma, lam)
    return out


def returns_bwd(
    dout: Tensor,
    values: Tensor,
    continues: Tensor | None,
    out: Tensor,
    gamma: float,
    lam: float,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of :func:`returns_fwd`, whose result is ``out``, towards its tensors."""
    drewards, dvalues = torch.empty_like(out), torch.empty_like(values)
    dcontinues = None if continues is None else torch.empty_like(continues)
    tensors = (dout, values, continues, out, drewards, dvalues, dcontinues)
    _run(returns_bwd_kernel, tensors, out, values, gamma, lam)
    return drewards, dvalues, dcontinues


def _run(
    kernel: Any,
    tensors: tuple[Tensor | None, ...],
    like: Tensor,
    values: Tensor,
    gamma: float,
    lam: float,
) -> None:
    steps, n = like.shape
    launch(
        kernel,
        (triton.cdiv(n, BLOCK),),
        *tensors,
        steps,
        n,
        gamma,
        lam,
        LAST=values.shape[0] == 1,
        BLOCK=BLOCK,
    )
