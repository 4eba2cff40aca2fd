"""What ``pwm_fast.kernels.column_sums`` is launched with, for :mod:`tests.compile.report`."""

from __future__ import annotations

from pwm_fast.kernels.column_sums import COLUMNS, PARTS, column_sums_kernel
from tests.compile.aot import Case


def cases() -> list[Case]:
    """What :func:`add_column_sums` launches."""
    outs = {"out0": "*fp64", "out1": "*fp64", "out2": "*fp64"}
    return [
        Case(
            f"column_sums n{n}",
            column_sums_kernel,
            {"partial": "*fp32", **outs, "parts": "i32", "n": "i32"}
            | {"PARTS": "constexpr", "COLS": "constexpr"},
            {"PARTS": PARTS, "COLS": COLUMNS},
            unaligned=frozenset({"parts"} if n % 16 == 0 else {"parts", "n"}),
        )
        for n in (512, 777)
    ]
