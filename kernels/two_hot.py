"""Two-hot distributional heads: expectation over the bins and cross-entropy, forward and backward.

What there is once a row is done in float64, as is the mean's sum over bins: symexp multiplies its
error. Backward recomputes the softmax from the logits, which costs less than reading it back.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from pwm_fast.kernels.launch import launch, row_tile


@triton.jit
def _logits(logits, row, row_in, bins, stride, BLOCK: tl.constexpr):
    """A tile of logits less the largest of their row, and that; ``-inf`` beyond the bins."""
    col = tl.arange(0, BLOCK)
    inside = row_in[:, None] & (col < bins)[None, :]
    at = row.to(tl.int64)[:, None] * stride + col[None, :]
    x = tl.load(logits + at, mask=inside, other=-float("inf")).to(tl.float32)
    top = tl.max(x, axis=1)
    top = tl.where(row_in, top, 0.0)
    return x - top[:, None], top


@triton.jit
def _centres(vmin, vmax, bins, BLOCK: tl.constexpr):
    """The bins' centres, float64."""
    share = tl.arange(0, BLOCK).to(tl.float64) / (bins - 1)
    return vmin + (vmax - vmin) * share


@triton.jit
def _two_hot(x, vmin, vmax, bins, TRANSFORM: tl.constexpr):
    """Between which bins a value lies: the lower one, and the weight of the one above it.

    Beyond the ends it is at them; NaN gives a weight of NaN.
    """
    x = x.to(tl.float64)
    if TRANSFORM:
        size = tl.log(1.0 + tl.abs(x))
        x = tl.where(x < 0.0, -size, size)
    last = (bins - 1) * 1.0
    position = (x - vmin) * (last / (vmax - vmin))
    position = tl.where(position < 0.0, 0.0, position)
    position = tl.where(position > last, last, position)
    whole = tl.where(position == position, position, 0.0)
    lower = tl.minimum(whole.to(tl.int32), bins - 2)
    return lower, position - lower.to(tl.float64)


