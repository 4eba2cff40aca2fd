"""What ``pwm_fast.kernels.centre`` is launched with, for :mod:`tests.compile.report`."""

from __future__ import annotations

from pwm_fast.kernels.centre import COLUMNS, WARPS, centre_kernel, rows_of_block
from tests.compile.aot import Case, signature

_VECTORS = ("bias", "gamma", "beta", "bias_out", "gamma_out", "beta_out")


def _case(n: int, operand: str | None, *, centred: bool = True) -> Case:
    """A layer of ``n`` features; ``operand`` names the dtype of the rounded copy."""
    constants: dict[str, object] = {"CENTRE": centred, "ROWS": rows_of_block(n), "COLS": COLUMNS}
    absent = [] if centred else ["gamma", "beta", "gamma_out", "beta_out"]
    constants |= dict.fromkeys(absent if operand else [*absent, "operand"])
    types = dict.fromkeys(("weight", "weight_out", *_VECTORS), "*fp32")
    types |= {"operand": f"*{operand}"}
    types |= dict.fromkeys(("n", "k", "n_out", "k_out", "stride", "out_stride"), "i32")
    odd = {"weight", "n", "k", "k_out", "stride"}
    words = ("centre" if centred else "pad", f"U{n}", f"to {operand}" if operand else "")
    return Case(
        " ".join(w for w in words if w),
        centre_kernel,
        signature(centre_kernel, types, constants),
        constants,
        unaligned=frozenset(odd if n % 16 == 0 else odd | {"n_out"}),
        num_warps=WARPS,
    )


def cases() -> list[Case]:
    """Forward with a 16-bit copy, backward without, of layers and of a plain head."""
    return [
        _case(512, "fp16"),
        _case(1792, "fp16"),
        _case(1792, "bf16"),
        _case(510, None),
        _case(1788, None),
        _case(512, "fp16", centred=False),
    ]
