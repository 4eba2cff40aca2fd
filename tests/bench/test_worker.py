"""A crash or a hang costs one row."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import gpu, session
from bench.cases import Case, Provider, Workload
from bench.environment import ROOT
from bench.matrix import Job
from bench.measure import Effort
from bench.providers import Absent
from bench.results import Row
from bench.stages import Deadline, Record
from bench.worker import Ended, Message, Worker
from tests.bench import fake_work
from tests.bench.synthetic import FACTS

CPU = torch.device("cpu")


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[Worker]:
    found = Worker(CPU, tmp_path / "log", fake_work.serve)
    yield found
    found.stop(kill=True)


def test_a_worker_survives_what_its_jobs_do(worker: Worker) -> None:
    """One process after another: good work, a death, a lost context, an error, a hang."""

    def run(*providers: str, seconds: float = 60.0) -> tuple[Ended, list[str]]:
        rows: list[Message] = []
        ended = worker.run(Job("case", "quick", "c", providers), seconds, rows.append)
        return ended, [message[1]["provider"] for message in rows]

    assert run("a", "b") == (Ended("done"), ["a", "b"])
    ended, rows = run("a", "dies", "b")
    assert (ended.how, ended.provider, rows) == ("crash", "dies", ["a"])
    assert "status 7" in ended.reason and "Segmentation fault of the test" in ended.reason
    ended, rows = run("breaks", "b")
    assert (ended.how, ended.provider, rows) == ("crash", None, ["breaks"])
    ended, rows = run("raises")
    assert (ended.how, ended.provider) == ("crash", "raises")
    assert ended.reason == "ValueError: of the test"
    ended, rows = run("a", "hangs", "b", seconds=1.0)
    assert (ended.how, ended.provider, rows) == ("time", "hangs", ["a"])
    assert run("b") == (Ended("done"), ["b"])


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="there is no /proc")
def test_a_worker_ends_with_a_run_that_was_killed(tmp_path: Path) -> None:
    """It would have the GPU's memory, and the next run's timings."""
    run = (
        "import torch\nfrom pathlib import Path\nfrom bench.matrix import Job\n"
        "from bench.worker import Worker\n"
        "from tests.bench import fake_work\n"
        "if __name__ == '__main__':\n"
        f"    w = Worker(torch.device('cpu'), Path({str(tmp_path / 'log')!r}), fake_work.serve)\n"
        "    w._connect()\n    print(w._process.pid, flush=True)\n"
        "    job = Job('case', 'quick', 'c', ('a', 'hangs'))\n"
        "    w.run(job, 600.0, lambda m: print(m, flush=True))\n"
    )
    (tmp_path / "run.py").write_text(run, "utf-8")
    command = [sys.executable, str(tmp_path / "run.py")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        assert "row" in process.stdout.readline()  # of "a": it serves, and now hangs
        process.kill()
    end = time.monotonic() + 30.0
    while not _ended(pid) and time.monotonic() < end:
        time.sleep(0.05)
    assert _ended(pid)


def _ended(pid: int) -> bool:
    """It runs no more, be it that nobody has asked for its status."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return not Path(f"/proc/{pid}").exists()


# --- the measuring stages, with the worker in this process ---------------------------------------


class Script:
    """A worker whose providers do as their table says, on a clock of its own."""

    def __init__(self, table: dict[str, str], clock: list[float]) -> None:
        self.table, self.clock, self.device = table, clock, CPU
        self.ran: list[tuple[str, ...]] = []

    def run(self, job: Job, seconds: float, take: Any) -> Ended:
        end = self.clock[0] + seconds
        self.ran.append(job.providers)
        if "no case" in self.table.values():
            return Ended("crash", None, "ValueError: sizes")
        for name in job.providers:
            what = self.table.get(name, "ok")
            if what == "dies":
                return Ended("crash", name, "it died")
            cost = 50.0 if what == "slow" else 1.0
            if self.clock[0] + cost > end:
                spent, self.clock[0] = end - self.clock[0], end
                return Ended("time", name, seconds=spent)
            self.clock[0] += cost
            status = what if what in ("memory", "absent", "failed") else "ok"
            row = {"provider": name, "status": status, "reason": "why", "seconds": [1.0]}
            take(("row", row))
            if what == "failed":
                return Ended("crash", None, "the context is lost")
        return Ended("done")


@pytest.fixture
def record(tmp_path: Path) -> Record:
    return Record(tmp_path / "gpu_x.json", copy.deepcopy(FACTS))


def measure(
    monkeypatch: pytest.MonkeyPatch, record: Record, table: dict[str, str], seconds: float
) -> tuple[Any, Script]:
    case = Case("c", {"work": "w"}, lambda _: Workload({}), ("published", "fast", "compile_bf16"))
    monkeypatch.setattr(gpu, "cases", lambda *_: [case])
    clock = [0.0]
    script = Script(table, clock)
    left = Deadline(seconds, lambda: clock[0])
    return gpu.measure(left, "quick", record, script, False), script  # type: ignore[arg-type]


def status(record: Record) -> dict[str, str]:
    return {name: row.status for name, row in record.result.groups["c"].rows.items()}


IN_TURN = [("published", "fast"), ("compile_bf16",)]  # cheap ones before those that compile
AGAIN = [IN_TURN[0], ("fast",), IN_TURN[1]]


