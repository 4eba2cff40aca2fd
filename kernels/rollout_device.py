"""Device code of the persistent rollout: a folded two-hidden-layer flow, forward and backward.

Tiles are features by rows, ``[BN, BM]``. With 8 rows the weight's slice is a product's first
operand; with 16 and more (``FLIP``) the rows are, and the result is transposed. Either way tensor
cores work by warps: a product of warpgroups from shared memory would need a descriptor every 16
features, and those of two weights and two operands do not fit the registers. A program owns the
features ``tile BN ...`` of both hidden layers for the rows ``group BM ...``, for the whole launch;
its two slices of weights are loaded once. The G programs of a row group meet in *exchanges*: each
publishes in global memory, adds 1 to the group's counter (release), and waits until all have
(acquire). Counters only grow, and no buffer is written twice without an exchange of another buffer
in between: who writes it again knows by that exchange that all have read it.

Sums over features add the programs' parts in a fixed order: results repeat bit by bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pwm_fast.kernels.pointwise import mish, mish_slope, operand, power, rounded, row_exponent

# The loops must not be pipelined: what they load is written by other programs in between. Launches
# therefore have num_stages=1.


@triton.jit
def _exchange(counter, target, ok, limit):
    """Publish what this program has stored, and wait for the others' of this group.

    Returns whether all came within ``limit`` polls; once one has not, no more waiting is done.
    """
    tl.debug_barrier()  # all threads' stores are before the one thread's release
    seen = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") + 1
    left = tl.where(ok != 0, limit, 0)
    while (seen < target) & (left > 0):
        seen = tl.atomic_add(counter, 0, sem="acquire", scope="gpu")
        left -= 1
    return tl.where(seen >= target, ok, 0)


@triton.jit
def _flow_time(number, substeps):
    # Of shape [1, 1], correctly rounded, as the host's division is.
    return tl.div_rn(tl.full([1, 1], number, tl.float32), tl.full([1, 1], substeps, tl.float32))


@triton.jit
def _parts(slots, G: tl.constexpr, GP: tl.constexpr, BM: tl.constexpr):
    """What all programs of the group put into ``slots [G, BM]``; zeros beyond G."""
    i = tl.arange(0, GP)[:, None]
    j = tl.arange(0, BM)[None, :]
    return tl.load(slots + i * BM + j, mask=i < G, other=0.0, cache_modifier=".cg")


@triton.jit
def _features(i: tl.constexpr, KP: tl.constexpr, CHUNKS: tl.constexpr):
    return i * (KP // CHUNKS) + tl.arange(0, KP // CHUNKS)


@triton.jit
def _slice(
    w,
    stride_n,
    stride_k,
    n,
    UP: tl.constexpr,
    KP: tl.constexpr,
    PRECISION: tl.constexpr,
    CHUNKS: tl.constexpr,
    FLIP: tl.constexpr,
):
    """A slice of a weight for :func:`_product`: chunks ``[BN, KP / CHUNKS]``, or flipped."""
    chunks = ()
    for i in tl.static_range(CHUNKS):
        k = _features(i, KP, CHUNKS)
        if FLIP:
            at = w + k[:, None] * stride_k + n[None, :] * stride_n
            chunk = tl.load(at, mask=k[:, None] < UP, other=0.0)
        else:
            at = w + n[:, None] * stride_n + k[None, :] * stride_k
            chunk = tl.load(at, mask=k[None, :] < UP, other=0.0)
        chunk = operand(chunk, PRECISION)
        chunks = chunks + (chunk,)  # type: ignore[assignment]  # noqa: RUF005  no unpacking there
    return chunks


@triton.jit
def _gather(
    board, rows, UP: tl.constexpr, KP: tl.constexpr, CHUNKS: tl.constexpr, FLIP: tl.constexpr
):
    """All features of rows for :func:`_product`: chunks ``[KP / CHUNKS, BM]``, or flipped."""
    chunks = ()
    for i in tl.static_range(CHUNKS):
        k = _features(i, KP, CHUNKS)
        if FLIP:
            at = board + rows[:, None] * UP + k[None, :]
            chunk = tl.load(at, mask=k[None, :] < UP, other=0.0, cache_modifier=".cg")
        else:
            at = board + rows[None, :] * UP + k[:, None]
            chunk = tl.load(at, mask=k[:, None] < UP, other=0.0, cache_modifier=".cg")
        chunks = chunks + (chunk,)  # type: ignore[assignment]  # noqa: RUF005
    return chunks


@triton.jit
def _product(w, x, nil, PRECISION: tl.constexpr, CHUNKS: tl.constexpr, FLIP: tl.constexpr):
    """``w x`` ``[BN, BM]`` as products of chunks: each is a chain of waiting instructions.

    Every chunk's sum begins at ``nil``, a zero that the compiler does not know, lest it join them.
    """
    if FLIP:
        start = tl.zeros([x[0].shape[0], w[0].shape[1]], tl.float32) + nil
        total = tl.dot(x[0], w[0], start, input_precision=PRECISION)
    else:
        start = tl.zeros([w[0].shape[0], x[0].shape[1]], tl.float32) + nil
        total = tl.dot(w[0], x[0], start, input_precision=PRECISION)
    for i in tl.static_range(1, CHUNKS):
        if FLIP:
            total += tl.dot(x[i], w[i], start, input_precision=PRECISION)
        else:
            total += tl.dot(w[i], x[i], start, input_precision=PRECISION)
    if FLIP:
        total = tl.trans(total)
    return total


@triton.jit
def _hidden(
    h,
    gamma,
    beta,
    board,
    slots,
    counter,
    target,
    ok,
    limit,
    tile,
    group,
    width,
    eps,
    UP: tl.constexpr,
    KP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    CHUNKS: tl.constexpr,
    FLIP: tl.constexpr,
):
    """RMS and Mish of pre-activations that the group's programs hold in parts.

    Returns this program's xhat and output, ``[BN, BM]``, the rows' rstd, and all programs' outputs
    as an operand ``[KP, BM]``.
    """
    G: tl.constexpr = UP // BN
    GP: tl.constexpr = triton.next_power_of_2(G)
    j = tl.arange(0, BM)
    rows = group * BM + j
    own = rows[None, :] * UP + (tile * BN + tl.arange(0, BN))[:, None]
    slots += group * G * BM
    tl.store(slots + tile * BM + j, tl.sum(h * h, axis=0))
    target += G
    ok = _exchange(counter, target, ok, limit)
    squares = tl.sum(_parts(slots, G, GP, BM), axis=0)
    rstd = tl.rsqrt(squares / width + eps)
    xhat = h * rstd[None, :]
    y = mish(xhat * gamma[:, None] + beta[:, None])
    tl.store(board + own, operand(rounded(y, DTYPE), PRECISION))
    target += G
    ok = _exchange(counter, target, ok, limit)
    full = _gather(board, rows, UP, KP, CHUNKS, FLIP)
    return xhat, y, rstd, full, target, ok


@triton.jit(do_not_specialize=["batch", "steps", "evals", "substeps", "limit"])
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
    counter = counters_ptr + group * 32
    size = batch.to(tl.int64) * UP  # of one evaluation's or macro step's tensor

    w2 = _slice(w2_ptr, w2_n, w2_k, n, UP, KP, PRECISION, CHUNKS, FLIP)
    tl.debug_barrier()  # one slice at a time through the registers
    w13 = _slice(w13_ptr, w13_n, w13_k, n, UP, KP, PRECISION, CHUNKS, FLIP)
    tl.debug_barrier()
    gamma1, beta1 = tl.load(gamma1_ptr + n), tl.load(beta1_ptr + n)
    gamma2, beta2 = tl.load(gamma2_ptr + n), tl.load(beta2_ptr + n)
    b2, b13 = tl.load(b2_ptr + n), tl.load(b13_ptr + n)
    w_tau = tl.load(tau_ptr + n)

    p = tl.load(p_ptr + offs, mask=mask, other=0.0)
    stage = p
    first = tl.zeros([BN, BM], tl.float32)
    target = 0
    ok = 1
    for t in range(steps):
        c = tl.load(c_ptr + t * size + offs, mask=mask, other=0.0)
        total = tl.zeros([BN, BM], tl.float32)
        for e in range(evals):
            at = t * evals + e
            number = e
            if HEUN:
                number = (e >> 1) + (e & 1)
            tau = _flow_time(number, substeps)
            h = stage + (c + tau * w_tau[:, None])
            xhat, y, rstd, full, target, ok = _hidden(
                h,
                gamma1,
                beta1,
                board1_ptr,
                slots1_ptr,
                counter,
                target,
                ok,
                limit,
                tile,
                group,
                width1,
                eps1,
                UP,
                KP,
                BM,
                BN,
                DTYPE,
                PRECISION,
                CHUNKS,
                FLIP,
            )
            if SAVE:
                tl.store(xhat1_ptr + at * size + offs, rounded(xhat, DTYPE), mask=mask)
                tl.store(rstd1_ptr + at * batch + m, rstd, mask=rows & (tile == 0))
            if KEEP:
                tl.store(y1_ptr + at * size + offs, rounded(y, DTYPE), mask=mask)
            h = _product(w2, full, nil, PRECISION, CHUNKS, FLIP) + b2[:, None]
            xhat, y, rstd, full, target, ok = _hidden(
                h,
                gamma2,
                beta2,
                board2_ptr,
                slots2_ptr,
                counter,
                target,
                ok,
                limit,
                tile,
                group,
                width2,
                eps2,
                UP,
                KP,
                BM,
                BN,
                DTYPE,
                PRECISION,
                CHUNKS,
                FLIP,
            )
            if SAVE:
                tl.store(xhat2_ptr + at * size + offs, rounded(xhat, DTYPE), mask=mask)
                tl.store(rstd2_ptr + at * batch + m, rstd, mask=rows & (tile == 0))
            if KEEP:
                tl.store(y2_ptr + at * size + offs, y, mask=mask)
            q = _product(w13, full, nil, PRECISION, CHUNKS, FLIP) + b13[:, None]
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
            # A program that waited in vain makes its rows NaN, here and in all that follows.
            lost = tl.where(ok != 0, 0.0, float("nan"))
            p += lost
            stage += lost
            total += lost
        tl.store(sum_ptr + t * size + offs, rounded(total, sum_ptr.dtype.element_ty), mask=mask)
    tl.store(p_out_ptr + offs, p, mask=mask)


@triton.jit
def _adjoint(
    dy,
    xhat,
    gamma,
    beta,
    slots,
    base,
    counter,
    target,
    ok,
    limit,
    rstd,
    tile,
    group,
    width,
    UP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Adjoint of :func:`_hidden` towards its ``h``, from the one towards its output.

    Returns it, ``[BN, BM]``, with ``du`` (towards LayerNorm's output) and, over all
    features of a row, the largest ``|dh|`` but for a factor up to ``1 + |xhat|``, and ``|base|``.
    """
    G: tl.constexpr = UP // BN
    GP: tl.constexpr = triton.next_power_of_2(G)
    j = tl.arange(0, BM)
    stride: tl.constexpr = G * BM
    slots += group * 3 * stride
    du = dy * mish_slope(xhat * gamma[:, None] + beta[:, None])
    g = du * gamma[:, None]
    tl.store(slots + tile * BM + j, tl.sum(g * xhat, axis=0))
    tl.store(slots + stride + tile * BM + j, tl.max(tl.abs(g), axis=0))
    tl.store(slots + 2 * stride + tile * BM + j, tl.max(tl.abs(base), axis=0))
    target += G
    ok = _exchange(counter, target, ok, limit)
    inner = tl.sum(_parts(slots, G, GP, BM), axis=0) / width
    largest = tl.max(_parts(slots + stride, G, GP, BM), axis=0) * rstd
    largest_base = tl.max(_parts(slots + 2 * stride, G, GP, BM), axis=0)
    dh = (g - xhat * inner[None, :]) * rstd[None, :]
    return dh, du, largest, largest_base, target, ok


