"""The ``interpreted`` marker: such tests run in Triton's interpreter, and their failures show."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")
tl = triton.language


@triton.jit
def _double(x, y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, 2.0 * tl.load(x + i, mask=i < n), mask=i < n)


@pytest.mark.interpreted
@pytest.mark.parametrize("n", [1, 17])
def test_a_kernel_runs_on_cpu_tensors(n: int) -> None:
    x = torch.randn(n)
    y = torch.full((n + 1,), float("nan"))
    _double[(triton.cdiv(n, 8),)](x, y, n, BLOCK=8)
    assert torch.equal(y[:n], 2.0 * x)
    assert y[n].isnan()


def test_this_process_still_compiles() -> None:
    assert isinstance(_double, triton.runtime.JITFunction)


def test_a_failure_shows(tmp_path: Path) -> None:
    """Each test of the interpreter's process keeps its own outcome and message."""
    conftest = (Path(__file__).parent / "conftest.py").read_text()
    (tmp_path / "conftest.py").write_text(conftest)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    interpreted: x\n")
    (tmp_path / "test_some.py").write_text(
        "import os, pytest\n"
        "@pytest.mark.interpreted\n"
        "@pytest.mark.parametrize('i', [1, 2, 3])\n"
        "def test_some(i):\n"
        "    assert os.environ['TRITON_INTERPRET'] == '1' and i != 2, f'it was {i}'\n"
        "    if i == 3: pytest.skip('it was 3')\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},  # for what it imports
        capture_output=True,
        text=True,
        check=False,
    )
    assert "1 failed, 1 passed, 1 skipped" in done.stdout
    assert "it was 2" in done.stdout
