"""Launches of the fused products: checks, what the plan decides, cooperative where they wait."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from pwm_fast.kernels.plan import Exchange, Plan

POINTER_TYPES = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}


def check_operands(
    what: str,
    x: Tensor,
    weight: Tensor,
    k: int,
    results: Mapping[str, Tensor | None],
    n: int,
) -> int:
    """Rows of a product ``x [R, k]`` with a weight of the same dtype, and ``[R, n]`` results.

    Raises:
        ValueError: what does not fit, and what was expected.
    """
    if x.dim() != 2 or x.shape[1] != k:
        raise ValueError(f"{what}: the operand must be [R, {k}], got {list(x.shape)}")
    if x.dtype != weight.dtype or x.dtype not in POINTER_TYPES:
        raise ValueError(
            f"{what}: operand and weight must both be float32, float16 or bfloat16, "
            f"got {x.dtype} and {weight.dtype}"
        )
    if x.stride(1) != 1 and x.shape[1] > 1:
        raise ValueError(f"{what}: the operand's rows must be contiguous, strides {x.stride()}")
    for name, tensor in results.items():
        if tensor is None:
            continue
        if tensor.shape != (x.shape[0], n):
            raise ValueError(f"{what}: {name} must be {[x.shape[0], n]}, got {list(tensor.shape)}")
        if tensor.stride(1) != 1 and n > 1:
            raise ValueError(f"{what}: {name}'s rows must be contiguous, got {tensor.stride()}")
    return x.shape[0]


def launch(
    kernel: Any,
    plan: Plan,
    exchange: Exchange | None,
    rows: int,
    arguments: Mapping[str, Any],
    *,
    waits: bool = True,
) -> None:
    """Launch a kernel of the fused products, on the tensors' device and its current stream.

    Adds to ``arguments`` what the plan decides. ``waits`` says that programs exchange something
    where a row lies in several tiles.

    Raises:
        ValueError: the plan does not fit the columns, or its exchange is missing or too small.
    """
    n, k = arguments["N"], arguments["K"]
    if plan.tiles_n != -(-n // plan.block_n):
        raise ValueError(f"the plan's {plan.tiles_n} tiles of {plan.block_n} are not {n} columns")
    if waits and plan.tiles_n > 1 and not plan.waits:
        raise ValueError("the plan is made for programs that do not wait for one another")
    synced = plan.synced and waits
    if synced and (
        exchange is None
        or exchange.tiles_n != plan.tiles_n
        or exchange.stride < -(-rows // plan.block_m) * plan.block_m
    ):
        raise ValueError(f"a plan of {plan.tiles_n} column tiles needs an Exchange made for it")
    weight = arguments["w"]
    arguments = {
        **arguments,
        "slots": exchange.slots if exchange else None,
        "counters": exchange.counters if exchange else None,
        "stride_slot": exchange.stride if exchange else 0,
        "groups": plan.groups,
        "BLOCK_M": plan.block_m,
        "BLOCK_N": plan.block_n,
        "BLOCK_K": plan.block_k,
        "TILES_N": plan.tiles_n,
        "TILES_2": 1 << (plan.tiles_n - 1).bit_length(),
        "EVEN_N": n % plan.block_n == 0,
        "EVEN_K": k % plan.block_k == 0,
    }
    with torch.cuda.device(weight.device) if weight.is_cuda else nullcontext():
        kernel[(plan.programs,)](
            **arguments,
            num_warps=plan.warps,
            num_stages=plan.stages,
            enable_fp_fusion=True,
            launch_cooperative_grid=synced,
        )
