"""What ``pwm_fast.kernels.act_norm`` is launched with, for :mod:`tests.compile.report`."""

from __future__ import annotations

from pwm_fast.kernels.act_norm import act_norm_bwd_kernel, act_norm_fwd_kernel
from pwm_fast.kernels.launch import row_tile
from tests.compile.aot import Case, signature

_TYPES = {
    **dict.fromkeys(("x", "mean", "rstd", "bias", "gamma", "beta"), "*fp32"),
    **dict.fromkeys(("dy_scale", "dx_scale", "partial"), "*fp32"),
    **dict.fromkeys(("rows", "n", "rows_per_member", "x_stride", "y_stride", "u_stride"), "i32"),
    **dict.fromkeys(("dy_stride", "dx_stride"), "i32"),
    "eps": "fp32",
}


def _case(
    direction: str,
    n: int,
    dtype: str,
    *,
    norm: bool = True,
    members: bool = False,
    sums: bool = False,
    scales: bool = False,
) -> Case:
    fn = act_norm_fwd_kernel if direction == "fwd" else act_norm_bwd_kernel
    tile = row_tile(n)
    constants: dict[str, object] = {"MISH": True, "MEMBERS": members, "SUMS": sums and norm}
    constants |= {"BIAS_SUM": sums, "ROWS": tile.rows, "BLOCK": tile.block}
    if not norm:
        constants |= dict.fromkeys(("mean", "rstd", "gamma", "beta"))
    if not scales:
        constants |= dict.fromkeys(("dy_scale", "dx_scale"))
    if not sums:
        constants["partial"] = None
    constants = {name: value for name, value in constants.items() if name in fn.arg_names}
    types = _TYPES | dict.fromkeys(("y", "u", "dy", "dx"), f"*{dtype}")
    sizes = ("n", "x_stride", "y_stride", "u_stride", "dy_stride", "dx_stride")
    given = {"norm": norm, "members": members, "sums": sums, "scales": scales}
    return Case(
        " ".join([f"act_norm_{direction} mish U{n} {dtype}", *(k for k, v in given.items() if v)]),
        fn,
        signature(fn, types, constants),
        constants,
        unaligned=frozenset({"rows", "rows_per_member", *(sizes if n % 16 else ())}),
        num_warps=tile.warps,
    )


def cases() -> list[Case]:
    """Launches of the published models' actors and critics, and of odd widths."""
    return [
        _case("fwd", 256, "fp16"),
        _case("fwd", 256, "fp16", members=True),
        _case("fwd", 400, "fp32"),
        _case("fwd", 101, "fp32", norm=False),
        _case("fwd", 1024, "bf16", members=True),
        _case("fwd", 4096, "fp16"),
        _case("bwd", 256, "fp16", scales=True),
        _case("bwd", 256, "fp16", sums=True, scales=True, members=True),
        _case("bwd", 400, "fp32", sums=True),
        _case("bwd", 101, "fp32", norm=False, sums=True),
        _case("bwd", 1024, "bf16", sums=True),
        _case("bwd", 4096, "fp16", sums=True, scales=True),
    ]
