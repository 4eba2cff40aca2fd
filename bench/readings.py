"""Figures that are no rows of a case: one number each, with its unit, or why there is none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from bench.internals import CONSTANTS
from bench.measure import CpuClock, CudaClock, Effort, graphed, race
from bench.results import Spread

Reading = dict[str, Any]
#: Constants of the cost model by the reading that replaces each.
ASSUMED = {c.reading: c for c in CONSTANTS.values() if c.reading is not None}
EFFORT = Effort(seconds=0.15, min_rounds=5, max_rounds=20, sample=0.002)


def reading(name: str, value: float | None, unit: str, reason: str | None = None) -> Reading:
    """One figure; with what it replaces where the cost model has one of that name."""
    found: Reading = {"name": name, "value": None if value is None else float(f"{value:.5g}")}
    found["unit"] = unit
    if reason is not None:
        found["reason"] = reason
    if name in ASSUMED:
        a = ASSUMED[name]
        found["replaces"] = {"text": a.text, "value": a.value, "source": a.source}
    return found


def seconds(
    call: Callable[[], Any], device: torch.device, calls: int = 1, effort: Effort = EFFORT
) -> float:
    """Median time of a call; on a GPU of ``calls`` of them in one CUDA graph, a call."""
    if device.type != "cuda":
        return median(call, device, effort)

    def several() -> None:
        for _ in range(calls):
            call()

    several()
    return median(graphed(several, 1), device, effort) / calls


def median(call: Callable[[], Any], device: torch.device, effort: Effort = EFFORT) -> float:
    """Median time of a call as it is."""
    call()
    clock = CudaClock() if device.type == "cuda" else CpuClock()
    return Spread.of(race({"": call}, clock, effort)[""]).p50