@triton.jit
def _publish(
    x,
    inverse,
    board,
    counter,
    target,
    ok,
    limit,
    tile,
    group,
    UP: tl.constexpr,
    KP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    CHUNKS: tl.constexpr,
    FLIP: tl.constexpr,
):
    """All programs' ``x * inverse`` as an operand ``[KP, BM]``, and this one's."""
    G: tl.constexpr = UP // BN
    rows = group * BM + tl.arange(0, BM)
    mine = rounded(x * inverse[None, :], DTYPE)
    at = board + rows[None, :] * UP + (tile * BN + tl.arange(0, BN))[:, None]
    tl.store(at, operand(mine, PRECISION))
    target += G
    ok = _exchange(counter, target, ok, limit)
    return mine, _gather(board, rows, UP, KP, CHUNKS, FLIP), target, ok


@triton.jit
def _scale(x, SCALED: tl.constexpr):
    if SCALED:
        exponent = row_exponent(x)
        scale, inverse = power(exponent), power(254 - exponent)
    else:
        scale = tl.zeros_like(x) + 1.0
        inverse = scale
    return scale, inverse


@triton.jit(do_not_specialize=["batch", "steps", "evals", "substeps", "limit"])
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
    HEUN: tl.constexpr,
    KEEP: tl.constexpr,
    SCALED: tl.constexpr,
):
    """Adjoint of the forward kernel; see :func:`pwm_fast.kernels.rollout.rollout_backward`.

    ``w2`` and ``w13`` are read as their transposes: rows are the features that an adjoint goes to.
    """
    G: tl.constexpr = UP // BN
    GP: tl.constexpr = triton.next_power_of_2(G)
    group = tl.program_id(0) // G
    tile = tl.program_id(0) % G
    n = tile * BN + tl.arange(0, BN)
    j = tl.arange(0, BM)
    m = group * BM + j
    offs = m[None, :] * UP + n[:, None]
    rows = m < batch
    mask = rows[None, :] & (n[:, None] >= 0)
    counter = counters_ptr + group * 32
    size = batch.to(tl.int64) * UP  # of one evaluation's or macro step's tensor

    w2 = _slice(w2_ptr, w2_n, w2_k, n, UP, KP, PRECISION, CHUNKS, FLIP)
    tl.debug_barrier()  # one slice at a time through the registers
    w13 = _slice(w13_ptr, w13_n, w13_k, n, UP, KP, PRECISION, CHUNKS, FLIP)
    tl.debug_barrier()
    gamma1, beta1 = tl.load(gamma1_ptr + n), tl.load(beta1_ptr + n)
    gamma2, beta2 = tl.load(gamma2_ptr + n), tl.load(beta2_ptr + n)

    lp = tl.load(lp_ptr + offs, mask=mask, other=0.0)
    late = tl.zeros([BN, BM], tl.float32)  # the second stage's dh1
    share = dt
    if HEUN:
        share = 0.5 * dt
    dq = share * lp
    # How large a row of the first dq is. Like everything in slots1, it is read before board1 is
    # published and written again after that.
    slots = slots1_ptr + group * 3 * G * BM
    tl.store(slots + tile * BM + j, tl.max(tl.abs(dq), axis=0))
    target = G
    ok = _exchange(counter, target, 1, limit)
    dq_scale, dq_inverse = _scale(tl.max(_parts(slots, G, GP, BM), axis=0), SCALED)

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

            mine, full, target, ok = _publish(
                dq,
                dq_inverse,
                board1_ptr,
                counter,
                target,
                ok,
                limit,
                tile,
                group,
                UP,
                KP,
                BM,
                BN,
                DTYPE,
                PRECISION,
                CHUNKS,
                FLIP,
            )
            if KEEP:
                tl.store(dq_ptr + at * size + offs, mine, mask=mask)
                if SCALED:
                    tl.store(dq_scale_ptr + at * batch + m, dq_scale, mask=rows & (tile == 0))
                sum_b13 += dq
            dy = _product(w13, full, nil, PRECISION, CHUNKS, FLIP) * dq_scale[None, :] + share * g
            dh, du, largest, _, target, ok = _adjoint(
                dy,
                xhat2,
                gamma2,
                beta2,
                slots2_ptr,
                lp,
                counter,
                target,
                ok,
                limit,
                rstd2,
                tile,
                group,
                width2,
                UP,
                BM,
                BN,
            )
            if KEEP:
                sum_gamma2 += du * xhat2
                sum_beta2 += du
                sum_b2 += dh
            scale, inverse = _scale(largest, SCALED)
            mine, full, target, ok = _publish(
                dh,
                inverse,
                board2_ptr,
                counter,
                target,
                ok,
                limit,
                tile,
                group,
                UP,
                KP,
                BM,
                BN,
                DTYPE,
                PRECISION,
                CHUNKS,
                FLIP,
            )
            if KEEP:
                tl.store(dh2_ptr + at * size + offs, mine, mask=mask)
                if SCALED:
                    tl.store(dh2_scale_ptr + at * batch + m, scale, mask=rows & (tile == 0))
            dy = _product(w2, full, nil, PRECISION, CHUNKS, FLIP) * scale[None, :]
            base = lp + late
            dh, du, largest, largest_base, target, ok = _adjoint(
                dy,
                xhat1,
                gamma1,
                beta1,
                slots1_ptr,
                base,
                counter,
                target,
                ok,
                limit,
                rstd1,
                tile,
                group,
                width1,
                UP,
                BM,
                BN,
            )
            lost = tl.where(ok != 0, 0.0, float("nan"))  # see the forward kernel
            dh += lost
            if KEEP:
                sum_gamma1 += du * xhat1
                sum_beta1 += du
                number = e
                if HEUN:
                    number = (e >> 1) + (e & 1)
                sum_tau += _flow_time(number, substeps) * dh
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
