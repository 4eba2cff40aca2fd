"""What ``pwm_fast.kernels.two_hot`` is launched with, for :mod:`tests.compile.report`."""

from __future__ import annotations

from typing import Any

from pwm_fast.kernels.launch import row_tile
from pwm_fast.kernels.two_hot import (
    two_hot_ce_bwd_kernel,
    two_hot_ce_fwd_kernel,
    two_hot_decode_bwd_kernel,
    two_hot_decode_fwd_kernel,
)
from tests.compile.aot import Case, signature


def _case(fn: Any, bins: int, transform: bool) -> Case:
    tile = row_tile(bins)
    constants = {"TRANSFORM": transform, "ROWS": tile.rows, "BLOCK": tile.block}
    types = dict.fromkeys(fn.arg_names, "*fp32") | {"vmin": "fp32", "vmax": "fp32"}
    types |= dict.fromkeys(("rows", "bins", "stride", "dlogits_stride"), "i32")
    name = fn.__name__.removesuffix("_kernel")
    odd = {"rows", *(("bins", "stride", "dlogits_stride") if bins % 16 else ())}
    return Case(
        f"{name} {bins} bins{'' if transform else ' untransformed'}",
        fn,
        signature(fn, types, constants),
        constants,
        unaligned=frozenset(odd),
        num_warps=tile.warps,
    )


def cases() -> list[Case]:
    """The published 101 bins, and others."""
    return [
        _case(fn, bins, transform)
        for fn in (
            two_hot_decode_fwd_kernel,
            two_hot_decode_bwd_kernel,
            two_hot_ce_fwd_kernel,
            two_hot_ce_bwd_kernel,
        )
        for bins, transform in ((101, True), (256, False))
    ]
