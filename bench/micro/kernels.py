"""Triton kernels that measure the machine, for :mod:`bench.micro`; nothing else uses them."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def read(x, out, blocks, repeats, BLOCK: tl.constexpr, PROGRAMS: tl.constexpr, AHEAD: tl.constexpr):
    """Every program sums its share of ``blocks`` blocks of ``x``, several times, past its L1.

    ``AHEAD`` loads are in flight.
    """
    pid = tl.program_id(0)
    offsets = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(repeats):
        for i in range(pid, blocks, PROGRAMS * AHEAD):
            for j in tl.static_range(AHEAD):
                block = i + j * PROGRAMS
                place = x + block.to(tl.int64) * BLOCK + offsets
                mask = (block < blocks) & (offsets < BLOCK)
                total += tl.load(place, mask=mask, other=0.0, cache_modifier=".cg")
    tl.store(out + pid, tl.sum(total, 0))


@triton.jit
def flags(flag, out, rounds, LIMIT: tl.constexpr):
    """Two programs, which must run at once, pass a number to and fro through L2.

    Program p waits until the other's flag says it is its turn and then sets its own. Every wait
    gives up after ``LIMIT`` looks, and ``out[p]`` holds the rounds that worked.
    """
    me = tl.program_id(0)
    mine, other = flag + me * 64, flag + (1 - me) * 64  # lines of their own
    done = 0
    going = 1
    for i in range(rounds):
        wanted = i + 1 - me  # program 1 moves first, to 1; then 0 follows to 1
        looks = 0
        seen = tl.atomic_add(other, 0, sem="acquire", scope="gpu")
        while (seen < wanted) & (looks < LIMIT) & (going > 0):
            seen = tl.atomic_add(other, 0, sem="acquire", scope="gpu")
            looks += 1
        going = tl.where(seen >= wanted, going, 0)
        tl.atomic_xchg(mine, i + 1, sem="release", scope="gpu")
        done += going
    tl.store(out + me, done)


@triton.jit
def clock(out, cycles):
    """Cycles of the multiprocessor's clock and nanoseconds that pass meanwhile."""
    kind: tl.constexpr = "=l"
    start = tl.inline_asm_elementwise(
        "mov.u64 $0, %clock64;", kind, [], dtype=tl.int64, is_pure=False, pack=1
    )
    began = tl.inline_asm_elementwise(
        "mov.u64 $0, %globaltimer;", kind, [], dtype=tl.int64, is_pure=False, pack=1
    )
    now = start
    while now - start < cycles:
        now = tl.inline_asm_elementwise(
            "mov.u64 $0, %clock64;", kind, [], dtype=tl.int64, is_pure=False, pack=1
        )
    ended = tl.inline_asm_elementwise(
        "mov.u64 $0, %globaltimer;", kind, [], dtype=tl.int64, is_pure=False, pack=1
    )
    tl.store(out, now - start)
    tl.store(out + 1, ended - began)


READ_BLOCK, READ_AHEAD, READ_WARPS = 4096, 4, 8
LARGE = 2**30  # float32s that are read
ROUNDS, CYCLES, LIMIT = 2000, 20_000_000, 100_000


class Read(NamedTuple):
    """Sizes of a launch of :func:`read`."""

    blocks: int
    programs: int
    repeats: int


def reads(sms: int) -> dict[str, Read]:
    """By name of the reading; 732 blocks are 12 MB, which L2 holds."""
    return {
        "L2 read by one SM": Read(732, 1, 8),
        "L2 read, 12 MB": Read(732, 2 * sms, 100),
        "HBM read": Read(LARGE // READ_BLOCK, 2 * sms, 1),
    }


def start_flags(flag: Tensor, out: Tensor) -> None:
    """Launch :func:`flags`."""
    flags[(2,)](flag, out, ROUNDS, LIMIT=LIMIT, num_warps=1)


def start_read(source: Tensor, out: Tensor, repeats: int) -> None:
    """Launch :func:`read` with a program for each number of ``out``."""
    programs, size = out.numel(), {"BLOCK": READ_BLOCK, "AHEAD": READ_AHEAD}
    blocks = source.numel() // READ_BLOCK
    launch = read[(programs,)]
    launch(source, out, blocks, repeats, PROGRAMS=programs, **size, num_warps=READ_WARPS)


def start_clock(out: Tensor) -> None:
    """Launch :func:`clock`."""
    clock[(1,)](out, CYCLES, num_warps=1)


def start_all(device: torch.device, sms: int) -> None:
    """Launch each as :mod:`bench.micro` does, on tensors without values."""
    x, integers = (torch.empty(LARGE, dtype=d, device=device) for d in (torch.float32, torch.int32))
    start_flags(integers, integers)
    for way in reads(sms).values():
        start_read(x[: way.blocks * READ_BLOCK], x[: way.programs], way.repeats)
    start_clock(torch.empty(2, dtype=torch.int64, device=device))
