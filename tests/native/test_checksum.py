"""The checksum that packed copies of weights are kept by: every bit counts, and where it is."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import combinations

import pytest
import torch
from torch import Tensor

from tests.native.harness import _C, Rows

SIZES = (1, 3, 7, 8, 31, 255, 256, 257, 1000, 65535, 65536, 65537, 200_001)
WIDE, NARROW = 2**64 - 1, 2**32 - 1
START = 0x9E3779B97F4A7C15


def checksum(x: Tensor, threads: int = 1) -> int:
    return _C.checksum([x.data_ptr(), 1, x.numel() * x.element_size(), 0], threads)


def step(h: int, word: int) -> int:
    h = (h ^ word) * 0x9E3779B185EBCA87 & WIDE
    return (h ^ h >> 32) * 0xC2B2AE3D27D4EB4F & WIDE


def narrow_step(h: int, word: int) -> int:
    h = (h ^ word) * 0x9E3779B1 & NARROW
    return (h ^ h >> 15) * 0x85EBCA77 & NARROW


def slow(rows: list[bytes]) -> int:
    """As the source defines it, of one unit: stripes of 64 words of 4 bytes, zeros at the end."""
    h = [step(START * (i + 1) & WIDE, 0) >> 32 for i in range(64)]
    for row in rows:
        padded = row + bytes(-len(row) % 256)
        for at in range(0, len(padded), 256):
            words = [int.from_bytes(padded[i : i + 4], "little") for i in range(at, at + 256, 4)]
            h = [narrow_step(a, word) for a, word in zip(h, words, strict=True)]
            sums = [a + b & NARROW for a, b in zip(h[:32], h[32:], strict=True)]
            h = sums + [a + b & NARROW for a, b in zip(sums, h[32:], strict=True)]
    total = START
    for low, high in zip(h[:32], h[32:], strict=True):
        total = step(total, high << 32 | low)
    return step(START, total)


@pytest.mark.parametrize("size", [1, 7, 8, 255, 256, 257, 3000])
def test_definition(size: int) -> None:
    x = torch.randint(0, 256, (3, size), dtype=torch.uint8)
    assert checksum(x[0]) == slow([bytes(x[0].tolist())])
    rows = [bytes(row.tolist()) for row in x]
    assert _C.checksum([x.data_ptr(), 3, size, size], 1) == slow(rows)
    assert _C.checksum([], 1) == _C.checksum([0, 0, 8, 8], 1) == START


@pytest.mark.parametrize("size", SIZES)
def test_every_byte_counts(size: int) -> None:
    """Any changed bit of a byte gives another sum, all of them different, and back the first."""
    x = torch.randint(0, 256, (size,), dtype=torch.uint8)
    first = checksum(x)
    seen = {first}
    places = range(size) if size < 2000 else [*range(0, size, 997), size - 1]
    for i in places:
        for bit in (0, 3, 7):
            x[i] ^= 1 << bit
            seen.add(checksum(x))
            x[i] ^= 1 << bit
    assert len(seen) == 1 + 3 * len(places)
    assert checksum(x) == first


def _swap(i: int, j: int) -> Callable[[Tensor], None]:
    def change(x: Tensor) -> None:
        x[[i, j]] = x[[j, i]]

    return change


CHANGES: dict[str, Callable[[Tensor], None]] = {
    "sign": lambda x: x.neg_(),
    "sign of two rows": lambda x: x[3:5].neg_(),
    "sign of two neighbours": lambda x: x[2, 6:8].neg_(),
    "sign of two in one lane": lambda x: x[2, 0:65:64].neg_(),
    "rows swapped": _swap(0, 1),
    "far rows swapped": _swap(2, 40),
    "rows rolled": lambda x: x.copy_(x.roll(1, 0)),
    "columns rolled": lambda x: x.copy_(x.roll(1, 1)),
    "columns rolled by a stripe": lambda x: x.copy_(x.roll(64, 1)),
    "reversed": lambda x: x.copy_(x.flip(0)),
    "one up, one down": lambda x: x[0, :2].add_(torch.tensor([1.0, -1.0])),
    "up in one row, down in the next": lambda x: (x[0].add_(1.0), x[1].sub_(1.0)),  # type: ignore[dict-item,return-value]
    "doubled": lambda x: x.mul_(2.0),
    "zero": lambda x: x.zero_(),
    "minus zero": lambda x: x.fill_(-0.0),
    "last": lambda x: x[-1, -1].add_(1e-6),
}


@pytest.mark.parametrize("values", ["random", "whole", "ones"])
@pytest.mark.parametrize("width", [128, 193, 512])
def test_what_sums_miss(width: int, values: str) -> None:
    """Changes that leave a sum, a sum of squares or the set of numbers as they are."""
    x = torch.randn(64, width)
    if values == "whole":
        x = torch.arange(64.0 * width).view(64, width)  # few bits are set
    elif values == "ones":
        x = torch.ones(64, width)
    seen: dict[bytes, int] = {}
    for change in (lambda y: y, *CHANGES.values()):
        y = x.clone()
        change(y)
        seen[bytes(y.view(torch.uint8).flatten().tolist())] = checksum(y)
    assert len(set(seen.values())) == len(seen)
    assert len(seen) >= (16 if values != "ones" else 10)


def test_sparse_changes_do_not_cancel() -> None:
    """All pairs of signs, and all swaps, of numbers that share lanes of the sum."""
    x = torch.randn(8, 64)
    seen = {checksum(x)}
    flat = x.view(-1)
    places = [*range(0, 512, 64), *range(1, 512, 64), 7, 8, 9]
    count = 1
    for i, j in combinations(places, 2):
        y = flat.clone()
        y[[i, j]] = -y[[i, j]]
        z = flat.clone()
        z[[i, j]] = z[[j, i]]
        seen |= {checksum(y), checksum(z)}
        count += 2
    assert len(seen) == count


@pytest.mark.parametrize("n", [1, 6, 64, 65, 519])
def test_what_lies_between_rows_does_not_count(n: int) -> None:
    a = torch.randn(33, n)
    sums = set()
    for gap in (1, 7):
        rows = Rows.of(a, gap=gap)
        piece = [rows.tensor.data_ptr(), 33, 4 * n, 4 * rows.tensor.stride(0)]
        first = _C.checksum(piece, 1)
        rows.tensor[32, n - 1] += 1.0
        assert _C.checksum(piece, 1) != first
        rows.tensor[32, n - 1] = a[32, n - 1]
        rows.written()  # nothing was written around it
        sums.add((first, _C.checksum(piece, 1)))
    assert len(sums) == 1 and len(set(*sums)) == 1


def test_pieces_in_their_order() -> None:
    a, b = torch.randn(70_000), torch.randn(70_000)
    pieces = [[x.data_ptr(), 1, 4 * x.numel(), 0] for x in (a, b)]
    assert _C.checksum(pieces[0] + pieces[1], 1) != _C.checksum(pieces[1] + pieces[0], 1)
    first = _C.checksum(pieces[0] + pieces[1], 1)
    a[0], b[0] = b[0].clone(), a[0].clone()
    assert _C.checksum(pieces[0] + pieces[1], 1) != first


@pytest.mark.parametrize("wrong", [[0], [0] * 5, [0, 1, 2], [0] * 7])
def test_wrong_length(wrong: list[int]) -> None:
    message = f"pieces must be a list whose length is a multiple of 4, got {len(wrong)}"
    with pytest.raises(ValueError, match=re.escape(message)):
        _C.checksum(wrong, 1)


@pytest.mark.parametrize(
    ("piece", "message"),
    [
        ([0, -1, 8, 8], "rows must be at least 0, got -1"),
        ([0, 1, -8, 8], "bytes must be at least 0, got -8"),
        ([0, 2, 8, 7], "stride must be at least 8, got 7"),
    ],
)
def test_wrong_piece(piece: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        _C.checksum(piece, 1)
    with pytest.raises(ValueError, match="threads must be at least 1, got 0"):
        _C.checksum([0, 1, 0, 0], 0)
    with pytest.raises(TypeError):
        _C.checksum([0.5, 1, 0, 0], 1)
