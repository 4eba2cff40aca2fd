"""The activation, then LayerNorm or nothing: actors, critics, ensembles of them in one launch.

``y = gamma xhat + beta`` with ``xhat = (m - mean(m)) rstd``, ``m = act(u)`` and ``u = x + bias``.
All arithmetic is float32; ``u`` is kept, and the backward pass recomputes ``m`` from it. Of an
ensemble consecutive rows share a member's parameters ``[E, n]``.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from pwm_fast.kernels.column_sums import add_column_sums, partial_sums
from pwm_fast.kernels.launch import launch, row_tile
from pwm_fast.kernels.pointwise import mish, mish_slope, power, rounded, row_exponent


@triton.jit
def act_norm_fwd_kernel(
    x,
    y,
    u,
    mean,
    rstd,
    bias,
    gamma,
    beta,
    rows,
    n,
    rows_per_member,
    x_stride,
    y_stride,
    u_stride,
    eps,
    MISH: tl.constexpr,
    MEMBERS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program p takes rows from p ROWS on; ``u``, the statistics and all parameters may be None."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK)
    row_in, col_in = row < rows, col < n
    inside = row_in[:, None] & col_in[None, :]
    wide = row.to(tl.int64)[:, None]
    v = tl.load(x + wide * x_stride + col[None, :], mask=inside, other=0.0).to(tl.float32)
    if MEMBERS:
        at = (row // rows_per_member)[:, None] * n + col[None, :]
        there = inside
    else:
        at = col[None, :]
        there = col_in[None, :]
    if bias is not None:
        v += tl.load(bias + at, mask=there, other=0.0)
    if u is not None:
        kept = rounded(v, u.dtype.element_ty)
        tl.store(u + wide * u_stride + col[None, :], kept, mask=inside)
    if MISH:
        v = mish(v)
    if gamma is not None:
        mu = tl.sum(v, axis=1) / n
        v = tl.where(col_in[None, :], v - mu[:, None], 0.0)
        r = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(v * v, axis=1) / n + eps))
        if mean is not None:
            tl.store(mean + row, mu, mask=row_in)
            tl.store(rstd + row, r, mask=row_in)
        g = tl.load(gamma + at, mask=there, other=0.0)
        v = v * r[:, None] * g + tl.load(beta + at, mask=there, other=0.0)
    tl.store(y + wide * y_stride + col[None, :], rounded(v, y.dtype.element_ty), mask=inside)


@triton.jit
def act_norm_bwd_kernel(
    dy,
    dx,
    u,
    mean,
    rstd,
    gamma,
    dy_scale,
    dx_scale,
    partial,
    rows,
    n,
    dy_stride,
    dx_stride,
    u_stride,
    SUMS: tl.constexpr,
    BIAS_SUM: tl.constexpr,
    MISH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (p, e) takes blocks p, p + P, ... of the ``rows`` rows of member e.

    ``SUMS``: leave sums for gamma and beta; ``BIAS_SUM``: for the bias.
    """
    col = tl.arange(0, BLOCK)
    col_in = col < n
    member = tl.program_id(1)
    first = member.to(tl.int64) * rows
    if gamma is not None:
        g = tl.load(gamma + member * n + col, mask=col_in, other=0.0)[None, :]
    if SUMS:
        gamma_sum = tl.zeros([ROWS, BLOCK], tl.float32)
        beta_sum = tl.zeros([ROWS, BLOCK], tl.float32)
    if BIAS_SUM:
        bias_sum = tl.zeros([ROWS, BLOCK], tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        own = block * ROWS + tl.arange(0, ROWS)
        row_in = own < rows
        row = first + own
        inside = row_in[:, None] & col_in[None, :]
        wide = row[:, None]
        d = tl.load(dy + wide * dy_stride + col[None, :], mask=inside, other=0.0).to(tl.float32)
        v = tl.load(u + wide * u_stride + col[None, :], mask=inside, other=0.0).to(tl.float32)
        if dy_scale is not None:
            d *= tl.load(dy_scale + row, mask=row_in, other=0.0)[:, None]
        if gamma is not None:
            r = tl.load(rstd + row, mask=row_in, other=0.0)[:, None]
            mu = tl.load(mean + row, mask=row_in, other=0.0)[:, None]
            hat = mish(v) if MISH else v
            hat = tl.where(inside, (hat - mu) * r, 0.0)
            if SUMS:
                gamma_sum += d * hat
                beta_sum += d
            d *= g
            along = tl.sum(d * hat, axis=1) / n
            d = (d - (tl.sum(d, axis=1) / n)[:, None] - hat * along[:, None]) * r
        if MISH:
            d *= mish_slope(v)
        d = tl.where(inside, d, 0.0)
        if BIAS_SUM:
            bias_sum += d
        if dx_scale is not None:
            exponent = row_exponent(tl.max(tl.abs(d), axis=1))
            tl.store(dx_scale + row, power(exponent), mask=row_in)
            d *= power(254 - exponent)[:, None]
        out = rounded(d, dx.dtype.element_ty)
        tl.store(dx + wide * dx_stride + col[None, :], out, mask=inside)
    if SUMS or BIAS_SUM:
        parts = tl.num_programs(0)
        at = partial + (member * parts + tl.program_id(0)).to(tl.int64) * n + col
        each = (tl.num_programs(1) * parts).to(tl.int64) * n
        if SUMS:
            tl.store(at, tl.sum(gamma_sum, axis=0), mask=col_in)
            tl.store(at + each, tl.sum(beta_sum, axis=0), mask=col_in)
        if BIAS_SUM:
            tl.store(at + 2 * each, tl.sum(bias_sum, axis=0), mask=col_in)


def act_norm_fwd(
    x: Tensor,
    y: Tensor,
    u: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    *,
    bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    act: str,
    eps: float,
    rows_per_member: int = 0,
) -> None:
    """See :meth:`pwm_fast.backends.base.Kernels.act_norm_fwd`; ``act``: none or mish."""
    rows, n = x.shape
    tile = row_tile(n)
    launch(
        act_norm_fwd_kernel,
        tile.grid(rows),
        x,
        y,
        u,
        mean if gamma is not None else None,
        rstd if gamma is not None else None,
        bias,
        gamma,
        beta if gamma is not None else None,
        rows,
        n,
        rows_per_member or rows,
        x.stride(0),
        y.stride(0),
        0 if u is None else u.stride(0),
        eps,
        MISH=act == "mish",
        MEMBERS=rows_per_member > 0,
        **tile.options,
    )


def act_norm_bwd(
    dy: Tensor,
    dx: Tensor,
    u: Tensor,
    mean: Tensor | None,
    rstd: Tensor | None,
    *,
    gamma: Tensor | None,
    act: str,
    rows_per_member: int = 0,
    dgamma: Tensor | None = None,
    dbeta: Tensor | None = None,
    dbias: Tensor | None = None,
    dy_scale: Tensor | None = None,
    dx_scale: Tensor | None = None,
) -> None:
    """See :meth:`pwm_fast.backends.base.Kernels.act_norm_bwd`; ``act``: none or mish."""
    n = dy.shape[1]
    rows = rows_per_member or dy.shape[0]
    members = dy.shape[0] // rows if rows else 0
    tile = row_tile(n)
    blocks = triton.cdiv(rows, tile.rows)
    if gamma is None:
        mean = rstd = dgamma = dbeta = None
    sums = dgamma is not None or dbeta is not None
    parts, partial = partial_sums(dy, members, blocks, (dgamma, dbeta, dbias))
    launch(
        act_norm_bwd_kernel,
        (parts, members),
        dy,
        dx,
        u,
        mean,
        rstd,
        gamma,
        dy_scale,
        dx_scale,
        partial,
        rows,
        n,
        dy.stride(0),
        dx.stride(0),
        u.stride(0),
        SUMS=sums,
        BIAS_SUM=dbias is not None,
        MISH=act == "mish",
        **tile.options,
    )
    if partial is not None:
        add_column_sums(partial, (dgamma, dbeta, dbias))
