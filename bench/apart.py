"""A case's providers measured one after another, each alone in the GPU's memory.

A GPU's memory holds the activations of one provider at the large sizes, and CUDA graphs keep
theirs. So providers do not take turns here as in :mod:`bench.session`.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence

import torch

from bench.cases import Case, Workload
from bench.measure import CpuClock, CudaClock, Effort, peak_memory, race
from bench.providers import Absent, pointless
from bench.results import Row
from bench.session import say


class Broken(RuntimeError):
    """The CUDA context is lost: no other result of this process could be trusted."""


def measure(case: Case, names: Sequence[str], device: torch.device) -> Iterator[str | Row]:
    """Yield the name of each provider before its work and its row after it.

    Raises:
        Broken: after a row that an illegal access or the like has ended.
    """
    try:
        workload = case.build(device)
    except Exception as error:
        row = _refused("", error)
        yield from (Row(name, row.status, row.reason) for name in names)
        _check(device)
        return
    for name in names:
        yield name
        yield _row(workload, name, device, case.effort)
        _check(device)
        clean(device)


def _row(workload: Workload, name: str, device: torch.device, effort: Effort) -> Row:
    why_not = pointless(name, device)
    if why_not is not None:
        return Row(name, "absent", why_not)
    try:
        provider = workload.make[name]()
        workload.verify(name, provider)
        on_gpu = device.type == "cuda" and not provider.wall
        clock = CudaClock() if on_gpu else CpuClock()
        seconds = race({name: provider.call}, clock, effort)[name]
        replayed = getattr(provider.call, "replayed", False)
        peak = None if provider.wall or replayed else peak_memory(provider.call, device)
    except Exception as error:
        return _refused(name, error)
    return Row(name, "ok", None, seconds, peak)


def _refused(name: str, error: Exception) -> Row:
    if isinstance(error, Absent):
        return Row(name, "absent", str(error))
    text = say(error)
    # JAX has no exception of its own for it.
    memory = isinstance(error, torch.OutOfMemoryError) or "RESOURCE_EXHAUSTED" in text
    return Row(name, "memory" if memory else "failed", text)


def _check(device: torch.device) -> None:
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
        except RuntimeError as error:
            raise Broken(say(error)) from error


def clean(device: torch.device) -> None:
    """Give back what a provider left."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
