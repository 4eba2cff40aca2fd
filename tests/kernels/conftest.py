"""Tests marked ``interpreted`` run in Triton's interpreter, which needs no GPU.

``TRITON_INTERPRET=1`` acts where a kernel is decorated, so it must be set before the kernels are
imported, and then nothing in that process can be compiled. So the marked tests of a module run
together in a process of their own, forked from one that has imported everything
(``interpreting.py``), and are reported here one by one::

    @pytest.mark.interpreted
    def test_rows(): ...  # kernels take CPU tensors

Use float32 and float16 there: products of bfloat16 are wrong in the interpreter.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

_REPORT = "PWM_FAST_TEST_REPORT"  # where the process of the interpreter leaves its results

_TIMEOUT = 300  # seconds of a test in the interpreter

_INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"

if _INTERPRETING:
    from tests.kernels.interpreter import patch_once

    patch_once()

_selected: dict[str, list[str]] = {}
_results: dict[str, dict[str, tuple[str, str]]] = {}
_forking: list[subprocess.Popen[str]] = []  # none or one


@pytest.hookimpl(trylast=True)  # after -k and -m have had their say
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if not _INTERPRETING and item.get_closest_marker("interpreted"):
            _selected.setdefault(str(item.path), []).append(item.nodeid)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    if _INTERPRETING or not pyfuncitem.get_closest_marker("interpreted"):
        return None
    module = str(pyfuncitem.path)
    if module not in _results:
        tmp = pyfuncitem.config._tmp_path_factory.mktemp("interpreted")  # type: ignore[attr-defined]
        _results[module] = _interpret(_selected[module], pyfuncitem.config.rootpath, tmp)
    outcome, text = _results[module].get(
        pyfuncitem.nodeid, ("failed", "the interpreter's process ended before this test")
    )
    if outcome == "skipped":
        pytest.skip(text)
    if outcome != "passed":
        pytest.fail(text, pytrace=False)
    return True


def _interpret(nodes: list[str], root: Path, tmp: Path) -> dict[str, tuple[str, str]]:
    report = tmp / "report.jsonl"
    log = tmp / "output.txt"
    arguments = ["-q", "-p", "no:cacheprovider", *nodes]
    # A test that hangs ends that process, and is named, well before the one that waits for it.
    arguments += ["-o", f"faulthandler_timeout={_TIMEOUT}"]
    request = {"arguments": arguments, "env": {_REPORT: str(report)}, "output": str(log)}
    process = _fork_server(root)
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(json.dumps(request) + "\n")
    process.stdin.flush()
    process.stdout.readline()
    results: dict[str, tuple[str, str]] = {}
    for line in report.read_text().splitlines() if report.exists() else []:
        node, outcome, text = json.loads(line)
        results[node] = outcome, text
    output = log.read_text() if log.exists() else "it did not start"
    for node in nodes:
        results.setdefault(node, ("failed", f"did not run in the interpreter:\n{output}"))
    return results


def _fork_server(root: Path) -> subprocess.Popen[str]:
    if not _forking:
        env = os.environ | {"TRITON_INTERPRET": "1"}
        # Tensors of an interpreted kernel are tiny: threads would only get in each other's way.
        env |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "tests.kernels.interpreting"]
        pipe = subprocess.PIPE
        _forking.append(
            subprocess.Popen(command, cwd=root, env=env, stdin=pipe, stdout=pipe, text=True)
        )
    return _forking[0]


def pytest_unconfigure() -> None:
    for process in _forking:
        process.communicate()  # the end of its requests


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    path = os.environ.get(_REPORT)
    if not path or (report.when != "call" and report.passed):
        return
    text = report.longreprtext
    if report.skipped and isinstance(report.longrepr, tuple):
        text = str(report.longrepr[2]).removeprefix("Skipped: ")
    with open(path, "a") as file:
        file.write(json.dumps([report.nodeid, report.outcome, text]) + "\n")
