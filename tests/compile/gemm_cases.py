"""Ahead-of-time cases of the fused GEMMs: all that a plan may launch them with.

Tiles come from :func:`pwm_fast.kernels.plan.candidates`, as on a device.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch

from pwm_fast.kernels.gemm_tile import POINTER_TYPES, constants_of
from pwm_fast.kernels.plan import GemmPlan, GemmShape, Limits, candidates
from tests.compile.aot import SHARED_LIMIT, Case

#: Operands in which GEMMs are fused, by the name of their precision; ``exact`` ones are not.
OPERANDS = {"fp16": torch.float16, "bf16": torch.bfloat16, "tf32": torch.float32}

#: Tiles of the cases that are compiled of some only: bf16 differs from fp16 in its type alone.
SOME = ((16, 512), (64, 128), (32, 256))

#: Bytes that an epilogue may spill: up to 24 registers at its fullest, once a tile; the loop of the
#: GEMM is free of them.
SPILL = 96

_NARROW = frozenset({"x", "w", "y", "xhat", "u", "dy", "dx", "operand"})
_FLOATS = frozenset({"eps", "add_factor", "c0", "c1", "c2"})
_UNALIGNED = frozenset({"width", "groups", "R"})


def tile_cases(
    name: str,
    kernel: str,
    fn: Any,
    operand: str,
    *sizes: tuple[int, int],
    tiles: Collection[tuple[int, int]] | None = None,
    max_spill: int = SPILL,
    absent: Iterable[str] = (),
    wide: Iterable[str] = (),
    constants: Mapping[str, Any] | None = None,
    unaligned: Iterable[str] = (),
) -> list[Case]:
    """A case for every tile that a kernel may have, on each generation as it is launched there.

    Args:
        name: of the kernel and what is special about the cases.
        kernel: a key of :data:`pwm_fast.kernels.plan.TILES`.
        fn: the kernel.
        operand: a key of :data:`OPERANDS`.
        sizes: columns of a result and what is summed over, several to reach all tiles; a tile that
            fits several is taken of the last.
        tiles: ``(BLOCK_M, BLOCK_N)`` to take; None: all.
        max_spill: see :class:`Case`.
        absent: arguments passed as None.
        wide: tensors in fp32 that are operands elsewhere.
        constants: values of further compile-time arguments.
        unaligned: see :class:`Case`.
    """
    found: dict[tuple[int, int, int], tuple[GemmPlan, GemmShape]] = {}
    for n, k in sizes:
        gemm = GemmShape(kernel, 1 << 16, n, k, element=OPERANDS[operand].itemsize)
        for arch, shared in SHARED_LIMIT.items():
            for plan in candidates(gemm, Limits(1 << 10, shared)):
                if tiles is None or (plan.block_m, plan.block_n) in tiles:
                    found[arch, plan.block_m, plan.block_n] = plan, gemm
    same: dict[tuple[GemmPlan, GemmShape], list[int]] = {}
    for (arch, _, _), launched in found.items():
        same.setdefault(launched, []).append(arch)
    given = {**(constants or {}), **dict.fromkeys(absent)}
    pointers = dict.fromkeys(_NARROW, POINTER_TYPES[OPERANDS[operand]]) | dict.fromkeys(
        wide, "*fp32"
    )
    return [
        Case(
            f"{name} {plan.name} of {gemm.n}, K {gemm.k}, {operand}",
            fn,
            {a: "constexpr" if a in values else _type(a, pointers) for a in fn.arg_names},
            values,
            unaligned=_UNALIGNED | frozenset(unaligned),
            num_warps=plan.warps,
            num_stages=plan.stages,
            options={"enable_fp_fusion": True, "launch_cooperative_grid": plan.synced},
            tensor_cores=True,
            hgmma=plan.block_m >= 64,
            max_spill=max_spill,
            archs=tuple(archs),
        )
        for (plan, gemm), archs in same.items()
        for values in [_values(fn, plan, gemm, given)]
    ]


def absent_scales(operand: str, wide: bool) -> tuple[str, ...]:
    """Row scales that there are not: only fp16 gradients have any."""
    if operand != "fp16":
        return ("dy_scale", "dx_scale")
    return ("dx_scale",) if wide else ()


def _values(fn: Any, plan: GemmPlan, gemm: GemmShape, given: Mapping[str, Any]) -> dict[str, Any]:
    """Of the compile-time arguments, and None for those that are not passed."""
    values = constants_of(gemm.kernel, plan, gemm.n, gemm.k, gemm.input_precision)
    values |= {"PHASE": 0, **given}
    if not plan.synced:
        values |= {"slots": None, "counters": None}
    return {a: v for a, v in values.items() if a in fn.arg_names}


def _type(argument: str, pointers: Mapping[str, str]) -> str:
    if argument in _FLOATS:
        return "fp32"
    if argument.startswith("stride") or argument in ("R", "N", "K", "width", "groups"):
        return "i32"
    return "*i32" if argument == "counters" else pointers.get(argument, "*fp32")
