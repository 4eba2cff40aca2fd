"""Signal and noise of gradient samples: one pass over the samples, all tensors in one launch.

Where the extension has CUDA code, ``csrc/cuda/esnr.cu`` does this; here is the same in Triton. Per
element Welford's recurrence over its samples. All in float64, which holds the square of every
float32 number, so that no scale of the samples overflows or underflows, and in which samples that
agree to 1e-7 lose nothing; sums chunk by chunk and then in order: the same bits on every GPU.

Source: Welford 1962, "Note on a method for calculating corrected sums of squares and products".
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from pwm_fast.kernels import table as tables
from pwm_fast.kernels.launch import launch
from pwm_fast.kernels.table import Table

DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}

BLOCK = 1024  # elements that a program holds
STREAMED_BLOCK = 512  # the same where it holds running sums, whose float64 takes more registers
SLOTS = 128  # chunks whose sums the second stage adds at a time

MOMENTS, UPDATE, RESULT = 0, 1, 2


@triton.jit
def _load(pointer, i, n, WHOLE: tl.constexpr):
    """Elements as float64, 0 beyond n; without a mask, wide loads are possible."""
    if WHOLE:
        return tl.load(pointer + i).to(tl.float64)
    return tl.load(pointer + i, mask=i < n, other=0.0).to(tl.float64)


@triton.jit
def _share(s):
    """``1 / (s + 1)``, float64 ``[1]``."""
    return tl.full([1], 1.0, tl.float64) / (s + 1)


@triton.jit
def _moments(
    words,
    tensors,
    samples,
    tensor,
    start,
    i,
    n,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Of each element the square of its mean and the sum of centred squares, float64."""
    mean = tl.zeros_like(i).to(tl.float64)
    squares = tl.zeros_like(mean)
    for s in range(samples):
        sample = tables.row(words, tensors, samples, tensor, s, DTYPE, ALIGNED) + start
        x = _load(sample, i, n, WHOLE)
        apart = x - mean
        mean += apart * _share(s)
        squares += apart * (x - mean)
    return mean * mean, squares


