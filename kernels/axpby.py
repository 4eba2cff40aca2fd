"""Updates of a state by velocities, and casts to what a GEMM takes.

``axpby`` is the Euler step, the Heun stage and the Heun sum; its result also goes, rounded to 16
bits, for the next GEMM, so that nobody reads it twice.
"""

from __future__ import annotations

from functools import lru_cache

import triton
import triton.language as tl
from torch import Tensor

from pwm_fast.kernels.launch import Tile, launch, row_tile
from pwm_fast.kernels.pointwise import power, rounded, row_exponent


@triton.jit
def axpby_kernel(
    z,
    k1,
    k2,
    out,
    operand,
    k1_scale,
    k2_scale,
    c1,
    c2,
    rows,
    n,
    z_stride,
    k1_stride,
    k2_stride,
    out_stride,
    operand_stride,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A tile a program; ``k2``, ``operand`` and the scales may be None."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row_in = row < rows
    inside = row_in[:, None] & (col < n)[None, :]
    wide = row.to(tl.int64)[:, None]
    value = tl.load(z + wide * z_stride + col[None, :], mask=inside).to(tl.float32)
    k = tl.load(k1 + wide * k1_stride + col[None, :], mask=inside).to(tl.float32)
    if k1_scale is not None:
        k *= tl.load(k1_scale + row, mask=row_in)[:, None]
    value += c1 * k
    if k2 is not None:
        k = tl.load(k2 + wide * k2_stride + col[None, :], mask=inside).to(tl.float32)
        if k2_scale is not None:
            k *= tl.load(k2_scale + row, mask=row_in)[:, None]
        value += c2 * k
    tl.store(out + wide * out_stride + col[None, :], value, mask=inside)
    if operand is not None:
        narrow = rounded(value, operand.dtype.element_ty)
        tl.store(operand + wide * operand_stride + col[None, :], narrow, mask=inside)


@triton.jit
def to_operand_kernel(
    x,
    out,
    scale,
    rows,
    n,
    x_stride,
    out_stride,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Whole rows with a scale, else a tile a program; ``scale`` may be None."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row_in = row < rows
    inside = row_in[:, None] & (col < n)[None, :]
    wide = row.to(tl.int64)[:, None]
    value = tl.load(x + wide * x_stride + col[None, :], mask=inside, other=0.0).to(tl.float32)
    if scale is not None:
        exponent = row_exponent(tl.max(tl.abs(value), axis=1))
        tl.store(scale + row, power(exponent), mask=row_in)
        value *= power(254 - exponent)[:, None]
    narrow = rounded(value, out.dtype.element_ty)
    tl.store(out + wide * out_stride + col[None, :], narrow, mask=inside)


@triton.jit
def scaled_rows_kernel(
    x,
    out,
    scale,
    largest,
    rows,
    n,
    x_rows,
    x_stride,
    out_stride,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A tile a program: each row times its scale over the largest one."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row_in = row < rows
    inside = row_in[:, None] & (col < n)[None, :]
    at = x + (row % x_rows).to(tl.int64)[:, None] * x_stride + col[None, :]
    value = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    factor = tl.div_rn(tl.load(scale + row, mask=row_in, other=0.0), tl.load(largest))
    narrow = rounded(value * factor[:, None], out.dtype.element_ty)
    tl.store(out + row.to(tl.int64)[:, None] * out_stride + col[None, :], narrow, mask=inside)


@lru_cache(maxsize=256)
def flat_tile(n: int) -> Tile:
    """What a program works on where rows need not be whole."""
    block = min(max(triton.next_power_of_2(n), 16), 512)
    return Tile(512 // block, block, 4)


def _matrix(x: Tensor) -> Tensor:
    return x if x.dim() == 2 else x.view(-1, x.shape[-1])


def axpby(
    z: Tensor,
    k1: Tensor,
    k2: Tensor | None,
    out: Tensor,
    c1: float,
    c2: float,
    *,
    cast: Tensor | None = None,
    k1_scale: Tensor | None = None,
    k2_scale: Tensor | None = None,
) -> None:
    """See :meth:`pwm_fast.backends.base.Kernels.axpby`."""
    z, k1, out = _matrix(z), _matrix(k1), _matrix(out)
    k2 = None if k2 is None else _matrix(k2)
    cast = None if cast is None else _matrix(cast)
    rows, n = z.shape
    tile = flat_tile(n)
    launch(
        axpby_kernel,
        tile.grid(rows, n),
        z,
        k1,
        k2,
        out,
        cast,
        k1_scale,
        k2_scale,
        c1,
        c2,
        rows,
        n,
        z.stride(0),
        k1.stride(0),
        0 if k2 is None else k2.stride(0),
        out.stride(0),
        0 if cast is None else cast.stride(0),
        **tile.options,
    )


def cast(x: Tensor, out: Tensor, scale: Tensor | None) -> None:
    """See :meth:`pwm_fast.backends.base.Kernels.cast`."""
    x, out = _matrix(x), _matrix(out)
    rows, n = x.shape
    tile = flat_tile(n) if scale is None else row_tile(n)
    launch(
        to_operand_kernel,
        tile.grid(rows, n),
        x,
        out,
        scale,
        rows,
        n,
        x.stride(0),
        out.stride(0),
        **tile.options,
    )


def scaled_rows(x: Tensor, out: Tensor, scale: Tensor, largest: Tensor) -> None:
    """``out = x * scale / largest`` row by row, rounded: an operand of a weight gradient.

    Args:
        x: ``[R', n]``, fp32 or 16-bit; its rows are taken over and over where R' divides R.
        out: ``[R, n]`` fp16 or bf16, written.
        scale: ``[R]`` fp32, row scales of the gradients that ``x`` meets.
        largest: their largest, one number.
    """
    rows, n = out.shape
    tile = flat_tile(n)
    launch(
        scaled_rows_kernel,
        tile.grid(rows, n),
        x,
        out,
        scale,
        largest,
        rows,
        n,
        x.shape[0],
        x.stride(0),
        out.stride(0),
        **tile.options,
    )
