"""Tests marked ``interpreted`` run in Triton's interpreter, which needs no GPU.

``TRITON_INTERPRET=1`` acts where a kernel is decorated, so it must be set before the kernels are
imported, and then nothing in that process can be compiled. So the marked tests of a module run
together in a process of their own, and are reported here one by one::

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
    env = os.environ | {"TRITON_INTERPRET": "1", _REPORT: str(report)}
    # Tensors of an interpreted kernel are tiny: threads would only get in each other's way.
    env |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *nodes]
    # A test that hangs ends that process, and is named, well before the one that waits for it.
    command += ["-o", f"faulthandler_timeout={_TIMEOUT}"]
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, check=False)
    results: dict[str, tuple[str, str]] = {}
    for line in report.read_text().splitlines() if report.exists() else []:
        node, outcome, text = json.loads(line)
        results[node] = outcome, text
    output = f"{done.stdout}\n{done.stderr}"
    for node in nodes:
        results.setdefault(node, ("failed", f"did not run in the interpreter:\n{output}"))
    return results


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    path = os.environ.get(_REPORT)
    if not path or (report.when != "call" and report.passed):
        return
    text = report.longreprtext
    if report.skipped and isinstance(report.longrepr, tuple):
        text = str(report.longrepr[2]).removeprefix("Skipped: ")
    with open(path, "a") as file:
        file.write(json.dumps([report.nodeid, report.outcome, text]) + "\n")
