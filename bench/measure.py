"""Time of several functions side by side, and the peak memory of one."""

from __future__ import annotations

import ctypes
import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

Call = Callable[[], Any]
_settled = 0  # blocks of settled() within one another


class CpuClock:
    """Seconds that a number of calls take, by the wall clock."""

    def __call__(self, call: Call, calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            call()
        return time.perf_counter() - start


class CudaClock:
    """Seconds between two events around a number of calls on the current stream."""

    def __call__(self, call: Call, calls: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(calls):
            call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3


@dataclass(frozen=True)
class Effort:
    """How long to measure.

    Attributes:
        seconds: to spend on one case, over all of its providers; ``min_rounds`` may take longer.
        min_rounds: rounds of every provider at least.
        max_rounds: rounds of every provider at most.
        sample: seconds that one sample should last; a faster function is called several times.
    """

    seconds: float = 6.0
    min_rounds: int = 5
    max_rounds: int = 60
    sample: float = 0.005


def race(
    calls: Mapping[str, Call], clock: Callable[[Call, int], float], effort: Effort
) -> dict[str, list[float]]:
    """Seconds a call of each function, one a round.

    Every round measures each function once, in an order that turns by one place a round and
    back and forth, so that a disturbance of the machine, a warm cache and a raised clock meet all
    alike, and the times of a round can be compared with each other.
    """
    names = list(calls)
    repeats, rounds = {}, {}
    for name in names:  # the check has called it once already
        once = clock(calls[name], 1)
        if once < 1.0:
            once = clock(calls[name], 1)
        repeats[name] = max(1, math.ceil(effort.sample / max(once, 1e-9)))
        # One that would use up half of the time by itself drops out after two rounds.
        rounds[name] = effort.max_rounds if 2 * once < effort.seconds else 2
    samples: dict[str, list[float]] = {name: [] for name in names}
    enabled = gc.isenabled()
    gc.disable()
    try:
        with settled():
            start = time.perf_counter()
            for i in range(effort.max_rounds):
                if i >= effort.min_rounds and time.perf_counter() - start > effort.seconds:
                    break
                gc.collect()
                turn = i % max(len(names), 1)
                order = names[turn:] + names[:turn]
                for name in order[:: 1 if i % 2 == 0 else -1]:
                    if i < rounds[name]:
                        samples[name].append(clock(calls[name], repeats[name]) / repeats[name])
    finally:
        if enabled:
            gc.enable()
    return samples


@contextmanager
def settled() -> Iterator[None]:
    """The garbage collector looks at new objects alone: at those of torch it takes 0.2 s a time."""
    global _settled
    _settled += 1  # not gc.get_freeze_count(): in Python 3.12 a collection leaves some frozen
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        _settled -= 1
        if not _settled:
            gc.unfreeze()


def peak_memory(call: Call, device: torch.device) -> int | None:
    """Bytes by which one call raises the memory in use at its peak; None where it cannot be told.

    CUDA: torch's allocator. CPU: the process's resident set, whose high-water mark Linux lets a
    process reset; freed memory that the C library keeps is given back first, so whatever the call
    touches counts, of torch as of native code, and what it returns. The call has run before.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    gc.collect()
    if not _trim():
        return None
    before = _status("VmRSS")
    kept = call()
    peak = _status("VmHWM") - before
    del kept
    return max(peak, 0)


def _trim() -> bool:
    """Give freed memory back and restart the high-water mark; False where that is not possible."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", "ascii")
    except (AttributeError, OSError, TypeError):
        return False
    return True


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text("ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def available_memory(device: torch.device) -> int | None:
    """Bytes that are free to use; None where that is not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        for line in Path("/proc/meminfo").read_text("ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def graphed(call: Call, warmup: int = 3) -> Call:
    """The same work replayed from a CUDA graph: the call's outputs are static tensors."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warmup):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = call()

    def replay() -> Any:
        graph.replay()
        return outputs

    replay.replayed = True  # type: ignore[attr-defined]  it allocates nothing: see bench.session
    return replay