@triton.jit
def esnr_moments_kernel(
    words,
    slots,
    tensors,
    chunk,
    samples,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    TENSORS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``slots[c] =`` sums over a chunk of squared means and of centred squares; a row a sample."""
    c = tl.program_id(0)
    tensor, start, n = tables.find(words, tensors, chunk, c, TENSORS)
    signal = tl.zeros([BLOCK], tl.float64)
    noise = tl.zeros([BLOCK], tl.float64)
    whole = n // BLOCK * BLOCK
    for base in range(0, whole, BLOCK):
        i = base + tl.arange(0, BLOCK)
        a, b = _moments(words, tensors, samples, tensor, start, i, n, DTYPE, ALIGNED, True)
        signal += a
        noise += b
    if whole < n:
        i = whole + tl.arange(0, BLOCK)
        a, b = _moments(words, tensors, samples, tensor, start, i, n, DTYPE, ALIGNED, False)
        signal += a
        noise += b
    tl.store(slots + 2 * c, tl.sum(signal, axis=0))
    tl.store(slots + 2 * c + 1, tl.sum(noise, axis=0))


@triton.jit
def _update(sample, origin, total, i, n, WHOLE: tl.constexpr):
    x = _load(sample, i, n, WHOLE) - _load(origin, i, n, WHOLE)
    moved = _load(total, i, n, WHOLE) + x
    if WHOLE:
        tl.store(total + i, moved)
    else:
        tl.store(total + i, moved, mask=i < n)
    return x * x


@triton.jit
def esnr_update_kernel(
    words,
    slots,
    tensors,
    chunk,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    TENSORS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Rows sample, origin, running sum: add to the sum; ``slots[c] =`` squared distances, 0."""
    c = tl.program_id(0)
    tensor, start, n = tables.find(words, tensors, chunk, c, TENSORS)
    sample = tables.row(words, tensors, 3, tensor, 0, DTYPE, ALIGNED) + start
    origin = tables.row(words, tensors, 3, tensor, 1, DTYPE, ALIGNED) + start
    total = tables.row(words, tensors, 3, tensor, 2, tl.float64, ALIGNED) + start
    squares = tl.zeros([BLOCK], tl.float64)
    whole = n // BLOCK * BLOCK
    for base in range(0, whole, BLOCK):
        squares += _update(sample, origin, total, base + tl.arange(0, BLOCK), n, True)
    if whole < n:
        squares += _update(sample, origin, total, whole + tl.arange(0, BLOCK), n, False)
    tl.store(slots + 2 * c, tl.sum(squares, axis=0))
    tl.store(slots + 2 * c + 1, tl.zeros([], tl.float64))


@triton.jit
def _result(origin, total, share, i, n, WHOLE: tl.constexpr):
    way = _load(total, i, n, WHOLE) * share
    mean = _load(origin, i, n, WHOLE) + way
    return mean * mean, way * way


@triton.jit
def esnr_result_kernel(
    words,
    slots,
    tensors,
    chunk,
    samples,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    TENSORS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Rows origin, running sum: ``slots[c] =`` squares of the mean, and of its way from there."""
    c = tl.program_id(0)
    tensor, start, n = tables.find(words, tensors, chunk, c, TENSORS)
    origin = tables.row(words, tensors, 2, tensor, 0, DTYPE, ALIGNED) + start
    total = tables.row(words, tensors, 2, tensor, 1, tl.float64, ALIGNED) + start
    share = _share(samples - 1)
    signal = tl.zeros([BLOCK], tl.float64)
    shift = tl.zeros([BLOCK], tl.float64)
    whole = n // BLOCK * BLOCK
    for base in range(0, whole, BLOCK):
        a, b = _result(origin, total, share, base + tl.arange(0, BLOCK), n, True)
        signal += a
        shift += b
    if whole < n:
        a, b = _result(origin, total, share, whole + tl.arange(0, BLOCK), n, False)
        signal += a
        shift += b
    tl.store(slots + 2 * c, tl.sum(signal, axis=0))
    tl.store(slots + 2 * c + 1, tl.sum(shift, axis=0))


@triton.jit
def esnr_sums_kernel(
    words, slots, squares, signal, noise, samples, TASK: tl.constexpr, SLOTS: tl.constexpr
):
    """A tensor's results from the sums of its chunks, added in order.

    TASK 0: signal and noise of moments; 1: squares += ; 2: signal and noise of a streamed estimate.
    """
    t = tl.program_id(0)
    begin, end = tl.load(words + t), tl.load(words + t + 1)
    first = tl.zeros([SLOTS], tl.float64)
    second = tl.zeros([SLOTS], tl.float64)
    for base in range(begin, end, SLOTS):
        c = base + tl.arange(0, SLOTS)
        first += tl.load(slots + 2 * c, mask=c < end, other=0.0)
        second += tl.load(slots + 2 * c + 1, mask=c < end, other=0.0)
    a, b = tl.sum(first, axis=0), tl.sum(second, axis=0)
    if TASK == 1:
        tl.store(squares + t, tl.load(squares + t) + a)
    else:
        if TASK == 0:
            spread = b / samples
        else:
            spread = tl.load(squares + t) / samples - b
            spread = tl.where(spread < 0.0, 0.0, spread)  # a NaN stays one
        tl.store(signal + t, a)
        tl.store(noise + t, spread)


class TritonEsnr:
    """See :class:`pwm_fast.backends.esnr.EsnrReduction`."""

    def moments(self, grads: Sequence[Tensor], samples: int) -> tuple[Tensor, Tensor]:
        """See :class:`EsnrReduction`."""
        count = len(grads) // samples
        whole = [g.contiguous() for g in grads]  # named: alive until the launches are made
        table = tables.make([whole[s * count : (s + 1) * count] for s in range(samples)])
        return _run(MOMENTS, esnr_moments_kernel, table, whole[0], samples, None)

    def update(
        self,
        grads: Sequence[Tensor],
        origins: Sequence[Tensor],
        sums: Sequence[Tensor],
        squares: Tensor,
    ) -> None:
        """See :class:`EsnrReduction`."""
        whole = [g.contiguous() for g in grads]
        table = tables.make([whole, origins, sums])
        _run(UPDATE, esnr_update_kernel, table, whole[0], None, squares)

    def result(
        self, origins: Sequence[Tensor], sums: Sequence[Tensor], squares: Tensor, samples: int
    ) -> tuple[Tensor, Tensor]:
        """See :class:`EsnrReduction`."""
        table = tables.make([origins, sums])
        return _run(RESULT, esnr_result_kernel, table, origins[0], samples, squares)


def _run(
    task: int,
    kernel: triton.JITFunction,
    table: Table,
    like: Tensor,
    samples: int | None,
    squares: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Both stages; signal and noise ``[T]``, which an update leaves alone."""
    device = table.words.device
    slots = torch.empty(2 * table.chunks, dtype=torch.float64, device=device)
    signal = torch.empty(table.tensors, dtype=torch.float64, device=device)
    noise = torch.empty_like(signal)  # an operator's outputs must not share memory
    launch(
        kernel,
        (table.chunks,),
        table.words,
        slots,
        table.tensors,
        table.chunk,
        *(() if samples is None else (samples,)),
        DTYPE=DTYPES[like.dtype],
        ALIGNED=table.aligned,
        TENSORS=triton.next_power_of_2(table.tensors),
        BLOCK=BLOCK if task == MOMENTS else STREAMED_BLOCK,
    )
    launch(
        esnr_sums_kernel,
        (table.tensors,),
        table.words,
        slots,
        squares,
        signal,
        noise,
        1 if samples is None else samples,
        TASK=task,
        SLOTS=SLOTS,
    )
    return signal, noise
