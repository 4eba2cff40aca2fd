"""A policy's step in one launch: from its first layer's GEMM to the action and what follows it.

``a = tanh(mu + std noise)`` and ``c = base + a W_a^T``, the term that the next macro step of a
rollout takes, where ``mu`` is the rest of an MLP whose layers are Linear, activation, LayerNorm. A
policy is small and runs between macro steps, one small launch after another: at 128 rows each takes
about as long to start as to compute.

A program takes rows through all layers. Between two layers they pass through global memory, where
what a GEMM reads lies anyway (gradients of weights need it); nobody else reads them meanwhile,
so a barrier of the program is enough.

GEMMs take 16-bit operands and add up in float32; statistics, parameters, and all from ``mu`` on
are float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pwm_fast.kernels.gemm_tile import GemmTile, act_norm_rows, gemm
from pwm_fast.kernels.launch import check_dense, launch
from pwm_fast.kernels.pointwise import rounded, tanh

#: The widest hidden layer, and the most actions: what a tile of rows holds whole.
WIDEST, MOST_ACTIONS = 512, 128
#: Most hidden layers: each adds to the arguments and to the code.
MOST_LAYERS = 6

_OPERANDS = {torch.float16: "fp16", torch.bfloat16: "bf16"}
_BLOCK_K = 64
_TERM_BLOCK = 128  # columns of c at a time
WARPS = 8
STAGES = 3


@triton.constexpr_function
def _block(n: int) -> int:
    """Columns of a tile that holds ``n``: what a GEMM takes at least, and a power of two."""
    return max(triton.next_power_of_2(n), 16)


class PolicyLayer(NamedTuple):
    """A hidden layer.

    Attributes:
        weight: ``[N, K]`` fp16 or bf16; None of the first layer, whose GEMM is the caller's.
        bias: ``[N]`` fp32 or None.
        gamma: ``[N]`` fp32.
        beta: ``[N]`` fp32.
        act: ``"mish"`` or ``"none"``.
        eps: of the LayerNorm.
        y: ``[R, N]`` in the operands' dtype, written: the layer's output.
        u: ``[R, N]`` in the operands' dtype, written: its pre-activation; None: not kept.
        mean: ``[R]`` fp32, written, with ``rstd``; None without ``u``.
        rstd: ``[R]`` fp32.
    """

    weight: Tensor | None
    bias: Tensor | None
    gamma: Tensor
    beta: Tensor
    act: str
    eps: float
    y: Tensor
    u: Tensor | None = None
    mean: Tensor | None = None
    rstd: Tensor | None = None


@triton.jit
def _first(h, stride_h, own, R, N: tl.constexpr):
    """Rows of the first layer's GEMM, ``[BLOCK_M, N]`` and zeros up to a power of two."""
    cols = tl.arange(0, _block(N))
    far = tl.minimum(own, R - 1)[:, None].to(tl.int64)
    return tl.load(h + far * stride_h + cols[None, :], mask=(cols < N)[None, :], other=0.0)


