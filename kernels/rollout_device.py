"""Device code of the persistent rollout: a folded two-hidden-layer flow, here forward.

Tiles are features by rows, ``[BN, BM]``. With 8 rows the weight's slice is a GEMM's first
operand; with 16 and more (``FLIP``) the rows are, and the result is transposed. Either way tensor
cores work by warps: a GEMM of warpgroups from shared memory would need a descriptor every 16
features, and those of two weights and two operands do not fit the registers. A program owns the
features ``tile BN ...`` of both hidden layers for the rows ``group BM ...``, for the whole launch;
its two slices of weights are loaded once. The G programs of a row group have four barriers an
evaluation (:mod:`pwm_fast.kernels.rollout_exchange`), each time at another board: ``slots1``,
``board1``, ``slots2`` and ``board2`` forward. So no board is written twice without others between.

Sums over features add the programs' parts in a fixed order: results repeat bit by bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pwm_fast.kernels.pointwise import mish, operand, rounded
from pwm_fast.kernels.rollout_exchange import PARTS, Layout, Place, share_rows, share_tile

# The loops must not be pipelined: what they load is written by other programs in between. Launches
# therefore have num_stages=1.


@triton.jit
def lost(ok):
    """Added to what follows: NaN once a program has waited in vain, so that its rows are NaN."""
    return tl.where(ok != 0, 0.0, float("nan"))


@triton.jit
def flow_time(e, substeps, HEUN: tl.constexpr):
    """That of a macro step's evaluation ``e``: [1, 1], correctly rounded, as the host divides."""
    number = e
    if HEUN:
        number = (e >> 1) + (e & 1)
    return tl.div_rn(tl.full([1, 1], number, tl.float32), tl.full([1, 1], substeps, tl.float32))


