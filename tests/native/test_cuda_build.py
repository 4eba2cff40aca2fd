"""The extension's CUDA part where there is no GPU: it loads, says so, and does not launch."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap

import pytest

from tests.native.harness import _C

if not hasattr(_C, "cuda_devices"):
    pytest.skip("the native extension is of an older version", allow_module_level=True)

CODE = """
    import json
    from array import array
    from pwm_fast import _C

    memory, sizes = array("q", [0] * 64), array("q", [5])
    at, size = memory.buffer_info()[0], sizes.buffer_info()[0]
    calls = {
        "cuda_esnr": (at, size, 0, at, at, 2, 1, at, 64, 0, 0),
        "cuda_esnr_update": (at, size, 0, at, 1, at, 64, 0, 0),
        "cuda_esnr_result": (at, size, 0, at, at, at, 2, 1, at, 64, 0, 0),
    }
    raised = {}
    for name, arguments in calls.items():
        try:
            getattr(_C, name)(*arguments)
        except RuntimeError as error:
            raised[name] = str(error)
    isa = _C.cpu_isa()  # what does not concern a GPU still runs
    print(json.dumps([_C.cuda_devices(), _C.cuda_why_not(0), raised, isa, _C.build_info()]))
"""


def test_without_a_gpu() -> None:
    """No crash and no launch: an error that tells the reason, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(CODE)],
        capture_output=True,
        text=True,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr
    (count, reason), why_not, raised, isa, build = json.loads(done.stdout)
    assert count == 0 and reason and reason in why_not
    assert isa in ("generic", "avx2", "avx512")
    assert sorted(raised) == ["cuda_esnr", "cuda_esnr_result", "cuda_esnr_update"]
    if build["cuda"]:
        assert re.fullmatch(r"nvcc \d+\.\d+, for .+", build["cuda_detail"])
        assert why_not == f"CUDA finds no GPU ({reason})"
        assert all("cuda" in text for text in raised.values())  # the name of CUDA's error
    else:
        assert set(raised.values()) == {why_not}
        assert why_not == f"the native extension is built without CUDA ({build['cuda_detail']})"


def test_what_nvcc_found_is_built() -> None:
    """Where an nvcc and a driver, or CI's PWM_FAST_CUDA=1, asked for the sources, they went in."""
    setting = os.environ.get("PWM_FAST_CUDA") or "auto"
    wanted = setting == "1" or (setting == "auto" and shutil.which("nvidia-smi"))
    if not wanted or shutil.which("nvcc") is None:
        pytest.skip("nvcc is not installed, or CUDA was not asked for and has no driver")
    assert _C.build_info()["cuda"], _C.build_info()["cuda_detail"]


def test_left_out_for_a_reason_that_helps() -> None:
    """The build's own words, which name what would change it."""
    build = _C.build_info()
    if build["cuda"]:
        pytest.skip("built with CUDA")
    reasons = r"PWM_FAST_CUDA=[01]|nvcc was not found|--list-gpu-code failed|nvcc|did not build"
    assert re.search(reasons, build["cuda_detail"])


def test_one_cuda_runtime_alone() -> None:
    """CUDA's runtime is linked statically, and none of its names can meet another one's."""
    if not sys.platform.startswith("linux") or shutil.which("nm") is None:
        pytest.skip("needs Linux and nm")
    names = subprocess.run(
        ["nm", "-D", _C.__file__], capture_output=True, text=True, check=True
    ).stdout
    assert "PyInit__C" in names
    assert not re.findall(r"\bcuda[A-Z]\w+|\bcu[A-Z]\w+", names)
