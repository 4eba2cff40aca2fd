"""Saying what did not fit into memory, and what to make smaller."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class OutOfMemory(RuntimeError):
    """A device's memory is too small for what was asked; the message says what to lower."""


# Where no torch.OutOfMemoryError is raised: the CPU's allocator, libraries' and the driver's own
# allocations.
_MESSAGES = (
    "can't allocate memory",
    "not enough memory: you tried to allocate",
    "CUDA error: out of memory",
    "CUDA driver error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)


@contextmanager
def explained(what: str, lower: str, device: torch.device | str) -> Iterator[None]:
    """Inside, running out of memory raises :class:`OutOfMemory` with one readable line.

    Args:
        what: was computed or made, with its size: ``"the actor's update of 512 rollouts"``.
        lower: what to make smaller: ``"alg.actor.batch_size"``.
        device: where.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(
            f"{_place(torch.device(device))} is out of memory in {what}: lower {lower}"
        ) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether that is what the error means."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(m in str(error) for m in _MESSAGES)


def _place(device: torch.device) -> str:
    """The device with its sizes, as far as they can still be asked for."""
    if device.type != "cuda":
        return f"device {device}"
    try:
        free, total = torch.cuda.mem_get_info(device)
        name = torch.cuda.get_device_name(device)
        own = torch.cuda.memory_reserved(device)
    except (RuntimeError, AssertionError):  # after an error of the device nothing can be asked
        return f"device {device}"
    return (
        f"device {device} ({name}, {_gib(total)}, of which {_gib(own)} are this process's and "
        f"{_gib(free)} free)"
    )


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
