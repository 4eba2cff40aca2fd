"""A pytest plugin that writes each test's outcome at once, so that a killed run loses none.

``-p bench.gpu_plugin`` with PWM_FAST_TEST_LOG naming the file: a line of JSON a test.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

VARIABLE = "PWM_FAST_TEST_LOG"


def pytest_runtest_logreport(report: Any) -> None:
    """A test passes with its call; it is skipped or fails in any phase."""
    if report.when == "call" or not report.passed:
        _write(report)


def pytest_collectreport(report: Any) -> None:
    """A file that cannot be imported has failed."""
    if report.failed:
        _write(report)


def _write(report: Any) -> None:
    crash = getattr(report.longrepr, "reprcrash", None)
    text = "" if not report.failed else str(crash.message if crash else report.longrepr)
    lines = [line for line in text.splitlines() if line.strip()]
    said = (lines[0] if crash else lines[-1]) if lines else ""
    line = {"test": report.nodeid, "outcome": report.outcome, "message": said[:200]}
    with Path(os.environ[VARIABLE]).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
