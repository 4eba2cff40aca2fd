"""The tests marked ``gpu``, each in a process that it may take with it without harm to others."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bench.environment import ROOT
from bench.gpu_checks import last_words, run_command
from bench.gpu_out import FAILURES, WORK
from bench.stages import Deadline, Outcome, Record

HANGS = 90.0  # seconds in which one test must end, with the kernels that it compiles
STARTS = 120.0  # seconds in which a process must come to its first test
BATCH = 24  # tests of a process, at most
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
TOGETHER = min(max(CORES - 2, 2), 12)  # processes: most of their time is spent compiling kernels
OUTCOMES = ("passed", "failed", "skipped")
MESSAGES = 10  # kept of a file
VARIABLE = "PWM_FAST_TEST_LOG"  # tells bench.gpu_plugin of its file
LOST = 77  # its status where a test took the CUDA context with it


def test_files() -> list[str]:
    """Test files with tests that need a GPU, found by their text: some cannot be imported here.

    The mark stands in the file, or in a module of the tests that it imports.
    """
    marked: dict[Path, bool] = {}

    def has(path: Path) -> bool:
        if path not in marked:
            marked[path] = False  # until known: modules may import each other
            text = path.read_text("utf-8") if path.is_file() else ""
            names = re.findall(r"^\s*(?:from|import) (tests(?:\.\w+)+)", text, re.MULTILINE)
            others = [ROOT / f"{name.replace('.', '/')}.py" for name in names]
            marked[path] = bool(re.search(r"\bmark\.gpu\b", text)) or any(map(has, others))
        return marked[path]

    found = filter(has, sorted((ROOT / "tests").rglob("test_*.py")))
    return [path.relative_to(ROOT).as_posix() for path in found]


def tests(
    left: Deadline,
    record: Record,
    device: str,
    files: Sequence[str] | None = None,
    *,
    first: bool = False,
    log: Path | None = None,
    tell: Callable[[str], None] = print,
) -> Outcome:
    """Run what has not been run yet, in several processes at a time.

    What fails is told at once. A process that dies, hangs or loses its CUDA context costs the test
    at work; another goes on after it. What the time ends is gone on with by the next run. What was
    printed by processes with failures is added to a log.

    Args:
        left: the time.
        record: what is known.
        device: ``cuda``, where some test must have passed, or ``cpu``.
        files: with the tests.
        first: of each test function :func:`first_cases` alone.
        log: of what processes with failures printed, by default ``build/gpu/failures.log``.
        tell: takes a line a failure.
    """
    if find_spec("pytest") is None:
        return Outcome("partial", "not run: there is no pytest here")
    files = test_files() if files is None else files
    known = Known(record, tell)
    there = _collect([name for name in files if not known.finished(name)], left, known)
    if isinstance(there, Outcome):
        return there
    work = _Work(left, known, log or WORK / FAILURES)
    for name, found in sorted(there.items(), key=lambda item: -len(item[1])):
        wanted = first_cases(found) if first else found
        chosen = [test for test in wanted if test not in known.done(name)]
        size = -(-len(chosen) // max(-(-len(chosen) // BATCH), 1))  # batches of one size
        for begin in range(0, len(chosen), max(size, 1)):
            work.queue.append((name, chosen[begin : begin + size]))
    complete = work.run()
    for name, found in there.items():
        known.finish(name, found)
    record.save()
    return known.summary(files, device, first and complete)


def first_cases(tests: Sequence[str]) -> list[str]:
    """The first case of each test function, then each that brings a word none before it has.

    Words are names of operations, precisions and dtypes; sizes, and numbered cases, are none.
    """
    first, more, seen = [], [], set()
    for test in tests:
        function, _, case = test.partition("[")
        words = {(function, "")}
        for word in case.rstrip("]").split("-"):
            name = word if word.endswith(("16", "32")) else word.rstrip("0123456789")
            if re.search("[a-zA-Z]", name):
                words.add((function, name))
        if (function, "") not in seen:
            first.append(test)
        elif not words <= seen:
            more.append(test)
        seen |= words
    return first + more


class Known:
    """What is known of the tests, by file: counts, messages, and while some are left, the done."""

    def __init__(self, record: Record, tell: Callable[[str], None]) -> None:
        self.record, self.tell = record, tell
        self.files: dict[str, dict[str, Any]] = record.result.gpu["tests"]

    def finished(self, name: str) -> bool:
        """No test of the file is left."""
        return name in self.files and "done" not in self.files[name]

    def done(self, name: str) -> set[str]:
        """Tests of a file that is not finished."""
        return set(self.files.get(name, {}).get("done", ()))

    def add(self, name: str, test: str, outcome: str, message: str = "") -> None:
        """A test has ended."""
        found = self.files.setdefault(
            name, {**dict.fromkeys(OUTCOMES, 0), "messages": [], "done": []}
        )
        found[outcome] += 1
        found["done"].append(test)
        if outcome == "failed":
            text = f"{test}: {message}"
            if len(found["messages"]) < MESSAGES:
                found["messages"].append(text)
            self.tell(f"  failed: {name}: {text}")

    def finish(self, name: str, tests: Sequence[str]) -> None:
        """Note that a file is finished, if these are its tests and have all ended."""
        if self.done(name).issuperset(tests):
            none = {**dict.fromkeys(OUTCOMES, 0), "messages": []}
            self.files.setdefault(name, none).pop("done", None)

    def summary(self, files: Sequence[str], device: str, complete: bool = False) -> Outcome:
        """What became of the tests, in a line; ``complete``: no more were wanted."""
        there = [self.files[name] for name in files if name in self.files]
        ended = sum(self.finished(name) for name in files)
        passed, failed, skipped = (
            sum(c[k] for c in there) for k in ("passed", "failed", "skipped")
        )
        text = f"{passed} passed, {failed} failed, {skipped} skipped"
        text += f" in {ended} of {len(files)} files"
        broken = [name for name in files if self.files.get(name, {}).get("failed")]
        if broken:
            text += f"; see {', '.join(broken)}"
        if ended < len(files) and not complete:
            return Outcome("partial", text)
        if failed or (device == "cuda" and not passed):
            return Outcome("failed", text if failed else f"{text}: no test has run on the GPU")
        return Outcome("ok", text)


def _collect(files: Sequence[str], left: Deadline, known: Known) -> dict[str, list[str]] | Outcome:
    """The tests of each file; none of one that cannot be imported or is skipped as a whole."""
    found: dict[str, list[str]] = {name: [] for name in files}
    if not files:
        return found
    report = _folder() / "collected.jsonl"
    report.unlink(missing_ok=True)
    options = ["--collect-only", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *options, "-p", "bench.gpu_plugin", *files]
    done = run_command(command, left, **{VARIABLE: str(report)})
    if done.status is None:
        return Outcome("partial", f"the tests were not collected within {done.seconds:.0f} s")
    report.with_suffix(".log").write_text(done.output, "utf-8")
    paths = {(ROOT / name).resolve(): name for name in files}
    for line in _lines(report):
        place = Path(line["file"]).resolve()
        if line["outcome"] == "collected":
            found[paths[place]].append(_inside(line["test"]))
            continue
        for path, name in paths.items():
            if place == path or place in path.parents:  # of a folder whose conftest.py is at fault
                known.add(name, line["test"], line["outcome"], line["message"])
    if done.status not in (0, 2, 5) and not any(found.values()):
        last = last_words(report.with_suffix(".log"))
        return Outcome("failed", f"the tests were not collected: {last}")
    return found


def _inside(test: str) -> str:
    """The name of a test in its file: what the file is called depends on where pytest begins."""
    return test.partition("::")[2] or test


def _folder() -> Path:
    folder = WORK / "tests"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _lines(report: Path) -> list[dict[str, str]]:
    try:
        return [json.loads(line) for line in report.read_text("utf-8").splitlines()]
    except OSError:
        return []


class _Batch:
    """A process that runs some tests of one file."""

    def __init__(self, name: str, tests: Sequence[str], number: int) -> None:
        self.name, self.left = name, list(tests)
        self.current: str | None = None  # has started and not ended
        self.failed = False
        self.report = _folder() / f"{name.strip('/').replace('/', '.')}.{number}.jsonl"
        self.report.unlink(missing_ok=True)
        self._read = 0
        self._heard = time.monotonic()
        command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider"]
        command += ["-p", "bench.gpu_plugin", *(f"{name}::{test}" for test in tests)]
        variables = {**os.environ, VARIABLE: str(self.report)}
        variables["OMP_NUM_THREADS"] = str(max(CORES // TOGETHER, 1))
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=variables, stdout=log, stderr=subprocess.STDOUT
            )

    @property
    def log(self) -> Path:
        """What pytest printed."""
        return self.report.with_suffix(".log")

    @property
    def quiet(self) -> float:
        """Seconds since something was heard."""
        return time.monotonic() - self._heard

    def keep_log(self, path: Path) -> None:
        """Add what was printed to the log of failures, if some test has failed."""
        if self.failed:
            with path.open("a", encoding="utf-8") as file:
                file.write(self.log.read_text("utf-8", "replace"))

    def news(self) -> Iterator[dict[str, str]]:
        """Tests that have ended since the last call; a test is ``left`` until it has."""
        lines = _lines(self.report) if self.report.exists() else []
        for line in lines[self._read :]:
            self._read += 1
            self._heard = time.monotonic()
            line["test"] = _inside(line["test"])
            self.current = line["test"] if line["outcome"] == "started" else None
            if self.current is None and line["test"] in self.left:
                self.left.remove(line["test"])
                yield line


class _Work:
    """Batches that wait and batches that run."""

    def __init__(self, left: Deadline, known: Known, log: Path) -> None:
        self.queue: deque[tuple[str, list[str]]] = deque()
        self._running: list[_Batch] = []
        self._left, self._known, self._log = left, known, log
        self._number = 0

    def run(self) -> bool:
        """Run them; False if the time was over before all had ended."""
        left, saved = self._left, time.monotonic()
        try:
            while self.queue or self._running:
                while self.queue and len(self._running) < TOGETHER and not left.over:
                    name, tests = self.queue.popleft()
                    self._number += 1
                    self._running.append(_Batch(name, tests, self._number))
                for batch in list(self._running):
                    self._look(batch)
                if left.left <= 0.0 or (left.over and not self._running):
                    break
                if time.monotonic() - saved > 2.0:
                    self._known.record.save()
                    saved = time.monotonic()
                time.sleep(0.05)
            return not self.queue and not self._running
        finally:
            for batch in self._running:
                batch.process.kill()
                batch.process.wait()
                self._take(batch)
                test = f"{batch.name}::{batch.current}"
                if batch.current and self._known.record.attempt(test, batch.quiet, HANGS):
                    self._add(batch, batch.current, "failed", "it did not end")
                batch.keep_log(self._log)

    def _take(self, batch: _Batch) -> None:
        for line in batch.news():
            self._add(batch, line["test"], line["outcome"], line["message"])

    def _add(self, batch: _Batch, test: str, outcome: str, message: str) -> None:
        batch.failed |= outcome == "failed"
        self._known.add(batch.name, test, outcome, message)

    def _look(self, batch: _Batch) -> None:
        status = batch.process.poll()
        self._take(batch)
        if status is None and batch.quiet < (STARTS if batch.current is None else HANGS):
            return
        if status is None:
            batch.process.kill()
            batch.process.wait()
            said = f"it did not end within {batch.quiet:.0f} s"
        else:
            said = f"status {status}: {last_words(batch.log)}"
        self._running.remove(batch)
        if batch.current is not None:
            self._add(batch, batch.current, "failed", said)
            batch.left.remove(batch.current)
        elif status != LOST and (batch.left or status not in (0, 1)):
            # It could not run them, or it died when it had run all.
            self._add(batch, "its process", "failed", said)
            self._known.files[batch.name]["done"] += batch.left
            batch.left = []
        batch.keep_log(self._log)
        if batch.left:
            self.queue.appendleft((batch.name, batch.left))
