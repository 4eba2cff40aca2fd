"""Adam with clipping that skips what is not finite: two launches for all tensors of a rate.

The first leaves the sum of squares of every chunk of the gradients, float64. The programs of the
second each add those up in one order, so all know the norm, the factor that clips, and whether the
step is to be taken, and nothing waits for it: not the host, and no program for another.

Addresses are arguments of the launch, not a table in memory: gradients lie elsewhere in every step,
and a captured graph keeps arguments by itself.

Source: Kingma and Ba 2015, "Adam: a method for stochastic optimization", algorithm 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pwm_fast.kernels.launch import launch
from pwm_fast.kernels.table import chunk_of

if TYPE_CHECKING:
    from pwm_fast.backends.optimizer import Group

BLOCK = 1024  # elements that a program holds
SLOTS = 256  # sums of squares that are added at a time
MOST = 64  # tensors of a launch, whose addresses fit its 4 KB of arguments


@triton.jit
def _find(c, FIRST: tl.constexpr, SIZES: tl.constexpr, CHUNK: tl.constexpr):
    """Of chunk ``c``: its tensor, its first element there, and how many it has."""
    tensor = 0
    first = 0
    size = SIZES[0]
    for j in tl.static_range(1, len(SIZES)):
        after = c >= FIRST[j]
        tensor = tl.where(after, j, tensor)
        first = tl.where(after, FIRST[j], first)
        size = tl.where(after, SIZES[j], size)
    start = (c - first).to(tl.int64) * CHUNK
    return tensor, start, tl.minimum(size - start, CHUNK).to(tl.int32)


@triton.jit
def _pointer(tensors, tensor, SIZES: tl.constexpr, ALIGNED: tl.constexpr):
    """Pointer to one of the tensors, by its number."""
    address = tensors[0].to(tl.int64)
    for j in tl.static_range(1, len(SIZES)):
        address = tl.where(tensor == j, tensors[j].to(tl.int64), address)
    pointer = address.to(tl.pointer_type(tl.float32))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, [16])
    return pointer


@triton.jit
def squares_kernel(
    grads,
    slots,
    steps,
    before,
    tensors,
    FIRST: tl.constexpr,
    SIZES: tl.constexpr,
    ALIGNED: tl.constexpr,
    TENSORS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``slots[c] =`` sum of squares of a chunk; ``before`` gets a copy of the step counts.

    The programs of :func:`adam_kernel` read step counts there: one of them writes them.
    """
    c = tl.program_id(0)
    tensor, start, n = _find(c, FIRST, SIZES, CHUNK)
    pointer = _pointer(grads, tensor, SIZES, ALIGNED) + start
    total = tl.zeros([BLOCK], tl.float64)
    for base in range(0, n, BLOCK):
        i = base + tl.arange(0, BLOCK)
        x = tl.load(pointer + i, mask=i < n, other=0.0).to(tl.float64)
        total += x * x
    tl.store(slots + c, tl.sum(total, axis=0))
    if c == 0:
        t = tl.arange(0, TENSORS)
        tl.store(before + t, tl.load(steps + t, mask=t < tensors), mask=t < tensors)


