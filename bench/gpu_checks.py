"""The stages of :mod:`bench.gpu` that run other programs: the build, ncu, the sanitizer."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from bench.environment import ROOT
from bench.gpu_out import FAILURES, NCU, NCU_REPORT, WORK, Output
from bench.stages import Deadline, Outcome, Record

SANITIZERS = ("memcheck", "racecheck")
BUILD_TOOLS = ("pybind11", "ninja")  # the kit brings them
PROBE = "from pwm_fast import _C; print(_C.cpu_isa(), *sorted(n for n in dir(_C) if 'cuda' in n))"


def find_program(name: str) -> str | None:
    """The path of one of CUDA's programs: on PATH, or in CUDA_HOME or /usr/local/cuda."""
    home = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    return shutil.which(name) or shutil.which(name, path=f"{home}/bin")


def build(left: Deadline, record: Record, *, loads_sources: bool = False) -> Outcome:
    """See that ``pwm_fast._C`` loads, and build it in place where it does not and nvcc is there.

    Args:
        left: the time.
        record: what is known.
        loads_sources: what is there was built from these sources, whatever the files' times say.
    """
    found = _probe(ROOT)
    if found.status == 0 and (loads_sources or not _stale()):
        return _built("loads", found, record)
    why = "it is older than its sources" if found.status == 0 else _telling(found.output)
    lacking = [name for name in BUILD_TOOLS if find_spec(name) is None]
    if find_program("nvcc") is None and not os.environ.get("NVCC"):
        lacking = ["nvcc", *lacking]
    if lacking:
        return Outcome("ok", f"not built: there is no {' and no '.join(lacking)}; {why}")
    done = compile_extension(left, "--inplace")
    if done.status is None:
        return Outcome("partial", f"the build did not end within {done.seconds:.0f} s")
    if done.status:
        return Outcome("failed", _telling(done.output))
    found = _probe(ROOT)
    if found.status:
        return Outcome("failed", f"built, but it does not load: {_telling(found.output)}")
    return _built("built", found, record)


def compile_extension(left: Deadline, *options: str, **variables: str) -> Done:
    """Build ``pwm_fast._C`` with the Python that runs this, from nothing but what is installed.

    It is built through a folder without pyproject.toml: the project's metadata asks for a newer
    setuptools than many machines have, and the extension does not.
    """
    WORK.mkdir(parents=True, exist_ok=True)
    for name in ("setup.py", "csrc", "pwm_fast", "kernels", "configs"):
        link = WORK / name
        if not link.is_symlink():
            link.symlink_to(ROOT / name)
    variables = {"PWM_FAST_BUILD": "1", **variables}
    return run_command(
        [sys.executable, "setup.py", "build_ext", *options], left, cwd=WORK, **variables
    )


def _probe(folder: Path) -> Done:
    return run_command([sys.executable, "-c", PROBE], Deadline(60.0), cwd=folder)


def _built(how: str, found: Done, record: Record) -> Outcome:
    isa, *cuda = found.output.split()
    record.result.facts["machine"]["native_isa"] = isa
    text = f"{how}: CPU kernels for {isa}; of CUDA: {' '.join(cuda) or 'nothing'}"
    return Outcome("ok", text)


def _stale() -> bool:
    built = [p.stat().st_mtime for p in (ROOT / "pwm_fast").glob(f"_C{suffix()}")]
    return max(built, default=0.0) < max(p.stat().st_mtime for p in sources())


def suffix() -> str:
    """How the extension's file name ends in this Python."""
    return str(sysconfig.get_config_var("EXT_SUFFIX"))


def sources() -> list[Path]:
    """What the extension is built from."""
    return [ROOT / "setup.py", *sorted(p for p in (ROOT / "csrc").rglob("*") if p.is_file())]


def ncu(left: Deadline, output: Output, device: str) -> Outcome:
    """``ncu --set full`` of the persistent kernels (bench.gpu_rollout): its report, and as text."""
    program = find_program("ncu")
    if program is None or device != "cuda":
        return Outcome("ok", "ncu: " + ("no GPU" if program else "it is not installed"))
    report = WORK / NCU_REPORT
    command = [program, "--set", "full", "--kernel-name", "regex:rollout", "--clock-control"]
    command += ["none", "--force-overwrite", "--export", str(report), sys.executable]
    done = run_command([*command, "-m", "bench.gpu_rollout"], left)
    output.append(NCU, done.output)
    if "ERR_NVGPUCTRPERM" in done.output:
        return Outcome("ok", "ncu: it may not read the counters here")
    if done.status is None:
        return Outcome("partial", f"ncu did not end within {done.seconds:.0f} s")
    if done.status or not report.exists():
        return Outcome("failed", f"ncu: {_telling(done.output)}")
    details = [program, "--import", str(report), "--page", "details"]
    output.append(NCU, run_command(details, Deadline(60.0)).output)
    kept = "" if output.keep(NCU_REPORT, report) else ", too large to keep"
    return Outcome("ok", f"ncu: {report.stat().st_size / 2**20:.1f} MiB{kept}")


def sanitize(left: Deadline, device: str, output: Output) -> Outcome:
    """Small work under compute-sanitizer's memcheck and racecheck."""
    program = find_program("compute-sanitizer")
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
        if done.status != 0:
            output.append(FAILURES, f"compute-sanitizer, {tool}:\n{done.output}\n")
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
    except BaseException as error:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        if not isinstance(error, subprocess.TimeoutExpired):
            raise  # an interrupt
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