@triton.jit
def _next(
    x,
    weight,
    own,
    R,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The GEMM of rows of K features, which this program has stored, with ``[N, K]``."""
    BLOCK: tl.constexpr = _block(N)
    T: tl.constexpr = GemmTile(BLOCK_M, BLOCK, BLOCK_K, N == BLOCK, K % BLOCK_K == 0, "tf32")
    return gemm(x, weight, tl.minimum(own, R - 1), tl.arange(0, BLOCK), N, K, K, K, 1, T)


@triton.jit
def _act_norm(
    v,
    bias,
    gamma,
    beta,
    eps,
    y,
    u,
    mean,
    rstd,
    own,
    R,
    N: tl.constexpr,
    MISH: tl.constexpr,
):
    """``norm(act(v + bias))`` of whole rows, stored."""
    cols = tl.arange(0, _block(N))
    inside = cols < N
    kept = (own < R)[:, None] & inside[None, :]
    at = own[:, None].to(tl.int64) * N + cols[None, :]
    if bias is not None:
        v += tl.load(bias + cols, mask=inside, other=0.0)[None, :]
    if u is not None:
        tl.store(u + at, rounded(v, u.dtype.element_ty), mask=kept)
    v, mu, r = act_norm_rows(v, inside, N, gamma + cols, beta + cols, eps, MISH)
    if mean is not None:
        tl.store(mean + own, mu, mask=own < R)
        tl.store(rstd + own, r, mask=own < R)
    tl.store(y + at, rounded(v, y.dtype.element_ty), mask=kept)
    tl.debug_barrier()  # the next GEMM reads what other warps have stored


@triton.jit
def policy_step_kernel(
    h,
    weights,
    biases,
    gammas,
    betas,
    epsilons,
    ys,
    us,
    means,
    rstds,
    head,
    head_bias,
    std,
    noise,
    action,
    base,
    w_a,
    c,
    R,
    U,
    stride_h,
    stride_base,
    stride_wn,
    stride_wk,
    WIDTHS: tl.constexpr,
    MISH: tl.constexpr,
    LAYERS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ACTIONS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_U: tl.constexpr,
):
    """Program p takes rows from p BLOCK_M on; tuples have an entry a hidden layer."""
    own = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    far = own[:, None].to(tl.int64)
    for i in tl.static_range(LAYERS):
        if i == 0:
            v = _first(h, stride_h, own, R, WIDTHS[i])
        else:
            v = _next(ys[i - 1], weights[i], own, R, WIDTHS[i], WIDTHS[i - 1], BLOCK_M, BLOCK_K)
        _act_norm(
            v,
            biases[i],
            gammas[i],
            betas[i],
            epsilons[i],
            ys[i],
            us[i],
            means[i],
            rstds[i],
            own,
            R,
            WIDTHS[i],
            MISH[i],
        )
    v = _next(ys[LAYERS - 1], head, own, R, ACTIONS, WIDTHS[LAYERS - 1], BLOCK_M, BLOCK_K)
    cols = tl.arange(0, _block(ACTIONS))
    inside = cols < ACTIONS
    if head_bias is not None:
        v += tl.load(head_bias + cols, mask=inside, other=0.0)[None, :]
    at = far * ACTIONS + cols[None, :]
    there = inside[None, :] & (own < R)[:, None]
    v += tl.load(noise + at, mask=there, other=0.0) * tl.load(std + cols, mask=inside, other=0.0)
    tl.store(action + at, tanh(v), mask=there)
    tl.debug_barrier()
    # More than 16 summed at once spill kilobytes.
    T: tl.constexpr = GemmTile(BLOCK_M, BLOCK_U, 16, False, False, "ieee")
    for start in range(0, U, BLOCK_U):
        columns = start + tl.arange(0, BLOCK_U)
        # Actions and their weights are float32 in every precision: they take no time.
        row = tl.minimum(own, R - 1)
        term = gemm(action, w_a, row, columns, U, ACTIONS, ACTIONS, stride_wn, stride_wk, T)
        kept = (columns < U)[None, :] & (own < R)[:, None]
        term += tl.load(base + far * stride_base + columns[None, :], mask=kept, other=0.0)
        tl.store(c + far * U + columns[None, :], term, mask=kept)


def shared_bytes(widths: Sequence[int], actions: int, block_m: int) -> int:
    """Shared memory of a program: of its widest GEMM, the operands that are on their way."""
    widest = max(_block(n) for n in (*widths[1:], actions))
    return (STAGES - 1) * (block_m + widest) * _BLOCK_K * 2


def why_not(
    widths: Sequence[int],
    acts: Sequence[str],
    actions: int,
    compute: torch.dtype,
    shared: int | None = None,
) -> str | None:
    """Why there is no such kernel for hidden layers of these widths; None if there is.

    ``shared`` is what a program may have on the device, bytes; None: enough.
    """
    if compute not in _OPERANDS:
        return f"GEMMs in {compute} run layer by layer"
    if not 1 <= len(widths) <= MOST_LAYERS:
        return f"{len(widths)} hidden layers are not 1 to {MOST_LAYERS}"
    if max(widths) > WIDEST:
        return f"rows of {max(widths)} features do not fit: at most {WIDEST}"
    if not 1 <= actions <= MOST_ACTIONS:
        return f"{actions} actions are not 1 to {MOST_ACTIONS}"
    other = set(acts) - {"mish", "none"}
    if other:
        return f"there is no activation {other.pop()!r} here"
    need = shared_bytes(widths, actions, 32)
    if shared is not None and need > shared:
        return f"its GEMMs take {need} bytes of shared memory, the device has {shared}"
    return None


def rows_of(rows: int, sms: int) -> int:
    """Rows of a program: few as long as the device has room for all programs at once.

    A multiprocessor has room for one, whose 256 threads take more than half of its registers.
    """
    return 16 if rows <= 16 * sms else 32


def policy_step(
    h: Tensor,
    layers: Sequence[PolicyLayer],
    head: Tensor,
    head_bias: Tensor | None,
    *,
    std: Tensor,
    noise: Tensor,
    base: Tensor,
    w_a: Tensor,
    action: Tensor,
    c: Tensor,
    block_m: int = 16,
) -> None:
    """The rest of a policy, its action and the hoisted term of the macro step that follows.

    Args:
        h: ``[R, N]``, or its first N columns, fp32: the first layer's GEMM without its bias.
        layers: the hidden layers, from the first to the last.
        head: ``[A, K]``, the last Linear, in the operands' dtype.
        head_bias: ``[A]`` fp32 or None.
        std: ``[A]`` fp32.
        noise: ``[R, A]`` fp32.
        base: ``[1 or R, U]`` fp32.
        w_a: ``[U, A]`` fp32, with any strides.
        action: ``[R, A]`` fp32, written.
        c: ``[R, U]`` fp32, written: ``base + action w_a^T``.
        block_m: rows of a program, 16 or 32.

    Raises:
        ValueError: shapes, dtypes or layouts do not fit.
    """
    widths = [layer.gamma.shape[0] for layer in layers]
    rows, actions, columns = h.shape[0], head.shape[0], w_a.shape[0]
    reason = why_not(widths, [layer.act for layer in layers], actions, head.dtype)
    if reason is not None:
        raise ValueError(f"policy_step: {reason}")
    _check(h, layers, widths, head, rows)
    fp32 = {
        "std": (std, (actions,)),
        "noise": (noise, (rows, actions)),
        "action": (action, (rows, actions)),
        "c": (c, (rows, columns)),
    }
    if head_bias is not None:
        fp32["head_bias"] = head_bias, (actions,)
    for name, (x, shape) in fp32.items():
        check_dense(f"policy_step: {name}", x, shape, torch.float32)
    if w_a.shape != (columns, actions) or w_a.dtype != torch.float32:
        raise ValueError(f"policy_step: w_a must be float32 [U, {actions}], got {list(w_a.shape)}")
    if base.shape not in {(1, columns), (rows, columns)} or base.dtype != torch.float32:
        raise ValueError(
            f"policy_step: base must be float32 [1 or {rows}, {columns}], got {list(base.shape)}"
        )
    base = base.contiguous()
    launch(
        policy_step_kernel,
        (triton.cdiv(rows, block_m),),
        h,
        tuple(None if p.weight is None else p.weight.contiguous() for p in layers),
        tuple(p.bias for p in layers),
        tuple(p.gamma for p in layers),
        tuple(p.beta for p in layers),
        tuple(p.eps for p in layers),
        tuple(p.y for p in layers),
        tuple(p.u for p in layers),
        tuple(p.mean for p in layers),
        tuple(p.rstd for p in layers),
        head.contiguous(),
        head_bias,
        std,
        noise,
        action,
        base,
        w_a,
        c,
        rows,
        columns,
        h.stride(0),
        columns if base.shape[0] > 1 else 0,
        w_a.stride(0),
        w_a.stride(1),
        **constants_of(widths, [p.act for p in layers], actions, block_m),
        num_warps=WARPS,
        num_stages=STAGES,
    )


def constants_of(
    widths: Sequence[int], acts: Sequence[str], actions: int, block_m: int
) -> dict[str, Any]:
    """What the kernel is compiled for."""
    return {
        "WIDTHS": tuple(widths),
        "MISH": tuple(act == "mish" for act in acts),
        "LAYERS": len(widths),
        "BLOCK_M": block_m,
        "ACTIONS": actions,
        "BLOCK_K": _BLOCK_K,
        "BLOCK_U": _TERM_BLOCK,
    }


def _check(
    h: Tensor, layers: Sequence[PolicyLayer], widths: Sequence[int], head: Tensor, rows: int
) -> None:
    compute = head.dtype
    if h.dim() != 2 or h.dtype != torch.float32 or h.shape[1] < widths[0] or h.stride(1) != 1:
        raise ValueError(
            f"policy_step: h must be float32 [R, {widths[0]}] with contiguous rows, got {h.dtype} "
            f"{list(h.shape)} with strides {h.stride()}"
        )
    if head.dim() != 2 or head.shape[1] != widths[-1]:
        raise ValueError(f"policy_step: head must be [A, {widths[-1]}], got {list(head.shape)}")
    for i, (layer, n) in enumerate(zip(layers, widths, strict=True)):
        vectors = {"bias": layer.bias, "gamma": layer.gamma, "beta": layer.beta}
        for name, x in vectors.items():
            if x is not None:
                check_dense(f"policy_step: layer {i}'s {name}", x, (n,), torch.float32)
        for name, x in {"y": layer.y, "u": layer.u}.items():
            if x is not None:
                check_dense(f"policy_step: layer {i}'s {name}", x, (rows, n), compute)
        for name, x in {"mean": layer.mean, "rstd": layer.rstd}.items():
            if x is not None:
                check_dense(f"policy_step: layer {i}'s {name}", x, (rows,), torch.float32)
        if (layer.weight is None) != (i == 0):
            raise ValueError("policy_step: all layers but the first have a weight")
        if layer.weight is not None:
            shape = (n, widths[i - 1])
            if layer.weight.shape != shape or layer.weight.dtype != compute:
                raise ValueError(
                    f"policy_step: layer {i}'s weight must be {list(shape)} of {compute}, got "
                    f"{list(layer.weight.shape)} of {layer.weight.dtype}"
                )
