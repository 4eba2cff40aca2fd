"""Updates of a state by velocities, and rounding of what a product takes.

``axpby`` is the Euler step, the Heun stage and the Heun sum; its result also goes, rounded to 16
bits, into the next product's operand, so that nobody reads it twice.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from pwm_fast.kernels.aot import Case, signature
from pwm_fast.kernels.launch import launch, row_tile
from pwm_fast.kernels.pointwise import power, rounded, row_exponent

_WARPS = 4


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
    """A tile a program: each row times its factor over the largest one."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row_in = row < rows
    inside = row_in[:, None] & (col < n)[None, :]
    at = x + (row % x_rows).to(tl.int64)[:, None] * x_stride + col[None, :]
    value = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    factor = tl.div_rn(tl.load(scale + row, mask=row_in, other=0.0), tl.load(largest))
    narrow = rounded(value * factor[:, None], out.dtype.element_ty)
    tl.store(out + row.to(tl.int64)[:, None] * out_stride + col[None, :], narrow, mask=inside)


def _flat_tile(n: int) -> tuple[int, int]:
    """Rows and columns of a tile where rows need not be whole."""
    block = min(max(triton.next_power_of_2(n), 16), 512)
    return 512 // block, block


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
    operand: Tensor | None = None,
    k1_scale: Tensor | None = None,
    k2_scale: Tensor | None = None,
) -> None:
    """See :meth:`pwm_fast.backends.base.Kernels.axpby`."""
    z, k1, out = _matrix(z), _matrix(k1), _matrix(out)
    k2 = None if k2 is None else _matrix(k2)
    operand = None if operand is None else _matrix(operand)
    rows, n = z.shape
    tile_rows, block = _flat_tile(n)
    launch(
        axpby_kernel,
        (triton.cdiv(rows, tile_rows), triton.cdiv(n, block)),
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
        z.stride(0),
        k1.stride(0),
        0 if k2 is None else k2.stride(0),
        out.stride(0),
        0 if operand is None else operand.stride(0),
        ROWS=tile_rows,
        BLOCK=block,
        num_warps=_WARPS,
    )


def to_operand(x: Tensor, out: Tensor, scale: Tensor | None) -> None:
    """See :meth:`pwm_fast.backends.base.Kernels.to_operand`."""
    x, out = _matrix(x), _matrix(out)
    rows, n = x.shape
    if scale is None:
        (tile_rows, block), warps = _flat_tile(n), _WARPS
    else:
        tile_rows, block, warps = row_tile(n)
    launch(
        to_operand_kernel,
        (triton.cdiv(rows, tile_rows), triton.cdiv(n, block)),
        x,
        out,
        scale,
        rows,
        n,
        x.stride(0),
        out.stride(0),
        ROWS=tile_rows,
        BLOCK=block,
        num_warps=warps,
    )


def scaled_rows(x: Tensor, out: Tensor, scale: Tensor, largest: Tensor) -> None:
    """``out = x * scale / largest`` row by row, rounded: an operand of a weight gradient.

    Args:
        x: ``[R', n]``, fp32 or 16-bit; its rows are taken over and over where R' divides R.
        out: ``[R, n]`` fp16 or bf16, written.
        scale: ``[R]`` fp32, factors of the rows of the adjoints that ``x`` meets.
        largest: their largest, one number.
    """
    rows, n = out.shape
    tile_rows, block = _flat_tile(n)
    launch(
        scaled_rows_kernel,
        (triton.cdiv(rows, tile_rows), triton.cdiv(n, block)),
        x,
        out,
        scale,
        largest,
        rows,
        n,
        x.shape[0],
        x.stride(0),
        out.stride(0),
        ROWS=tile_rows,
        BLOCK=block,
        num_warps=_WARPS,
    )


_TYPES = {
    **dict.fromkeys(("x", "z", "out", "scale", "k1_scale", "k2_scale", "largest"), "*fp32"),
    **dict.fromkeys(
        ("rows", "x_rows", "n", "x_stride", "z_stride", "k1_stride", "k2_stride"), "i32"
    ),
    **dict.fromkeys(("out_stride", "operand_stride"), "i32"),
    **dict.fromkeys(("c1", "c2"), "fp32"),
}


def _axpby_case(n: int, k: str, operand: str | None, given: str) -> Case:
    rows, block = _flat_tile(n)
    absent = [a for a in ("k2", "k1_scale", "k2_scale") if a not in given.split()]
    absent += [] if operand else ["operand"]
    constants: dict[str, object] = {"ROWS": rows, "BLOCK": block, **dict.fromkeys(absent)}
    types = _TYPES | {"k1": f"*{k}", "k2": f"*{k}", "operand": f"*{operand}"}
    sizes = {"n", "z_stride", "k1_stride", "k2_stride", "out_stride", "operand_stride"}
    return Case(
        " ".join(w for w in (f"axpby D{n} {k}", operand and f"to {operand}", given) if w),
        axpby_kernel,
        signature(axpby_kernel, types, constants),
        constants,
        unaligned=frozenset({"rows", *(sizes if n % 16 else ())}),
        num_warps=_WARPS,
    )


def _operand_case(n: int, out: str, scaled: bool) -> Case:
    rows, block, warps = row_tile(n) if scaled else (*_flat_tile(n), _WARPS)
    constants: dict[str, object] = {"ROWS": rows, "BLOCK": block}
    if not scaled:
        constants["scale"] = None
    return Case(
        f"to_operand D{n} {out}{' scaled' if scaled else ''}",
        to_operand_kernel,
        signature(to_operand_kernel, _TYPES | {"out": f"*{out}"}, constants),
        constants,
        unaligned=frozenset({"rows", *({"n", "x_stride", "out_stride"} if n % 16 else ())}),
        num_warps=warps,
    )


def _scaled_rows_case(n: int, x: str, out: str) -> Case:
    rows, block = _flat_tile(n)
    constants: dict[str, object] = {"ROWS": rows, "BLOCK": block}
    odd = {"n", "x_stride", "out", "out_stride"} if n % 16 else set()
    return Case(
        f"scaled_rows D{n} {x} to {out}",
        scaled_rows_kernel,
        signature(scaled_rows_kernel, _TYPES | {"x": f"*{x}", "out": f"*{out}"}, constants),
        constants,
        unaligned=frozenset({"rows", "x_rows", *odd}),
        num_warps=_WARPS,
    )


def cases() -> list[Case]:
    """Euler, Heun and adjoint updates, and operands, of aligned and odd widths."""
    return [
        _axpby_case(512, "fp32", None, ""),
        _axpby_case(512, "fp32", "fp16", "k2"),
        _axpby_case(777, "fp32", "bf16", "k2"),
        _axpby_case(512, "fp16", "fp16", "k2 k1_scale k2_scale"),
        _operand_case(512, "fp16", True),
        _operand_case(1376, "fp16", False),
        _operand_case(777, "bf16", False),
        _operand_case(777, "fp16", True),
        _operand_case(4096, "fp16", True),
        _scaled_rows_case(512, "fp16", "fp16"),
        _scaled_rows_case(512, "fp32", "fp16"),
        _scaled_rows_case(777, "fp32", "fp16"),
    ]
