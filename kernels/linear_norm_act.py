"""``y = act(norm(x W^T + bias))`` in one kernel, and in one kernel backward.

Forward the GEMM's tile stays in registers until the row's statistics are known. Backward the
GEMM ``dy W`` of the *following* layer's gradient goes straight into the gradient of this layer's
activation and norm. Where a row lies in several tiles their programs exchange partial statistics
(:mod:`pwm_fast.kernels.gemm_tile`); :func:`pwm_fast.kernels.plan.plan` chooses.

Operands and ``y``, ``xhat``, ``dx`` are fp16, bf16 or fp32; all sums, statistics and parameters
fp32. The plain form of the arithmetic is ``norm_act_fwd`` of ``pwm_fast.backends.torch``.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from pwm_fast.kernels.gemm_tile import (
    COUNTER_STRIDE,
    Exchange,
    GemmTile,
    barrier,
    check_act,
    check_operands,
    gemm,
    launch,
    load_partials,
    store_partial,
)
from pwm_fast.kernels.plan import GemmPlan
from pwm_fast.kernels.pointwise import mish, mish_slope, power, rounded, row_exponent

_COUNTER = tl.constexpr(COUNTER_STRIDE)


@triton.jit
def linear_norm_act_fwd_kernel(
    x,
    w,
    bias,
    gamma,
    beta,
    y,
    xhat,
    rstd,
    slots,
    counters,
    R,
    N,
    K,
    width,
    groups,
    stride_slot,
    stride_x,
    stride_wn,
    stride_wk,
    stride_y,
    stride_hat,
    eps,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILES_N: tl.constexpr,
    TILES_2: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    CENTRED: tl.constexpr,
    ACT: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
    PHASE: tl.constexpr,
):
    """Grid ``(groups TILES_N,)``; a program takes every ``groups``-th row block of its columns."""
    T: tl.constexpr = GemmTile(BLOCK_M, BLOCK_N, BLOCK_K, EVEN_N, EVEN_K, PRECISION)
    for part in range(tl.program_id(0), tl.cdiv(R, BLOCK_M) * TILES_N, groups * TILES_N):
        # The columns are the same each time, but pointers to them kept through would spill.
        tile = part % TILES_N
        block = part // TILES_N
        cols = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = cols < N
        rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
        valid = tl.minimum(rows, R - 1)
        h = gemm(x, w, valid, cols, N, K, stride_x, stride_wn, stride_wk, T)
        if bias is not None:
            h += tl.load(bias + cols, mask=inside, other=0.0)[None, :]

        # Statistics of the row: of this tile first, then of all.
        if CENTRED:
            first = tl.sum(h * h, 1)
        else:
            count = tl.minimum(N - tile * BLOCK_N, BLOCK_N).to(tl.float32)
            first = tl.sum(h, 1) / count
            off = tl.where(inside[None, :], h - first[:, None], 0.0)
            second = tl.sum(off * off, 1)
        if TILES_N > 1:
            if PHASE != 2:
                store_partial(slots, 0, tile, rows, first, stride_slot, TILES_N)
                if not CENTRED:
                    store_partial(slots, 1, tile, rows, second, stride_slot, TILES_N)
            if PHASE == 0:
                barrier(counters + block * _COUNTER, TILES_N)
        if PHASE != 1:
            if TILES_N > 1:
                parts = load_partials(slots, 0, rows, stride_slot, TILES_N, TILES_2)
                if CENTRED:
                    first = tl.sum(parts, 0)
                else:
                    # Chan's formula: means and squared distances of parts of unequal size.
                    seconds = load_partials(slots, 1, rows, stride_slot, TILES_N, TILES_2)
                    starts = tl.arange(0, TILES_2) * BLOCK_N
                    counts = tl.maximum(tl.minimum(N - starts, BLOCK_N), 0).to(tl.float32)
                    first = tl.sum(parts * counts[:, None], 0) / N
                    shift = parts - first[None, :]
                    second = tl.sum(seconds + shift * shift * counts[:, None], 0)
            if CENTRED:
                r = tl.rsqrt(first / width + eps)
                hat = h * r[:, None]
            else:
                r = tl.rsqrt(second / width + eps)
                hat = (h - first[:, None]) * r[:, None]
            u = hat * tl.load(gamma + cols, mask=inside, other=0.0)[None, :]
            u += tl.load(beta + cols, mask=inside, other=0.0)[None, :]
            if ACT == "mish":
                u = mish(u)
            elif ACT == "simnorm":
                parted = tl.reshape(u, [BLOCK_M, BLOCK_N // GROUP, GROUP])
                parted = tl.exp(parted - tl.max(parted, 2)[:, :, None])
                parted = parted / tl.sum(parted, 2)[:, :, None]
                u = tl.where(cols[None, :] < width, tl.reshape(parted, [BLOCK_M, BLOCK_N]), 0.0)
            kept = (rows < R)[:, None] & inside[None, :]
            far = rows[:, None].to(tl.int64)
            tl.store(y + far * stride_y + cols[None, :], rounded(u, y.dtype.element_ty), mask=kept)
            if xhat is not None:
                tl.store(
                    xhat + far * stride_hat + cols[None, :],
                    rounded(hat, xhat.dtype.element_ty),
                    mask=kept,
                )
            if rstd is not None:
                tl.store(rstd + rows, r, mask=(rows < R) & (tile == 0))


@triton.jit
def linear_norm_act_bwd_kernel(
    dy,
    dy_scale,
    w,
    add,
    xhat,
    rstd,
    gamma,
    beta,
    dx,
    dx_scale,
    sums,
    slots,
    counters,
    R,
    N,
    K,
    width,
    groups,
    stride_slot,
    stride_dy,
    stride_wn,
    stride_wk,
    stride_hat,
    stride_dx,
    stride_add,
    add_factor,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILES_N: tl.constexpr,
    TILES_2: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    CENTRED: tl.constexpr,
    ACT: tl.constexpr,
    PRECISION: tl.constexpr,
    PHASE: tl.constexpr,
):
    """The grid of the forward kernel; ``N`` are the columns of ``dx``, ``K`` those of ``dy``."""
    T: tl.constexpr = GemmTile(BLOCK_M, BLOCK_N, BLOCK_K, EVEN_N, EVEN_K, PRECISION)
    for part in range(tl.program_id(0), tl.cdiv(R, BLOCK_M) * TILES_N, groups * TILES_N):
        # The columns are the same each time, but pointers to them kept through would spill.
        tile = part % TILES_N
        block = part // TILES_N
        cols = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = cols < N
        rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
        valid = tl.minimum(rows, R - 1)
        far = valid[:, None].to(tl.int64)
        g = gemm(dy, w, valid, cols, N, K, stride_dy, stride_wn, stride_wk, T)
        if dy_scale is not None:
            g *= tl.load(dy_scale + valid)[:, None]
        if add is not None:
            at = add + far * stride_add + cols[None, :]
            g += add_factor * tl.load(at, mask=inside[None, :], other=0.0)
        kept = (rows < R)[:, None] & inside[None, :]
        # Loaded a second time after the exchange: between, its registers are free.
        near = xhat + far * stride_hat + cols[None, :]
        hat = tl.load(near, mask=inside[None, :], other=0.0).to(tl.float32)
        gain = tl.load(gamma + cols, mask=inside, other=0.0)[None, :]
        if ACT == "mish":
            shift = tl.load(beta + cols, mask=inside, other=0.0)[None, :]
            g *= mish_slope(hat * gain + shift)
        if sums is not None:  # [3, row blocks, N]: gamma, beta, bias
            blocks = tl.cdiv(R, BLOCK_M)
            if PHASE != 1:
                du = tl.where(kept, g, 0.0)
                tl.store(sums + block * N + cols, tl.sum(du * hat, 0), mask=inside)
                tl.store(sums + (blocks + block) * N + cols, tl.sum(du, 0), mask=inside)
        g *= gain

        inner = tl.sum(g * hat, 1)
        if not CENTRED:
            mean = tl.sum(g, 1)
        if TILES_N > 1:
            if PHASE != 2:
                store_partial(slots, 0, tile, rows, inner, stride_slot, TILES_N)
                if not CENTRED:
                    store_partial(slots, 1, tile, rows, mean, stride_slot, TILES_N)
                if dx_scale is not None:
                    store_partial(slots, 2, tile, rows, tl.max(tl.abs(g), 1), stride_slot, TILES_N)
            if PHASE == 0:
                barrier(counters + block * _COUNTER, TILES_N)
        if PHASE != 1:
            r = tl.load(rstd + valid)
            if TILES_N > 1:
                inner = tl.sum(load_partials(slots, 0, rows, stride_slot, TILES_N, TILES_2), 0)
                if not CENTRED:
                    mean = tl.sum(load_partials(slots, 1, rows, stride_slot, TILES_N, TILES_2), 0)
            inner = inner / width
            hat = tl.load(near, mask=inside[None, :], other=0.0, cache_modifier=".cg")
            hat = hat.to(tl.float32)
            if CENTRED:
                g = (g - hat * inner[:, None]) * r[:, None]
            else:
                mean = mean / width
                g = (g - mean[:, None] - hat * inner[:, None]) * r[:, None]
            if sums is not None:
                total = tl.sum(tl.where(kept, g, 0.0), 0)
                tl.store(sums + (2 * blocks + block) * N + cols, total, mask=inside)
            if dx_scale is not None:
                if TILES_N > 1:
                    # The row's true maximum would cost a second exchange. This bounds it, since
                    # no |xhat| exceeds the root of the width.
                    largest = tl.max(
                        load_partials(slots, 2, rows, stride_slot, TILES_N, TILES_2), 0
                    )
                    largest += tl.sqrt(width * 1.0) * tl.abs(inner)
                    if not CENTRED:
                        largest += tl.abs(mean)
                    largest = largest * r
                elif CENTRED or EVEN_N:
                    largest = tl.max(tl.abs(g), 1)
                else:  # beyond the row's end there is the mean that was taken off
                    largest = tl.max(tl.where(inside[None, :], tl.abs(g), 0.0), 1)
                exponent = row_exponent(largest)
                g *= power(254 - exponent)[:, None]
                tl.store(dx_scale + rows, power(exponent), mask=(rows < R) & (tile == 0))
            tl.store(
                dx + far * stride_dx + cols[None, :], rounded(g, dx.dtype.element_ty), mask=kept
            )


def linear_norm_act_fwd(
    x: Tensor,
    weight: Tensor,
    y: Tensor,
    xhat: Tensor | None,
    rstd: Tensor | None,
    *,
    gamma: Tensor,
    beta: Tensor,
    act: str,
    group: int,
    eps: float,
    plan: GemmPlan,
    exchange: Exchange | None,
    bias: Tensor | None = None,
    width: int = 0,
    input_precision: str = "tf32",
    phase: int = 0,
) -> None:
    """``y = act(norm(x weight^T + bias))``.

    Args:
        x: ``[R, K]``, the operand.
        weight: ``[N, K]`` of the same dtype, with any strides.
        y: ``[R, N]``, written; what an fp16 ``y`` cannot hold is infinite.
        xhat: ``[R, N]`` or None: the normalised rows, for the backward pass.
        rstd: ``[R]`` fp32 or None: their reciprocal standard deviations.
        gamma: ``[N]`` fp32.
        beta: ``[N]`` fp32.
        act: ``"none"``, ``"mish"`` or ``"simnorm"``.
        group: SimNorm's group width, a power of two that divides N.
        eps: added to the variance.
        plan: how to launch it; of these shapes.
        exchange: where ``plan.synced``.
        bias: ``[N]`` fp32.
        width: 0: LayerNorm over N. Otherwise the true width of rows that are centred over their
            first ``width`` columns and 0 beyond: LayerNorm is RMS there.
        input_precision: of fp32 operands: ``"tf32"`` or ``"ieee"``.
        phase: of the exchange; for tests without a device.

    Raises:
        ValueError: tensors that do not fit one another or the plan.
    """
    n, k = weight.shape
    rows = check_operands("linear_norm_act_fwd", x, weight, k, {"y": y, "xhat": xhat}, n)
    if act == "simnorm" and (group < 1 or group & (group - 1) or n % group or width % group):
        raise ValueError(f"SimNorm's groups must be a power of two that divides {n}, got {group}")
    if act == "simnorm" and plan.block_n % group:
        raise ValueError(f"groups of {group} do not fit tiles of {plan.block_n}")
    launch(
        "linear_norm_act_fwd",
        linear_norm_act_fwd_kernel,
        plan,
        rows,
        {
            "x": x,
            "w": weight,
            "bias": bias,
            "gamma": gamma,
            "beta": beta,
            "y": y,
            "xhat": xhat,
            "rstd": rstd,
            "R": rows,
            "N": n,
            "K": k,
            "width": width or n,
            "stride_x": x.stride(0),
            "stride_wn": weight.stride(0),
            "stride_wk": weight.stride(1),
            "stride_y": y.stride(0),
            "stride_hat": 0 if xhat is None else xhat.stride(0),
            "eps": eps,
            "CENTRED": width > 0,
            "ACT": act,
            "GROUP": group if act == "simnorm" else 1,
            "PHASE": phase,
        },
        input_precision,
        exchange=exchange,
    )


def linear_norm_act_bwd(
    dy: Tensor,
    weight: Tensor,
    dx: Tensor,
    xhat: Tensor,
    rstd: Tensor,
    *,
    gamma: Tensor,
    beta: Tensor,
    act: str,
    plan: GemmPlan,
    exchange: Exchange | None,
    dy_scale: Tensor | None = None,
    dx_scale: Tensor | None = None,
    add: Tensor | None = None,
    add_factor: float = 1.0,
    sums: Tensor | None = None,
    width: int = 0,
    input_precision: str = "tf32",
    phase: int = 0,
) -> None:
    """The gradient through the following Linear and this layer's activation and norm.

    ``dm = dy dy_scale weight + add_factor add`` is the gradient towards this layer's output;
    ``dx dx_scale`` that towards its pre-activation.

    Args:
        dy: ``[R, K]``, the following layer's gradient.
        weight: ``[K, N]``, the following layer's, with any strides.
        dx: ``[R, N]``, written.
        xhat: ``[R, N]``, kept by the forward pass.
        rstd: ``[R]`` likewise.
        gamma: ``[N]`` fp32, this layer's.
        beta: ``[N]`` fp32.
        act: ``"none"`` or ``"mish"``.
        plan: how to launch it.
        exchange: where ``plan.synced``.
        dy_scale: ``[R]`` fp32, powers of two.
        dx_scale: ``[R]`` fp32, written: powers of two with which no ``|dx|`` exceeds 1. Where the
            plan holds whole rows a row's largest lies in (0.5, 1]; otherwise the scale comes from
            a bound, mostly within a factor of 4.
        add: ``[R, N]`` fp32.
        add_factor: what ``add`` is multiplied by.
        sums: ``[3, ceil(R / plan.block_m), N]`` fp32, written: what each row block adds to the
            gradients of gamma, beta and the bias.
        width: as in the forward pass.
        input_precision: of fp32 operands.
        phase: of the exchange; for tests without a device.

    Raises:
        ValueError: tensors that do not fit one another or the plan.
    """
    k, n = weight.shape
    rows = check_operands("linear_norm_act_bwd", dy, weight, k, {"dx": dx, "xhat": xhat}, n)
    check_act("linear_norm_act_bwd", act)
    launch(
        "linear_norm_act_bwd",
        linear_norm_act_bwd_kernel,
        plan,
        rows,
        {
            "dy": dy,
            "dy_scale": dy_scale,
            "w": weight,
            "add": add,
            "xhat": xhat,
            "rstd": rstd,
            "gamma": gamma,
            "beta": beta,
            "dx": dx,
            "dx_scale": dx_scale,
            "sums": sums,
            "R": rows,
            "N": n,
            "K": k,
            "width": width or n,
            "stride_dy": dy.stride(0),
            "stride_wn": weight.stride(1),
            "stride_wk": weight.stride(0),
            "stride_hat": xhat.stride(0),
            "stride_dx": dx.stride(0),
            "stride_add": 0 if add is None else add.stride(0),
            "add_factor": add_factor,
            "CENTRED": width > 0,
            "ACT": act,
            "PHASE": phase,
        },
        input_precision,
        exchange=exchange,
    )


#: Values a row and tile that the kernels exchange: at most this many.
PLANES = 3
