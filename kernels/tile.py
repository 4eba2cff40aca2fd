"""What the fused products have in common on the device: product, row statistics, exchange.

A program owns one tile ``[BLOCK_M, BLOCK_N]`` of a result ``[R, N]``. Where a row lies in several
tiles, their programs exchange partial sums of it through *slots* in global memory: each writes its
own, adds to the row block's counter and waits until all have; then each reads all slots in the same
order, so that all come to the same bits, run after run. That needs all programs on the device at
once: such launches are cooperative and no larger than it holds.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pwm_fast.kernels.pointwise import mish, operand

#: A program waits for the others at most this many polls (seconds), then stops the device with a
#: trap: an error of the launch in place of a hang.
POLLS = 1 << 24

#: int32 counters of neighbouring row blocks lie this far apart: one to a 128-byte line.
COUNTER_STRIDE = 32

#: What a launch does of the exchange. ``PUBLISH`` ends after the slots are written and ``CONSUME``
#: starts from them: one after another they are ``SPIN`` without its wait, for devices and
#: interpreters that run programs one after another.
SPIN, PUBLISH, CONSUME = 0, 1, 2

_COUNTER_STRIDE = tl.constexpr(COUNTER_STRIDE)
_POLLS = tl.constexpr(POLLS)


@triton.jit
def product(
    x,
    w,
    rows,
    cols,
    N,
    K,
    stride_x,
    stride_wn,
    stride_wk,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``x[rows] w[cols]^T`` in fp32; columns from N on give 0. ``rows`` are valid ones."""
    ks = tl.arange(0, BLOCK_K)
    a = x + rows[:, None].to(tl.int64) * stride_x + ks[None, :]
    b = w + ks[:, None] * stride_wk + cols[None, :] * stride_wn
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        if EVEN_K:
            at = tl.load(a)
            bt = tl.load(b) if EVEN_N else tl.load(b, mask=cols[None, :] < N, other=0.0)
        else:
            at = tl.load(a, mask=ks[None, :] < K - k, other=0.0)
            bt = tl.load(b, mask=(ks[:, None] < K - k) & (cols[None, :] < N), other=0.0)
        at, bt = operand(at, PRECISION), operand(bt, PRECISION)
        acc = tl.dot(at, bt, acc, input_precision=PRECISION)
        a += BLOCK_K
        b += BLOCK_K * stride_wk
    return acc


@triton.jit
def act_norm_rows(v, inside, N, gamma, beta, eps, MISH: tl.constexpr):
    """LayerNorm after Mish or nothing, of whole rows that are 0 beyond their N columns ``inside``.

    ``gamma`` and ``beta`` point to the columns. Returns the rows, their means and their rstd.
    """
    if MISH:
        v = mish(v)  # 0 beyond the row's end, as the product is
    mu = tl.sum(v, 1) / N
    v = tl.where(inside[None, :], v - mu[:, None], 0.0)
    r = tl.rsqrt(tl.sum(v * v, 1) / N + eps)
    v = v * r[:, None] * tl.load(gamma, mask=inside, other=0.0)[None, :]
    return v + tl.load(beta, mask=inside, other=0.0)[None, :], mu, r


@triton.jit
def meet(counter, TILES: tl.constexpr):
    """Wait until the ``TILES`` programs of a row block have come here with what they wrote.

    The counter only grows: a launch's programs take the tickets ``[e TILES, (e + 1) TILES)``, so
    nothing has to be reset between launches that follow one another.
    """
    tl.debug_barrier()  # the other warps' slots are written before the counter says so
    ticket = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
    target = (ticket // TILES + 1) * TILES
    seen = ticket + 1
    polls = ticket * 0
    while (seen < target) & (polls < _POLLS):
        seen = tl.atomic_add(counter, 0, sem="acquire", scope="gpu")
        polls += 1
    if seen < target:
        tl.inline_asm_elementwise(
            "trap; mov.b32 $0, $1;", "=r,r", [seen], dtype=tl.int32, is_pure=False, pack=1
        )
    tl.debug_barrier()


@triton.jit
def put(slots, plane, tile, rows, values, stride, TILES: tl.constexpr):
    """Write this tile's values of its rows; ``slots`` is ``[planes, TILES, stride]``."""
    tl.store(slots + (plane * TILES + tile) * stride + rows, values)


@triton.jit
def take(slots, plane, rows, stride, TILES: tl.constexpr, TILES_2: tl.constexpr):
    """All tiles' values of the rows, ``[TILES_2, rows]``, 0 beyond ``TILES``."""
    tiles = tl.arange(0, TILES_2)
    at = slots + (plane * TILES + tiles[:, None]) * stride + rows[None, :]
    return tl.load(at, mask=tiles[:, None] < TILES, other=0.0, volatile=True)
