"""Device code of the persistent rollout's exchanges: the barriers of a group's programs.

At each barrier every program of a group publishes a part of a tensor in global memory and takes
what all have published. There are two ways, with the same results:

**Flags.** A program stores its part, adds 1 to the group's counter (release), and waits until all
have (acquire); then it reads. That takes a fence, an atomic and a flag on their way there, and the
data after them.

**Words.** Every number travels in one word with the number of its barrier, its *epoch*: 32 bits of
each in 64, or 16 in 32. Readers ask for the data itself, again and again, until every word carries
the epoch; that takes one way there, and twice the bytes. No order in memory is needed between two
words, since each says by itself that it has come: it is written and read as one relaxed access, and
never torn. (NVIDIA's NCCL calls this its low-latency protocol.)

**Who may overwrite.** No buffer is used by two barriers in succession. A program writes one again
only after it has taken what all published at a barrier in between, and each of them published that
because of what it had taken before: so all have read what is overwritten. With words nothing but
that dependence is needed, as a store cannot come before what decides whether it is made. So there
need be no second half of a buffer either: it holds the epoch that is waited for or an earlier one,
and epochs of 16 bits may wrap. Memory is cleared before the first barrier, whose epoch is not 0.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from pwm_fast.kernels.launch import INTERPRETING
from pwm_fast.kernels.rollout_plan import RolloutLayout

_COMPILED = tl.constexpr(not INTERPRETING)
PARTS = tl.constexpr(3)  # numbers that a program publishes of a row at a time, at most


class Layout(NamedTuple):
    """What a launch is compiled for, as device functions pass it on; all are constants.

    Attributes:
        UP: features, padded.
        KP: the power of two that holds them.
        BM: rows of a group.
        BN: features of a program.
        DTYPE: of the weights.
        PRECISION: of their GEMMs in float32.
        CHUNKS: independent parts of a GEMM's sum.
        FLIP: rows are a GEMM's first operand.
        WORDS: programs exchange words, not flags.
        WARPS: of a program.
    """

    UP: Any
    KP: Any
    BM: Any
    BN: Any
    DTYPE: Any
    PRECISION: Any
    CHUNKS: Any
    FLIP: Any
    WORDS: Any
    WARPS: Any


class Place(NamedTuple):
    """Where a program stands.

    Attributes:
        tile: its slice of the features.
        group: its group of rows.
        counter: of the group.
        limit: polls until it gives up.
    """

    tile: Any
    group: Any
    counter: Any
    limit: Any


# --- flags --------------------------------------------------------------------------------------


@triton.jit
def _await_flags(counter, target, ok, limit):
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


# --- words --------------------------------------------------------------------------------------


@triton.jit
def _stamp(epoch, WORD: tl.constexpr):
    """The word of a zero."""
    if WORD.primitive_bitwidth == 64:
        return epoch.to(tl.int64) << 32
    else:
        return epoch << 16


@triton.jit
def _sealed(x, epoch, WORD: tl.constexpr):
    """Words of numbers of 16 bits (int32) or 32 (int64)."""
    if WORD.primitive_bitwidth == 64:
        bits = x.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
    else:
        bits = x.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    return bits | _stamp(epoch, WORD)


@triton.jit
def _opened(word, WORD: tl.constexpr, DTYPE: tl.constexpr):
    """The numbers of words."""
    if WORD.primitive_bitwidth == 64:
        return word.to(tl.int32).to(DTYPE, bitcast=True)
    else:
        return word.to(tl.int16).to(DTYPE, bitcast=True)


@triton.jit
def _distance(word, epoch, WORD: tl.constexpr):
    """How far words are from an epoch, uint32; less than to the next for words of it."""
    if WORD.primitive_bitwidth == 64:
        apart = (word >> 32).to(tl.int32) - epoch
    else:
        apart = word - _stamp(epoch, WORD)  # the number is what remains
    return apart.to(tl.uint32, bitcast=True)


@triton.jit
def _send(at, word, WORD: tl.constexpr):
    """Store words, each as one access that other programs may read meanwhile."""
    if not _COMPILED:
        tl.store(at, word)
    elif WORD.primitive_bitwidth == 64:
        tl.inline_asm_elementwise(
            "st.relaxed.gpu.global.b64 [$1], $2; mov.b32 $0, 0;",
            "=r,l,l",
            [at.to(tl.int64), word],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    else:
        tl.inline_asm_elementwise(
            "st.relaxed.gpu.global.b32 [$1], $2; mov.b32 $0, 0;",
            "=r,l,r",
            [at.to(tl.int64), word],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def _await_words(
    at, index, epoch, ok, limit, STEP: tl.constexpr, END, COUNT: tl.constexpr, WORD: tl.constexpr
):
    """Words at ``at + i STEP`` where ``index + i STEP < END``, once all of them have the epoch.

    Returns the COUNT tiles of words and whether all came within ``limit`` polls. A tile has at
    least as many words as the program has threads: copies of a word in several threads would be
    read at several times.
    """
    got = ()
    for _ in tl.static_range(COUNT):
        got = got + (tl.zeros(at.shape, WORD),)  # type: ignore[assignment]  # noqa: RUF005
    NEAR: tl.constexpr = (
        1 if WORD.primitive_bitwidth == 64 else 1 << 16
    )  # distance from the next epoch
    farthest = tl.full((), NEAR, tl.uint32)
    left = tl.where(ok != 0, limit, 0)
    while (farthest >= NEAR) & (left > 0):
        read = ()
        apart = tl.full(at.shape, 0, tl.uint32)
        for i in tl.static_range(COUNT):
            # Volatile loads are relaxed, and look past the multiprocessor's own cache.
            inside = index + i * STEP < END
            word = tl.load(at + i * STEP, mask=inside, other=_stamp(epoch, WORD), volatile=True)
            apart = tl.maximum(apart, _distance(word, epoch, WORD))
            read = read + (word,)  # type: ignore[assignment]  # noqa: RUF005
        got = read
        farthest = tl.max(apart)
        left -= 1
    return got, tl.where(farthest >= NEAR, 0, ok)


# --- meetings -----------------------------------------------------------------------------------


@triton.jit
def share_rows(values, slots, meeting, ok, place, L: tl.constexpr, COUNT: tl.constexpr):
    """Publish COUNT numbers a row, ``[BM]`` each; returns those of all G programs.

    They are ``[P, BM]`` each, with zeros in all but G places of P, and with them whether all came.
    """
    BM: tl.constexpr = L.BM
    G: tl.constexpr = L.UP // L.BN
    GP: tl.constexpr = triton.next_power_of_2(G)
    j = tl.arange(0, BM)
    mine = slots + place.tile * BM + j
    for i in tl.static_range(COUNT):
        if L.WORDS:
            _send(mine + i * G * BM, _sealed(values[i], meeting, tl.int64), tl.int64)
        else:
            tl.store(mine + i * G * BM, values[i])
    found = ()
    if L.WORDS:
        FIT: tl.constexpr = triton.next_power_of_2(COUNT) * GP
        LEAST: tl.constexpr = 32 * L.WARPS // BM  # see _await_words
        ROWS: tl.constexpr = FIT if FIT > LEAST else LEAST
        row = tl.arange(0, ROWS)[:, None]
        value, program = row // GP, row % GP
        at = slots + (value * G + program) * BM + j[None, :]
        # The programs' places of values that there are.
        index = tl.where(value < COUNT, program, G)
        words, ok = _await_words(at, index, meeting, ok, place.limit, 0, G, 1, tl.int64)
        all_values = _opened(words[0], tl.int64, tl.float32)
        for i in tl.static_range(COUNT):
            own = (value == i) & (program < G)
            found = found + (tl.where(own, all_values, 0.0),)  # type: ignore[assignment]  # noqa: RUF005
    else:
        ok = _await_flags(place.counter, meeting * G, ok, place.limit)
        program = tl.arange(0, GP)[:, None]
        at = slots + program * BM + j[None, :]
        for i in tl.static_range(COUNT):
            part = tl.load(at + i * G * BM, mask=program < G, other=0.0, cache_modifier=".cg")
            found = found + (part,)  # type: ignore[assignment]  # noqa: RUF005
    return found, ok


@triton.jit
def share_tile(mine, board, meeting, ok, place, L: tl.constexpr):
    """Publish ``mine`` ``[BN, BM]``; returns all features of the group's rows for a GEMM.

    They are chunks ``[KP / CHUNKS, BM]``, or flipped, and with them whether all came.
    """
    UP: tl.constexpr = L.UP
    STEP: tl.constexpr = L.KP // L.CHUNKS
    rows = place.group * L.BM + tl.arange(0, L.BM)
    k = tl.arange(0, STEP)
    own = board + rows[None, :] * UP + (place.tile * L.BN + tl.arange(0, L.BN))[:, None]
    if L.FLIP:
        at = board + rows[:, None] * UP + k[None, :]
        index = k[None, :]
    else:
        at = board + rows[None, :] * UP + k[:, None]
        index = k[:, None]
    chunks = ()
    if L.WORDS:
        WORD: tl.constexpr = board.dtype.element_ty
        _send(own, _sealed(mine, meeting, WORD), WORD)
        words, ok = _await_words(at, index, meeting, ok, place.limit, STEP, UP, L.CHUNKS, WORD)
        for i in tl.static_range(L.CHUNKS):
            chunks = chunks + (_opened(words[i], WORD, mine.dtype),)  # type: ignore[assignment]  # noqa: RUF005
    else:
        tl.store(own, mine)
        ok = _await_flags(place.counter, meeting * (UP // L.BN), ok, place.limit)
        for i in tl.static_range(L.CHUNKS):
            chunk = tl.load(
                at + i * STEP, mask=index + i * STEP < UP, other=0.0, cache_modifier=".cg"
            )
            chunks = chunks + (chunk,)  # type: ignore[assignment]  # noqa: RUF005
    return chunks, ok


# --- memory -------------------------------------------------------------------------------------

_COUNTER = 32  # int32s from one group's counter to the next: a cache line each


class Workspace:
    """What the programs of launches exchange through: one after another, on one stream.

    It is cleared when it is made: so a captured graph must hold that, too, before the launches.

    Args:
        plan: layout of the launches.
        batch: B.
        padded: Up.
        dtype: of the weights.
        device: of the tensors.
    """

    def __init__(
        self, plan: RolloutLayout, batch: int, padded: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.fits = (plan, batch, padded, dtype)
        self.groups = -(-batch // plan.bm)
        self.tiles = padded // plan.bn
        self.programs = self.groups * self.tiles
        self._met = 0
        numbers = 2 * self.groups * PARTS.value * self.tiles * plan.bm
        boards = 2, self.groups * plan.bm, padded
        if plan.exchange == "flags":
            parts = torch.empty(2, numbers // 2, device=device)
            met = torch.zeros(self.groups * _COUNTER, dtype=torch.int32, device=device)
            self.tensors = (*torch.empty(boards, dtype=dtype, device=device), *parts, met)
            return
        word = torch.int32 if dtype.itemsize == 2 else torch.int64
        longs = math.prod(boards) * word.itemsize // 8
        cleared = torch.zeros(numbers + longs, dtype=torch.int64, device=device)
        words = cleared[numbers:].view(word).view(boards)
        # No word counts anything: another tensor stands for the counters.
        none = cleared.view(torch.int32)
        self.tensors = (*words, *cleared[:numbers].view(2, -1), none)

    def begin(self, meetings: int) -> int:
        """How often a group has met before a launch in which it does ``meetings`` times.

        Raises:
            ValueError: the counters, or epochs, would not fit 31 bits.
        """
        before = self._met
        self._met += meetings
        if self._met * self.tiles >= 1 << 31:
            raise ValueError(f"{self._met} meetings of {self.tiles} programs are too many to count")
        return before
