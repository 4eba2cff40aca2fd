"""What ``bench.micro`` launches its own kernels with."""

from __future__ import annotations

from bench import micro_kernels
from tests.compile.aot import Case


def cases() -> list[Case]:
    """All of them, as :mod:`bench.micro` launches them."""
    size = {"BLOCK": micro_kernels.READ_BLOCK, "PROGRAMS": 132, "AHEAD": micro_kernels.READ_AHEAD}
    reading = {"x": "*fp32", "out": "*fp32", "blocks": "i32", **dict.fromkeys(size, "constexpr")}
    return [
        Case("bench nothing", micro_kernels.nothing, {"x": "*fp32"}, num_warps=1),
        Case(
            "bench read",
            micro_kernels.read,
            reading,
            size,
            unaligned=frozenset({"blocks"}),
            num_warps=micro_kernels.READ_WARPS,
        ),
        Case(
            "bench flags",
            micro_kernels.flags,
            {"flag": "*i32", "out": "*i32", "rounds": "i32", "LIMIT": "constexpr"},
            {"LIMIT": micro_kernels.LIMIT},
            unaligned=frozenset({"rounds"}),
            num_warps=1,
        ),
        Case(
            "bench mish",
            micro_kernels.mish,
            {"x": "*fp32", "out": "*fp32", "rounds": "i32", "BLOCK": "constexpr"},
            {"BLOCK": micro_kernels.MISH_BLOCK},
            unaligned=frozenset({"rounds"}),
            num_warps=micro_kernels.MISH_WARPS,
        ),
        Case("bench clock", micro_kernels.clock, {"out": "*i64", "cycles": "i64"}, num_warps=1),
    ]
