"""What ``pwm_fast.kernels.linear_norm_act`` is launched with, for :mod:`tests.compile.report`."""

from __future__ import annotations

from pwm_fast.kernels.linear_norm_act import linear_norm_act_bwd_kernel, linear_norm_act_fwd_kernel
from tests.compile.aot import Case
from tests.compile.gemm_cases import SOME, SPILL, absent_scales, tile_cases

_SIZES = ((512, 512), (1792, 1792))  # padded hidden layers: whole rows, and rows in several tiles


def cases() -> list[Case]:
    """Every tile with all that it can be given.

    16-bit weights are centred, tf32 ones are not, unless asked for. A stack's first gradient and
    its last layer's output, SimNorm's as a rule, are fp32.
    """
    found = [
        *_forward("fp16", True, "mish"),
        *_forward("fp16", True, "simnorm"),
        *_backward("fp16", True, False),
        *_backward("fp16", True, True),
        *_forward("tf32", False, "mish"),
        *_backward("tf32", False, True),
    ]
    # What is rare, and bf16, which differs from fp16 in its type alone.
    for operand, centred in (("fp16", False), ("tf32", True), ("bf16", True)):
        found += _forward(operand, centred, "mish", SOME)
        found += _backward(operand, centred, operand == "tf32", SOME)
    return found + _forward("tf32", False, "simnorm")


def _forward(
    operand: str, centred: bool, act: str, tiles: tuple[tuple[int, int], ...] | None = None
) -> list[Case]:
    simnorm = act == "simnorm"
    return tile_cases(
        f"linear_norm_act_fwd {'' if centred else 'LayerNorm '}{act}",
        "linear_norm_act_fwd",
        linear_norm_act_fwd_kernel,
        operand,
        *_SIZES,
        tiles=tiles,
        # SimNorm sums along a third axis: the tile is laid out anew, on sm_100 out of registers.
        max_spill=192 if simnorm else SPILL,
        wide=("y",) if simnorm else (),
        constants={"stride_wk": 1, "CENTRED": centred, "ACT": act, "GROUP": 8 if simnorm else 1},
    )


def _backward(
    operand: str, centred: bool, wide: bool, tiles: tuple[tuple[int, int], ...] | None = None
) -> list[Case]:
    return tile_cases(
        f"linear_norm_act_bwd {'' if centred else 'LayerNorm '}mish{' to fp32' if wide else ''}",
        "linear_norm_act_bwd",
        linear_norm_act_bwd_kernel,
        operand,
        *_SIZES,
        tiles=tiles,
        # On sm_100 the sums and the addend do not fit beside a result that is not rounded.
        max_spill=128 if wide else SPILL,
        absent=absent_scales(operand, wide),
        wide=("dx",) if wide else (),
        constants={"stride_wn": 1, "CENTRED": centred, "ACT": "mish"},
    )
