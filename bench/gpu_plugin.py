"""A pytest plugin that writes what becomes of each test at once, so that a killed run loses none.

``-p bench.gpu_plugin`` with PWM_FAST_TEST_LOG naming the file: a line of JSON where a test starts
and one where it has ended; with ``--collect-only`` one for every test that there is. Tracebacks are
printed at once, too, since pytest waits for the end. A test that takes the CUDA context with it
ends the process with status :data:`LOST`: no test after it could pass.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from bench.gpu_tests import LOST, VARIABLE

_found: dict[str, tuple[str, str]] = {}  # what is known of a test before its teardown


def pytest_collection_finish(session: Any) -> None:
    """The tests that are left after ``-m`` and ``-k``."""
    if session.config.option.collectonly:
        for item in session.items:
            _write(item.nodeid, "collected", file=str(item.path))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: Any) -> Generator[None, Any, Any]:
    """A file that cannot be imported has failed, or is skipped as a whole."""
    report = yield
    if not report.passed:
        _write(report.nodeid, report.outcome, _message(report), file=str(collector.path))
    return report


def pytest_runtest_logstart(nodeid: str) -> None:
    """Whatever ends the process now, it was this test."""
    _write(nodeid, "started")


def pytest_runtest_logreport(report: Any) -> None:
    """The worst of a test's setup, call and teardown is its outcome."""
    if report.failed:
        print(f"\n{report.nodeid}, {report.when}:\n{report.longreprtext}", flush=True)
    if report.failed or (report.skipped and report.nodeid not in _found):
        _found[report.nodeid] = report.outcome, _message(report)
    if report.when == "teardown":
        outcome, message = _found.pop(report.nodeid, ("passed", ""))
        _write(report.nodeid, outcome, message)
        if outcome == "failed" and _context_is_lost():
            print(f"{report.nodeid} took the CUDA context with it", flush=True)
            os._exit(LOST)


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


def _write(test: str, outcome: str, message: str = "", **more: str) -> None:
    line = {"test": test, "outcome": outcome, "message": message, **more}
    with Path(os.environ[VARIABLE]).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
