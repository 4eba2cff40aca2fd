"""CPU threads of the commands: they wait without spinning, and there are as many as have work."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from pwm_fast.config import AlgConfig, ConfigError, compose
from pwm_fast.launch import resources
from pwm_fast.run import build
from tests.run.conftest import clean_environment


def python(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """What Python prints, without settings of OpenMP but those given."""
    plain = {k: v for k, v in clean_environment().items() if not k.startswith(("OMP_", "GOMP_"))}
    return subprocess.run(
        [sys.executable, *arguments],
        env={**plain, **variables},
        capture_output=True,
        text=True,
        check=True,
    )


@pytest.fixture(scope="module")
def info() -> subprocess.CompletedProcess[str]:
    """A command, whose OpenMP says how it is set."""
    return python("-m", "pwm_fast.info", OMP_DISPLAY_ENV="true")


def policy_of(report: str) -> str | None:
    lines = [line.split() for line in report.splitlines()]
    return next((line[-1] for line in lines if line and line[0] == "OMP_WAIT_POLICY"), None)


def test_commands_wait_without_spinning(info: subprocess.CompletedProcess[str]) -> None:
    assert policy_of(info.stdout) == "passive"


def test_what_the_user_says_stands() -> None:
    assert policy_of(python("-m", "pwm_fast.info", OMP_WAIT_POLICY="active").stdout) == "active"


@pytest.mark.parametrize("first", ["pwm_fast", "torch"])
def test_a_program_of_the_users_own_is_left_alone(first: str) -> None:
    code = f"import {first}, pwm_fast.ops, os; print(os.environ.get('OMP_WAIT_POLICY'))"
    assert python("-c", code).stdout.strip() == "None"


def test_openmp_takes_it(info: subprocess.CompletedProcess[str]) -> None:
    """The runtime that torch loads says so itself: it has read the variable, not come before it."""
    if not sys.platform.startswith("linux"):
        pytest.skip("libgomp's report; only Linux is sure to have it")
    if "OPENMP DISPLAY ENVIRONMENT" not in info.stderr:
        pytest.skip("this torch has no OpenMP runtime")
    assert "OMP_WAIT_POLICY = 'PASSIVE'" in info.stderr


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> int:
    """As many threads as torch takes by itself on a machine with 8 cores."""
    for name in ("OMP_NUM_THREADS", "SLURM_CPUS_PER_TASK"):
        monkeypatch.delenv(name, raising=False)
    count = 8
    monkeypatch.setattr(torch, "get_num_threads", lambda: count)
    return count


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    seen: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", seen.append)
    return seen


def alg(name: str) -> AlgConfig:
    return compose(f"alg={name}").alg


@pytest.mark.parametrize(("name", "expected"), [("pwm_tiny_flow", 2), ("pwm_5M_flow", 8)])
def test_as_many_as_have_work(name: str, expected: int, threads: int, chosen: list[int]) -> None:
    build.set_threads(None, alg(name), torch.device("cpu"))
    assert chosen == [expected]


def test_a_large_agent_does_not_get_more_than_torch_takes(threads: int, chosen: list[int]) -> None:
    assert build.useful_threads(alg("pwm_48M_flow")) > threads
    build.set_threads(None, alg("pwm_48M_flow"), torch.device("cpu"))
    assert chosen == [threads]


@pytest.mark.parametrize("name", ["pwm_tiny_flow", "pwm_5M_flow", None])
@pytest.mark.parametrize(
    ("allotted", "expected"),
    [
        *(("7", 7), ("0012", 12), (" 3 ", 3), ("0" * 5000 + "5", 5)),
        *(("1024", 1024), ("1025", 1024), ("9" * 8, 1024), ("9" * 30, 1024), ("9" * 5000, 1024)),
    ],
)
def test_what_slurm_allots_is_bounded(
    name: str | None,
    allotted: str,
    expected: int,
    threads: int,
    chosen: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", allotted)
    build.set_threads(None, name and alg(name), torch.device("cpu"))
    assert chosen == [expected]
    assert resources.cpus() == expected
    assert resources.slots(1, [])[0]["OMP_NUM_THREADS"] == str(expected)


@pytest.mark.parametrize("allotted", ["0", "-1", "4.5", "many", "\u00b2", "1e3", "4,2"])
def test_what_slurm_cannot_allot(
    allotted: str, threads: int, chosen: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", allotted)
    for ask in (lambda: build.set_threads(None), resources.cpus):
        with pytest.raises(ConfigError, match=r"^SLURM_CPUS_PER_TASK must be a positive .*, got "):
            ask()
    build.set_threads(2)  # it is not looked at
    assert chosen == [2]


@pytest.mark.parametrize("limit", ["2000", "100000", "9" * 30])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_openmp_was_told_is_bounded(
    limit: str, device: str, chosen: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a number that torch has taken already."""
    monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", limit)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 100_000)
    build.set_threads(None, alg("pwm_tiny_flow"), torch.device(device))
    assert chosen == [1024]
    assert int(resources.slots(1, [])[0]["OMP_NUM_THREADS"]) <= 1024


def test_what_was_asked_for_stands(
    threads: int, chosen: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu, tiny = torch.device("cpu"), alg("pwm_tiny_flow")
    build.set_threads(3, tiny, cpu)
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "2")
    build.set_threads(None, tiny, cpu)
    monkeypatch.delenv("SLURM_CPUS_PER_TASK")
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    build.set_threads(None, tiny, cpu)  # torch has taken it already
    monkeypatch.delenv("OMP_NUM_THREADS")
    build.set_threads(None, tiny, torch.device("cuda"))  # the products are on the GPU
    assert chosen == [3, 2]
    assert "OMP_NUM_THREADS" not in os.environ
