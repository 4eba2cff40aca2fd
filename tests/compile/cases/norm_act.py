"""What ``pwm_fast.kernels.norm_act`` is launched with, for :mod:`tests.compile.report`."""

from __future__ import annotations

from pwm_fast.kernels.launch import row_tile
from pwm_fast.kernels.norm_act import ACTS, norm_act_bwd_kernel, norm_act_fwd_kernel
from tests.compile.aot import Case, signature

_TYPES = {
    **dict.fromkeys(("x", "rstd", "gamma", "beta", "bias", "add", "tau", "w_tau"), "*fp32"),
    **dict.fromkeys(("dy_scale", "dx_scale", "partial"), "*fp32"),
    **dict.fromkeys(("rows", "n", "width", "add_rows", "x_stride", "y_stride"), "i32"),
    **dict.fromkeys(("xhat_stride", "add_stride", "dy_stride", "dx_stride"), "i32"),
    "eps": "fp32",
}


_OPTIONAL = ("bias", "add", "tau", "w_tau", "dy_scale", "dx_scale", "partial")


def _case(
    direction: str, act: str, n: int, dtype: str, given: str = "", width: int = 0, sums: int = 0
) -> Case:
    """One launch on rows of ``n`` with the optional tensors that ``given`` names."""
    fn = norm_act_fwd_kernel if direction == "fwd" else norm_act_bwd_kernel
    tile = row_tile(n)
    there = given.split() + (["partial"] if sums else [])
    constants: dict[str, object] = {name: None for name in _OPTIONAL if name not in there}
    constants |= {"CENTRED": width > 0, "ACT": ACTS[act], "GROUP": 8 if act == "simnorm" else 1}
    constants |= {"ROWS": tile.rows, "BLOCK": tile.block, "SUMS": sums, "TAU_ROWS": False}
    if direction == "bwd" and act != "simnorm":
        constants["y"] = None
    constants = {name: value for name, value in constants.items() if name in fn.arg_names}
    types = _TYPES | dict.fromkeys(("y", "xhat", "dy", "dx"), f"*{dtype}")
    sizes = ("n", "x_stride", "y_stride", "xhat_stride", "add_stride", "dy_stride", "dx_stride")
    # Rows wider than any published model's: a few spilled registers are better than no kernel.
    spill = 128 if n > 4096 else 0
    odd = {"rows", "width", "add_rows", *(sizes if n % 16 else ())}
    words = (act, f"U{n}", dtype, "centred" if width else "", given, "sums" if sums else "")
    return Case(
        " ".join(w for w in (f"norm_act_{direction}", *words) if w),
        fn,
        signature(fn, types, constants),
        constants,
        unaligned=frozenset(odd),
        num_warps=tile.warps,
        max_spill=spill,
    )


def cases() -> list[Case]:
    """Launches of the published models' widths, of odd ones, and of the extremes."""
    return [
        _case("fwd", "mish", 512, "fp16", "add tau w_tau", width=510),
        _case("fwd", "mish", 512, "fp16", "bias", width=510),
        _case("fwd", "mish", 512, "bf16", "bias", width=510),
        _case("fwd", "mish", 510, "fp32", "add tau w_tau"),
        _case("fwd", "mish", 1792, "fp16", "bias", width=1788),
        _case("fwd", "mish", 1788, "fp32", "bias"),
        _case("fwd", "mish", 4096, "fp16", "bias", width=4096),
        _case("fwd", "mish", 8192, "fp32", "add tau w_tau bias"),
        _case("fwd", "simnorm", 512, "fp16", "bias"),
        _case("fwd", "simnorm", 1376, "fp32", "bias"),
        _case("fwd", "none", 7, "fp32"),
        _case("bwd", "mish", 512, "fp16", "dy_scale dx_scale", width=510),
        _case("bwd", "mish", 512, "bf16", width=510),
        _case("bwd", "mish", 512, "fp16", "dy_scale dx_scale", width=510, sums=3),
        _case("bwd", "mish", 510, "fp32", sums=3),
        _case("bwd", "mish", 1792, "fp16", "dy_scale dx_scale", width=1788),
        _case("bwd", "mish", 1792, "fp16", "dy_scale dx_scale", width=1788, sums=3),
        _case("bwd", "mish", 4096, "fp16", "dy_scale dx_scale", width=4096, sums=3),
        _case("bwd", "mish", 8192, "fp32", sums=3),
        _case("bwd", "simnorm", 512, "fp16", "dy_scale dx_scale", width=512, sums=3),
        _case("bwd", "simnorm", 1376, "fp32", sums=3),
        _case("bwd", "none", 7, "fp32", sums=2),
    ]
