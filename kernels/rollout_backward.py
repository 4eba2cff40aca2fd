"""Device code of the persistent rollout, backward, with the forward kernel's layout.

The boards come in another order: ``slots1`` for the size of the first gradient, then ``board1``,
``slots2``, ``board2`` and ``slots1`` in every evaluation.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pwm_fast.kernels.pointwise import mish_slope, operand, power, rounded, row_exponent
from pwm_fast.kernels.rollout_device import flow_time, lost, product, weight_slice
from pwm_fast.kernels.rollout_exchange import PARTS, Layout, Place, share_rows, share_tile

# No pipelining, for the reason that the forward kernel gives.


@triton.jit
def _hidden_dgrad(
    dy, xhat, gamma, beta, slots, base, meeting, ok, rstd, place, width, L: tl.constexpr
):
    """Gradient of ``rollout_device._hidden`` towards its ``h``, from the one towards its output.

    Returns it, ``[BN, BM]``, with ``du`` (towards LayerNorm's output) and, over all
    features of a row, the largest ``|dh|`` but for a factor up to ``1 + |xhat|``, and ``|base|``.
    """
    slots += place.group * PARTS * (L.UP // L.BN) * L.BM
    du = dy * mish_slope(xhat * gamma[:, None] + beta[:, None])
    g = du * gamma[:, None]
    meeting += 1
    parts, ok = share_rows(
        (tl.sum(g * xhat, axis=0), tl.max(tl.abs(g), axis=0), tl.max(tl.abs(base), axis=0)),
        slots,
        meeting,
        ok,
        place,
        L,
        PARTS,
    )
    inner = tl.sum(parts[0], axis=0) / width + lost(ok)
    largest = tl.max(parts[1], axis=0) * rstd
    largest_base = tl.max(parts[2], axis=0)
    dh = (g - xhat * inner[None, :]) * rstd[None, :]
    return dh, du, largest, largest_base, meeting, ok


@triton.jit
def _publish(x, inverse, board, meeting, ok, place, L: tl.constexpr):
    """All programs' ``x * inverse`` as an operand ``[KP, BM]``, and this one's."""
    mine = rounded(x * inverse[None, :], L.DTYPE)
    meeting += 1
    full, ok = share_tile(operand(mine, L.PRECISION), board, meeting, ok, place, L)
    return mine, full, meeting, ok


@triton.jit
def _scale(x, SCALED: tl.constexpr):
    if SCALED:
        exponent = row_exponent(x)
        scale, inverse = power(exponent), power(254 - exponent)
    else:
        scale = tl.zeros_like(x) + 1.0
        inverse = scale
    return scale, inverse


@triton.jit(do_not_specialize=["batch", "steps", "evals", "substeps", "begin", "limit"])
def rollout_backward_kernel(
    g_ptr,
    lp_ptr,
    w2_ptr,
    w13_ptr,
    gamma1_ptr,
    beta1_ptr,
    gamma2_ptr,
    beta2_ptr,
    xhat1_ptr,
    rstd1_ptr,
    xhat2_ptr,
    rstd2_ptr,
    dc_ptr,
    lp_out_ptr,
    dh2_ptr,
    dh2_scale_ptr,
    dq_ptr,
    dq_scale_ptr,
    sums_ptr,
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
    KEEP: tl.constexpr,
    SCALED: tl.constexpr,
):
    """Gradient of the forward kernel; see :func:`pwm_fast.kernels.rollout.rollout_backward`.

    ``w2`` and ``w13`` are read as their transposes: rows are the features that a gradient goes to.
    """
    G: tl.constexpr = UP // BN
    group = tl.program_id(0) // G
    tile = tl.program_id(0) % G
    n = tile * BN + tl.arange(0, BN)
    j = tl.arange(0, BM)
    m = group * BM + j
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

    lp = tl.load(lp_ptr + offs, mask=mask, other=0.0)
    late = tl.zeros([BN, BM], tl.float32)  # the second stage's dh1
    share = dt
    if HEUN:
        share = 0.5 * dt
    dq = share * lp
    # How large a row of the first dq is.
    meeting = begin + 1
    parts, ok = share_rows(
        (tl.max(tl.abs(dq), axis=0),), slots1_ptr + group * PARTS * G * BM, meeting, 1, place, L, 1
    )
    dq_scale, dq_inverse = _scale(tl.max(parts[0], axis=0), SCALED)
    # Without the others' parts it is another factor than theirs.
    dq_scale += lost(ok)
    dq_inverse += lost(ok)

    if KEEP:
        sum_gamma1 = tl.zeros([BN, BM], tl.float32)
        sum_beta1 = tl.zeros([BN, BM], tl.float32)
        sum_gamma2 = tl.zeros([BN, BM], tl.float32)
        sum_beta2 = tl.zeros([BN, BM], tl.float32)
        sum_b2 = tl.zeros([BN, BM], tl.float32)
        sum_b13 = tl.zeros([BN, BM], tl.float32)
        sum_tau = tl.zeros([BN, BM], tl.float32)
    for back in range(steps):
        t = steps - 1 - back
        g = tl.load(g_ptr + t * size + offs, mask=mask, other=0.0)
        dc = tl.zeros([BN, BM], tl.float32)
        for back_e in range(evals):
            e = evals - 1 - back_e
            at = t * evals + e
            # Asked for here, long before they are used.
            xhat2 = tl.load(xhat2_ptr + at * size + offs, mask=mask, other=0.0)
            xhat1 = tl.load(xhat1_ptr + at * size + offs, mask=mask, other=0.0)
            rstd2 = tl.load(rstd2_ptr + at * batch + m, mask=rows, other=0.0)
            rstd1 = tl.load(rstd1_ptr + at * batch + m, mask=rows, other=0.0)
            xhat2, xhat1 = xhat2.to(tl.float32), xhat1.to(tl.float32)

            mine, full, meeting, ok = _publish(dq, dq_inverse, board1_ptr, meeting, ok, place, L)
            if KEEP:
                tl.store(dq_ptr + at * size + offs, mine, mask=mask)
                if SCALED:
                    tl.store(dq_scale_ptr + at * batch + m, dq_scale, mask=rows & (tile == 0))
                sum_b13 += dq
            back_scale = (dq_scale + lost(ok))[None, :]
            dy = product(w13, full, nil, L) * back_scale + share * g
            dh, du, largest, _, meeting, ok = _hidden_dgrad(
                dy, xhat2, gamma2, beta2, slots2_ptr, lp, meeting, ok, rstd2, place, width2, L
            )
            if KEEP:
                sum_gamma2 += du * xhat2
                sum_beta2 += du
                sum_b2 += dh
            scale, inverse = _scale(largest, SCALED)
            mine, full, meeting, ok = _publish(dh, inverse, board2_ptr, meeting, ok, place, L)
            if KEEP:
                tl.store(dh2_ptr + at * size + offs, mine, mask=mask)
                if SCALED:
                    tl.store(dh2_scale_ptr + at * batch + m, scale, mask=rows & (tile == 0))
            back_scale = (scale + lost(ok))[None, :]
            dy = product(w2, full, nil, L) * back_scale
            base = lp + late
            dh, du, largest, largest_base, meeting, ok = _hidden_dgrad(
                dy, xhat1, gamma1, beta1, slots1_ptr, base, meeting, ok, rstd1, place, width1, L
            )
            if KEEP:
                sum_gamma1 += du * xhat1
                sum_beta1 += du
                sum_tau += flow_time(e, substeps, HEUN) * dh
            dc += dh
            if HEUN:
                # Reversed, a substep's second stage (odd) comes first.
                second = (e & 1) == 1
                lp = tl.where(second, lp, base + dh)
                late = tl.where(second, dh, 0.0)
                dq = share * lp + dt * late
                largest = tl.where(second, dt, share) * largest
            else:
                lp = base + dh
                dq = dt * lp
                largest = dt * largest
            dq_scale, dq_inverse = _scale(tl.maximum(share * largest_base, largest), SCALED)
        tl.store(dc_ptr + t * size + offs, dc, mask=mask)
    tl.store(lp_out_ptr + offs, lp, mask=mask)
    if KEEP:
        out = sums_ptr + group * 7 * UP + n
        tl.store(out, tl.sum(sum_gamma1, axis=1))
        tl.store(out + UP, tl.sum(sum_beta1, axis=1))
        tl.store(out + 2 * UP, tl.sum(sum_gamma2, axis=1))
        tl.store(out + 3 * UP, tl.sum(sum_beta2, axis=1))
        tl.store(out + 4 * UP, tl.sum(sum_b2, axis=1))
        tl.store(out + 5 * UP, tl.sum(sum_b13, axis=1))
        tl.store(out + 6 * UP, tl.sum(sum_tau, axis=1))
