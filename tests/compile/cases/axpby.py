"""What ``pwm_fast.kernels.axpby`` is launched with, for :mod:`tests.compile.report`."""

from __future__ import annotations

from pwm_fast.kernels.axpby import (
    axpby_kernel,
    flat_tile,
    scaled_rows_kernel,
    to_operand_kernel,
)
from pwm_fast.kernels.launch import row_tile
from tests.compile.aot import Case, signature

_TYPES = {
    **dict.fromkeys(("x", "z", "out", "scale", "k1_scale", "k2_scale", "largest"), "*fp32"),
    **dict.fromkeys(
        ("rows", "x_rows", "n", "x_stride", "z_stride", "k1_stride", "k2_stride"), "i32"
    ),
    **dict.fromkeys(("out_stride", "operand_stride"), "i32"),
    **dict.fromkeys(("c1", "c2"), "fp32"),
}


def _axpby_case(n: int, k: str, operand: str | None, given: str) -> Case:
    tile = flat_tile(n)
    absent = [a for a in ("k2", "k1_scale", "k2_scale") if a not in given.split()]
    absent += [] if operand else ["operand"]
    constants: dict[str, object] = {"ROWS": tile.rows, "BLOCK": tile.block, **dict.fromkeys(absent)}
    types = _TYPES | {"k1": f"*{k}", "k2": f"*{k}", "operand": f"*{operand}"}
    sizes = {"n", "z_stride", "k1_stride", "k2_stride", "out_stride", "operand_stride"}
    return Case(
        " ".join(w for w in (f"axpby D{n} {k}", operand and f"to {operand}", given) if w),
        axpby_kernel,
        signature(axpby_kernel, types, constants),
        constants,
        unaligned=frozenset({"rows", *(sizes if n % 16 else ())}),
        num_warps=tile.warps,
    )


def _operand_case(n: int, out: str, scaled: bool) -> Case:
    tile = row_tile(n) if scaled else flat_tile(n)
    constants: dict[str, object] = {"ROWS": tile.rows, "BLOCK": tile.block}
    if not scaled:
        constants["scale"] = None
    return Case(
        f"to_operand D{n} {out}{' scaled' if scaled else ''}",
        to_operand_kernel,
        signature(to_operand_kernel, _TYPES | {"out": f"*{out}"}, constants),
        constants,
        unaligned=frozenset({"rows", *({"n", "x_stride", "out_stride"} if n % 16 else ())}),
        num_warps=tile.warps,
    )


def _scaled_rows_case(n: int, x: str, out: str) -> Case:
    tile = flat_tile(n)
    constants: dict[str, object] = {"ROWS": tile.rows, "BLOCK": tile.block}
    odd = {"n", "x_stride", "out", "out_stride"} if n % 16 else set()
    return Case(
        f"scaled_rows D{n} {x} to {out}",
        scaled_rows_kernel,
        signature(scaled_rows_kernel, _TYPES | {"x": f"*{x}", "out": f"*{out}"}, constants),
        constants,
        unaligned=frozenset({"rows", "x_rows", *odd}),
        num_warps=tile.warps,
    )


def cases() -> list[Case]:
    """Euler, Heun and gradient updates, and casts, of aligned and odd widths."""
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
