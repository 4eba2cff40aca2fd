"""What ``pwm_fast.kernels.esnr`` is launched with, for :mod:`tests.compile.report`."""

from __future__ import annotations

import triton.language as tl

from pwm_fast.kernels.esnr import (
    BLOCK,
    MOMENTS,
    RESULT,
    SLOTS,
    STREAMED_BLOCK,
    UPDATE,
    esnr_moments_kernel,
    esnr_result_kernel,
    esnr_sums_kernel,
    esnr_update_kernel,
)
from tests.compile.aot import Case, signature


def cases() -> list[Case]:
    """Every kernel by dtype, aligned or not where that changes its loads most."""
    names = {tl.float32: "fp32", tl.float16: "fp16", tl.bfloat16: "bf16"}
    types = {"words": "*i64", "slots": "*fp64", "squares": "*fp64", "signal": "*fp64"}
    types |= {"noise": "*fp64", "tensors": "i32", "chunk": "i32", "samples": "i32"}
    listed = []
    for kernel, aligned, dtypes in (
        (esnr_moments_kernel, True, (tl.float32, tl.float16, tl.bfloat16)),
        (esnr_moments_kernel, False, (tl.float32,)),
        (esnr_update_kernel, True, (tl.float32, tl.float16)),
        (esnr_result_kernel, True, (tl.float32, tl.float16)),
    ):
        for dtype in dtypes:
            block = BLOCK if kernel is esnr_moments_kernel else STREAMED_BLOCK
            constants = {"DTYPE": dtype, "ALIGNED": aligned, "TENSORS": 32, "BLOCK": block}
            name = kernel.fn.__name__.removesuffix("_kernel")
            listed.append(
                Case(
                    f"{name} {names[dtype]}" + ("" if aligned else " unaligned"),
                    kernel,
                    signature(kernel, types, constants),
                    constants,
                    unaligned=frozenset({"tensors", "samples"} & set(kernel.arg_names)),
                )
            )
    for task, name in ((MOMENTS, "moments"), (UPDATE, "update"), (RESULT, "result")):
        constants = {"TASK": task, "SLOTS": SLOTS}
        if task == MOMENTS:
            constants["squares"] = None
        listed.append(
            Case(
                f"esnr_sums {name}",
                esnr_sums_kernel,
                signature(esnr_sums_kernel, types, constants),
                constants,
                unaligned=frozenset({"samples"}),
            )
        )
    return listed
