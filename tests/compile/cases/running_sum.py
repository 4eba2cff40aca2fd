"""What ``pwm_fast.kernels.running_sum`` is launched with, for :mod:`tests.compile.report`."""

from __future__ import annotations

from pwm_fast.kernels.running_sum import BLOCK, running_sum_kernel
from tests.compile.aot import Case, signature


def cases() -> list[Case]:
    """Both directions."""
    types = dict.fromkeys(("start_ptr", "x_ptr", "out_ptr"), "*fp32")
    types |= dict.fromkeys(("steps", "n"), "i32")
    found = []
    for backward in (False, True):
        constants: dict[str, object] = {"BACKWARD": backward, "BLOCK": BLOCK}
        if backward:
            constants["start_ptr"] = None
        found.append(
            Case(
                f"running_sum {'backward' if backward else 'forward'}",
                running_sum_kernel,
                signature(running_sum_kernel, types, constants),
                constants,
                unaligned=frozenset({"steps"}),
            )
        )
    return found
