"""``y = norm(act(x W^T + bias))`` in one kernel, and in one backward: actors, ensembles of critics.

A program holds whole rows of one member, so that the statistics need nobody else; a row's true
width (400, 200, odd ones) is masked inside a tile of a power of two. Backward the GEMM ``dy W``
of the *following* layer's gradient goes straight into the gradient of this layer's norm and
activation.

Operands and ``y``, ``u``, ``dx`` are fp16, bf16 or fp32; all sums, statistics and parameters fp32.
The plain form of the arithmetic is ``act_norm_fwd`` of ``pwm_fast.backends.torch``.
"""

from __future__ import annotations

from collections.abc import Mapping

import triton
import triton.language as tl
from torch import Tensor

from pwm_fast.kernels.gemm_tile import (
    GemmTile,
    act_norm_rows,
    check_act,
    check_operands,
    gemm,
    launch,
)
from pwm_fast.kernels.plan import GemmPlan
from pwm_fast.kernels.pointwise import mish, mish_slope, power, rounded, row_exponent


@triton.jit
def linear_act_norm_fwd_kernel(
    x,
    w,
    bias,
    gamma,
    beta,
    y,
    u,
    mean,
    rstd,
    R,
    N,
    K,
    stride_x,
    stride_we,
    stride_wn,
    stride_wk,
    stride_y,
    stride_u,
    eps,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    ACT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Program (p, e) takes rows from p BLOCK_M on of the ``R`` rows of member e."""
    T: tl.constexpr = GemmTile(BLOCK_M, BLOCK_N, BLOCK_K, EVEN_N, EVEN_K, PRECISION)
    member = tl.program_id(1)
    cols = tl.arange(0, BLOCK_N)
    inside = cols < N
    own = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = member * R + tl.minimum(own, R - 1)
    v = gemm(
        x, w + member.to(tl.int64) * stride_we, rows, cols, N, K, stride_x, stride_wn, stride_wk, T
    )
    at = member * N + cols
    if bias is not None:
        v += tl.load(bias + at, mask=inside, other=0.0)[None, :]
    kept = (own < R)[:, None] & inside[None, :]
    far = rows[:, None].to(tl.int64)
    if u is not None:
        tl.store(u + far * stride_u + cols[None, :], rounded(v, u.dtype.element_ty), mask=kept)
    v, mu, r = act_norm_rows(v, inside, N, gamma + at, beta + at, eps, ACT == "mish")
    if mean is not None:
        tl.store(mean + rows, mu, mask=own < R)
    if rstd is not None:
        tl.store(rstd + rows, r, mask=own < R)
    tl.store(y + far * stride_y + cols[None, :], rounded(v, y.dtype.element_ty), mask=kept)


# Gradients of 200 or 101 columns lie unaligned; the kernel is the same for aligned ones.
@triton.jit(do_not_specialize_on_alignment=["K", "stride_dy"])
def linear_act_norm_bwd_kernel(
    dy,
    dy_scale,
    w,
    u,
    mean,
    rstd,
    gamma,
    dx,
    dx_scale,
    sums,
    R,
    N,
    K,
    stride_dy,
    stride_we,
    stride_wn,
    stride_wk,
    stride_u,
    stride_dx,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    ACT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The grid of the forward kernel; ``N`` are the columns of ``dx``, ``K`` those of ``dy``."""
    T: tl.constexpr = GemmTile(BLOCK_M, BLOCK_N, BLOCK_K, EVEN_N, EVEN_K, PRECISION)
    member = tl.program_id(1)
    cols = tl.arange(0, BLOCK_N)
    inside = cols < N
    own = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = member * R + tl.minimum(own, R - 1)
    own_w = w + member.to(tl.int64) * stride_we
    d = gemm(dy, own_w, rows, cols, N, K, stride_dy, stride_wn, stride_wk, T)
    if dy_scale is not None:
        d *= tl.load(dy_scale + rows)[:, None]
    kept = (own < R)[:, None] & inside[None, :]
    far = rows[:, None].to(tl.int64)
    near = u + far * stride_u + cols[None, :]
    hat = tl.load(near, mask=kept, other=0.0).to(tl.float32)
    if ACT == "mish":
        hat = mish(hat)
    r = tl.load(rstd + rows)
    hat = tl.where(kept, (hat - tl.load(mean + rows)[:, None]) * r[:, None], 0.0)
    if sums is not None:  # [3, members, row blocks, N]: gamma, beta, bias
        blocks = tl.num_programs(0)
        plane = (tl.num_programs(1) * blocks).to(tl.int64) * N
        at = sums + (member * blocks + tl.program_id(0)).to(tl.int64) * N + cols
        tl.store(at, tl.sum(d * hat, 0), mask=inside)
        tl.store(at + plane, tl.sum(tl.where(kept, d, 0.0), 0), mask=inside)
    d *= tl.load(gamma + member * N + cols, mask=inside, other=0.0)[None, :]
    along = tl.sum(d * hat, 1) / N
    d = (d - (tl.sum(d, 1) / N)[:, None] - hat * along[:, None]) * r[:, None]
    if ACT == "mish":
        # Loaded a second time: its registers are free while the row is summed.
        v = tl.load(near, mask=kept, other=0.0, cache_modifier=".cg").to(tl.float32)
        d *= mish_slope(v)
    d = tl.where(kept, d, 0.0)
    if sums is not None:
        tl.store(at + 2 * plane, tl.sum(d, 0), mask=inside)
    if dx_scale is not None:
        exponent = row_exponent(tl.max(tl.abs(d), 1))
        d *= power(254 - exponent)[:, None]
        tl.store(dx_scale + rows, power(exponent), mask=own < R)
    tl.store(dx + far * stride_dx + cols[None, :], rounded(d, dx.dtype.element_ty), mask=kept)


def linear_act_norm_fwd(
    x: Tensor,
    weight: Tensor,
    y: Tensor,
    u: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    *,
    gamma: Tensor,
    beta: Tensor,
    act: str,
    eps: float,
    plan: GemmPlan,
    bias: Tensor | None = None,
    input_precision: str = "tf32",
) -> None:
    """``y = norm(act(x weight^T + bias))``, of one layer or of each member of an ensemble.

    Args:
        x: ``[R, K]``, the operand; of E members, the rows of one after those of another.
        weight: ``[N, K]`` or ``[E, N, K]`` of the same dtype, with any strides.
        y: ``[R, N]``, written; what an fp16 ``y`` cannot hold is infinite.
        u: ``[R, N]`` or None: the pre-activation, for the backward pass.
        mean: ``[R]`` fp32 or None: of the activations.
        rstd: ``[R]`` fp32 or None: their reciprocal standard deviations.
        gamma: ``[N]`` or ``[E, N]`` fp32, contiguous.
        beta: likewise.
        act: ``"none"`` or ``"mish"``.
        eps: added to the variance.
        plan: how to launch it; of whole rows.
        bias: like ``gamma``.
        input_precision: of fp32 operands: ``"tf32"`` or ``"ieee"``.

    Raises:
        ValueError: tensors that do not fit one another or the plan, or another ``act``.
    """
    n, k = weight.shape[-2:]
    what = "linear_act_norm_fwd"
    check_operands(what, x, weight, k, {"y": y, "u": u}, n)
    vectors = {"gamma": gamma, "beta": beta, "bias": bias}
    rows, members = _rows(what, x, weight, plan, n, act, vectors)
    launch(
        what,
        linear_act_norm_fwd_kernel,
        plan,
        rows,
        {
            "x": x,
            "w": weight,
            "bias": bias,
            "gamma": gamma,
            "beta": beta,
            "y": y,
            "u": u,
            "mean": mean,
            "rstd": rstd,
            "R": rows,
            "N": n,
            "K": k,
            "stride_x": x.stride(0),
            "stride_we": weight.stride(0) if weight.dim() == 3 else 0,
            "stride_wn": weight.stride(-2),
            "stride_wk": weight.stride(-1),
            "stride_y": y.stride(0),
            "stride_u": 0 if u is None else u.stride(0),
            "eps": eps,
            "ACT": act,
        },
        input_precision,
        members=members,
    )


def linear_act_norm_bwd(
    dy: Tensor,
    weight: Tensor,
    dx: Tensor,
    u: Tensor,
    mean: Tensor,
    rstd: Tensor,
    *,
    gamma: Tensor,
    act: str,
    plan: GemmPlan,
    dy_scale: Tensor | None = None,
    dx_scale: Tensor | None = None,
    sums: Tensor | None = None,
    input_precision: str = "tf32",
) -> None:
    """The gradient through the following Linear and this layer's norm and activation.

    ``dy dy_scale weight`` is the gradient towards this layer's output; ``dx dx_scale`` that towards
    its pre-activation.

    Args:
        dy: ``[R, K]``, the following layer's gradient; members' rows as in the forward pass.
        weight: ``[K, N]`` or ``[E, K, N]``, the following layer's, with any strides.
        dx: ``[R, N]``, written.
        u: ``[R, N]``, kept by the forward pass.
        mean: ``[R]`` fp32, likewise.
        rstd: ``[R]`` fp32, likewise.
        gamma: ``[N]`` or ``[E, N]`` fp32, contiguous.
        act: ``"none"`` or ``"mish"``.
        plan: how to launch it; of whole rows, made for a backward pass.
        dy_scale: ``[R]`` fp32: row scales of ``dy``.
        dx_scale: ``[R]`` fp32, written: a power of two a row, so that the row's largest entry in
            ``dx`` lies in (0.5, 1]; 1 for a zero row.
        sums: ``[3, E, row blocks, N]`` fp32 contiguous (E = 1 without members), written: what each
            of a member's row blocks adds to the gradients of gamma, beta and bias.
        input_precision: of fp32 operands.

    Raises:
        ValueError: tensors that do not fit one another or the plan, or another ``act``.
    """
    k, n = weight.shape[-2:]
    what = "linear_act_norm_bwd"
    check_operands(what, dy, weight, k, {"dx": dx, "u": u}, n)
    rows, members = _rows(what, dy, weight, plan, n, act, {"gamma": gamma})
    blocks = -(-rows // plan.block_m)
    if sums is not None and (sums.numel() != 3 * members * blocks * n or not sums.is_contiguous()):
        raise ValueError(
            f"{what}: sums must be contiguous, {[3, members, blocks, n]}, got {list(sums.shape)}"
        )
    launch(
        what,
        linear_act_norm_bwd_kernel,
        plan,
        rows,
        {
            "dy": dy,
            "dy_scale": dy_scale,
            "w": weight,
            "u": u,
            "mean": mean,
            "rstd": rstd,
            "gamma": gamma,
            "dx": dx,
            "dx_scale": dx_scale,
            "sums": sums,
            "R": rows,
            "N": n,
            "K": k,
            "stride_dy": dy.stride(0),
            "stride_we": weight.stride(0) if weight.dim() == 3 else 0,
            "stride_wn": weight.stride(-1),
            "stride_wk": weight.stride(-2),
            "stride_u": u.stride(0),
            "stride_dx": dx.stride(0),
            "ACT": act,
        },
        input_precision,
        members=members,
    )


def _rows(
    what: str,
    x: Tensor,
    weight: Tensor,
    plan: GemmPlan,
    n: int,
    act: str,
    vectors: Mapping[str, Tensor | None],
) -> tuple[int, int]:
    """Rows of a member, and members; checks what both directions take."""
    check_act(what, act)
    if plan.tiles_n != 1 or plan.block_n < n:
        raise ValueError(f"{what}: {n} columns must lie in one tile, got tiles of {plan.block_n}")
    members = weight.shape[0] if weight.dim() == 3 else 1
    if x.shape[0] % members:
        raise ValueError(f"{what}: {x.shape[0]} rows are not as many for each of {members} members")
    for name, vector in vectors.items():
        if vector is not None and (vector.numel() != members * n or not vector.is_contiguous()):
            raise ValueError(
                f"{what}: {name} must be contiguous, {[members, n]}, got {list(vector.shape)}"
            )
    return x.shape[0] // members, members
