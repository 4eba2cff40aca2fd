"""LayerNorm, then the activation, forward and backward: a row stays in registers throughout.

``y = act(gamma xhat + beta)`` with ``xhat = (v - mean(v)) rstd`` and ``v = x + bias + add + tau
w_tau``. Of centred rows (``width > 0``) the mean is 0, and ``rstd = 1 / sqrt(sum(v^2) / width +
eps)``. All arithmetic is float32; what is stored may be 16-bit. The backward pass recomputes the
activation from the saved ``xhat``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pwm_fast.kernels.column_sums import add_column_sums, partial_sums
from pwm_fast.kernels.launch import launch, row_tile
from pwm_fast.kernels.pointwise import mish, mish_slope, power, rounded, row_exponent
from pwm_fast.kernels.simnorm import simnorm_bwd, simnorm_fwd

#: Codes of the activations.
ACTS = {"none": 0, "mish": 1, "simnorm": 2}


@triton.jit
def norm_act_fwd_kernel(
    x,
    y,
    xhat,
    rstd,
    gamma,
    beta,
    bias,
    add,
    tau,
    w_tau,
    rows,
    n,
    width,
    add_rows,
    x_stride,
    y_stride,
    xhat_stride,
    add_stride,
    eps,
    TAU_ROWS: tl.constexpr,
    CENTRED: tl.constexpr,
    ACT: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program p takes rows from p ROWS on; ``xhat`` and ``rstd`` may be None, and addends."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK)
    row_in, col_in = row < rows, col < n
    inside = row_in[:, None] & col_in[None, :]
    wide = row.to(tl.int64)[:, None]
    v = tl.load(x + wide * x_stride + col[None, :], mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        v += tl.load(bias + col, mask=col_in, other=0.0)[None, :]
    if add is not None:
        at = (row % add_rows).to(tl.int64)[:, None] * add_stride + col[None, :]
        v += tl.load(add + at, mask=inside, other=0.0).to(tl.float32)
    if tau is not None:
        w = tl.load(w_tau + col, mask=col_in, other=0.0)[None, :]
        if TAU_ROWS:
            v += tl.load(tau + row, mask=row_in, other=0.0)[:, None] * w
        else:
            v += tl.load(tau) * w
    if not CENTRED:
        mean = tl.sum(v, axis=1) / n
        v = tl.where(col_in[None, :], v - mean[:, None], 0.0)
    variance = tl.sum(v * v, axis=1) / width
    r = tl.div_rn(1.0, tl.sqrt_rn(variance + eps))
    hat = v * r[:, None]
    if xhat is not None:
        kept = rounded(hat, xhat.dtype.element_ty)
        tl.store(xhat + wide * xhat_stride + col[None, :], kept, mask=inside)
    if rstd is not None:
        tl.store(rstd + row, r, mask=row_in)
    g = tl.load(gamma + col, mask=col_in, other=0.0)[None, :]
    b = tl.load(beta + col, mask=col_in, other=0.0)[None, :]
    u = hat * g + b
    if ACT == 1:
        u = mish(u)
    elif ACT == 2:
        # Groups beyond the row's end are of zeros, whose softmax nobody reads.
        parts = tl.reshape(u, [ROWS, BLOCK // GROUP, GROUP])
        e = tl.exp(parts - tl.max(parts, axis=2)[:, :, None])
        u = tl.reshape(e / tl.sum(e, axis=2)[:, :, None], [ROWS, BLOCK])
    out = rounded(u, y.dtype.element_ty)
    tl.store(y + wide * y_stride + col[None, :], out, mask=inside)


@triton.jit
def norm_act_bwd_kernel(
    dy,
    dx,
    xhat,
    rstd,
    gamma,
    beta,
    y,
    dy_scale,
    dx_scale,
    partial,
    rows,
    n,
    width,
    dy_stride,
    dx_stride,
    xhat_stride,
    y_stride,
    CENTRED: tl.constexpr,
    SUMS: tl.constexpr,
    ACT: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program p takes blocks p, p + P, ... of rows; ``SUMS``: 0, 2 (gamma, beta), 3 (and bias)."""
    col = tl.arange(0, BLOCK)
    col_in = col < n
    g = tl.load(gamma + col, mask=col_in, other=0.0)[None, :]
    if ACT == 1:
        b = tl.load(beta + col, mask=col_in, other=0.0)[None, :]
    if SUMS:
        gamma_sum = tl.zeros([ROWS, BLOCK], tl.float32)
        beta_sum = tl.zeros([ROWS, BLOCK], tl.float32)
        bias_sum = tl.zeros([ROWS, BLOCK], tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = block * ROWS + tl.arange(0, ROWS)
        row_in = row < rows
        inside = row_in[:, None] & col_in[None, :]
        wide = row.to(tl.int64)[:, None]
        d = tl.load(dy + wide * dy_stride + col[None, :], mask=inside, other=0.0).to(tl.float32)
        hat = tl.load(xhat + wide * xhat_stride + col[None, :], mask=inside, other=0.0)
        hat = hat.to(tl.float32)
        r = tl.load(rstd + row, mask=row_in, other=0.0)
        if dy_scale is not None:
            d *= tl.load(dy_scale + row, mask=row_in, other=0.0)[:, None]
        if ACT == 1:
            d *= mish_slope(hat * g + b)
        elif ACT == 2:
            s = tl.load(y + wide * y_stride + col[None, :], mask=inside, other=0.0).to(tl.float32)
            product = tl.reshape(d * s, [ROWS, BLOCK // GROUP, GROUP])
            inner = tl.broadcast_to(
                tl.sum(product, axis=2)[:, :, None], [ROWS, BLOCK // GROUP, GROUP]
            )
            d = s * (d - tl.reshape(inner, [ROWS, BLOCK]))
        if SUMS:
            gamma_sum += d * hat
            beta_sum += d
        h = d * g
        along = tl.sum(h * hat, axis=1) / width
        if not CENTRED:
            h -= (tl.sum(h, axis=1) / n)[:, None]
        result = tl.where(inside, (h - hat * along[:, None]) * r[:, None], 0.0)
        if SUMS == 3:
            bias_sum += result
        if dx_scale is not None:
            exponent = row_exponent(tl.max(tl.abs(result), axis=1))
            tl.store(dx_scale + row, power(exponent), mask=row_in)
            result *= power(254 - exponent)[:, None]
        out = rounded(result, dx.dtype.element_ty)
        tl.store(dx + wide * dx_stride + col[None, :], out, mask=inside)
    if SUMS:
        at = partial + tl.program_id(0).to(tl.int64) * n + col
        each = tl.num_programs(0).to(tl.int64) * n
        tl.store(at, tl.sum(gamma_sum, axis=0), mask=col_in)
        tl.store(at + each, tl.sum(beta_sum, axis=0), mask=col_in)
        if SUMS == 3:
            tl.store(at + 2 * each, tl.sum(bias_sum, axis=0), mask=col_in)


def norm_act_fwd(
    x: Tensor,
    y: Tensor,
    xhat: Tensor | None,
    rstd: Tensor | None,
    *,
    gamma: Tensor,
    beta: Tensor,
    act: str,
    group: int,
    eps: float,
    bias: Tensor | None = None,
    add: Tensor | None = None,
    tau: Tensor | None = None,
    w_tau: Tensor | None = None,
    width: int = 0,
) -> None:
    """See :meth:`pwm_fast.backends.base.Kernels.norm_act_fwd`."""
    rows, n = x.shape
    tile = row_tile(n)
    two = act == "simnorm" and not _fits_a_tile(group)
    u = torch.empty_like(y, dtype=x.dtype, memory_format=torch.contiguous_format) if two else y
    act = "none" if two else act
    launch(
        norm_act_fwd_kernel,
        tile.grid(rows),
        x,
        u,
        xhat,
        rstd,
        gamma,
        beta,
        bias,
        add,
        tau,
        w_tau,
        rows,
        n,
        width or n,
        1 if add is None else add.shape[0],
        x.stride(0),
        u.stride(0),
        0 if xhat is None else xhat.stride(0),
        0 if add is None else add.stride(0),
        eps,
        TAU_ROWS=tau is not None and tau.numel() > 1,
        CENTRED=width > 0,
        ACT=ACTS[act],
        GROUP=group if act == "simnorm" else 1,
        **tile.options,
    )
    if two:
        simnorm_fwd(u, y, group)


def norm_act_bwd(
    dy: Tensor,
    dx: Tensor,
    xhat: Tensor,
    rstd: Tensor,
    *,
    gamma: Tensor,
    beta: Tensor,
    y: Tensor | None,
    act: str,
    group: int,
    dgamma: Tensor | None = None,
    dbeta: Tensor | None = None,
    dbias: Tensor | None = None,
    width: int = 0,
    dy_scale: Tensor | None = None,
    dx_scale: Tensor | None = None,
) -> None:
    """See :meth:`pwm_fast.backends.base.Kernels.norm_act_bwd`."""
    rows, n = dy.shape
    tile = row_tile(n)
    if act == "simnorm" and not _fits_a_tile(group):
        assert y is not None
        du = torch.empty_like(dy, dtype=rstd.dtype, memory_format=torch.contiguous_format)
        simnorm_bwd(dy, y, du, group, dy_scale)
        dy, dy_scale, act = du, None, "none"
    blocks = triton.cdiv(rows, tile.rows)
    sums = 3 if dbias is not None else 2 if dgamma is not None or dbeta is not None else 0
    parts, partial = partial_sums(dy, 1, blocks, (dgamma, dbeta, dbias))
    launch(
        norm_act_bwd_kernel,
        (parts,),
        dy,
        dx,
        xhat,
        rstd,
        gamma,
        beta,
        y if act == "simnorm" else None,
        dy_scale,
        dx_scale,
        partial,
        rows,
        n,
        width or n,
        dy.stride(0),
        dx.stride(0),
        xhat.stride(0),
        0 if y is None or act != "simnorm" else y.stride(0),
        CENTRED=width > 0,
        SUMS=sums,
        ACT=ACTS[act],
        GROUP=group if act == "simnorm" else 1,
        **tile.options,
    )
    if partial is not None:
        add_column_sums(partial, (dgamma, dbeta, dbias))


def _fits_a_tile(group: int) -> bool:
    """Groups of a power of two make up a tile in one kernel; SimNorm of others is a second one."""
    return group & (group - 1) == 0
