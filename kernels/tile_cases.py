"""Ahead-of-time cases of the fused products: what a plan makes of a kernel's arguments."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from pwm_fast.kernels.aot import Case
from pwm_fast.kernels.plan import make_plan
from pwm_fast.kernels.tile_launch import POINTER_TYPES

#: Operands that the projects' precisions give: name, dtype, ``input_precision``.
OPERANDS = {
    "fp16": (torch.float16, "tf32"),
    "bf16": (torch.bfloat16, "tf32"),
    "tf32": (torch.float32, "tf32"),
    "exact": (torch.float32, "ieee"),
}

_NARROW = frozenset({"x", "w", "y", "xhat", "u", "dy", "dx", "operand", "m"})
_FLOATS = frozenset({"eps", "add_factor", "c0", "c1", "c2", "operand_factor"})
_UNALIGNED = frozenset({"width", "groups", "S", "R", "rows_per_group"})


def tile_case(
    name: str,
    fn: Any,
    operand: str,
    tile: tuple[int, int],
    n: int,
    k: int,
    *,
    absent: Iterable[str] = (),
    constants: Mapping[str, Any] | None = None,
    shared: int = 163 * 1024,
    archs: tuple[int, ...] = (80, 90, 100),
    backward: bool = False,
    max_spill: int = 0,
) -> Case:
    """The case of a kernel with tiles ``tile`` of a result of ``n`` columns, summed over ``k``.

    Args:
        name: of the kernel and what is special about the case.
        fn: the kernel.
        operand: a key of :data:`OPERANDS`.
        tile: ``(BLOCK_M, BLOCK_N)``.
        n: columns of the result.
        k: summed over.
        absent: arguments passed as None.
        constants: values of further compile-time arguments.
        shared: bytes of shared memory that the plan is made for.
        archs: compute capabilities.
        backward: see :func:`make_plan`.
        max_spill: see :class:`Case`.
    """
    dtype, precision = OPERANDS[operand]
    plan = make_plan(*tile, 1 << 16, n, 1 << 10, dtype.itemsize, shared, backward)
    if plan is None:
        raise ValueError(f"tiles of {tile} do not fit {n} columns of {operand}")
    values: dict[str, Any] = {
        "BLOCK_M": plan.block_m,
        "BLOCK_N": plan.block_n,
        "BLOCK_K": plan.block_k,
        "TILES_N": plan.tiles_n,
        "TILES_2": 1 << (plan.tiles_n - 1).bit_length(),
        "EVEN_N": n % plan.block_n == 0,
        "EVEN_K": k % plan.block_k == 0,
        "PRECISION": precision,
        "PHASE": 0,
        **(constants or {}),
        **{a: None for a in absent},
    }
    if not plan.synced:
        values |= {"slots": None, "counters": None}
    signature = {
        a: "constexpr" if a in values else _type(a, POINTER_TYPES[dtype]) for a in fn.arg_names
    }
    return Case(
        f"{name} {plan.block_m}x{plan.block_n} of {n}, K {k}, {operand}",
        fn,
        signature,
        {a: v for a, v in values.items() if a in fn.arg_names},
        unaligned=_UNALIGNED,
        num_warps=plan.warps,
        num_stages=plan.stages,
        options={"enable_fp_fusion": True, "launch_cooperative_grid": plan.synced},
        tensor_cores=precision != "ieee" or dtype.itemsize == 2,
        hgmma=dtype.itemsize == 2 and plan.block_m >= 64,
        max_spill=max_spill,
        archs=archs,
    )


def _type(argument: str, operand: str) -> str:
    if argument in _NARROW:
        return operand
    if argument in _FLOATS:
        return "fp32"
    if argument == "counters":
        return "*i32"
    integer = argument.startswith("stride") or argument in ("R", "N", "K", "S", "width", "groups")
    return "i32" if integer else "*fp32"
