"""Helpers of environments whose step runs on a device without the host."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_ALIGNMENT = 16  # bytes; the widest dtype has 8


class Packed:
    """Named tensors in one allocation, so that one copy hands all of them out.

    Args:
        parts: shape and dtype of each tensor, by name.
        device: where they live.

    Attributes:
        parts: the tensors, by name.
    """

    def __init__(
        self, parts: dict[str, tuple[tuple[int, ...], torch.dtype]], device: torch.device
    ) -> None:
        self._layout: dict[str, tuple[int, int, tuple[int, ...], torch.dtype]] = {}
        offset = 0
        for name, (shape, dtype) in parts.items():
            size = math.prod(shape) * dtype.itemsize
            self._layout[name] = (offset, size, shape, dtype)
            offset += -(-size // _ALIGNMENT) * _ALIGNMENT
        self._bytes = torch.zeros(offset, dtype=torch.uint8, device=device)
        self.parts = self._views(self._bytes)

    def snapshot(self) -> dict[str, Tensor]:
        """Copies of all, which are the caller's."""
        return self._views(self._bytes.clone())

    def _views(self, buffer: Tensor) -> dict[str, Tensor]:
        return {
            name: buffer[start : start + size].view(dtype).view(shape)
            for name, (start, size, shape, dtype) in self._layout.items()
        }


class Watch:
    """Reads counters on a device without ever waiting for it.

    Args:
        counters: int64 ``[n]``, on the CPU or a CUDA device.
        every: calls of :meth:`poll` between copies from a CUDA device.
    """

    def __init__(self, counters: Tensor, every: int = 64) -> None:
        self._counters = counters
        self._every = every
        self._calls = 0
        self._known = [0] * counters.numel()
        self._copied: torch.cuda.Event | None = None
        if counters.is_cuda:
            self._host = torch.zeros(counters.shape, dtype=counters.dtype, pin_memory=True)

    def poll(self) -> list[int]:
        """The counters; of a CUDA device as they were some calls ago."""
        if not self._counters.is_cuda:
            return self.now()
        if self._copied is not None and self._copied.query():
            self._known, self._copied = self._host.tolist(), None
        self._calls += 1
        if self._copied is None and self._calls % self._every == 0:
            self._host.copy_(self._counters, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(self._counters.device))
        return self._known

    def now(self) -> list[int]:
        """The counters as they are; waits for a CUDA device."""
        self._known = self._counters.tolist()
        return self._known
