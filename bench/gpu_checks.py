"""The stages of :mod:`bench.gpu` that measure nothing: the build, the tests, the sanitizer."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench import gpu_plugin
from bench.environment import ROOT
from bench.stages import Deadline, Outcome, Record

WORK = ROOT / "build" / "gpu"
HANGS = 60.0  # seconds in which a file must get one test done
TOGETHER = 4  # test files that run at once: most of their time is spent compiling kernels
SANITIZERS = ("memcheck", "racecheck")
NEEDED = ("setuptools", "pybind11", "ninja")


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
    done = _run(command, left, cwd=WORK, PWM_FAST_BUILD="1")
    if done.status is None:
        return Outcome("partial", f"the build did not end within {done.seconds:.0f} s")
    if done.status:
        return Outcome("failed", _telling(done.output))
    probe = (
        "from pwm_fast import _C; print(_C.cpu_isa(), *sorted(n for n in dir(_C) if 'cuda' in n))"
    )
    found = _run([sys.executable, "-c", probe], Deadline(60.0))
    if found.status:
        return Outcome("failed", f"built, but it does not load: {_telling(found.output)}")
    isa, *cuda = found.output.split()
    record.result.facts["machine"]["native_isa"] = isa
    return Outcome("ok", f"CPU kernels for {isa}; of CUDA: {' '.join(cuda) or 'nothing'}")


def test_files() -> list[str]:
    """Test files with tests that need a GPU, found by their text: some cannot be imported here.

    The mark stands in the file, or in a module of the tests that it imports.
    """
    marked: dict[Path, bool] = {}

    def has(path: Path) -> bool:
        if path not in marked:
            marked[path] = False  # until known: modules may import each other
            text = path.read_text("utf-8") if path.is_file() else ""
            names = re.findall(r"^\s*(?:from|import) (tests(?:\.\w+)+)", text, re.MULTILINE)
            others = [ROOT / f"{name.replace('.', '/')}.py" for name in names]
            marked[path] = bool(re.search(r"\bmark\.gpu\b", text)) or any(map(has, others))
        return marked[path]

    found = filter(has, sorted((ROOT / "tests").rglob("test_*.py")))
    return [path.relative_to(ROOT).as_posix() for path in found]


def tests(
    left: Deadline, record: Record, device: str, files: Sequence[str] | None = None
) -> Outcome:
    """Run the tests marked ``gpu``, some files at a time, each in a process of its own.

    A file that the time ends is gone on with by the next run, after the tests that it has done.
    """
    known: dict[str, Any] = record.result.gpu["tests"]
    files = test_files() if files is None else files
    waiting = [name for name in files if name not in known or known[name].get("stopped")]
    folder = WORK / "tests"
    folder.mkdir(parents=True, exist_ok=True)
    running: dict[str, subprocess.Popen[bytes]] = {}
    began: dict[str, float] = {}

    def take(name: str, status: int, stopped: bool) -> None:
        now = counts(_report(folder, name), status, stopped)
        if stopped and not now["done"] and record.attempt(name, began[name] - left.left, HANGS):
            now = {**now, "failed": 1, "messages": ["a test did not end"]}
            del now["stopped"], now["done"]
        known[name] = added(known.get(name), now)
        record.save()

    try:
        while waiting or running:
            while waiting and len(running) < TOGETHER and not left.over:
                name = waiting.pop(0)
                done = known.get(name, {}).get("done", [])
                running[name] = _test(name, folder, done)
                began[name] = left.left
            for name, process in list(running.items()):
                if process.poll() is not None:
                    take(name, process.returncode, False)
                    del running[name]
            if left.left <= 0.0 or (left.over and not running):
                break
            time.sleep(0.05)
        for name, process in running.items():
            process.kill()
            take(name, process.wait(), True)
    finally:
        for process in running.values():
            process.kill()
            process.wait()
    return summary(known, files, device)


def _test(name: str, folder: Path, done: Sequence[str]) -> subprocess.Popen[bytes]:
    report = _report(folder, name)
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-m", "gpu", name, "-q", "-p", "no:cacheprovider"]
    command += ["-p", "bench.gpu_plugin", *(f"--deselect={test}" for test in done)]
    variables = {**os.environ, gpu_plugin.VARIABLE: str(report)}
    with report.with_suffix(".log").open("wb") as log:
        return subprocess.Popen(
            command, cwd=ROOT, env=variables, stdout=log, stderr=subprocess.STDOUT
        )


def _report(folder: Path, name: str) -> Path:
    return folder / f"{name.strip('/').replace('/', '.')}.jsonl"


def counts(report: Path, status: int, stopped: bool = False) -> dict[str, Any]:
    """Passed, failed and skipped tests of a file, and the messages of up to 10 that failed.

    pytest's status 5, no test was chosen, is no failure. A process that ended badly without a
    failed test is one. Of one that was stopped, ``stopped`` is set and ``done`` names the tests
    that ended.
    """
    try:
        lines = [json.loads(line) for line in report.read_text("utf-8").splitlines()]
    except (OSError, ValueError):
        lines = []
    worst = {}
    for line in lines:  # a test that passes may still fail in its teardown
        worst[line["test"]] = line if line["outcome"] != "passed" else worst.get(line["test"], line)
    by_outcome = {
        outcome: sum(line["outcome"] == outcome for line in worst.values())
        for outcome in ("passed", "failed", "skipped")
    }
    messages = [
        f"{line['test'].rpartition('::')[2]}: {line['message']}"
        for line in worst.values()
        if line["outcome"] == "failed"
    ][:10]
    if stopped:
        return {**by_outcome, "messages": messages, "stopped": True, "done": list(worst)}
    if not by_outcome["failed"] and status not in (0, 5):  # it died
        by_outcome["failed"] = 1
        messages.append(f"status {status}: {_last(report.with_suffix('.log'))}")
    return {**by_outcome, "messages": messages}


def added(before: dict[str, Any] | None, now: dict[str, Any]) -> dict[str, Any]:
    """What two runs of a file found together."""
    if before is None:
        return now
    both = {k: before[k] + now[k] for k in ("passed", "failed", "skipped", "messages")}
    if now.get("stopped"):
        both |= {"stopped": True, "done": [*before.get("done", []), *now["done"]]}
    return both


def summary(known: dict[str, Any], files: Sequence[str], device: str) -> Outcome:
    """What became of the tests, in a line."""
    there = [known[name] for name in files if name in known]
    ended = sum(not found.get("stopped") for found in there)
    passed, failed, skipped = (sum(c[k] for c in there) for k in ("passed", "failed", "skipped"))
    text = f"{passed} passed, {failed} failed, {skipped} skipped in {ended} of {len(files)} files"
    broken = [name for name in files if known.get(name, {}).get("failed")]
    if broken:
        text += f"; see {', '.join(broken)}"
    if ended < len(files):
        return Outcome("partial", text)
    if failed or (device == "cuda" and not passed):
        return Outcome("failed", text if failed else f"{text}: no test has run on the GPU")
    return Outcome("ok", text)


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
    plain = _run([sys.executable, "-m", "bench.exercise"], left)  # compiles the kernels, too
    if plain.status:
        return Outcome("failed", f"without the sanitizer: {_telling(plain.output)}")
    words, bad = [], False
    for tool in SANITIZERS:
        command = [program, "--tool", tool, "--error-exitcode", "9"]
        command += [sys.executable, "-m", "bench.exercise"]
        # The caching allocator's blocks would hide what lies beyond the end of a tensor.
        done = _run(command, left, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
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


def _run(command: Sequence[str], left: Deadline, cwd: Path = ROOT, **variables: str) -> Done:
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


def _last(path: Path) -> str:
    try:
        return _telling(path.read_text("utf-8", "replace"))
    except OSError:
        return "it said nothing"
