"""Saying what did not fit into memory, and what to make smaller."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
    "Could not allocate memory",  # MuJoCo
    "std::bad_alloc",
    "Failed to allocate",  # Warp
)
ENVS = "num_envs, or the episodes of an evaluation"


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


def require(size: int, what: str, lower: str, device: torch.device | str) -> None:
    """Raise :class:`OutOfMemory` where a device certainly has no room, before any work.

    Args:
        size: bytes that are needed at least.
        what: needs them: ``"the replay of 1000000 transitions"``.
        lower: what to make smaller.
        device: where.
    """
    room = available(torch.device(device))
    if room is not None and size > room:
        raise OutOfMemory(
            f"{what} need at least {_gib(size)} of memory, and device {device} has {_gib(room)} "
            f"left: lower {lower}"
        )


def available(device: torch.device) -> int | None:
    """Bytes that this process could still take on a device; None where nobody says."""
    if device.type == "cuda":
        own = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + own
    sizes = [size for size in (_machine(), _control_group()) if size is not None]
    return min(sizes, default=None)


class Growth:
    """Foresees, while many like parts are made one by one, that not all of them will fit.

    Args:
        count: parts to be made.
        what: they are, for the message.
        lower: what to make smaller.
    """

    _FIRST, _NEXT = 16, 64  # parts between which growth is measured: imports come before

    def __init__(self, count: int, what: str, lower: str) -> None:
        self._count, self._what, self._lower = count, what, lower
        self._before: int | None = None

    def require(self, least: int) -> None:
        """Raise :class:`OutOfMemory` if parts of ``least`` bytes do not fit."""
        require(self._count * least, self._what, self._lower, "cpu")

    def check(self, made: int) -> None:
        """Call it before each part, with the number of those that there are.

        Raises:
            OutOfMemory: the rest does not fit, if each takes what those did so far.
        """
        if made == self._FIRST:
            self._before = _resident()
        elif made and made % self._NEXT == 0 and self._before is not None:
            grown = (_resident() or self._before) - self._before
            each = grown // (made - self._FIRST)
            require((self._count - made) * each, self._what, self._lower, "cpu")


def _machine() -> int | None:
    """Bytes of memory that are free, or could be made so; of all there are where Linux is not."""
    try:
        for line in Path("/proc/meminfo").read_text("ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


def _control_group() -> int | None:
    """Bytes that a container's limit leaves; None without a limit."""
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        folder = Path("/sys/fs/cgroup")
        try:
            return int((folder / limit).read_text()) - int((folder / used).read_text())
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return None


def _resident() -> int | None:
    """Bytes of this process in memory."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):
        return None


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
