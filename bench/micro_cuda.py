"""Microbenchmarks in CUDA C++ (``bench/cuda``): compiled for the GPU that is there, and run.

Every part of a program runs in a process of its own, with a limit of time: one that hangs or
crashes loses its own figures alone. A program checks what it computed and prints one JSON line a
figure.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shlex
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch

from bench import gpu_checks, gpu_out
from bench.providers import Absent

SOURCES = Path(__file__).with_name("cuda")
PROGRAMS = {  # and their parts, in the order in which they are run
    "clusters": ("count",),
    "dsmem": ("hop", "store", "copy", "multicast", "loads"),
    "graphs": ("plain", "programmatic"),
    "l2": ("loads", "bulk", "flag"),
    "tensor": ("wgmma", "mma"),
    "mish": ("rate",),
}
TOY = "clusters"  # the program whose parts `right` and `wrong` a sanitizer is tried on
FLAGS = ("-std=c++17",)
COMPILE_LIMIT, RUN_LIMIT = 120.0, 20.0  # seconds


class Figure(NamedTuple):
    """What a program says.

    Attributes:
        name: of the figure.
        value: None where there is none.
        unit: of the value.
        reason: why there is no value: ``absent: ...`` or ``failed: ...``.
    """

    name: str
    value: float | None
    unit: str = ""
    reason: str | None = None


def find_nvcc() -> str:
    """nvcc's path: NVCC, or the one on PATH, or CUDA_HOME's.

    Raises:
        Absent: there is none.
    """
    found = os.environ.get("NVCC") or gpu_checks.find_program("nvcc")
    if found is None:
        raise Absent("there is no nvcc (NVCC, PATH, CUDA_HOME)")
    return found


def architecture(major: int, minor: int) -> str:
    """What nvcc calls a GPU of this compute capability, with all that later ones may not have."""
    return f"{major}{minor}{'a' if major >= 9 else ''}"


class Compiler:
    """Compiles programs into a folder that keeps them.

    Args:
        nvcc: the compiler.
        archs: as :func:`architecture` gives them.
        folder: of the programs; their names hold all that they were made from.

    Raises:
        Absent: this nvcc does not run.
    """

    def __init__(self, nvcc: str, archs: Sequence[str], folder: Path) -> None:
        self.nvcc, self.archs, self.folder = nvcc, tuple(archs), folder
        try:
            done = subprocess.run(
                [nvcc, "--version"], capture_output=True, timeout=COMPILE_LIMIT, check=True
            )
        except (OSError, subprocess.SubprocessError) as error:
            raise Absent(f"{nvcc} does not run: {error}") from error
        self._version = done.stdout

    def command(self, source: Path, target: Path) -> list[str]:
        """What compiles a program."""
        codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in self.archs]
        compiler = shlex.split(
            os.environ.get("CXX", "")
        )  # it may be called through another program
        host = ["-ccbin", compiler[-1]] if compiler else []
        return [self.nvcc, *FLAGS, *host, *codes, "-o", str(target), str(source)]

    def path(self, source: Path) -> Path:
        """Where the program of a source is, once it is compiled."""
        texts = [source, *sorted(source.parent.glob("*.cuh"))]
        parts = [self._version, repr(self.command(source, Path())).encode()]
        key = hashlib.sha256(b"\0".join(parts + [t.read_bytes() for t in texts])).hexdigest()
        return self.folder / f"{source.stem}-{'-'.join(self.archs)}-{key[:16]}"

    def compile(self, source: Path) -> Path:
        """The program of a source.

        Raises:
            RuntimeError: it does not compile; the message holds the line that says why.
        """
        path = self.path(source)
        if path.exists():
            return path
        self.folder.mkdir(parents=True, exist_ok=True)
        half = path.with_suffix(f".{os.getpid()}")
        try:
            done = subprocess.run(
                self.command(source, half), capture_output=True, timeout=COMPILE_LIMIT
            )
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"it did not compile within {COMPILE_LIMIT:.0f} s") from None
        if done.returncode:
            raise RuntimeError(f"it does not compile: {_telling(done.stderr + done.stdout)}")
        os.replace(half, path)  # in one step: nobody finds half a program
        return path

    def compile_all(self, sources: Sequence[Path]) -> None:
        """All of them at once; errors show where one is asked for."""
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for future in [pool.submit(self.compile, source) for source in sources]:
                future.exception()


def measure(name: str, device: torch.device) -> Iterator[Figure]:
    """The figures of one of :data:`PROGRAMS`.

    Raises:
        Absent: there is no GPU or no nvcc.
        RuntimeError: it does not compile.
    """
    program = _compiled(name, device)
    for part in PROGRAMS[name]:
        yield from run(f"{name} {part}", [str(program), str(device.index or 0), part])


def sanitize(device: torch.device) -> Iterator[Figure]:
    """What compute-sanitizer finds in a small cluster kernel, a right and a wrong one.

    Raises:
        Absent: there is no GPU, no nvcc or no compute-sanitizer.
        RuntimeError: the kernel does not compile.
    """
    sanitizer = gpu_checks.find_program("compute-sanitizer")
    if sanitizer is None:
        raise Absent("there is no compute-sanitizer")
    program = _compiled(TOY, device)
    for tool, part in (*((t, "right") for t in gpu_checks.SANITIZERS), ("memcheck", "wrong")):
        command = [sanitizer, "--tool", tool, str(program), str(device.index or 0), part]
        yield sanitized(f"{tool} of a cluster kernel that is {part}", command, part == "wrong")


def sanitized(name: str, command: Sequence[str], wrong: bool) -> Figure:
    """The number of errors that a sanitizer reports; of a program that is wrong, not none."""
    status, out, err = _process(command)
    if status is None:
        return Figure(name, None, reason=f"failed: {_telling(err)}")
    found = re.findall(r"SUMMARY: (\d+)", (out + err).decode("utf-8", "replace"))
    if not found:
        return Figure(name, None, reason=f"failed: status {status}: {_telling(err + out)}")
    if wrong and found[-1] == "0":
        return Figure(name, None, reason="failed: it did not find a store beyond the end")
    return Figure(name, float(found[-1]), "errors")


def _compiled(name: str, device: torch.device) -> Path:
    if device.type != "cuda":
        raise Absent("it is a CUDA program for a GPU")
    arch = architecture(*torch.cuda.get_device_capability(device))
    compiler = Compiler(find_nvcc(), [arch], gpu_out.WORK / "cuda")
    sources = [SOURCES / f"{n}.cu" for n in PROGRAMS]
    if not all(compiler.path(source).exists() for source in sources):
        compiler.compile_all(sources)
    return compiler.compile(SOURCES / f"{name}.cu")


# --- one process --------------------------------------------------------------------------------


def run(name: str, command: Sequence[str], limit: float = RUN_LIMIT) -> list[Figure]:
    """Run a part: its figures, and one named ``name`` without a value if it ended badly."""
    status, out, err = _process(command, limit)
    found = [parse(name, line) for line in out.decode("utf-8", "replace").splitlines()]
    if status is None:
        return [*found, Figure(name, None, reason=f"failed: {_telling(err)}")]
    if status:
        end = f"signal {-status}" if status < 0 else f"status {status}"
        return [*found, Figure(name, None, reason=f"failed: {end}: {_telling(err)}")]
    return found or [Figure(name, None, reason="failed: it printed no figure")]


def parse(name: str, line: str) -> Figure:
    """A line of a program; one that is no figure gives one without a value."""
    try:
        data = json.loads(line)
        figure = Figure(**data)
        value, reason = figure.value, figure.reason
        good = all(isinstance(x, str) for x in (figure.name, figure.unit, reason or ""))
        if value is None:
            good = good and reason is not None and reason.startswith(("absent: ", "failed: "))
        else:
            good = good and type(value) in (int, float) and math.isfinite(value) and not reason
    except (ValueError, TypeError):
        good = False
    if not good:
        return Figure(name, None, reason=f"failed: it printed {line[:100]!r}, which is no figure")
    return figure


def _process(command: Sequence[str], limit: float = RUN_LIMIT) -> tuple[int | None, bytes, bytes]:
    """Status, output and errors; status None where it did not end, and why as its errors."""
    try:
        done = subprocess.run(command, capture_output=True, timeout=limit)
    except subprocess.TimeoutExpired as stopped:
        return None, stopped.stdout or b"", f"it did not end within {limit:.0f} s".encode()
    except OSError as error:
        return None, b"", f"it does not start: {error}".encode()
    return done.returncode, done.stdout, done.stderr


def _telling(output: bytes) -> str:
    """The line that says what went wrong: the first error, else the last line."""
    lines = [x.strip() for x in output.decode("utf-8", "replace").splitlines() if x.strip()]
    errors = [line for line in lines if re.search(r"\berror\b|\bfatal\b", line, re.IGNORECASE)]
    return ([*errors[:1], *lines[-1:], "it said nothing"])[0][:300]
