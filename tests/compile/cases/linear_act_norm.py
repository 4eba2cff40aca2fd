"""What ``pwm_fast.kernels.linear_act_norm`` is launched with, for :mod:`tests.compile.report`."""

from __future__ import annotations

from pwm_fast.kernels.linear_act_norm import linear_act_norm_bwd_kernel, linear_act_norm_fwd_kernel
from tests.compile.aot import Case
from tests.compile.gemm_cases import OPERANDS, SOME, absent_scales, tile_cases

_KERNELS = {
    "linear_act_norm_fwd": linear_act_norm_fwd_kernel,
    "linear_act_norm_bwd": linear_act_norm_bwd_kernel,
}


#: ``(N, K)`` of critics' and actors' layers in tiles of 512 and of 256, N aligned and not.
_SIZES = {
    "linear_act_norm_fwd": ((400, 512), (399, 400), (208, 400), (200, 400)),
    "linear_act_norm_bwd": ((400, 200), (399, 201), (208, 104), (200, 101)),
}


#: Arguments that are no multiples of 16 where N is none.
_ROW_OF_N = {
    "linear_act_norm_fwd": ("N", "stride_y", "stride_u"),
    "linear_act_norm_bwd": ("N", "stride_we", "stride_wk", "stride_u", "stride_dx"),
}


def cases() -> list[Case]:
    """Every tile with all that it can be given."""
    found = []
    for operand in OPERANDS:
        for kernel, fn in _KERNELS.items():
            forward = kernel.endswith("fwd")
            for n, k in _SIZES[kernel]:
                wide = not forward and operand == "tf32"
                found += tile_cases(
                    f"{kernel} mish{' to fp32' if wide else ''}",
                    kernel,
                    fn,
                    operand,
                    (n, k),
                    tiles=SOME if operand == "bf16" else None,
                    absent=() if forward else absent_scales(operand, wide),
                    wide=("dx",) if wide else (),
                    constants={"ACT": "mish", "stride_wk" if forward else "stride_wn": 1},
                    unaligned=(
                        *(_ROW_OF_N[kernel] if n % 16 else ()),
                        *(() if forward else ("K", "stride_dy")),
                    ),
                )
    return found
