"""What setup.py makes of settings and of what the machine has; nothing is compiled here."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("setuptools")

ROOT = Path(__file__).parents[2]


def build(tmp_path: Path, **settings: str) -> subprocess.CompletedProcess[str]:
    """Run build_ext with settings in the environment and an nvcc that knows two architectures."""
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho sm_80\necho sm_90\n")
    nvcc.chmod(0o755)
    folders = ["--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temp")]
    return subprocess.run(
        [sys.executable, "setup.py", "build_ext", *folders],
        cwd=ROOT,
        env=os.environ | {"NVCC": str(nvcc), "PWM_FAST_CUDA": "1"} | settings,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"PWM_FAST_CUDA": "yes"}, "PWM_FAST_CUDA=yes is unknown: use auto, 0 or 1"),
        ({"NVCC": "/no/such/nvcc"}, r"/no/such/nvcc --list-gpu-code failed: .*No such file"),
        ({"PWM_FAST_CUDA_ARCHS": "hopper"}, "PWM_FAST_CUDA_ARCHS names hopper, which is no archi"),
        ({"PWM_FAST_CUDA_ARCHS": "80 120"}, "names 120, which this nvcc does not know"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_wrong_settings_are_named(settings: dict[str, str], message: str, tmp_path: Path) -> None:
    done = build(tmp_path, **settings)
    assert done.returncode != 0
    assert re.search(message, done.stderr), done.stderr
    assert not (tmp_path / "lib").exists()


def setup_names(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What setup.py defines, in this environment; it runs where it is read, but builds nothing."""
    import setuptools

    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    monkeypatch.chdir(ROOT)
    names: dict[str, Any] = {"__name__": "setup", "__file__": "setup.py"}
    exec(compile(Path("setup.py").read_text(), "setup.py", "exec"), names)
    return names


NVCC = "sm_80 sm_90"
NO_DRIVER = "no NVIDIA driver was found when it was built; PWM_FAST_CUDA=1 builds without one"


@pytest.mark.parametrize(
    ("settings", "driver", "nvcc", "expected"),
    [
        ({}, "", NVCC, NO_DRIVER),
        ({"PWM_FAST_CUDA": "auto"}, "", NVCC, NO_DRIVER),
        ({"PWM_FAST_CUDA": ""}, "", NVCC, NO_DRIVER),
        ({"PWM_FAST_CUDA_ARCHS": ""}, "", NVCC, NO_DRIVER),
        ({}, "file", NVCC, None),
        ({}, "program", NVCC, None),
        ({"PWM_FAST_CUDA": "1"}, "", NVCC, None),
        ({"PWM_FAST_CUDA_ARCHS": "80"}, "", NVCC, None),
        ({"PWM_FAST_CUDA": "0"}, "file", NVCC, "PWM_FAST_CUDA=0"),
        ({"PWM_FAST_CUDA": "0", "PWM_FAST_CUDA_ARCHS": "80"}, "file", NVCC, "PWM_FAST_CUDA=0"),
        ({}, "file", "", "nvcc was not found when it was built"),
        ({}, "", "", "nvcc was not found when it was built"),
    ],
)
def test_cuda_is_compiled_where_it_is_of_use(
    settings: dict[str, str],
    driver: str,
    nvcc: str,
    expected: str | None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """With an nvcc, and a driver or a wish; else the extension is told why not, and says it."""
    for name in ("PWM_FAST_CUDA", "PWM_FAST_CUDA_ARCHS", "NVCC", "PWM_FAST_BUILD"):
        monkeypatch.delenv(name, raising=False)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    programs = tmp_path / "bin"
    programs.mkdir()
    for program in [*(["nvcc"] if nvcc else []), *(["nvidia-smi"] if driver == "program" else [])]:
        (programs / program).write_text(f"#!/bin/sh\nprintf '%s\\n' {nvcc}\n")
        (programs / program).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "no_cuda"))
    names = setup_names(monkeypatch)
    names["DRIVER_FILES"] = ("/no/such/file", *([str(programs)] if driver == "file" else []))
    asked = []

    class Built(names["NinjaBuildExt"]):  # type: ignore[misc]
        def __init__(self) -> None:
            pass

        def run_ninja(self, target: Path, compiler: Any, no_cuda: str | None) -> None:
            asked.append((compiler is not None, no_cuda))

    Built().build_with_cuda(tmp_path / "_C.so")
    assert asked == [(expected is None, expected)]


def test_make_looks_for_the_same_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that comes or goes installs again."""
    [line] = [x for x in (ROOT / "Makefile").read_text().splitlines() if x.startswith("DRIVER_F")]
    assert line.split(":=")[1].split() == list(setup_names(monkeypatch)["DRIVER_FILES"])


@pytest.mark.parametrize(
    ("known", "asked", "expected"),
    [
        ("80 90 100", "", ["80", "90a", "90+PTX"]),
        ("70 80", "", ["80", "80+PTX"]),  # an nvcc before H100
        ("80 90 100", "86", None),
        ("80 86 90", "86;90a, 90+PTX", ["86", "90a", "90+PTX"]),
        ("50 60", "", None),
    ],
)
def test_architectures(
    known: str, asked: str, expected: list[str] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of those that nvcc knows; the newest as PTX too, which later GPUs compile."""
    monkeypatch.setenv("PWM_FAST_CUDA_ARCHS", asked)
    names = setup_names(monkeypatch)
    if expected is None:
        with pytest.raises(names["CudaError"]):
            names["cuda_archs"](set(known.split()))
    else:
        assert names["cuda_archs"](set(known.split())) == expected
