"""A release, built with `python -m build`: what the wheel holds, and that it trains elsewhere."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.run.conftest import clean_environment, tiny_arguments

ROOT = Path(__file__).parents[1]
FILES = ["pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"]
FOLDERS = ["bench", "configs", "csrc", "kernels", "pwm_fast", "tests"]
UNTRACKED = shutil.ignore_patterns("__pycache__", "*.so")
pytestmark = pytest.mark.slow
# It asks an index for setuptools, so `make setup` does not install it; .ci/run does. A folder
# build/ of the tree passes for a package, but not for this module.
pytest.importorskip("build.__main__", reason="the package build is not installed")


def run(*command: object, cwd: Path, **variables: str) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=clean_environment() | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that is built from the source distribution of a copy of this tree."""
    copy = tmp_path_factory.mktemp("build") / "copy"
    copy.mkdir()
    for name in FILES:
        shutil.copy(ROOT / name, copy)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=UNTRACKED)
    # Its speed is not looked at: unoptimised it compiles in half the time.
    settings = {"PWM_FAST_BUILD": "1", "PWM_FAST_CUDA": "0", "CXXFLAGS": "-O0", "PYTHONPATH": ""}
    run(sys.executable, "-m", "build", cwd=copy, **settings)
    (built,) = (copy / "dist").glob("*.whl")
    return built


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    held = set(zipfile.ZipFile(wheel).namelist())
    extension = {name for name in held if name.startswith("pwm_fast/_C.") and name.endswith(".so")}
    information = {name for name in held if name.split("/")[0].endswith(".dist-info")}
    package = {
        (Path(folder) / name).relative_to(ROOT).as_posix()
        for folder, _, names in os.walk(ROOT / "pwm_fast", followlinks=True)
        for name in names
        if not name.endswith((".pyc", ".so"))
    }
    assert {"pwm_fast/configs/config.yaml", "pwm_fast/kernels/simnorm.py"} <= package
    assert len(extension) == 1
    assert held - extension - information == package


def test_the_wheel_trains_in_an_empty_folder(wheel: Path, tmp_path: Path) -> None:
    """Dependencies are this Python's; pwm_fast itself is the wheel's alone."""
    site, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target"]
    run(*pip, site, wheel, cwd=empty)
    lines = run(site / "bin" / "pwm-fast", "info", cwd=empty, PYTHONPATH=str(site)).splitlines()
    said = {line[:24].strip(): line[25:] for line in lines}
    assert said["pwm_fast"].endswith(f" in {site / 'pwm_fast'}")
    assert said["native extension"].startswith("loaded")
    assert said["native flags"].endswith(" -O0")
    run(
        site / "bin" / "pwm-fast",
        "train",
        *tiny_arguments(Path("here")),
        cwd=empty,
        PYTHONPATH=str(site),
    )
    rows = (empty / "here" / "metrics.jsonl").read_text("utf-8").splitlines()
    assert json.loads(rows[-1])["epoch"] == 6
    assert os.listdir(empty) == ["here"]
