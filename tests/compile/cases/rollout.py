"""Launches of the persistent rollout that are compiled ahead."""

from __future__ import annotations

from typing import Any

import torch

from pwm_fast.kernels.rollout import Scheme, constants_of, options_of
from pwm_fast.kernels.rollout_backward import rollout_backward_kernel
from pwm_fast.kernels.rollout_device import rollout_forward_kernel
from pwm_fast.kernels.rollout_plan import LAYOUTS, RolloutLayout
from tests.compile.aot import Case, signature

_OPERANDS = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
_PLAIN = ("batch", "steps", "evals", "substeps", "begin", "limit")


def _case(
    direction: str,
    plan: RolloutLayout,
    padded: int,
    dtype: str,
    archs: tuple[int, ...],
    *,
    keep: bool,
    spill: int = 0,
    method: str = "heun",
) -> Case:
    """One launch; ``keep`` with what gradients of the weights need."""
    forward = direction == "fwd"
    fn = rollout_forward_kernel if forward else rollout_backward_kernel
    operand = _OPERANDS[dtype]
    narrow = ("w2", "w13", "xhat1", "xhat2", "y1", "dh2", "dq", "board1", "board2")
    types = {f"{name}_ptr": f"*{dtype}" for name in narrow}
    if plan.exchange == "words":
        types |= dict.fromkeys(("slots1_ptr", "slots2_ptr"), "*i64")
        word = "*i32" if operand.itemsize == 2 else "*i64"
        types |= dict.fromkeys(("board1_ptr", "board2_ptr"), word)
    types |= {name: "*fp32" for name in fn.arg_names if name.endswith("_ptr") and name not in types}
    types |= {"counters_ptr": "*i32"}
    if forward and not keep:
        types["sum_ptr"] = f"*{dtype}"  # no gradient takes the sums, a product does
    types |= dict.fromkeys((*_PLAIN, "w2_n", "w2_k", "w13_n", "w13_k"), "i32")
    types |= dict.fromkeys(("width1", "width2", "eps1", "eps2", "dt", "nil"), "fp32")
    constants: dict[str, Any] = constants_of(padded, plan, operand, Scheme(method, 4, padded))
    constants |= {"KEEP": keep}
    # Contiguous weights, read as they are or as their transposes.
    constants |= {"SAVE": True, "w2_k": 1, "w13_k": 1} if forward else {"w2_n": 1, "w13_n": 1}
    if not forward:
        constants["SCALED"] = operand == torch.float16
    options = options_of(plan)
    words = (f"U{padded}", dtype, plan.name, "weights" if keep else "", method.replace("heun", ""))
    return Case(
        " ".join(w for w in (f"rollout_{direction}", *words) if w),
        fn,
        signature(fn, types, constants),
        constants,
        unaligned=frozenset(_PLAIN),
        num_warps=options.pop("num_warps"),
        num_stages=options.pop("num_stages"),
        options=options,
        tensor_cores=True,
        max_spill=spill,
        archs=archs,
    )


def cases() -> list[Case]:
    """Launches of the plans: 5M-class nets (510 features padded to 512) and twice as wide ones."""
    everywhere, newer = (80, 90, 100), (90, 100)
    few, few_8, middle, many = LAYOUTS[:4]
    few_narrow, few_narrow_8, middle_narrow, middle_narrow_8, many_narrow = LAYOUTS[4:9]
    found = []
    for flags, padded, dtype, archs, spill, forward_spill in (
        (few, 512, "fp16", everywhere, 24, 0),
        (few_8, 512, "fp16", everywhere, 16, 0),
        (middle, 512, "fp16", everywhere, 0, 0),
        # Seven sums a feature over 32 rows, for the smaller gradients, beside fragments of weights
        # and activations: too many registers, in a pass that mostly waits for exchanges.
        (many, 512, "fp16", newer, 128, 16),
        # Rows of 1024 in chunks of 256 or 512: fragments of both operands of a product.
        (few_narrow, 1024, "fp16", everywhere, 64, 0),
        (few_narrow_8, 1024, "fp16", everywhere, 64, 0),
        (middle_narrow, 1024, "fp16", newer, 128, 0),
        (middle_narrow_8, 1024, "fp16", newer, 128, 96),
        (many_narrow, 1024, "fp16", newer, 128, 96),
        (few_narrow, 512, "fp32", everywhere, 0, 0),
        (few_narrow_8, 512, "fp32", everywhere, 0, 0),
        (middle_narrow, 512, "fp32", newer, 0, 0),
        (middle_narrow_8, 512, "fp32", newer, 0, 0),
        (few, 512, "bf16", everywhere, 16, 0),
    ):
        words = flags._replace(exchange="words")
        for layout in (flags, words) if words in LAYOUTS and dtype != "bf16" else (flags,):
            # Words take registers, in the longer of the two directions a few more than there are.
            allowed = max(spill, 16) if layout == words else spill
            found.append(_case("fwd", layout, padded, dtype, archs, keep=True, spill=forward_spill))
            found.append(_case("bwd", layout, padded, dtype, archs, keep=True, spill=allowed))
            if padded == 512 and dtype == "fp16":
                found.append(
                    _case("fwd", layout, padded, dtype, archs, keep=False, spill=forward_spill)
                )
                found.append(_case("bwd", layout, padded, dtype, archs, keep=False, spill=spill))
            if layout in (few, middle) and padded == 512 and dtype == "fp16":
                # One Euler step, as the shipped flows take; residual dynamics, too.
                for way in ("fwd", "bwd"):
                    limit = forward_spill if way == "fwd" else spill
                    for keep in (True, False):
                        found.append(
                            _case(
                                way,
                                layout,
                                padded,
                                dtype,
                                archs,
                                keep=keep,
                                spill=limit,
                                method="euler",
                            )
                        )
    return found
