"""Measuring cases: their providers in turns, or each alone in the memory of a GPU."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from bench import environment
from bench.cases import Case, Provider, Workload
from bench.measure import CpuClock, CudaClock, Effort, available_memory, peak_memory, race
from bench.providers import Absent, pointless
from bench.results import Group, Result, Row

# Beyond this a run could be killed for want of memory, and all its figures lost.
MEMORY_SHARE = 0.7


class Session:
    """Results so far of a pytest session, each case with all its selected providers at once.

    Args:
        device: that everything runs on.
        seconds: to spend on a case, in place of what the case asks for.
    """

    def __init__(self, device: torch.device, seconds: float | None = None) -> None:
        self.device = device
        self.seconds = seconds
        self.groups: dict[str, Group] = {}

    def row(self, case: Case, provider: str, selected: Sequence[str]) -> Row:
        """The provider's row; the first call for a case measures all that are selected."""
        if case.name not in self.groups:
            self.groups[case.name] = self.measure(case, selected)
        return self.groups[case.name].rows[provider]

    def measure(self, case: Case, selected: Sequence[str]) -> Group:
        """Check every provider, then time those that are right side by side."""
        names = [name for name in case.providers if name in selected]
        group = Group(case.name, dict(case.axes), {})
        free = available_memory(self.device)
        if free is not None and case.memory > MEMORY_SHARE * free:
            reason = f"needs {case.memory / 2**30:.1f} GiB of memory, {free / 2**30:.1f} are free"
            group.rows = {name: Row(name, "absent", reason) for name in names}
            return group
        try:
            workload = case.build(self.device)
        except Exception as error:
            group.rows = {name: _refused(name, error) for name in names}
            return group
        calls = {}
        for name in names:
            found = _checked(workload, name, self.device)
            group.rows[name] = found if isinstance(found, Row) else Row(name, "ok")
            if isinstance(found, Provider):
                calls[name] = found.call
        workload.forget()
        effort = case.effort
        if self.seconds is not None:
            effort = replace(effort, seconds=self.seconds)
        clock = CudaClock() if self.device.type == "cuda" else CpuClock()
        for name, seconds in race(calls, clock, effort).items():
            group.rows[name].seconds = seconds
        for name, call in calls.items():
            group.rows[name].peak = peak_memory(call, self.device)
        calls.clear()
        gc.collect()
        return group

    def result(self) -> Result:
        """Everything measured, and on what."""
        return Result(environment.describe(self.device), self.groups)


# --- one after another --------------------------------------------------------------------------


class Broken(RuntimeError):
    """The CUDA context is lost: no other result of this process could be trusted."""


def one_by_one(case: Case, names: Sequence[str], device: torch.device) -> Iterator[str | Row]:
    """Yield the name of each provider before its work and its row after it.

    A GPU's memory holds the activations of one provider at the large sizes, and CUDA graphs keep
    theirs.

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
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _row(workload: Workload, name: str, device: torch.device, effort: Effort) -> Row:
    provider = _checked(workload, name, device)
    if isinstance(provider, Row):
        return provider
    try:
        on_gpu = device.type == "cuda" and not provider.wall
        clock = CudaClock() if on_gpu else CpuClock()
        seconds = race({name: provider.call}, clock, effort)[name]
        replayed = getattr(provider.call, "replayed", False)
        peak = None if provider.wall or replayed else peak_memory(provider.call, device)
    except Exception as error:
        return _refused(name, error)
    return Row(name, "ok", None, seconds, peak)


def _check(device: torch.device) -> None:
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
        except RuntimeError as error:
            raise Broken(say(error)) from error


# --- what both do -------------------------------------------------------------------------------


def _checked(workload: Workload, name: str, device: torch.device) -> Provider | Row:
    """A provider that is right, or the row that says why there is none."""
    why_not = pointless(name, device)
    if why_not is not None:
        return Row(name, "absent", why_not)
    try:
        provider = workload.make[name]()
        workload.verify(name, provider)
    except Exception as error:
        return _refused(name, error)
    return provider


def _refused(name: str, error: Exception) -> Row:
    if isinstance(error, Absent):
        return Row(name, "absent", str(error))
    text = say(error)
    # JAX has no exception of its own for it.
    memory = isinstance(error, torch.OutOfMemoryError) or "RESOURCE_EXHAUSTED" in text
    return Row(name, "memory" if memory else "failed", text)


def say(error: BaseException) -> str:
    """An error in one line."""
    text = " ".join(str(error).split())
    name = type(error).__name__
    return f"{name}: {text[:300]}" if text else name
