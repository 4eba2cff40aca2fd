"""Lists of tensors for kernels that work through many of them in one launch.

A kernel takes one table of 64-bit words: the first chunk of every tensor and the number of chunks,
``[T + 1]``; the tensors' sizes ``[T]``; the addresses of their rows ``[T, R]``, where a row is one
of several tensors of the same size, such as a gradient sample. A program works on one chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Table(NamedTuple):
    """A table and what a launch must know of it.

    Attributes:
        words: int64, on the tensors' device.
        tensors: T, at least 1.
        rows: R.
        chunk: elements of a chunk.
        chunks: of all tensors; an empty tensor has none.
        aligned: all rows lie on multiples of 16 bytes.
    """

    words: Tensor
    tensors: int
    rows: int
    chunk: int
    chunks: int
    aligned: bool


def chunk_of(elements: int) -> int:
    """Elements of a chunk: as many as leave 1024 chunks, from 4096 to 65536, a power of two.

    By the number of elements alone, not by the GPU: so sums over chunks have one order everywhere.
    """
    chunk = 4096
    while chunk < 65536 and elements // (2 * chunk) >= 1024:
        chunk *= 2
    return chunk


def make(rows: Sequence[Sequence[Tensor]]) -> Table:
    """The table of R rows of T contiguous tensors each.

    The tensors must live until the kernels that read the table are launched.
    """
    sizes = [x.numel() for x in rows[0]]
    chunk = chunk_of(sum(sizes))
    first = [0]
    for size in sizes:
        first.append(first[-1] + triton.cdiv(size, chunk))
    addresses = [row[t].data_ptr() for t in range(len(sizes)) for row in rows]
    words = _upload([*first, *sizes, *addresses], rows[0][0].device)
    aligned = all(a % 16 == 0 for a in addresses)
    return Table(words, len(sizes), len(rows), chunk, first[-1], aligned)


def _upload(words: list[int], device: torch.device) -> Tensor:
    """Words in a device's memory, without waiting for it.

    While a CUDA graph is captured, as constants of kernels: the graph must not read host memory
    that may be gone when it is replayed.
    """
    if device.type != "cuda":
        return torch.tensor(words, dtype=torch.int64, device="cpu")
    if torch.cuda.is_current_stream_capturing():
        return constants(words, device)
    return (
        torch.tensor(words, dtype=torch.int64, device="cpu")
        .pin_memory()
        .to(device, non_blocking=True)
    )


def constants(words: list[int], device: torch.device) -> Tensor:
    """Words that launches carry with them: nothing is copied from the host's memory."""
    made = torch.zeros(len(words), dtype=torch.int64, device=device)
    torch._foreach_add_(list(made.unbind()), words)
    return made


@triton.jit
def find(words, tensors, chunk, c, TENSORS: tl.constexpr):
    """Of chunk ``c``: its tensor, its first element there, and how many it has."""
    t = tl.arange(0, TENSORS)
    first = tl.load(words + t, mask=t < tensors, other=0x7FFFFFFFFFFFFFFF)
    # The last tensor that begins at or before c: empty ones begin where the next one does.
    tensor = tl.sum((first <= c).to(tl.int32), axis=0) - 1
    start = (c - tl.load(words + tensor)) * chunk
    size = tl.load(words + tensors + 1 + tensor)
    return tensor, start, tl.minimum(size - start, chunk)


@triton.jit
def row(words, tensors, rows, tensor, r, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Pointer to row ``r`` of a tensor."""
    address = tl.load(words + 2 * tensors + 1 + tensor * rows + r)
    pointer = address.to(tl.pointer_type(DTYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, [16])
    return pointer
