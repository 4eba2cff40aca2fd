"""What ``pwm_fast.kernels.linear_axpby`` is launched with, for :mod:`tests.compile.report`."""

from __future__ import annotations

from pwm_fast.kernels.linear_axpby import linear_axpby_kernel
from tests.compile.aot import Case
from tests.compile.gemm_cases import OPERANDS, SOME, tile_cases


def cases() -> list[Case]:
    """A state's step, and a gradient's, with all that they can be given."""
    found = []
    for operand in OPERANDS:
        unscaled = () if operand == "fp16" else ("x_scale",)
        for what, absent, order in (
            ("", ("x_scale",), "stride_wk"),
            (" gradient", ("bias", *unscaled), "stride_wn"),
        ):
            found += tile_cases(
                f"linear_axpby{what}",
                "linear_axpby",
                linear_axpby_kernel,
                operand,
                (768, 1792),
                tiles=SOME if operand == "bf16" else None,
                absent=absent,
                constants={order: 1},
            )
    return found
