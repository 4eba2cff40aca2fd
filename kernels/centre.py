"""Packed copies of a layer's tensors, in one launch: centred, padded with zeros, and rounded.

``W - mean(W)`` over outputs is what a LayerNorm sees of a weight; its bias likewise. The same
kernel, from a packed layer's gradients to the layer's own, is the transpose: the projection off the
mean is its own transpose, and what was padded is cut off. Means are summed and taken off in
float64, as what rounding leaves of them is not subtracted any more.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from pwm_fast.kernels.launch import launch
from pwm_fast.kernels.pointwise import rounded

_ROWS, COLUMNS, WARPS = 1024, 16, 8


@triton.jit
def _vector(x, out, n, n_out, CENTRE: tl.constexpr, ROWS: tl.constexpr):
    """``out``: ``x``, centred or not, then zeros."""
    mean = tl.zeros([1], tl.float64)
    if CENTRE:
        for start in range(0, n, ROWS):
            row = start + tl.arange(0, ROWS)
            part = tl.load(x + row, mask=row < n, other=0.0).to(tl.float64)
            mean += tl.sum(part, axis=0) / n
    for start in range(0, n_out, ROWS):
        row = start + tl.arange(0, ROWS)
        value = tl.load(x + row, mask=row < n, other=0.0).to(tl.float64)
        value = tl.where(row < n, value - mean, 0.0)
        tl.store(out + row, value.to(tl.float32), mask=row < n_out)


@triton.jit
def centre_kernel(
    weight,
    bias,
    gamma,
    beta,
    weight_out,
    bias_out,
    gamma_out,
    beta_out,
    operand,
    n,
    k,
    n_out,
    k_out,
    stride,
    out_stride,
    CENTRE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """A program takes some columns of the weight, the last one the vectors; any may be None."""
    part = tl.program_id(0)
    if part == tl.num_programs(0) - 1:
        if bias is not None:
            _vector(bias, bias_out, n, n_out, CENTRE, ROWS)
        if gamma is not None:
            _vector(gamma, gamma_out, n, n_out, False, ROWS)
        if beta is not None:
            _vector(beta, beta_out, n, n_out, False, ROWS)
    elif weight is not None:
        col = part * COLS + tl.arange(0, COLS)
        mean = tl.zeros([COLS], tl.float64)
        if CENTRE:
            for start in range(0, n, ROWS):
                row = start + tl.arange(0, ROWS)
                inside = (row < n)[:, None] & (col < k)[None, :]
                at = weight + row.to(tl.int64)[:, None] * stride + col[None, :]
                mean += tl.sum(tl.load(at, mask=inside, other=0.0).to(tl.float64), axis=0) / n
        for start in range(0, n_out, ROWS):
            row = start + tl.arange(0, ROWS)
            inside = (row < n)[:, None] & (col < k)[None, :]
            far = row.to(tl.int64)[:, None]
            x = tl.load(weight + far * stride + col[None, :], mask=inside, other=0.0)
            if CENTRE:
                x = tl.where(inside, x.to(tl.float64) - mean[None, :], 0.0).to(tl.float32)
            kept = (row < n_out)[:, None] & (col < k_out)[None, :]
            at = far * out_stride + col[None, :]
            tl.store(weight_out + at, x, mask=kept)
            if operand is not None:
                tl.store(operand + at, rounded(x, operand.dtype.element_ty), mask=kept)


def centre(
    layer: Sequence[Tensor | None],
    out: Sequence[Tensor | None],
    *,
    centred: bool,
    cast: Tensor | None = None,
) -> None:
    """Copy a layer's weight, bias, gamma and beta; what is None there is None in ``out``.

    Args:
        layer: ``[N, K]`` with a last stride of 1, and ``[N]``; fp32.
        out: ``[N', K']`` likewise, and ``[N']``, written: zeros beyond N and K; smaller ones get
            the first of the layer's rows and columns.
        centred: weight and bias lose their means over outputs, over the first min(N, N').
        cast: ``[N', K']`` fp16 or bf16 with the weight's strides, written: the weight rounded.
    """
    weight, weight_out = layer[0], out[0]
    rows = [x.shape[0] for x in (*layer, *out) if x is not None]
    n, n_out = rows[0], rows[-1]
    k = k_out = stride = out_stride = 0
    if weight is not None and weight_out is not None:
        k_out = weight_out.shape[1]
        k = min(weight.shape[1], k_out)
        stride, out_stride = weight.stride(0), weight_out.stride(0)
    n = min(n, n_out)
    launch(
        centre_kernel,
        (triton.cdiv(k_out, COLUMNS) + 1,),
        *layer,
        *out,
        cast,
        n,
        k,
        n_out,
        k_out,
        stride,
        out_stride,
        CENTRE=centred,
        ROWS=rows_of_block(n_out),
        COLS=COLUMNS,
        num_warps=WARPS,
    )


def rows_of_block(n: int) -> int:
    """Rows of a program's tile, a power of two."""
    return min(max(triton.next_power_of_2(n), 16), _ROWS)
