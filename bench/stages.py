"""Stages with a time budget each and in all, and their record, which a later run goes on from."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from bench import results
from bench.results import Group, Result, ResultError, Row
from bench.session import say

Clock = Callable[[], float]
ENOUGH = 3.0  # seconds: with less left, nothing is begun
GIVE_UP = 180.0  # seconds after which work that did not end counts as failed, not as interrupted


@contextmanager
def terminable() -> Iterator[None]:
    """Inside, SIGTERM raises :class:`KeyboardInterrupt`, as an interrupt does."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class Outcome(NamedTuple):
    """How a stage ended.

    Attributes:
        status: ``ok``, ``failed``, or ``partial`` (its time was over; the next run goes on).
        detail: in a line.
    """

    status: str
    detail: str = ""


class Deadline:
    """When a stage must end.

    Args:
        seconds: from now.
        clock: seconds on a clock that only moves forward.
    """

    def __init__(self, seconds: float, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._end = clock() + seconds

    @property
    def left(self) -> float:
        """Seconds left, not below 0."""
        return max(self._end - self._clock(), 0.0)

    @property
    def over(self) -> bool:
        """There is no time to begin anything."""
        return self.left < ENOUGH


@dataclass(frozen=True)
class Stage:
    """A part of a run.

    Attributes:
        name: of ``--stage``.
        budget: seconds that it may take of the run's.
        run: does the work that is still missing.
    """

    name: str
    budget: float
    run: Callable[[Deadline], Outcome]


class Record:
    """What is known so far, written to a file after every step.

    The file is a result of the benchmarks (:mod:`bench.results`) with a section ``gpu``.

    Args:
        path: the file.
        facts: of :func:`bench.environment.describe`, of this run.

    Raises:
        ResultError: the file is there and cannot be gone on with: another commit or machine.
    """

    def __init__(self, path: Path, facts: dict[str, Any]) -> None:
        self.result = Result(facts, {}, path)
        if path.exists():
            self.result = results.load(path)
            mine = Result(facts, {}).kind()
            before = {"commit": self.result.facts["commit"]["id"], **self.result.kind()}
            now = {"commit": facts["commit"]["id"], **mine}
            different = [
                f"{k} was {before.get(k)}, is {now[k]}"
                for k in now
                if before.get(k) != now[k] and k != "native_isa"  # a stage builds the kernels
            ]
            if different:
                raise ResultError(
                    f"{path} cannot be gone on with: {'; '.join(different)}; "
                    "name another file (--out) or start it anew (--restart)"
                )
            if facts["commit"]["dirty"]:
                self.result.facts["commit"]["dirty"] = True
        self.result.gpu.setdefault("stages", {})
        self.result.gpu.setdefault("micro", {})
        self.result.gpu.setdefault("tests", {})
        self.result.gpu.setdefault("attempts", {})
        self.path = path

    @property
    def stages(self) -> dict[str, dict[str, Any]]:
        """Of each stage: ``status``, ``detail`` and ``seconds`` over all runs."""
        found: dict[str, dict[str, Any]] = self.result.gpu["stages"]
        return found

    def finished(self, stage: str) -> bool:
        """The stage has come to its end, be it a bad one."""
        return self.stages.get(stage, {}).get("status") in ("ok", "failed")

    def end(self, stage: str, outcome: Outcome, seconds: float) -> None:
        """Note how a stage ended."""
        before = self.stages.get(stage, {}).get("seconds", 0.0)
        self.stages[stage] = {
            "status": outcome.status,
            "detail": outcome.detail,
            "seconds": round(before + seconds, 1),
        }
        self.save()

    def missing(self, name: str, providers: Sequence[str]) -> list[str]:
        """The providers of a case that have no row yet."""
        group = self.result.groups.get(name)
        return [p for p in providers if group is None or p not in group.rows]

    def add(self, name: str, axes: dict[str, Any], row: Row, order: Sequence[str]) -> None:
        """Keep a row; a case's rows stand in the order of its providers."""
        group = self.result.groups.setdefault(name, Group(name, axes, {}))
        group.rows[row.provider] = row
        place = {provider: i for i, provider in enumerate(order)}
        group.rows = dict(sorted(group.rows.items(), key=lambda item: place.get(item[0], 99)))
        self.save()

    def compiled(self, cached: int, names: Sequence[str]) -> None:
        """Count kernels that a measuring process took from Triton's cache, or compiled."""
        found = self.result.gpu.setdefault("compiled", {"cached": 0, "names": {}})
        found["cached"] += cached
        for name in names:
            found["names"][name] = found["names"].get(name, 0) + 1

    def attempt(self, key: str, seconds: float, enough: float | None = None) -> bool:
        """Note that work was stopped after so long; True if it is to be given up.

        ``enough``: seconds after which it is; :data:`GIVE_UP` by default.
        """
        attempts: dict[str, float] = self.result.gpu["attempts"]
        attempts[key] = max(round(seconds, 1), attempts.get(key, 0.0))
        return attempts[key] >= (GIVE_UP if enough is None else enough)

    def fits(self, key: str, left: float) -> bool:
        """Work that was stopped before is begun again only with more time than it had."""
        attempts: dict[str, float] = self.result.gpu["attempts"]
        return left > attempts.get(key, 0.0) + ENOUGH

    def save(self) -> None:
        """Write the file."""
        results.write(self.path, results.to_json(self.result))


def run(
    stages: Sequence[Stage],
    record: Record,
    budget: float,
    *,
    again: Sequence[str] = (),
    clock: Clock = time.monotonic,
    tell: Callable[[str], None] = print,
) -> bool:
    """Run the stages that are not finished, each within its budget and all within ``budget``.

    What a stage leaves of its time is there for the later ones. A stage that raises has failed, and
    the rest goes on.

    Args:
        stages: in order.
        record: what is known.
        budget: seconds.
        again: names of finished stages to run once more.
        clock: seconds.
        tell: takes a line a stage.

    Returns:
        False if a stage has failed, now or before.
    """
    whole = Deadline(budget, clock)
    for stage in stages:
        if record.finished(stage.name) and stage.name not in again:
            continue
        if whole.over:
            record.end(stage.name, Outcome("partial", "no time was left"), 0.0)
            tell(f"{stage.name}: no time left")
            continue
        started = clock()
        try:
            outcome = stage.run(Deadline(min(stage.budget, whole.left), clock))
        except Exception as error:
            outcome = Outcome("failed", say(error))
        seconds = clock() - started
        record.end(stage.name, outcome, seconds)
        tell(f"{stage.name}: {outcome.status} in {seconds:.0f} s; {outcome.detail}")
    return all(record.stages.get(s.name, {}).get("status") != "failed" for s in stages)
