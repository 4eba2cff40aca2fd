"""What ``pwm_fast.kernels.returns`` is launched with, for :mod:`tests.compile.report`."""

from __future__ import annotations

from typing import Any

from pwm_fast.kernels.returns import BLOCK, returns_bwd_kernel, returns_fwd_kernel
from tests.compile.aot import Case, signature


def _case(fn: Any, last: bool, ends: bool) -> Case:
    constants: dict[str, object] = {"LAST": last, "BLOCK": BLOCK}
    if not ends:
        constants |= dict.fromkeys(n for n in ("continues", "dcontinues") if n in fn.arg_names)
    types = dict.fromkeys(fn.arg_names, "*fp32") | dict.fromkeys(("steps", "n"), "i32")
    types |= dict.fromkeys(("gamma", "lam"), "fp32")
    words = (fn.__name__.removesuffix("_kernel"), "last" if last else "lambda")
    return Case(
        " ".join((*words, *(("ends",) if ends else ()))),
        fn,
        signature(fn, types, constants),
        constants,
        unaligned=frozenset({"steps"}),
    )


def cases() -> list[Case]:
    """Discounted returns and targets of critics, with episodes' ends and without."""
    return [
        _case(fn, last, ends)
        for fn in (returns_fwd_kernel, returns_bwd_kernel)
        for last in (False, True)
        for ends in (False, True)
    ]
