"""The instruction sets: all give the same numbers but for rounding, and each is chosen rightly."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.native.harness import _C

HERE = Path(__file__).parent
ISAS = ("generic", "avx2", "avx512")
KERNEL_TESTS = (
    *("test_norm_act.py", "test_act_norm.py", "test_adam.py", "test_other_kernels.py"),
    "test_row_program.py",
)


def run(command: list[str], isa: str) -> subprocess.CompletedProcess[str]:
    """Run with PWM_FAST_ISA, which "" leaves to the CPU."""
    environment = os.environ | {"PWM_FAST_ISA": isa, "PYTHONPATH": str(HERE.parents[1])}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def probe(isa: str, emulator: tuple[str, ...] = ()) -> dict[str, list[float]]:
    """What probe.py prints."""
    done = run([*emulator, sys.executable, str(HERE / "probe.py")], isa)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def need(isa: str) -> None:
    """Skip if this CPU or build lacks an instruction set."""
    done = run([sys.executable, "-c", "from pwm_fast import _C; _C.cpu_isa()"], isa)
    if done.returncode:
        pytest.skip(f"this CPU has no {isa}")


def assert_close(ours: dict[str, list[float]], other: dict[str, list[float]], ulp: float) -> None:
    """Compare all results but the name of the instruction set."""
    assert ours.keys() == other.keys()
    for name in ours.keys() - {"isa"}:
        largest = max(map(abs, other[name]))
        # Where an instruction set rounds a bf16 the other way, it is a unit of 16 bits.
        allowed = largest * (2.0**-7 if name == "bf16" and ulp else ulp * 2.0**-23)
        worst = max(abs(x - y) for x, y in zip(ours[name], other[name], strict=True))
        assert worst <= allowed, f"{name}: {worst} exceeds {allowed}"


@pytest.mark.parametrize("isa", ISAS)
def test_same_numbers(isa: str) -> None:
    need(isa)
    ours = probe(isa)
    assert bytes(ours["isa"]).decode() == isa
    assert_close(ours, probe("generic"), 20.0)


@pytest.mark.slow
@pytest.mark.parametrize("isa", ISAS)
def test_kernels_pass_their_tests(isa: str) -> None:
    need(isa)
    if isa == _C.cpu_isa():
        pytest.skip(f"{isa} is what the other tests run with")
    files = [str(HERE / name) for name in KERNEL_TESTS]
    done = run([sys.executable, "-m", "pytest", "-q", "-x", *files], isa)
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("cpu", "isa"), [("Nehalem", "generic"), ("Haswell", "avx2")])
def test_chosen_by_the_cpu(cpu: str, isa: str) -> None:
    """On an emulated CPU that lacks the rest: no illegal instruction, and the same bits."""
    emulator = shutil.which("qemu-x86_64")
    if emulator is None:
        pytest.skip("needs qemu-x86_64 (Debian's package qemu-user)")
    help_text = subprocess.run([emulator, "-cpu", "help"], capture_output=True, text=True).stdout
    if cpu not in help_text:
        pytest.skip(f"this qemu does not know the CPU {cpu}")
    need(isa)
    emulated = probe("", (emulator, "-cpu", cpu))
    assert bytes(emulated["isa"]).decode() == isa
    here = probe(isa)
    # The heads use the C library's log and exp, which it chooses by the CPU too.
    assert_close(emulated, here, 4.0)
    plain = [name for name in here if name.startswith(("norm_act", "act_norm", "signal", "noise"))]
    assert {name: emulated[name] for name in plain} == {name: here[name] for name in plain}


def test_unknown_isa_is_an_error_of_the_first_call() -> None:
    code = (
        "import torch; from pwm_fast import _C; x = torch.empty(0); _C.axpby(x, x, x, x, 1.0, 1.0)"
    )
    done = run([sys.executable, "-c", code], "sse9")
    assert "ValueError: PWM_FAST_ISA=sse9 is unknown: use generic, avx2 or avx512" in done.stderr
