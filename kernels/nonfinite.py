"""Gradients divided by a loss scale, and whether all are finite, in one launch over all tensors.

The verdict stays on the device, for an optimiser that skips itself (``found_inf`` of torch's fused
optimisers): nothing waits for it.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from pwm_fast.kernels import table as tables
from pwm_fast.kernels.aot import Case, signature
from pwm_fast.kernels.esnr import DTYPES
from pwm_fast.kernels.launch import launch

_BLOCK = 1024


@triton.jit
def _unscale(pointer, i, n, factor, SCALED: tl.constexpr, WHOLE: tl.constexpr):
    """Write elements times ``factor`` where there is one; how many results are not finite."""
    if WHOLE:
        x = tl.load(pointer + i).to(tl.float32)
    else:
        x = tl.load(pointer + i, mask=i < n, other=0.0).to(tl.float32)
    if SCALED:
        y = (x * factor).to(pointer.dtype.element_ty)
        if WHOLE:
            tl.store(pointer + i, y)
        else:
            tl.store(pointer + i, y, mask=i < n)
        x = y.to(tl.float32)  # what is kept: 16 bits may overflow where the product did not
    return tl.where(tl.abs(x) < float("inf"), 0, 1)  # a NaN is not below infinity


@triton.jit
def unscale_kernel(
    words,
    found,
    factor,
    tensors,
    chunk,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    SCALED: tl.constexpr,
    TENSORS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One chunk of a gradient; ``found = 1`` if one of its results is not finite."""
    tensor, start, n = tables.find(words, tensors, chunk, tl.program_id(0), TENSORS)
    pointer = tables.row(words, tensors, 1, tensor, 0, DTYPE, ALIGNED) + start
    scale = 1.0
    if SCALED:
        scale = tl.load(factor)
    bad = tl.zeros([BLOCK], tl.int32)
    whole = n // BLOCK * BLOCK
    for base in range(0, whole, BLOCK):
        bad += _unscale(pointer, base + tl.arange(0, BLOCK), n, scale, SCALED, True)
    if whole < n:
        bad += _unscale(pointer, whole + tl.arange(0, BLOCK), n, scale, SCALED, False)
    # All that write, write the same: their order does not matter.
    tl.store(found, 1.0, mask=tl.sum(bad, axis=0) > 0)


def unscale(grads: Sequence[Tensor], found: Tensor, factor: Tensor | None = None) -> None:
    """Multiply gradients by ``factor`` in place, and set ``found`` if one is not finite then.

    Args:
        grads: of one dtype, float32, float16 or bfloat16, contiguous, on one device.
        found: one float32; set to 1.0 where there is a NaN or an infinity, else left as it is.
        factor: one float32, such as the inverse of a loss scale; None only looks.

    Raises:
        ValueError: a gradient is not contiguous.
    """
    if not grads:
        return
    for j, g in enumerate(grads):
        if not g.is_contiguous():
            raise ValueError(f"grads[{j}] must be contiguous, got strides {g.stride()}")
    table = tables.make([grads])
    launch(
        unscale_kernel,
        (table.chunks,),
        table.words,
        found,
        found if factor is None else factor,
        table.tensors,
        table.chunk,
        DTYPE=DTYPES[grads[0].dtype],
        ALIGNED=table.aligned,
        SCALED=factor is not None,
        TENSORS=triton.next_power_of_2(table.tensors),
        BLOCK=_BLOCK,
    )


def cases() -> list[Case]:
    """With and without a factor."""
    names = {tl.float32: "fp32", tl.float16: "fp16", tl.bfloat16: "bf16"}
    types = {"words": "*i64", "found": "*fp32", "factor": "*fp32", "tensors": "i32", "chunk": "i32"}
    listed = []
    for dtype, scaled in ((tl.float32, True), (tl.float32, False), (tl.bfloat16, True)):
        constants = {"DTYPE": dtype, "ALIGNED": True, "SCALED": scaled}
        constants |= {"TENSORS": 32, "BLOCK": _BLOCK}
        listed.append(
            Case(
                f"unscale {names[dtype]}" + ("" if scaled else " only looking"),
                unscale_kernel,
                signature(unscale_kernel, types, constants),
                constants,
                unaligned=frozenset({"tensors"}),
            )
        )
    return listed
