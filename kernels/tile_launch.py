"""Launches of the fused products: checks, what the plan decides, cooperative where they wait."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from pwm_fast.kernels.launch import settle
from pwm_fast.kernels.plan import TILES, Exchange, Plan

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


def check_act(what: str, act: str) -> None:
    """Raise ValueError for an activation that is neither Mish nor none."""
    if act not in ("none", "mish"):
        raise ValueError(f'{what}: act must be "none" or "mish", got {act!r}')


def constants_of(name: str, plan: Plan, n: int, k: int, input_precision: str) -> dict[str, Any]:
    """The compile-time arguments that a plan decides, of the kernel ``name`` of :data:`TILES`."""
    tiles = TILES[name]
    found = {
        "BLOCK_M": plan.block_m,
        "BLOCK_N": plan.block_n,
        "BLOCK_K": plan.block_k,
        # What is masked for most sizes is masked for all: one variant to compile instead of two.
        "EVEN_N": not tiles.masked and n % plan.block_n == 0,
        "EVEN_K": not tiles.summed and k % plan.block_k == 0,
        "PRECISION": input_precision,
    }
    if not tiles.grouped:
        found["TILES_N"] = plan.tiles_n
    if tiles.waits:
        found["TILES_2"] = 1 << (plan.tiles_n - 1).bit_length()
    return found


def launch(
    name: str,
    kernel: Any,
    plan: Plan,
    rows: int,
    arguments: Mapping[str, Any],
    input_precision: str,
    *,
    exchange: Exchange | None = None,
    members: int = 1,
) -> None:
    """Launch a kernel of the fused products, on the tensors' device and its current stream.

    Adds to ``arguments`` what the plan decides; without rows it launches nothing.

    Args:
        name: a key of :data:`pwm_fast.kernels.plan.TILES`.
        kernel: what to launch.
        plan: how.
        rows: of the result, of one member.
        arguments: all others, by name.
        input_precision: of fp32 operands.
        exchange: where programs wait for one another.
        members: of an ensemble, on a grid axis of their own.

    Raises:
        ValueError: the plan does not fit the columns, or its exchange is missing or too small.
    """
    n, k, tiles = arguments["N"], arguments["K"], TILES[name]
    if plan.tiles_n != -(-n // plan.block_n):
        raise ValueError(f"the plan's {plan.tiles_n} tiles of {plan.block_n} are not {n} columns")
    if rows == 0:
        return
    blocks = -(-rows // plan.block_m)
    weight = arguments["w"]
    if weight.dtype != torch.float32:
        input_precision = "tf32"  # of no account, so that it makes no second variant
    arguments = {**arguments, **constants_of(name, plan, n, k, input_precision)}
    if not tiles.grouped:
        arguments["groups"] = plan.groups
    if tiles.waits:
        if plan.tiles_n > 1 and not plan.waits:
            raise ValueError("the plan is made for programs that do not wait for one another")
        if plan.synced and (
            exchange is None
            or exchange.tiles_n != plan.tiles_n
            or exchange.stride < blocks * plan.block_m
        ):
            raise ValueError(f"a plan of {plan.tiles_n} column tiles needs an Exchange made for it")
        arguments |= {
            "slots": exchange.slots if exchange else None,
            "counters": exchange.counters if exchange else None,
            "stride_slot": exchange.stride if exchange else 0,
        }
    settle(kernel)
    with torch.cuda.device(weight.device) if weight.is_cuda else nullcontext():
        kernel[(blocks, members) if tiles.grouped else (plan.programs,)](
            **arguments,
            num_warps=plan.warps,
            num_stages=plan.stages,
            enable_fp_fusion=True,
            launch_cooperative_grid=tiles.waits and plan.synced,
        )