@pytest.mark.parametrize(
    ("published", "ran", "rows", "outcome"),
    [
        ("ok", IN_TURN, ["ok"] * 3, ("ok", 3, 0, 0)),
        ("memory", IN_TURN, ["memory", "ok", "ok"], ("ok", 2, 1, 0)),
        ("dies", AGAIN, ["failed", "ok", "ok"], ("failed", 2, 0, 1)),
        ("failed", AGAIN, ["failed", "ok", "ok"], ("failed", 2, 0, 1)),  # and the CUDA context lost
        ("no case", IN_TURN, ["failed"] * 3, ("failed", 0, 0, 3)),
    ],
)
def test_what_a_provider_does_costs_its_own_row(
    published: str,
    ran: list[tuple[str, ...]],
    rows: list[str],
    outcome: tuple[str, int, int, int],
    monkeypatch: pytest.MonkeyPatch,
    record: Record,
) -> None:
    found, script = measure(monkeypatch, record, {"published": published}, 100.0)
    assert script.ran == ran and list(status(record).values()) == rows
    state, measured, memory, failed = outcome
    text = f"{measured} measured, {memory} out of memory, 0 absent, {failed} failed"
    assert found == (state, text)
    assert list(status(record)) == ["published", "fast", "compile_bf16"]
    if published == "dies":
        assert record.result.groups["c"].rows["published"].reason == "it died"


def test_what_the_time_ended_is_taken_up_by_the_next_run(
    monkeypatch: pytest.MonkeyPatch, record: Record
) -> None:
    outcome, _ = measure(monkeypatch, record, {"fast": "slow"}, 30.0)
    assert outcome.status == "partial" and "2 missing" in outcome.detail
    assert status(record) == {"published": "ok"}

    # Too little time for what was stopped before: others are not kept waiting.
    outcome, script = measure(monkeypatch, record, {"fast": "slow"}, 20.0)
    assert script.ran == [("compile_bf16",)]
    assert outcome.status == "partial" and "1 missing" in outcome.detail

    outcome, script = measure(monkeypatch, record, {"fast": "slow"}, 100.0)
    assert script.ran == [("fast",)]
    assert outcome.status == "ok"


def test_what_never_ends_is_given_up(monkeypatch: pytest.MonkeyPatch, record: Record) -> None:
    monkeypatch.setattr("bench.stages.GIVE_UP", 20.0)
    measure(monkeypatch, record, {"fast": "slow"}, 30.0)
    assert status(record)["fast"] == "failed"
    assert "did not end within" in (record.result.groups["c"].rows["fast"].reason or "")


class Micro:
    """A worker of microbenchmarks: one crashes after a reading, one hangs after a reading."""

    def __init__(self, clock: list[float]) -> None:
        self.clock = clock

    def run(self, job: Job, seconds: float, take: Any) -> Ended:
        take(("micro", {"name": f"{job.name} a", "value": 1.0, "unit": "s"}))
        if job.name == "hangs":
            self.clock[0] += seconds
            return Ended("time", seconds=seconds)
        self.clock[0] += 1.0
        return Ended("crash", None, "it died") if job.name == "dies" else Ended("done")


def test_a_microbenchmark_that_hangs_or_dies_leaves_the_others_their_time(
    monkeypatch: pytest.MonkeyPatch, record: Record
) -> None:
    names = ("first", "hangs", "dies", "last")
    monkeypatch.setattr(gpu, "jobs", lambda *_: [Job("micro", "micro", name) for name in names])
    clock = [0.0]
    left = Deadline(gpu.BUDGETS["micro"], lambda: clock[0])
    outcome = gpu.measure(left, "micro", record, Micro(clock), False)  # type: ignore[arg-type]
    assert outcome == ("failed", "4 figures, 2 failed")
    found = {name: [r["value"] for r in rows] for name, rows in record.result.gpu["micro"].items()}
    assert found == {"first": [1.0], "hangs": [1.0, None], "dies": [1.0, None], "last": [1.0]}
    reasons = [record.result.gpu["micro"][name][1]["reason"] for name in ("hangs", "dies")]
    assert reasons == ["failed: it did not end within 15 s", "failed: it died"]


# --- one provider after another ------------------------------------------------------------------


def raising(error: Exception) -> Any:
    def make(*_: Any) -> Provider:
        raise error

    return make


def test_rows_of_every_kind() -> None:
    truth = {"y": torch.ones(3, dtype=torch.float64)}
    good = Provider(lambda: None, lambda: {"y": torch.ones(3)})
    wrong = Provider(lambda: None, lambda: {"y": torch.full((3,), 1.1)})
    oom = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 TiB")
    wanted = {
        "published": ("ok", lambda: good),
        "tf32": ("memory", raising(oom)),
        "jax": ("memory", raising(RuntimeError("RESOURCE_EXHAUSTED: out of memory"))),
        "fast": ("failed", lambda: wrong),
        "fast_bf16": ("absent", raising(Absent("not here"))),
        "reference": ("failed", raising(RuntimeError("bug"))),
    }
    make = {name: made for name, (_, made) in wanted.items()}
    effort = Effort(0.01, 2, 3, 0.0)
    case = Case("c", {}, lambda _: Workload(make, lambda: truth), tuple(make), effort=effort)
    found = [x for x in session.one_by_one(case, case.providers, CPU) if isinstance(x, Row)]
    rows = {row.provider: row for row in found}
    assert {n: row.status for n, row in rows.items()} == {n: s for n, (s, _) in wanted.items()}
    assert len(rows["published"].seconds) >= 2
    assert not rows["fast"].seconds and "error" in (rows["fast"].reason or "")
    assert rows["reference"].reason == "RuntimeError: bug"


def test_a_case_that_does_not_fit_is_out_of_memory_for_all() -> None:
    case = Case("c", {}, raising(torch.OutOfMemoryError("full")), ("published", "fast"))
    found = [x for x in session.one_by_one(case, case.providers, CPU) if isinstance(x, Row)]
    assert [(r.provider, r.status) for r in found] == [("published", "memory"), ("fast", "memory")]
