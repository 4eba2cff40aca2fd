"""Whether tensors in the CPU's memory still hold the same bytes, whoever wrote to them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pwm_fast.backends import native

_SHORT = 16  # bytes of a row: shorter ones are gathered first
_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def fingerprint(tensors: Sequence[Tensor]) -> int | Copies:
    """What is equal to what it was for the same tensors where all their bytes are what they were.

    A checksum of 64 bits by the native extension (csrc/cpu/checksum.cpp); copies without it.
    """
    if not tensors:
        return 0
    if native.why_missing() is not None:
        return Copies(tensors)
    pieces: list[int] = []
    whole = []  # alive until the call is over
    for x in tensors:
        piece = _piece(x)
        if piece is None:
            x = x.contiguous()
            whole.append(x)
            piece = _piece(x)
        pieces += piece or ()
    return int(native.extension().checksum(pieces, torch.get_num_threads()))


def _piece(x: Tensor) -> tuple[int, int, int, int] | None:
    """Address, rows, bytes of a row and bytes from row to row, in any order of rows; or None."""
    size = x.element_size()
    if x.is_contiguous():
        return x.data_ptr(), 1, x.numel() * size, 0
    axes = sorted((s, n) for s, n in zip(x.stride(), x.shape, strict=True) if n > 1 and s)
    row = 1
    while axes and axes[0][0] == row:
        row *= axes.pop(0)[1]
    if not axes:
        return x.data_ptr(), 1, row * size, 0
    stride, rows = axes[0]
    for s, n in axes[1:]:
        if s != stride * rows:
            return None
        rows *= n
    if stride < row or row * size < _SHORT:
        return None
    return x.data_ptr(), rows, row * size, stride * size


class Copies:
    """What tensors hold, bit by bit: 0 is not -0, and NaNs are equal."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        with torch.inference_mode(False), torch.no_grad():
            self.words = [
                x.detach().clone(memory_format=torch.contiguous_format).view(_WORDS[x.itemsize])
                for x in tensors
            ]

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, Copies) and all(
            torch.equal(a, b) for a, b in zip(self.words, other.words, strict=True)
        )
