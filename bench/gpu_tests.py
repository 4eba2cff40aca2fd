"""The tests marked ``gpu`` on all cores, by pytest-xdist: what one takes along costs it alone."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from bench.environment import ROOT
from bench.gpu_checks import last_words
from bench.gpu_out import FAILURES, WORK
from bench.stages import Deadline, Outcome, Record
from pwm_fast.run.installation import usable_cpus

HANGS = 90.0  # seconds in which one test must end, with the kernels that it compiles
TOGETHER = min(max(usable_cpus() - 2, 2), 12)  # processes; they mostly compile kernels
OUTCOMES = ("passed", "failed", "skipped")
MESSAGES = 10  # kept of a file
NEEDED = {"pytest": 9, "pytest-xdist": 3}  # the first ends a process whose test hangs


def missing() -> str | None:
    """What cannot be found here and is needed to run tests; None if nothing."""
    for name, least in NEEDED.items():
        try:
            if int(metadata.version(name).partition(".")[0]) < least:
                return f"{name} {least}"
        except metadata.PackageNotFoundError:
            return name
    return None


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
    at work; another goes on after it. What the time ends is gone on with by the next run.

    Args:
        left: the time.
        record: what is known.
        device: ``cuda``, where some test must have passed, or ``cpu``.
        files: with the tests.
        first: of each test function :func:`bench.gpu_plugin.first_cases` alone.
        log: of what pytest prints and of tracebacks, by default ``build/gpu/failures.log``.
        tell: takes a line a failure.
    """
    if (lacking := missing()) is not None:
        return Outcome("partial", f"not run: there is no {lacking} here")
    files = test_files() if files is None else files
    known = Known(record, tell)
    run = _Run(known, [name for name in files if not known.finished(name)], first)
    WORK.mkdir(parents=True, exist_ok=True)
    status = run.wait(left, log or WORK / FAILURES) if run.files else 0
    record.save()
    if status not in (None, 0, 1, 5) and not run.heard:
        return Outcome("failed", f"the tests were not run: {last_words(log or WORK / FAILURES)}")
    return known.summary(files, device, first and status in (0, 1, 5))


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


class _Run:
    """One run of pytest over files whose tests have not all ended."""

    def __init__(self, known: Known, names: Iterable[str], first: bool) -> None:
        self.files = {str((ROOT / name).resolve()): name for name in names}
        self.heard = False
        self._known = known
        self._all: dict[str, list[str]] = {name: [] for name in self.files.values()}
        self._report, self._read = WORK / "tests.jsonl", 0
        self._first = first

    def wait(self, left: Deadline, log: Path) -> int | None:
        """Take what comes until the run ends, or the time; the status, None where it was ended."""
        self._report.unlink(missing_ok=True)
        process = self._start(log)
        saved = time.monotonic()
        try:
            while (status := process.poll()) is None and left.left > 0.0:
                time.sleep(0.05)
                self._take()
                if time.monotonic() - saved > 2.0:
                    self._known.record.save()
                    saved = time.monotonic()
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            self._take()
            for name, tests in self._all.items():
                if self.heard:
                    self._known.finish(name, tests)
        return status

    def _start(self, log: Path) -> subprocess.Popen[bytes]:
        from bench.gpu_plugin import VARIABLE, Orders  # imports pytest, which not all have

        done = {path: sorted(self._known.done(name)) for path, name in self.files.items()}
        orders = Orders(str(self._report), self._first, done, HANGS)
        command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "--no-summary", "-m", "gpu"]
        command += [*self.files, "-p", "no:cacheprovider", "-p", "bench.gpu_plugin"]
        command += [f"-n{TOGETHER}", "--dist=load", "--max-worker-restart=1000"]
        command += ["-o", f"faulthandler_timeout={HANGS}"]
        command += ["-o", "faulthandler_exit_on_timeout=true"]
        # Of another pytest-xdist's processes this one would pass for a worker.
        variables = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
        variables[VARIABLE] = json.dumps(asdict(orders))
        with log.open("ab") as stream:
            return subprocess.Popen(
                command,
                cwd=ROOT,
                env=variables,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that its workers end with it
            )

    def _take(self) -> None:
        text = self._report.read_text("utf-8") if self._report.exists() else ""
        lines = text.splitlines()[: text.count("\n")]  # the last may be half a line
        for line in map(json.loads, lines[self._read :]):
            self._read += 1
            self.heard = True
            for path, name in self.files.items():
                if line["file"] != path and Path(line["file"]) not in Path(path).parents:
                    continue  # of a folder whose conftest.py is at fault
                if line["outcome"] == "collected":
                    self._all[name] += line["tests"]
                else:
                    for test in line["tests"]:
                        self._known.add(name, test, line["outcome"], line["message"])
