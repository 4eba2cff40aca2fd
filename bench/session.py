"""Measuring the cases of a pytest session, each with all its selected providers at once."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import replace

import torch

from bench import environment
from bench.cases import Case, Provider
from bench.measure import CpuClock, CudaClock, available_memory, peak_memory, race
from bench.providers import Absent, pointless
from bench.results import Group, Result, Row

# Beyond this a run could be killed for want of memory, and all its figures lost.
MEMORY_SHARE = 0.7


class Session:
    """Results so far.

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
        ready: dict[str, Provider] = {}
        try:
            workload = case.build(self.device)
        except Exception as error:
            group.rows = {name: Row(name, "failed", say(error)) for name in names}
            return group
        for name in names:
            why_not = pointless(name, self.device)
            if why_not is not None:
                group.rows[name] = Row(name, "absent", why_not)
                continue
            try:
                provider = workload.make[name]()
                workload.verify(name, provider)
            except Absent as error:
                group.rows[name] = Row(name, "absent", str(error))
            except Exception as error:
                group.rows[name] = Row(name, "failed", say(error))
            else:
                group.rows[name] = Row(name, "ok")
                ready[name] = provider
        workload.forget()
        effort = case.effort
        if self.seconds is not None:
            effort = replace(effort, seconds=self.seconds)
        clock = CudaClock() if self.device.type == "cuda" else CpuClock()
        calls = {name: provider.call for name, provider in ready.items()}
        for name, seconds in race(calls, clock, effort).items():
            group.rows[name].seconds = seconds
        for name, call in calls.items():
            group.rows[name].peak = peak_memory(call, self.device)
        ready.clear()
        calls.clear()
        gc.collect()
        return group

    def result(self) -> Result:
        """Everything measured, and on what."""
        return Result(environment.describe(self.device), self.groups)


def say(error: BaseException) -> str:
    """An error in one line."""
    text = " ".join(str(error).split())
    name = type(error).__name__
    return f"{name}: {text[:300]}" if text else name
