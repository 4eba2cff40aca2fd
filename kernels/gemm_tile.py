"""Tiles of fused GEMMs: on the device GEMM, row statistics, partial sums; on the host the launch.

A program owns one tile ``[BLOCK_M, BLOCK_N]`` of a result ``[R, N]``. Where a row lies in several
tiles, their programs exchange partial sums of it through *slots* in global memory: each writes its
own, adds to the row block's counter and waits until all have; then each reads all slots in the same
order, so that all come to the same bits, run after run. That needs all programs on the device at
once: such launches are cooperative and no larger than it holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pwm_fast.kernels.launch import settle
from pwm_fast.kernels.plan import TILES, GemmPlan
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

_POLLS = tl.constexpr(POLLS)


class GemmTile(NamedTuple):
    """What a GEMM is compiled for, as device functions pass it on; all are constants.

    Attributes:
        BLOCK_M: rows.
        BLOCK_N: columns.
        BLOCK_K: summed at once.
        EVEN_N: columns are a multiple of the tile's: they are not masked.
        EVEN_K: what is summed is a multiple of BLOCK_K, likewise.
        PRECISION: of fp32 operands.
    """

    BLOCK_M: Any
    BLOCK_N: Any
    BLOCK_K: Any
    EVEN_N: Any
    EVEN_K: Any
    PRECISION: Any


@triton.jit
def gemm(x, w, rows, cols, N, K, stride_x, stride_wn, stride_wk, T: tl.constexpr):
    """``x[rows] w[cols]^T`` in fp32; columns from N on give 0. ``rows`` are valid ones."""
    ks = tl.arange(0, T.BLOCK_K)
    a = x + rows[:, None].to(tl.int64) * stride_x + ks[None, :]
    b = w + ks[:, None] * stride_wk + cols[None, :] * stride_wn
    acc = tl.zeros([T.BLOCK_M, T.BLOCK_N], dtype=tl.float32)
    for k in range(0, K, T.BLOCK_K):
        if T.EVEN_K:
            at = tl.load(a)
            bt = tl.load(b) if T.EVEN_N else tl.load(b, mask=cols[None, :] < N, other=0.0)
        else:
            at = tl.load(a, mask=ks[None, :] < K - k, other=0.0)
            bt = tl.load(b, mask=(ks[:, None] < K - k) & (cols[None, :] < N), other=0.0)
        at, bt = operand(at, T.PRECISION), operand(bt, T.PRECISION)
        acc = tl.dot(at, bt, acc, input_precision=T.PRECISION)
        a += T.BLOCK_K
        b += T.BLOCK_K * stride_wk
    return acc


@triton.jit
def act_norm_rows(v, inside, N, gamma, beta, eps, MISH: tl.constexpr):
    """LayerNorm after Mish or nothing, of whole rows that are 0 beyond their N columns ``inside``.

    ``gamma`` and ``beta`` point to the columns. Returns the rows, their means and their rstd.
    """
    if MISH:
        v = mish(v)  # 0 beyond the row's end, as the GEMM is
    mu = tl.sum(v, 1) / N
    v = tl.where(inside[None, :], v - mu[:, None], 0.0)
    r = tl.rsqrt(tl.sum(v * v, 1) / N + eps)
    v = v * r[:, None] * tl.load(gamma, mask=inside, other=0.0)[None, :]
    return v + tl.load(beta, mask=inside, other=0.0)[None, :], mu, r


@triton.jit
def barrier(counter, TILES: tl.constexpr):
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
def store_partial(slots, plane, tile, rows, values, stride, TILES: tl.constexpr):
    """Write this tile's values of its rows; ``slots`` is ``[planes, TILES, stride]``."""
    tl.store(slots + (plane * TILES + tile) * stride + rows, values)


@triton.jit
def load_partials(slots, plane, rows, stride, TILES: tl.constexpr, TILES_2: tl.constexpr):
    """All tiles' values of the rows, ``[TILES_2, rows]``, 0 beyond ``TILES``."""
    tiles = tl.arange(0, TILES_2)
    at = slots + (plane * TILES + tiles[:, None]) * stride + rows[None, :]
    return tl.load(at, mask=tiles[:, None] < TILES, other=0.0, volatile=True)


# --- on the host ----------------------------------------------------------------------------------

POINTER_TYPES = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}


def check_operands(
    what: str,
    x: Tensor,
    weight: Tensor,
    k: int,
    results: Mapping[str, Tensor | None],
    n: int,
) -> int:
    """Rows of a GEMM ``x [R, k]`` with a weight of the same dtype, and ``[R, n]`` results.

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


def constants_of(name: str, plan: GemmPlan, n: int, k: int, input_precision: str) -> dict[str, Any]:
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
    plan: GemmPlan,
    rows: int,
    arguments: Mapping[str, Any],
    input_precision: str,
    *,
    exchange: Exchange | None = None,
    members: int = 1,
) -> None:
    """Launch a kernel of the fused GEMMs, on the tensors' device and its current stream.

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


class Exchange:
    """Slots of partial sums and counters of barriers, for launches on one stream.

    Counters start from zero and only grow, so whoever runs a sequence of launches makes one of
    these at its beginning (in a captured sequence the zeroing is part of the graph) and never
    shares it with launches that may run at the same time.

    Args:
        plan: of the launches.
        rows: of their results.
        planes: values a row and tile; the most that any of the launches exchanges.
        device: of the tensors.
    """

    def __init__(self, plan: GemmPlan, rows: int, planes: int, device: torch.device) -> None:
        tiles_m = -(-rows // plan.block_m)
        self.stride = tiles_m * plan.block_m
        self.planes = planes
        self.tiles_n = plan.tiles_n
        size = planes * plan.tiles_n * self.stride
        self.slots = torch.empty(size, dtype=torch.float32, device=device)
        self.counters = torch.zeros(tiles_m * COUNTER_STRIDE, dtype=torch.int32, device=device)