@triton.jit
def _features(i: tl.constexpr, KP: tl.constexpr, CHUNKS: tl.constexpr):
    return i * (KP // CHUNKS) + tl.arange(0, KP // CHUNKS)


@triton.jit
def weight_slice(w, stride_n, stride_k, n, L: tl.constexpr):
    """A slice of a weight for :func:`product`: chunks ``[BN, KP / CHUNKS]``, or flipped."""
    UP: tl.constexpr = L.UP
    chunks = ()
    for i in tl.static_range(L.CHUNKS):
        k = _features(i, L.KP, L.CHUNKS)
        if L.FLIP:
            at = w + k[:, None] * stride_k + n[None, :] * stride_n
            chunk = tl.load(at, mask=k[:, None] < UP, other=0.0)
        else:
            at = w + n[:, None] * stride_n + k[None, :] * stride_k
            chunk = tl.load(at, mask=k[None, :] < UP, other=0.0)
        chunk = operand(chunk, L.PRECISION)
        chunks = chunks + (chunk,)  # type: ignore[assignment]  # noqa: RUF005  no unpacking there
    return chunks


@triton.jit
def product(w, x, nil, L: tl.constexpr):
    """``w x`` ``[BN, BM]`` as products of chunks: each is a chain of waiting instructions.

    Every chunk's sum begins at ``nil``, a zero that the compiler does not know, lest it join them.
    """
    PRECISION: tl.constexpr = L.PRECISION
    if L.FLIP:
        start = tl.zeros([x[0].shape[0], w[0].shape[1]], tl.float32) + nil
        total = tl.dot(x[0], w[0], start, input_precision=PRECISION)
    else:
        start = tl.zeros([w[0].shape[0], x[0].shape[1]], tl.float32) + nil
        total = tl.dot(w[0], x[0], start, input_precision=PRECISION)
    for i in tl.static_range(1, L.CHUNKS):
        if L.FLIP:
            total += tl.dot(x[i], w[i], start, input_precision=PRECISION)
        else:
            total += tl.dot(w[i], x[i], start, input_precision=PRECISION)
    if L.FLIP:
        total = tl.trans(total)
    return total


@triton.jit
def _hidden(h, gamma, beta, board, slots, meeting, ok, place, width, eps, L: tl.constexpr):
    """RMS and Mish of pre-activations that the group's programs hold in parts.

    Returns this program's xhat and output, ``[BN, BM]``, the rows' rstd, and all programs' outputs
    as an operand ``[KP, BM]``.
    """
    slots += place.group * PARTS * (L.UP // L.BN) * L.BM
    meeting += 1
    squares, ok = share_rows((tl.sum(h * h, axis=0),), slots, meeting, ok, place, L, 1)
    rstd = tl.rsqrt(tl.sum(squares[0], axis=0) / width + eps) + lost(ok)
    xhat = h * rstd[None, :]
    y = mish(xhat * gamma[:, None] + beta[:, None])
    meeting += 1
    mine = operand(rounded(y, L.DTYPE), L.PRECISION)
    full, ok = share_tile(mine, board, meeting, ok, place, L)
    return xhat, y, rstd, full, meeting, ok


@triton.jit(do_not_specialize=["batch", "steps", "evals", "substeps", "begin", "limit"])
def rollout_forward_kernel(
    p_ptr,
    c_ptr,
    tau_ptr,
    w2_ptr,
    b2_ptr,
    w13_ptr,
    b13_ptr,
    gamma1_ptr,
    beta1_ptr,
    gamma2_ptr,
    beta2_ptr,
    sum_ptr,
    p_out_ptr,
    xhat1_ptr,
    rstd1_ptr,
    xhat2_ptr,
    rstd2_ptr,
    y1_ptr,
    y2_ptr,
    board1_ptr,
    board2_ptr,
    slots1_ptr,
    slots2_ptr,
    counters_ptr,
    batch,
    steps,
    evals,
    substeps,
    w2_n,
    w2_k,
    w13_n,
    w13_k,
    begin,
    limit,
    width1,
    width2,
    eps1,
    eps2,
    dt,
    nil,
    UP: tl.constexpr,
    KP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    CHUNKS: tl.constexpr,
    FLIP: tl.constexpr,
    WORDS: tl.constexpr,
    WARPS: tl.constexpr,
    HEUN: tl.constexpr,
    SAVE: tl.constexpr,
    KEEP: tl.constexpr,
):
    """``steps`` macro steps from ``p``; see :func:`pwm_fast.kernels.rollout.rollout_forward`."""
    G: tl.constexpr = UP // BN
    group = tl.program_id(0) // G
    tile = tl.program_id(0) % G
    n = tile * BN + tl.arange(0, BN)
    m = group * BM + tl.arange(0, BM)
    offs = m[None, :] * UP + n[:, None]
    rows = m < batch
    mask = rows[None, :] & (n[:, None] >= 0)
    L: tl.constexpr = Layout(UP, KP, BM, BN, DTYPE, PRECISION, CHUNKS, FLIP, WORDS, WARPS)
    place = Place(tile, group, counters_ptr + group * 32, limit)
    size = batch.to(tl.int64) * UP  # of one evaluation's or macro step's tensor

    w2 = weight_slice(w2_ptr, w2_n, w2_k, n, L)
    tl.debug_barrier()  # one slice at a time through the registers
    w13 = weight_slice(w13_ptr, w13_n, w13_k, n, L)
    tl.debug_barrier()
    gamma1, beta1 = tl.load(gamma1_ptr + n), tl.load(beta1_ptr + n)
    gamma2, beta2 = tl.load(gamma2_ptr + n), tl.load(beta2_ptr + n)
    b2, b13 = tl.load(b2_ptr + n), tl.load(b13_ptr + n)
    w_tau = tl.load(tau_ptr + n)

    p = tl.load(p_ptr + offs, mask=mask, other=0.0)
    stage = p
    first = tl.zeros([BN, BM], tl.float32)
    meeting = begin
    ok = 1
    for t in range(steps):
        c = tl.load(c_ptr + t * size + offs, mask=mask, other=0.0)
        total = tl.zeros([BN, BM], tl.float32)
        for e in range(evals):
            at = t * evals + e
            h = stage + (c + flow_time(e, substeps, HEUN) * w_tau[:, None])
            xhat, y, rstd, full, meeting, ok = _hidden(
                h, gamma1, beta1, board1_ptr, slots1_ptr, meeting, ok, place, width1, eps1, L
            )
            if SAVE:
                tl.store(xhat1_ptr + at * size + offs, rounded(xhat, DTYPE), mask=mask)
                tl.store(rstd1_ptr + at * batch + m, rstd, mask=rows & (tile == 0))
            if KEEP:
                tl.store(y1_ptr + at * size + offs, rounded(y, DTYPE), mask=mask)
            h = product(w2, full, nil, L) + (b2[:, None] + lost(ok))
            xhat, y, rstd, full, meeting, ok = _hidden(
                h, gamma2, beta2, board2_ptr, slots2_ptr, meeting, ok, place, width2, eps2, L
            )
            if SAVE:
                tl.store(xhat2_ptr + at * size + offs, rounded(xhat, DTYPE), mask=mask)
                tl.store(rstd2_ptr + at * batch + m, rstd, mask=rows & (tile == 0))
            if KEEP:
                tl.store(y2_ptr + at * size + offs, y, mask=mask)
            q = product(w13, full, nil, L) + b13[:, None]
            if HEUN:
                total += (0.5 * dt) * y
                second = (e & 1) == 1
                ahead = p + (0.5 * dt) * (first + q)
                stage = tl.where(second, ahead, p + dt * q)
                p = tl.where(second, ahead, p)
                first = q
            else:
                total += dt * y
                p += dt * q
                stage = p
            poison = lost(ok)
            p += poison
            stage += poison
            total += poison
        tl.store(sum_ptr + t * size + offs, rounded(total, sum_ptr.dtype.element_ty), mask=mask)
    tl.store(p_out_ptr + offs, p, mask=mask)
