"""One test a provider of a case: it fails where the provider's result is wrong.

The providers of a case are measured together, in turns (``bench.measure.race``), when the first of
their tests runs. So that pytest-benchmark shows and keeps these times, each test replays its own
on a clock that the replay itself moves.
"""

from __future__ import annotations

from typing import Any

import pytest

from bench.cases import Case
from bench.results import Row, Spread

_now = 0.0


def replayed_time() -> float:
    """The clock of the replay, in seconds."""
    return _now


@pytest.mark.benchmark(timer=replayed_time)
def test_speed(case: Case, provider: str, row: Row, benchmark: Any) -> None:
    if row.status == "absent":
        pytest.skip(row.reason or "")
    if row.status != "ok":
        pytest.fail(row.reason or "", pytrace=False)
    spread = Spread.of(row.seconds)
    benchmark.group = case.name
    benchmark.extra_info.update(p20=spread.p20, p50=spread.p50, p80=spread.p80, peak=row.peak)
    times = iter(row.seconds)

    def replay() -> None:
        global _now
        _now += next(times, 0.0)

    benchmark.pedantic(replay, rounds=len(row.seconds))
