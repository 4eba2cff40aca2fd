"""What a run of the tests marked ``gpu`` adds to pytest and pytest-xdist: ``-p bench.gpu_plugin``.

The first of xdist's workers writes which tests there are, the controller what becomes of each, at
once and as lines of JSON, so that a killed run loses none. Tracebacks are printed at once, too. A
test that loses the CUDA context ends its worker, since no test after it could pass there; xdist
starts another one. It imports no torch by itself: each of the processes would take seconds for it.
"""

from __future__ import annotations

import json
import os
import re
import sys
import threading
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

VARIABLE = "PWM_FAST_GPU_TESTS"  # holds the orders


@dataclass
class Orders:
    """What :mod:`bench.gpu_tests` asks for.

    Attributes:
        report: the file that it writes.
        first: of each test function :func:`first_cases` alone.
        done: tests that are not to run again, by their file's path.
        hangs: seconds after which a test is given up.
    """

    report: str
    first: bool
    done: dict[str, list[str]]
    hangs: float


def pytest_configure(config: Any) -> None:
    """The role of this process."""
    orders = Orders(**json.loads(os.environ[VARIABLE]))
    plugin = Worker(config, orders) if hasattr(config, "workerinput") else Controller(orders)
    config.pluginmanager.register(plugin)


class Worker:
    """Chooses the tests; all workers must choose the same, in one order."""

    def __init__(self, config: Any, orders: Orders) -> None:
        self._orders = orders
        self._first = config.workerinput["workerid"] == "gw0"
        self._failed = False

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        """Of what ``-m`` has left, keep what is wanted and has not ended in an earlier run."""
        files: dict[str, list[str]] = {}
        for item in items:
            files.setdefault(str(item.path), []).append(inside(item.nodeid))
        place: dict[tuple[str, str], int] = {}
        for file, tests in files.items():
            self._write(file, tests, "collected")
            done = self._orders.done.get(file, ())
            for test in first_cases(tests) if self._orders.first else tests:
                if test not in done:
                    place[file, test] = len(place)
        keys = {item: (str(item.path), inside(item.nodeid)) for item in items}
        items[:] = sorted((x for x in items if keys[x] in place), key=lambda x: place[keys[x]])

    @pytest.hookimpl(wrapper=True)
    def pytest_make_collect_report(self, collector: Any) -> Generator[None, Any, Any]:
        """A file that cannot be imported has failed, or is skipped as a whole."""
        report = yield
        if not report.passed:
            name = inside(report.nodeid)
            self._write(str(collector.path), [name], report.outcome, _message(report))
        return report

    @pytest.hookimpl(trylast=True)  # the controller has the report
    def pytest_runtest_logreport(self, report: Any) -> None:
        self._failed |= report.failed
        if report.when == "teardown":
            if self._failed and _context_is_lost():
                os._exit(1)
            self._failed = False

    def _write(self, file: str, tests: list[str], outcome: str, message: str = "") -> None:
        if self._first:
            _write(self._orders, file, tests, outcome, message)


class Controller:
    """Writes what becomes of each test."""

    def __init__(self, orders: Orders) -> None:
        self._orders = orders
        self._root = Path()
        self._started: dict[str, float] = {}
        self._found: dict[str, tuple[str, str]] = {}  # what is known of a test before its teardown
        threading.Thread(target=_follow, args=(os.getppid(),), daemon=True).start()

    def pytest_sessionstart(self, session: Any) -> None:
        self._root = session.config.rootpath

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._started[nodeid] = time.monotonic()

    def pytest_runtest_logreport(self, report: Any) -> None:
        """The worst of a test's setup, call and teardown is its outcome; ``???`` is a crash."""
        name = report.nodeid
        if name not in self._started:
            return  # it has ended, and then its worker
        if report.failed:
            print(f"\n{name}, {report.when}:\n{report.longreprtext}", flush=True)
        if report.failed or (report.skipped and name not in self._found):
            self._found[name] = report.outcome, _message(report)
        if report.when not in ("teardown", "???"):
            return
        seconds = time.monotonic() - self._started.pop(name)
        outcome, message = self._found.pop(name, ("passed", ""))
        if report.when == "???" and seconds >= self._orders.hangs:
            message = f"it did not end within {self._orders.hangs:.0f} s"
        file = str((self._root / name.partition("::")[0]).resolve())
        _write(self._orders, file, [inside(name)], outcome, message)


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


def inside(test: str) -> str:
    """The name of a test in its file: what the file is called depends on where pytest begins."""
    return test.partition("::")[2] or test


def _follow(parent: int) -> None:
    """End with the process that asked: one that is killed would leave a GPU at work."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def _context_is_lost() -> bool:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def _message(report: Any) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    text = "" if not report.failed else str(crash.message if crash else report.longrepr)
    lines = [line for line in text.splitlines() if line.strip()]
    return ((lines[0] if crash else lines[-1]) if lines else "")[:200]


def _write(orders: Orders, file: str, tests: list[str], outcome: str, message: str) -> None:
    line = {"file": file, "tests": tests, "outcome": outcome, "message": message}
    with Path(orders.report).open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(line) + "\n")
