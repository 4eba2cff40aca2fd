"""Stages keep to their time, and a later run goes on where one ended."""

from __future__ import annotations

import copy
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from bench import results, stages
from bench.results import ResultError, Row
from bench.stages import Deadline, Outcome, Record, Stage
from tests.bench.synthetic import FACTS


def facts(**commit: Any) -> dict[str, Any]:
    found = copy.deepcopy(FACTS)
    found["commit"].update(commit)
    return found


@pytest.fixture
def record(tmp_path: Path) -> Record:
    return Record(tmp_path / "gpu_x.json", facts())


class Run:
    """Runs of stages on a clock that only they move: each wants some seconds."""

    def __init__(self, **wanted: tuple[float, float]) -> None:
        self.now = 100.0
        self.seen: list[float] = []  # the time that each stage had
        self.stages = [
            Stage(name, budget, partial(self.work, seconds))
            for name, (budget, seconds) in wanted.items()
        ]

    def work(self, seconds: float, left: Deadline) -> Outcome:
        self.seen.append(left.left)
        self.now += min(seconds, left.left)
        return Outcome("ok" if seconds <= self.seen[-1] else "partial", "")

    def go(self, record: Record, budget: float, **options: Any) -> bool:
        tell, clock = (lambda _: None), (lambda: self.now)
        return stages.run(self.stages, record, budget, clock=clock, tell=tell, **options)


INF = float("inf")


def test_a_stage_has_its_budget_and_no_more_than_is_left(record: Record) -> None:
    run = Run(build=(50.0, 20.0), tests=(100.0, 200.0), matrix=(INF, 1000.0))
    assert run.go(record, 200.0)
    assert run.seen == [50.0, 100.0, 80.0] and run.now == 300.0
    assert [s["status"] for s in record.stages.values()] == ["ok", "partial", "partial"]


def test_a_second_run_does_what_is_missing_alone(record: Record) -> None:
    run = Run(build=(50.0, 20.0), matrix=(INF, 150.0))
    run.go(record, 100.0)
    again = Record(record.path, facts())
    run.go(again, 200.0)
    assert run.seen == [50.0, 80.0, 200.0]
    assert again.stages["matrix"] == {"status": "ok", "detail": "", "seconds": 230.0}
    run.go(again, 100.0, again=["build"])
    assert run.seen[3:] == [50.0]


def test_a_stage_that_raises_has_failed_and_the_rest_goes_on(record: Record) -> None:
    def broken(left: Deadline) -> Outcome:
        raise OSError("no compiler")

    run = Run(micro=(9.0, 1.0))
    run.stages.insert(0, Stage("build", 9.0, broken))
    assert not run.go(record, 100.0)
    assert record.stages["build"]["detail"] == "OSError: no compiler"
    assert record.stages["micro"]["status"] == "ok"


def test_nothing_is_begun_without_time(record: Record) -> None:
    run = Run(build=(99.0, 98.0), tests=(99.0, 98.0))
    assert run.go(record, 100.0)
    assert len(run.seen) == 1
    assert record.stages["tests"]["status"] == "partial"


def test_rows_are_written_as_they_come_and_read_again(record: Record) -> None:
    order = ("published", "fast", "floor")
    record.add("case", {"work": "w"}, Row("floor", "ok", None, [1.0]), order)
    record.add("case", {"work": "w"}, Row("published", "memory", "2 TiB"), order)
    again = Record(record.path, facts())
    assert list(again.result.groups["case"].rows) == ["published", "floor"]
    assert again.missing("case", order) == ["fast"]
    assert again.missing("other", order) == list(order)
    assert again.result.groups["case"].rows["published"].reason == "2 TiB"


def test_the_file_has_the_form_of_all_results(record: Record) -> None:
    record.add("case", {"work": "w"}, Row("floor", "ok", None, [1.0], 5), ("floor",))
    record.result.gpu["micro"]["launches"] = [{"name": "graph node", "value": 1.0, "unit": "µs"}]
    record.end("micro", Outcome("ok", "1 figure"), 2.0)
    data = json.loads(record.path.read_text("utf-8"))
    assert data["schema"] == results.SCHEMA
    assert {"date", "commit", "machine", "software", "cases", "gpu"} <= set(data)
    assert data["cases"][0]["rows"] == [
        {"provider": "floor", "status": "ok", "peak_bytes": 5, "seconds": [1.0]}
    ]
    assert set(data["gpu"]) == {"stages", "micro", "tests", "attempts"}
    assert results.load(record.path).gpu == data["gpu"]
    assert not list(record.path.parent.glob("*.tmp"))


@pytest.mark.parametrize("change", ["commit", "gpu", "torch"])
def test_results_of_other_code_or_machines_are_not_mixed(record: Record, change: str) -> None:
    record.save()
    other = facts()
    section = {"commit": "commit", "gpu": "machine", "torch": "software"}[change]
    other[section]["id" if change == "commit" else change] = "another"
    with pytest.raises(ResultError, match=rf"{change} was .*, is another.*--out"):
        Record(record.path, other)


def test_uncommitted_changes_stay_known(record: Record) -> None:
    record.save()
    assert Record(record.path, facts(dirty=True)).result.facts["commit"]["dirty"] is True


def test_stopped_work_gets_more_time_or_is_given_up(record: Record) -> None:
    assert record.fits("a", 10.0)
    assert not record.attempt("a", 40.0)
    assert not record.fits("a", 42.0)
    assert record.fits("a", 60.0)
    assert record.attempt("a", stages.GIVE_UP)
