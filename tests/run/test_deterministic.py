"""``deterministic=true``: the same bits from process to process, and no trace of it afterwards."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch

from pwm_fast.config import ConfigError
from pwm_fast.run import build, checkpoint, trainer
from pwm_fast.run.start import train
from tests.run.conftest import clean_environment, command, rows, tiny_arguments, tiny_config

# Wide enough that torch parts the work among its threads, which it does from 32,768 elements on.
WIDE = (
    "deterministic=true",
    "num_envs=32",
    "epochs=5",
    "alg.replay_capacity=4000",
    "alg.world_model.latent_dim=256",
    "alg.world_model.units=[256]",
    "alg.model_learning.batch_size=64",
    "alg.actor.units=[256]",
    "alg.actor.batch_size=256",
    "alg.critic.units=[256]",
)


def run(cwd: Path, threads: int, *extra: str) -> Path:
    """A run in a process of its own; ``rows`` leaves out wall_time and steps_per_second."""
    cwd.mkdir()
    # Not forked from a warm process: the two are to share nothing.
    environment = {**clean_environment(), "PYTHONHASHSEED": "random"}
    environment.pop("OMP_NUM_THREADS")
    arguments = tiny_arguments(cwd / "run", *WIDE, f"threads={threads}", *extra)
    done = subprocess.run(
        command("pwm_fast.train", *arguments, plots=False),
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return cwd / "run"


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2])
def test_two_processes_agree_to_the_bit(threads: int, tmp_path: Path) -> None:
    one, two = (run(tmp_path / name, threads) for name in ("one", "two"))
    assert rows(one) == rows(two) and len(rows(one)) == 6
    states = [checkpoint.load(d / "checkpoints" / "final.pt")["agent"] for d in (one, two)]
    for module in ("world_model", "actor", "critic"):
        for name, value in states[0][module].items():
            assert torch.equal(value, states[1][module][name]), name
    losses = [row["wm_loss"] for row in rows(one) if "wm_loss" in row]
    assert len(set(losses)) == len(losses) > 2, "something is learnt, and compared"


def test_torch_is_asked_for_it_and_left_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "plot_run", lambda *_: [])
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    seen = []

    def looked(self: object, *args: object) -> None:
        seen.append(
            (
                torch.are_deterministic_algorithms_enabled(),
                torch.is_deterministic_algorithms_warn_only_enabled(),
                torch.backends.cudnn.deterministic,
                torch.backends.cudnn.benchmark,
                os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
            )
        )

    monkeypatch.setattr("pwm_fast.agent.PWM.observe", looked)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    for asked in (True, False):
        train(tiny_config(tmp_path / str(asked), epochs=1, deterministic=asked))
    assert set(seen[:4]) == {(True, False, True, False, ":4096:8")}
    assert set(seen[4:]) == {(False, False, False, True, None)}, "and put back"


def test_put_back_after_an_error() -> None:
    with pytest.raises(KeyError), build.deterministic(True):
        raise KeyError
    assert not torch.are_deterministic_algorithms_enabled()


def test_an_operation_that_cannot_raises() -> None:
    """What is promised is refused, not quietly broken."""
    with build.deterministic(True), pytest.raises(RuntimeError, match="deterministic"):
        torch.nn.functional.max_unpool2d(
            torch.ones(1, 1, 2, 2), torch.zeros(1, 1, 2, 2, dtype=torch.int64), 2
        )


@pytest.mark.parametrize(
    ("value", "fine"), [(":4096:8", True), (":16:8", True), (":0:0", False), ("", False)]
)
def test_cublas_setting_of_the_user(
    value: str, fine: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", value)
    if fine:
        with build.deterministic(True):
            assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == value
    else:
        with pytest.raises(ConfigError, match="CUBLAS_WORKSPACE_CONFIG"), build.deterministic(True):
            pass
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == value
    with build.deterministic(False):
        pass


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_two_processes_agree_on_a_gpu(tmp_path: Path) -> None:
    one, two = (run(tmp_path / name, 1, "device=cuda") for name in ("one", "two"))
    assert rows(one) == rows(two)
