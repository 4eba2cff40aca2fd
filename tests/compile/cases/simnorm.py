"""What ``pwm_fast.kernels.simnorm`` is launched with, for :mod:`tests.compile.report`."""

from __future__ import annotations

from pwm_fast.kernels.simnorm import simnorm_bwd_kernel, simnorm_fwd_kernel, tile_of
from tests.compile.aot import Case, signature


def _case(direction: str, group: int, scaled: bool = False) -> Case:
    fn = simnorm_fwd_kernel if direction == "fwd" else simnorm_bwd_kernel
    tile = tile_of(group)
    constants: dict[str, object] = {"GROUPS": tile.rows, "WIDTH": tile.block}
    if direction == "bwd" and not scaled:
        constants["scale"] = None
    types = dict.fromkeys(("x", "y", "dy", "dx", "scale"), "*fp32")
    types |= dict.fromkeys(("groups", "width", "per_row"), "i32")
    return Case(
        f"simnorm_{direction} V{group}{' scaled' if scaled else ''}",
        fn,
        signature(fn, types, constants),
        constants,
        unaligned=frozenset({"groups", "width", "per_row"}),
        num_warps=tile.warps,
    )


def cases() -> list[Case]:
    """The published group width, an odd one, and a wide one."""
    return [
        _case("fwd", 8),
        _case("fwd", 7),
        _case("fwd", 1000),
        _case("bwd", 8),
        _case("bwd", 7, scaled=True),
        _case("bwd", 1000),
    ]
