"""Without pybind11 and ninja the extension is built by stand-ins that do what setup.py asks for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import gpu_checks
from bench.environment import ROOT
from bench.stages import Deadline, Record
from tests.bench.synthetic import FACTS

STAND_INS = ROOT / "bench" / "stand_ins"
# The calls of setup.py, with files that tell what was run.
WRITE = """
import sys
from ninja import ninja_syntax

with open("build.ninja", "w") as file:
    ninja = ninja_syntax.Writer(file, width=10**6)
    ninja.variable("tool", ninja_syntax.escape("cat $nothing"))
    ninja.rule("copy", "test $own_flags = '$$' && $tool $in > $out", depfile="$out.d", deps="gcc")
    ninja.rule("link", "cat $in > $out")
    objects = []
    for name in ("one", "two"):
        objects += ninja.build(
            f"{name}.o", "copy", f"{name}.c", variables={"own_flags": ninja_syntax.escape("'$'")}
        )
    ninja.build("all", "link", objects)
"""


def run(folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *args],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(STAND_INS)},
    )


def test_files_are_built_in_order(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / f"{name}.c").write_text(f"{name}\n")
    assert run(tmp_path, "-c", WRITE).returncode == 0
    done = run(tmp_path, "-m", "ninja", "-C", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "all").read_text() == "one\ntwo\n"


def test_what_fails_is_said_and_ends_the_build(tmp_path: Path) -> None:
    (tmp_path / "one.c").write_text("one\n")
    assert run(tmp_path, "-c", WRITE).returncode == 0
    done = run(tmp_path, "-m", "ninja", "-C", str(tmp_path))
    assert done.returncode == 1 and "two.c" in done.stdout and "FAILED: two.o" in done.stdout
    assert not (tmp_path / "all").exists()


def test_the_headers_are_those_of_torch(tmp_path: Path) -> None:
    done = run(tmp_path, "-c", "import pybind11; print(pybind11.get_include())")
    assert (Path(done.stdout.strip()) / "pybind11" / "pybind11.h").exists()


@pytest.mark.parametrize("missing", ["pybind11", "ninja", None])
def test_they_are_used_where_a_tool_is_missing(
    missing: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def build(command: list[str], left: Deadline, **options: object) -> gpu_checks.Done:
        seen.append(options.get("PYTHONPATH", ""))
        return gpu_checks.Done(1, "", 0.0)

    monkeypatch.setenv("NVCC", "nvcc")
    monkeypatch.setattr(gpu_checks, "WORK", tmp_path / "gpu")
    monkeypatch.setattr(gpu_checks, "run_command", build)
    monkeypatch.setattr(gpu_checks, "find_spec", lambda name: None if name == missing else name)
    gpu_checks.build(Deadline(9.0), Record(tmp_path / "x.json", FACTS))
    probed, built = seen
    assert probed == "" and (str(STAND_INS) in str(built)) == (missing is not None)
