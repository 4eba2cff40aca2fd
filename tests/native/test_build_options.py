"""What setup.py says of settings that it cannot follow; nothing is compiled here."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

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
    import setuptools

    # setup.py runs where it is imported: let it not build anything.
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PWM_FAST_CUDA_ARCHS", asked)
    names: dict[str, object] = {"__name__": "setup", "__file__": "setup.py"}
    exec(compile(Path("setup.py").read_text(), "setup.py", "exec"), names)
    if expected is None:
        with pytest.raises(names["CudaError"]):  # type: ignore[arg-type]
            names["cuda_archs"](set(known.split()))  # type: ignore[operator]
    else:
        assert names["cuda_archs"](set(known.split())) == expected  # type: ignore[operator]
