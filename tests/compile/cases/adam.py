"""What ``pwm_fast.kernels.adam`` is launched with, for :mod:`tests.compile.report`."""

from __future__ import annotations

from typing import Any

import triton

from pwm_fast.kernels.adam import BLOCK, SLOTS, adam_kernel, squares_kernel
from tests.compile.aot import Case, signature


def _case(fn: Any, name: str, constants: dict[str, Any], aligned: bool = True) -> Case:
    tensors = 10  # an ensemble of critics has ten
    sizes = (3 * 400 * 512, *(3 * 400,) * 3, 3 * 200 * 400, *(3 * 200,) * 4, 3)
    first = [0]
    for size in sizes[:-1]:
        first.append(first[-1] + triton.cdiv(size, 4096))
    constants = constants | {"FIRST": tuple(first), "SIZES": sizes, "ALIGNED": aligned}
    constants |= {"CHUNK": 4096, "BLOCK": BLOCK}
    lists = ("weights", "grads", "means", "squares")
    types: dict[str, str | tuple[str, ...]] = dict.fromkeys(lists, ("*fp32",) * tensors)
    types |= dict.fromkeys(("steps", "before", "rate", "loss", "norm"), "*fp32")
    types |= dict.fromkeys(("settings", "slots"), "*fp64") | {"tensors": "i32", "count": "i32"}
    types |= dict.fromkeys(("skipped", "in_a_row"), "*i64")
    odd = {"tensors", "count", *(() if aligned else lists)}
    return Case(name, fn, signature(fn, types, constants), constants, unaligned=frozenset(odd))


def cases() -> list[Case]:
    """The critics' step, of aligned tensors and of others, and with gradients kept."""
    sums, step = {"TENSORS": 16}, {"LEAD": True, "KEEP": False, "SLOTS": SLOTS}
    return [
        _case(squares_kernel, "adam_squares", sums),
        _case(squares_kernel, "adam_squares unaligned", sums, False),
        _case(adam_kernel, "adam", step),
        _case(adam_kernel, "adam unaligned", step, False),
        _case(adam_kernel, "adam keeping gradients", step | {"KEEP": True}),
    ]
