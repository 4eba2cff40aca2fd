"""`make setup` with a Python that only says what it was asked: which pip installs, or why none."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAKE = shutil.which("make")
pytestmark = pytest.mark.skipif(MAKE is None, reason="there is no make")

# `pip` holds the version of .venv's pip; `index` says whether a newer one can be had.
PYTHON = r"""#!/bin/sh
echo "$*" | head -n 1 >>log
case "$*" in
-c*) echo "3.10 of /fake" ;;
"-m venv"*) mkdir -p .venv/bin && cp "$0" .venv/bin/python && cp bundled pip ;;
"-m pip --version") echo "pip $(cat pip) from /fake/pip (python 3.10)" ;;
"-m pip install"*"pip>="*)
  case "$(cat pip)" in 25.* | 26.*) exit 0 ;; esac
  if [ -e index ]; then echo 26.3 >pip
  else echo 'WARNING: Retrying' >&2; echo 'ERROR: Could not find a version' >&2; exit 1; fi ;;
"-m pip install"*) echo "installed by $(cat pip)" >>log ;;
"-m pwm_fast.info") echo "native CUDA  no: of no use" ;;
esac
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout as far as the Makefile looks at it."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("pyproject.toml", "setup.py", "constraints.txt"):
        (tmp_path / name).write_text("")
    (tmp_path / "csrc").mkdir()
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    return tmp_path


def setup(checkout: Path, bundled: str, **variables: str) -> subprocess.CompletedProcess[str]:
    assert MAKE is not None
    (checkout / "bundled").write_text(bundled + "\n")
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PWM_FAST_", "MAKE"))}
    return subprocess.run(
        [MAKE, "setup", f"PYTHON={checkout / 'python'}"],
        cwd=checkout,
        env={**clean, "PWM_FAST_BUILD": "0", **variables},
        capture_output=True,
        text=True,
        check=False,
    )


def wanted() -> str:
    """The pip that the Makefile asks for."""
    return re.findall(r"^PIP := (\S+)$", (ROOT / "Makefile").read_text(), re.M)[0]


@pytest.mark.parametrize("bundled", ["20.0.2", "22.0.2", "23.0.1", "23.2.1", "24.2"])
def test_pip_is_new_before_anything_is_installed(checkout: Path, bundled: str) -> None:
    (checkout / "index").touch()
    done = setup(checkout, bundled)
    assert done.returncode == 0, done.stderr
    log = (checkout / "log").read_text().splitlines()
    installs = [line for line in log if " install" in line or line.startswith("installed")]
    assert installs[0].endswith(f"pip>={wanted()}")
    assert installs[-1] == "installed by 26.3" and "constraints.txt" in installs[1]
    assert len(installs) == 3
    assert setup(checkout, bundled).returncode == 0
    assert (checkout / "log").read_text().count("installed by") == 1, "it is done already"


def test_pip_that_is_new_enough_stays(checkout: Path) -> None:
    """Whatever the index has: without one, too."""
    done = setup(checkout, "25.3")
    assert done.returncode == 0 and "NOTE: goes on" not in done.stdout
    assert "installed by 25.3" in (checkout / "log").read_text()


@pytest.mark.parametrize("bundled", ["22.0.2", "23.0.1", "24.2"])
def test_without_a_newer_pip_it_goes_on_and_says_so(checkout: Path, bundled: str) -> None:
    done = setup(checkout, bundled)
    assert done.returncode == 0, done.stderr
    [note] = [line for line in done.stdout.splitlines() if line.startswith("NOTE: goes on")]
    assert f"pip {bundled}" in note and wanted() in note and "Could not find a version" in note
    assert f"installed by {bundled}" in (checkout / "log").read_text()
    assert "Retrying" not in done.stdout + done.stderr


@pytest.mark.parametrize("bundled", ["9.0.1", "20.0.2", "21.3.1"])
def test_a_pip_that_is_too_old_stops_with_the_command(checkout: Path, bundled: str) -> None:
    done = setup(checkout, bundled)
    assert done.returncode != 0
    [error] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert f"pip {bundled}" in error
    assert error.endswith(f".venv/bin/python -m pip install 'pip>={wanted()}'")
    assert "installed by" not in (checkout / "log").read_text()
    (checkout / "index").touch()  # it is taken up again
    assert setup(checkout, bundled).returncode == 0


def test_a_driver_that_comes_installs_again(checkout: Path) -> None:
    """As an nvcc that comes does: setup.py compiles CUDA's sources where both are."""
    setup(checkout, "25.3")
    programs = checkout / "bin"
    programs.mkdir()
    (programs / "nvidia-smi").write_text("#!/bin/sh\n")
    (programs / "nvidia-smi").chmod(0o755)
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    for _ in range(2):
        setup(checkout, "25.3", PATH=path)
        assert (checkout / "log").read_text().count("installed by") == 2


def test_a_kit_for_a_python_that_is_not_there_stops_at_once(checkout: Path) -> None:
    assert MAKE is not None
    command = [MAKE, "gpu-kit", "KIT_PYTHON=/nowhere/python3.12"]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and not (checkout / "build").exists()
    assert done.stderr.startswith("error: /nowhere/python3.12 does not run; name that machine's")
