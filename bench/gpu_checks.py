"""The stages of :mod:`bench.gpu` that neither test nor measure: the build, the sanitizer."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from bench.environment import ROOT
from bench.stages import Deadline, Outcome, Record

WORK = ROOT / "build" / "gpu"
SANITIZERS = ("memcheck", "racecheck")
BUILD_TOOLS = ("pybind11", "ninja")  # where one is missing, bench/stand_ins has both


def build(left: Deadline, record: Record) -> Outcome:
    """Build ``pwm_fast._C`` in place, from nothing but what is installed.

    It is built through a folder without pyproject.toml: the project's metadata asks for a newer
    setuptools than many machines have, and the extension does not.
    """
    WORK.mkdir(parents=True, exist_ok=True)
    for name in ("setup.py", "csrc", "pwm_fast", "kernels", "configs"):
        link = WORK / name
        if not link.is_symlink():
            link.symlink_to(ROOT / name)
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    variables = {"PWM_FAST_BUILD": "1"}
    if any(find_spec(name) is None for name in BUILD_TOOLS):
        before = [os.environ["PYTHONPATH"]] if "PYTHONPATH" in os.environ else []
        variables["PYTHONPATH"] = os.pathsep.join([str(ROOT / "bench" / "stand_ins"), *before])
    done = run_command(command, left, cwd=WORK, **variables)
    if done.status is None:
        return Outcome("partial", f"the build did not end within {done.seconds:.0f} s")
    if done.status:
        return Outcome("failed", _telling(done.output))
    probe = (
        "from pwm_fast import _C; print(_C.cpu_isa(), *sorted(n for n in dir(_C) if 'cuda' in n))"
    )
    found = run_command([sys.executable, "-c", probe], Deadline(60.0))
    if found.status:
        return Outcome("failed", f"built, but it does not load: {_telling(found.output)}")
    isa, *cuda = found.output.split()
    record.result.facts["machine"]["native_isa"] = isa
    return Outcome("ok", f"CPU kernels for {isa}; of CUDA: {' '.join(cuda) or 'nothing'}")


def sanitizer() -> str | None:
    """compute-sanitizer's path; None where it is not installed."""
    home = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    return shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path=f"{home}/bin"
    )


def sanitize(left: Deadline, device: str) -> Outcome:
    """Small work under compute-sanitizer's memcheck and racecheck."""
    program = sanitizer()
    if program is None or device != "cuda":
        return Outcome("ok", "not run: " + ("no GPU" if program else "no compute-sanitizer here"))
    plain = run_command([sys.executable, "-m", "bench.exercise"], left)  # compiles the kernels, too
    if plain.status:
        return Outcome("failed", f"without the sanitizer: {_telling(plain.output)}")
    words, bad = [], False
    for tool in SANITIZERS:
        command = [program, "--tool", tool, "--error-exitcode", "9"]
        command += [sys.executable, "-m", "bench.exercise"]
        # The caching allocator's blocks would hide what lies beyond the end of a tensor.
        done = run_command(command, left, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        (WORK / f"{tool}.log").write_text(done.output, "utf-8")
        if done.status is None:
            words.append(f"{tool} did not end within {done.seconds:.0f} s")
        else:
            said = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (.*)", done.output)
            words.append(f"{tool}: {said[-1] if said else _telling(done.output)}")
            bad |= done.status != 0
    return Outcome("failed" if bad else "ok", "; ".join(words))


class Done(NamedTuple):
    """A process that ended; ``status`` is None where it was stopped."""

    status: int | None
    output: str
    seconds: float


def run_command(command: Sequence[str], left: Deadline, cwd: Path = ROOT, **variables: str) -> Done:
    """Run a command, and end it with all that it started when the time is over."""
    started = time.monotonic()
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env={**os.environ, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # so that what it starts can be ended with it
    )
    try:
        output, _ = process.communicate(timeout=max(left.left, 0.1))
        status: int | None = process.returncode
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        status = None
    return Done(status, output.decode("utf-8", "replace"), time.monotonic() - started)


def _telling(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r"\berror\b|Error", line)]
    return ([*errors[:1], *lines[-1:], "it said nothing"])[0][:300]


def last_words(path: Path) -> str:
    """Of a log, the line that says most."""
    try:
        return _telling(path.read_text("utf-8", "replace"))
    except OSError:
        return "it said nothing"