@triton.jit
def adam_kernel(
    weights,
    grads,
    means,
    squares,
    slots,
    before,
    steps,
    rate,
    settings,
    loss,
    norm,
    skipped,
    in_a_row,
    count,
    FIRST: tl.constexpr,
    SIZES: tl.constexpr,
    ALIGNED: tl.constexpr,
    LEAD: tl.constexpr,
    KEEP: tl.constexpr,
    CHUNK: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One chunk of the parameters and moments; ``count`` slots hold the sums of squares.

    ``settings``: both betas, epsilon and the largest norm, float64. ``LEAD``: this launch writes
    the norm and the counts of skips; ``KEEP``: clipped gradients are written back.
    """
    c = tl.program_id(0)
    sums = tl.zeros([SLOTS], tl.float64)
    for base in range(0, count, SLOTS):
        j = base + tl.arange(0, SLOTS)
        sums += tl.load(slots + j, mask=j < count, other=0.0)
    total = tl.sqrt(tl.sum(sums, axis=0))  # of finite gradients finite, also beyond float32
    finite = (total < float("inf")) & (tl.abs(tl.load(loss)) < float("inf"))  # a NaN is not below
    beta1, beta2 = tl.load(settings), tl.load(settings + 1)
    epsilon, most = tl.load(settings + 2).to(tl.float32), tl.load(settings + 3)
    factor = tl.minimum(most / (total + 1e-6), 1.0).to(tl.float32)
    tensor, start, n = _find(c, FIRST, SIZES, CHUNK)
    if KEEP:
        g_pointer = _pointer(grads, tensor, SIZES, ALIGNED) + start
        for base in range(0, n, BLOCK):
            i = base + tl.arange(0, BLOCK)
            g = tl.load(g_pointer + i, mask=i < n, other=0.0) * factor
            tl.store(g_pointer + i, g, mask=i < n)
        tl.debug_barrier()  # nothing says that the threads below read what they have written here
    if finite:
        step = tl.load(before + tensor) + 1.0
        if start == 0:
            tl.store(steps + tensor, step)
        left1 = 1.0 - tl.exp(step.to(tl.float64) * tl.log(beta1))
        left2 = 1.0 - tl.exp(step.to(tl.float64) * tl.log(beta2))
        size = (tl.load(rate).to(tl.float64) / left1).to(tl.float32)
        root = tl.sqrt(left2).to(tl.float32)
        share1, share2 = (1.0 - beta1).to(tl.float32), (1.0 - beta2).to(tl.float32)
        p_pointer = _pointer(weights, tensor, SIZES, ALIGNED) + start
        g_pointer = _pointer(grads, tensor, SIZES, ALIGNED) + start
        m_pointer = _pointer(means, tensor, SIZES, ALIGNED) + start
        v_pointer = _pointer(squares, tensor, SIZES, ALIGNED) + start
        for base in range(0, n, BLOCK):
            i = base + tl.arange(0, BLOCK)
            inside = i < n
            g = tl.load(g_pointer + i, mask=inside, other=0.0)
            if not KEEP:
                g *= factor
            m = tl.load(m_pointer + i, mask=inside, other=0.0)
            v = tl.load(v_pointer + i, mask=inside, other=0.0)
            m += share1 * (g - m)
            v += share2 * (g * g - v)
            tl.store(m_pointer + i, m, mask=inside)
            tl.store(v_pointer + i, v, mask=inside)
            p = tl.load(p_pointer + i, mask=inside, other=0.0)
            p -= size * tl.div_rn(m, tl.div_rn(tl.sqrt_rn(v), root) + epsilon)
            tl.store(p_pointer + i, p, mask=inside)
    if LEAD and c == 0:
        tl.store(norm, total.to(tl.float32))
        bad = tl.where(finite, 0, 1).to(tl.int64)
        tl.store(skipped, tl.load(skipped) + bad)
        tl.store(in_a_row, (tl.load(in_a_row) + 1) * bad)


class _Part(NamedTuple):
    """Some tensors of a group, those of one launch."""

    group: Group
    begin: int
    end: int
    first: tuple[int, ...]
    chunks: int

    def tensors(self, which: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return tuple(which[self.begin : self.end])

    def constants(self, chunk: int, lists: Sequence[Sequence[Tensor]]) -> dict[str, Any]:
        sizes = tuple(p.numel() for p in self.tensors(self.group.params))
        aligned = all(x.data_ptr() % 16 == 0 for each in lists for x in self.tensors(each))
        return {
            "FIRST": self.first,
            "SIZES": sizes,
            "ALIGNED": aligned,
            "CHUNK": chunk,
            "BLOCK": BLOCK,
        }


def _parts(groups: Sequence[Group], chunk: int) -> list[_Part]:
    parts = []
    for group in groups:
        for begin in range(0, len(group.params), MOST):
            some = group.params[begin : begin + MOST]
            first = [0]
            for p in some:  # an empty tensor has one chunk of nothing
                first.append(first[-1] + max(1, triton.cdiv(p.numel(), chunk)))
            parts.append(_Part(group, begin, begin + len(some), tuple(first[:-1]), first[-1]))
    return parts


def guarded_step(
    groups: Sequence[Group],
    options: Tensor,
    loss: Tensor,
    skipped: Tensor,
    in_a_row: Tensor,
    *,
    keep: bool = False,
) -> Tensor:
    """See :class:`pwm_fast.backends.optimizer.GuardedStep`."""
    for g, group in enumerate(groups):
        for name in ("params", "grads", "means", "squares"):
            for j, x in enumerate(getattr(group, name)):
                if not x.is_contiguous():
                    raise ValueError(
                        f"{name}[{j}] of group {g} must be contiguous, got strides {x.stride()}"
                    )
    chunk = chunk_of(sum(p.numel() for group in groups for p in group.params))
    parts = _parts(groups, chunk)
    slots = torch.empty(sum(p.chunks for p in parts), dtype=torch.float64, device=options.device)
    before = [torch.empty_like(group.steps) for group in groups]
    norm = torch.empty((), dtype=torch.float32, device=options.device)
    copies = {id(group): copy for group, copy in zip(groups, before, strict=True)}
    start = 0
    for part in parts:
        group, own = part.group, slice(part.begin, part.end)
        launch(
            squares_kernel,
            (part.chunks,),
            part.tensors(group.grads),
            slots[start:],
            group.steps[own],
            copies[id(group)][own],
            part.end - part.begin,
            TENSORS=triton.next_power_of_2(part.end - part.begin),
            **part.constants(chunk, [group.grads]),
        )
        start += part.chunks
    for number, part in enumerate(parts):
        group, own = part.group, slice(part.begin, part.end)
        lists = [group.params, group.grads, group.means, group.squares]
        launch(
            adam_kernel,
            (part.chunks,),
            *(part.tensors(each) for each in lists),
            slots,
            copies[id(group)][own],
            group.steps[own],
            group.rate,
            options,
            loss,
            norm,
            skipped,
            in_a_row,
            start,
            LEAD=number == 0,
            KEEP=keep,
            SLOTS=SLOTS,
            **part.constants(chunk, lists),
        )
    return norm
