"""A GEMM that ends in an integrator's update: ``out = c0 z + c1 k1 + c2 (x W^T + bias)``.

An Euler or Heun step after a velocity head is one kernel, and so is a gradient's step after the
GEMM with a first layer's weight; the next GEMM's operand is written beside the state.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from pwm_fast.kernels.gemm_tile import GemmTile, check_operands, gemm, launch
from pwm_fast.kernels.plan import GemmPlan
from pwm_fast.kernels.pointwise import rounded


@triton.jit
def linear_axpby_kernel(
    x,
    x_scale,
    w,
    bias,
    z,
    k1,
    out,
    raw,
    operand,
    R,
    N,
    K,
    groups,
    stride_x,
    stride_wn,
    stride_wk,
    stride_z,
    stride_k1,
    stride_out,
    stride_raw,
    stride_operand,
    c0,
    c1,
    c2,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILES_N: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid as in ``linear_norm_act``; no program waits for another."""
    T: tl.constexpr = GemmTile(BLOCK_M, BLOCK_N, BLOCK_K, EVEN_N, EVEN_K, PRECISION)
    for part in range(tl.program_id(0), tl.cdiv(R, BLOCK_M) * TILES_N, groups * TILES_N):
        tile = part % TILES_N
        block = part // TILES_N
        cols = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = cols < N
        rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
        valid = tl.minimum(rows, R - 1)
        far = valid[:, None].to(tl.int64)
        kept = (rows < R)[:, None] & inside[None, :]
        h = gemm(x, w, valid, cols, N, K, stride_x, stride_wn, stride_wk, T)
        if x_scale is not None:
            h *= tl.load(x_scale + valid)[:, None]
        if bias is not None:
            h += tl.load(bias + cols, mask=inside, other=0.0)[None, :]
        if raw is not None:
            tl.store(raw + far * stride_raw + cols[None, :], h, mask=kept)
        old = tl.load(z + far * stride_z + cols[None, :], mask=inside[None, :], other=0.0)
        h = c0 * old + c2 * h
        if k1 is not None:
            at = k1 + far * stride_k1 + cols[None, :]
            h += c1 * tl.load(at, mask=inside[None, :], other=0.0)
        if out is not None:
            tl.store(out + far * stride_out + cols[None, :], h, mask=kept)
        if operand is not None:
            at = operand + far * stride_operand + cols[None, :]
            tl.store(at, rounded(h, operand.dtype.element_ty), mask=kept)


def linear_axpby(
    x: Tensor,
    weight: Tensor,
    z: Tensor,
    k1: Tensor | None,
    out: Tensor | None,
    c0: float,
    c1: float,
    c2: float,
    *,
    plan: GemmPlan,
    bias: Tensor | None = None,
    x_scale: Tensor | None = None,
    raw: Tensor | None = None,
    cast: Tensor | None = None,
    input_precision: str = "tf32",
) -> None:
    """``out = c0 z + c1 k1 + c2 p`` with ``p = x_scale x weight^T + bias``.

    Forward Euler is ``(1, 0, dt)``; Heun's second stage ``(1, dt / 2, dt / 2)`` with the first
    stage's ``raw`` as ``k1``. For a step of the backward pass ``weight.t()`` and ``x_scale``.

    Args:
        x: ``[R, K]``, the operand.
        weight: ``[N, K]`` of the same dtype, with any strides.
        z: ``[R, N]`` fp32.
        k1: ``[R, N]`` fp32 or None.
        out: ``[R, N]`` fp32, written; None where only ``cast`` is wanted. May be ``z`` or
            ``k1``.
        c0: factor of ``z``.
        c1: factor of ``k1``.
        c2: factor of the GEMM.
        plan: how to launch it.
        bias: ``[N]`` fp32.
        x_scale: ``[R]`` fp32, row scales of ``x``.
        raw: ``[R, N]`` fp32, written: the GEMM ``p`` itself.
        cast: ``[R, N]`` fp16, bf16 or fp32, written: ``out`` for the next GEMM; what fp16
            cannot hold is infinite.
        input_precision: of fp32 operands: ``"tf32"`` or ``"ieee"``.

    Raises:
        ValueError: tensors that do not fit one another or the plan.
    """
    n, k = weight.shape
    results = {"z": z, "k1": k1, "out": out, "raw": raw, "cast": cast}
    rows = check_operands("linear_axpby", x, weight, k, results, n)
    if bias is not None and (bias.shape != (n,) or not bias.is_contiguous()):
        raise ValueError(f"linear_axpby: bias must be contiguous, [{n}], got {list(bias.shape)}")
    launch(
        "linear_axpby",
        linear_axpby_kernel,
        plan,
        rows,
        {
            "x": x,
            "x_scale": x_scale,
            "w": weight,
            "bias": bias,
            "z": z,
            "k1": k1,
            "out": out,
            "raw": raw,
            "operand": cast,
            "R": rows,
            "N": n,
            "K": k,
            "stride_x": x.stride(0),
            "stride_wn": weight.stride(0),
            "stride_wk": weight.stride(1),
            "stride_z": z.stride(0),
            "stride_k1": 0 if k1 is None else k1.stride(0),
            "stride_out": 0 if out is None else out.stride(0),
            "stride_raw": 0 if raw is None else raw.stride(0),
            "stride_operand": 0 if cast is None else cast.stride(0),
            "c0": c0,
            "c1": c1,
            "c2": c2,
        },
        input_precision,
    )