@triton.jit
def two_hot_decode_fwd_kernel(
    logits,
    value,
    mean,
    lse,
    rows,
    bins,
    stride,
    vmin,
    vmax,
    TRANSFORM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Expectation of the centres under the softmax; ``mean`` is that before symexp."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_in = row < rows
    x, top = _logits(logits, row, row_in, bins, stride, BLOCK)
    e = tl.exp(x).to(tl.float64)
    total = tl.sum(e, axis=1)
    m = tl.sum(e * _centres(vmin, vmax, bins, BLOCK)[None, :], axis=1) / total
    v = m
    if TRANSFORM:
        size = tl.exp(tl.abs(m)) - 1.0
        v = tl.where(m < 0.0, -size, size)
    tl.store(value + row, v.to(tl.float32), mask=row_in)
    tl.store(mean + row, m.to(tl.float32), mask=row_in)
    tl.store(lse + row, (top.to(tl.float64) + tl.log(total)).to(tl.float32), mask=row_in)


@triton.jit
def two_hot_decode_bwd_kernel(
    dvalue,
    logits,
    mean,
    dlogits,
    rows,
    bins,
    stride,
    dlogits_stride,
    vmin,
    vmax,
    TRANSFORM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``dlogits = dvalue slope p (centre - mean)``."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_in = row < rows
    x, _ = _logits(logits, row, row_in, bins, stride, BLOCK)
    e = tl.exp(x)
    total = tl.sum(e.to(tl.float64), axis=1)
    m = tl.load(mean + row, mask=row_in, other=0.0)
    factor = tl.load(dvalue + row, mask=row_in, other=0.0).to(tl.float64) / total
    if TRANSFORM:
        factor *= tl.exp(tl.abs(m).to(tl.float64))
    centres = _centres(vmin, vmax, bins, BLOCK).to(tl.float32)
    result = e * (centres[None, :] - m[:, None]) * factor.to(tl.float32)[:, None]
    col = tl.arange(0, BLOCK)
    at = row.to(tl.int64)[:, None] * dlogits_stride + col[None, :]
    tl.store(dlogits + at, result, mask=row_in[:, None] & (col < bins)[None, :])


@triton.jit
def two_hot_ce_fwd_kernel(
    logits,
    target,
    loss,
    lse,
    rows,
    bins,
    stride,
    vmin,
    vmax,
    TRANSFORM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``loss = -sum(two_hot(target) log_softmax(logits))``."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_in = row < rows
    x, top = _logits(logits, row, row_in, bins, stride, BLOCK)
    log_sum = tl.log(tl.sum(tl.exp(x).to(tl.float64), axis=1))
    t = tl.load(target + row, mask=row_in, other=0.0)
    lower, upper = _two_hot(t, vmin, vmax, bins, TRANSFORM)
    at = logits + row.to(tl.int64) * stride + lower
    low = tl.load(at, mask=row_in, other=0.0).to(tl.float64) - top
    high = tl.load(at + 1, mask=row_in, other=0.0).to(tl.float64) - top
    # No weight counts nothing, even of an infinite logit.
    taken = tl.where(upper == 1.0, 0.0, (1.0 - upper) * low)
    taken += tl.where(upper == 0.0, 0.0, upper * high)
    tl.store(loss + row, (log_sum - taken).to(tl.float32), mask=row_in)
    tl.store(lse + row, (top.to(tl.float64) + log_sum).to(tl.float32), mask=row_in)


@triton.jit
def two_hot_ce_bwd_kernel(
    dloss,
    logits,
    target,
    dlogits,
    rows,
    bins,
    stride,
    dlogits_stride,
    vmin,
    vmax,
    TRANSFORM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``dlogits = dloss (softmax(logits) - two_hot(target))``."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_in = row < rows
    x, _ = _logits(logits, row, row_in, bins, stride, BLOCK)
    e = tl.exp(x)
    total = tl.sum(e.to(tl.float64), axis=1).to(tl.float32)
    t = tl.load(target + row, mask=row_in, other=0.0)
    lower, upper = _two_hot(t, vmin, vmax, bins, TRANSFORM)
    col = tl.arange(0, BLOCK)
    below = (col[None, :] == lower[:, None]).to(tl.float32) * (1.0 - upper).to(tl.float32)[:, None]
    above = (col[None, :] == lower[:, None] + 1).to(tl.float32) * upper.to(tl.float32)[:, None]
    d = tl.load(dloss + row, mask=row_in, other=0.0)
    result = (e / total[:, None] - below - above) * d[:, None]
    at = row.to(tl.int64)[:, None] * dlogits_stride + col[None, :]
    tl.store(dlogits + at, result, mask=row_in[:, None] & (col < bins)[None, :])


def _run(
    kernel: Any,
    tensors: tuple[Tensor, ...],
    logits: Tensor,
    out: tuple[int, ...],
    vmin: float,
    vmax: float,
    transform: bool,
) -> None:
    rows, bins = logits.shape
    tile = row_tile(bins)
    launch(
        kernel,
        tile.grid(rows),
        *tensors,
        rows,
        bins,
        logits.stride(0),
        *out,
        vmin,
        vmax,
        TRANSFORM=transform,
        **tile.options,
    )


def two_hot_decode_fwd(
    logits: Tensor,
    value: Tensor,
    mean: Tensor,
    lse: Tensor,
    vmin: float,
    vmax: float,
    transform: bool,
) -> None:
    """Expectation of logits ``[R, bins]`` over the centres; saves mean and log-sum-exp."""
    tensors = (logits, value, mean, lse)
    _run(two_hot_decode_fwd_kernel, tensors, logits, (), vmin, vmax, transform)


def two_hot_decode_bwd(
    dvalue: Tensor,
    logits: Tensor,
    mean: Tensor,
    lse: Tensor,
    dlogits: Tensor,
    vmin: float,
    vmax: float,
    transform: bool,
) -> None:
    """Gradient of :func:`two_hot_decode_fwd`; sums the softmax anew and leaves ``lse`` alone."""
    tensors, out = (dvalue, logits, mean, dlogits), (dlogits.stride(0),)
    _run(two_hot_decode_bwd_kernel, tensors, logits, out, vmin, vmax, transform)


def two_hot_ce_fwd(
    logits: Tensor,
    x: Tensor,
    loss: Tensor,
    lse: Tensor,
    vmin: float,
    vmax: float,
    transform: bool,
) -> None:
    """Cross-entropy of logits ``[R, bins]`` against the two-hot code of ``x [R]``."""
    tensors = (logits, x, loss, lse)
    _run(two_hot_ce_fwd_kernel, tensors, logits, (), vmin, vmax, transform)


def two_hot_ce_bwd(
    dloss: Tensor,
    logits: Tensor,
    x: Tensor,
    lse: Tensor,
    dlogits: Tensor,
    vmin: float,
    vmax: float,
    transform: bool,
) -> None:
    """Gradient of :func:`two_hot_ce_fwd` towards the logits; leaves ``lse`` alone likewise."""
    tensors, out = (dloss, logits, x, dlogits), (dlogits.stride(0),)
    _run(two_hot_ce_bwd_kernel, tensors, logits, out, vmin, vmax, transform)
