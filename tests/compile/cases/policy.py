"""What ``pwm_fast.kernels.policy`` is launched with, for :mod:`tests.compile.report`."""

from __future__ import annotations

from typing import Any

from pwm_fast.kernels.policy import STAGES, WARPS, constants_of, policy_step_kernel
from tests.compile.aot import Case, signature


def cases() -> list[Case]:
    """The published policies: 400, 200 and 100 features, of few and many actions."""
    found = []
    widths, acts = (400, 200, 100), ("mish",) * 3
    each = len(widths)
    for dtype, block_m, actions, saves in (
        ("fp16", 16, 8, True),
        ("fp16", 32, 8, True),
        ("fp16", 16, 61, False),
        ("bf16", 16, 8, True),
    ):
        constants: dict[str, Any] = constants_of(widths, acts, actions, block_m)
        constants["stride_wk"] = 1
        operand, wide = f"*{dtype}", ("*fp32",) * each
        # An argument that is None in a tuple is a constant of it.
        types: dict[str, str | tuple[str, ...]] = dict.fromkeys(
            ("h", "head_bias", "std", "noise", "action", "base", "w_a", "c"), "*fp32"
        )
        types |= dict.fromkeys(("biases", "gammas", "betas"), wide)
        types |= {"weights": ("constexpr", *(operand,) * (each - 1)), "head": operand}
        types |= {"epsilons": ("fp32",) * each, "ys": (operand,) * each}
        kept = {"us": (operand,) * each, "means": wide, "rstds": wide}
        types |= kept if saves else dict.fromkeys(kept, ("constexpr",) * each)
        types |= dict.fromkeys(("R", "U", "stride_h", "stride_base", "stride_wn"), "i32")
        found.append(
            Case(
                f"policy_step {'-'.join(map(str, widths))} A{actions}, {block_m} rows, {dtype}"
                + ("" if saves else ", nothing kept"),
                policy_step_kernel,
                signature(policy_step_kernel, types, constants),
                constants,
                unaligned=frozenset({"R", "stride_wn", "noise", "action"}),
                num_warps=WARPS,
                num_stages=STAGES,
                options={"enable_fp_fusion": True},
                tensor_cores=True,
            )
        )
    return found
