"""A run in fp16 whose updates overflow goes on in bf16, and says so."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from pwm_fast.agent import PWM
from pwm_fast.config import ConfigError
from pwm_fast.run import build, checkpoint, trainer
from pwm_fast.run.start import train
from pwm_fast.run.trainer import TrainingDiverged
from tests.run.conftest import rows, tiny_config


@pytest.fixture(autouse=True)
def fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fused algebra in PyTorch has 16-bit products on a CPU, too."""
    monkeypatch.setenv("PWM_FAST_BACKEND", "torch")
    monkeypatch.setattr(trainer, "plot_run", lambda *_: [])


def overflow_in_fp16(monkeypatch: pytest.MonkeyPatch, after: int = 0) -> list[str]:
    """World-model updates in fp16 are not finite from that one on; returns their precisions."""
    original, seen = PWM.update_world_model, []

    def update(self: PWM, windows: Any) -> Any:
        seen.append(self.precision)
        if self.precision == "fast" and len(seen) > after:
            windows = windows._replace(obs=windows.obs * float("inf"))
        return original(self, windows)

    monkeypatch.setattr(PWM, "update_world_model", update)
    return seen


def test_overflow_switches_to_bf16(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """After the epoch in which updates were skipped; the checkpoint knows it."""
    seen = overflow_in_fp16(monkeypatch, after=9)
    summary, _ = train(tiny_config(tmp_path / "run", precision="fast"))
    assert summary["status"] == "finished"
    assert seen == ["fast"] * (5 + 6) + ["bf16"] * 2  # a bootstrap, then two updates an epoch
    logged = {row["epoch"]: row for row in rows(tmp_path / "run")}
    assert [logged[e]["fell_back"] for e in range(1, 7)] == [0, 0, 0, 0, 1, 1]
    assert [logged[e]["skipped_updates"] for e in range(1, 7)] == [0, 0, 0, 0, 2, 2]
    assert "2 updates had a non-finite loss or gradient in fp16" in capsys.readouterr().out
    latest = tmp_path / "run" / "checkpoints" / "latest.pt"
    assert checkpoint.load(latest)["precision"] == "bf16"


def test_the_switch_outlives_an_interruption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that continues the checkpoint computes in bf16, and so does its evaluation."""
    seen = overflow_in_fp16(monkeypatch)
    train(tiny_config(tmp_path / "run", precision="fast", epochs=3))
    first = len(seen)
    assert set(seen[-2:]) == {"bf16"}
    train(tiny_config(tmp_path / "run", precision="fast", epochs=5))
    assert set(seen[first:]) == {"bf16"} and len(seen) == first + 4
    path = tmp_path / "run" / "checkpoints" / "final.pt"
    config, content = build.load_run(path)
    env = build.make_env(config, 1, 0)
    agent = build.restore_agent(path, config, content, env, torch.device("cpu"))
    env.close()
    assert (config.precision, agent.precision) == ("fast", "bf16")


def test_a_long_bootstrap_switches_within(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not stopped as diverged: its looks come before the epoch's end."""
    seen = overflow_in_fp16(monkeypatch)
    changes = {"alg__max_skipped_updates": 4, "alg__model_learning__bootstrap_updates": 40}
    summary, _ = train(tiny_config(tmp_path / "run", precision="fast", **changes))
    assert summary["status"] == "finished"
    assert seen[:40] == ["fast"] * trainer.LOOK_EVERY + ["bf16"] * 30


SOON = {"alg__max_skipped_updates": 4, "epochs": 50}


@pytest.fixture
def nothing_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    """World-model updates get observations that are NaN."""
    original = PWM.update_world_model
    monkeypatch.setattr(
        PWM,
        "update_world_model",
        lambda self, w: original(self, w._replace(obs=w.obs * float("nan"))),
    )


@pytest.mark.usefixtures("nothing_finite")
def test_what_bf16_does_not_mend_still_stops(tmp_path: Path) -> None:
    with pytest.raises(TrainingDiverged, match=r"alg\.max_skipped_updates=4"):
        train(tiny_config(tmp_path / "run", precision="fast", **SOON))
    logged = rows(tmp_path / "run")
    assert logged[-1]["fell_back"] == 1 and len(logged) < 6
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "diverged"


@pytest.mark.usefixtures("nothing_finite")
def test_other_precisions_do_not_switch(tmp_path: Path) -> None:
    """What is exact already has nothing wider to go to."""
    with pytest.raises(TrainingDiverged):
        train(tiny_config(tmp_path / "run", **SOON))
    assert {row["fell_back"] for row in rows(tmp_path / "run") if row["epoch"]} == {0}


def test_graphs_without_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where ``auto`` finds no device."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="graphs=true needs a GPU, device=auto is cpu here"):
        train(tiny_config(tmp_path / "run", device="auto", graphs="true"))


@pytest.mark.parametrize("backend", ["auto", "native", "reference"])
@pytest.mark.parametrize("precision", ["fast", "tf32"])
def test_what_a_cpu_does_not_have_is_refused_before_any_work(
    backend: str, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PWM_FAST_BACKEND", backend)
    with pytest.raises(ConfigError, match=f"precision={precision} cannot run on device=cpu"):
        train(tiny_config(tmp_path / "run", precision=precision))
    assert not (tmp_path / "run").exists()


def test_a_gpu_runs_checkpoint_is_evaluated_on_a_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run in fp16 is restored in what the CPU has."""
    train(tiny_config(tmp_path / "run", precision="fast"))  # on the backend torch
    monkeypatch.setenv("PWM_FAST_BACKEND", "auto")
    path = tmp_path / "run" / "checkpoints" / "final.pt"
    config, content = build.load_run(path)
    assert config.precision == "fast"
    with closing(build.make_env(config, 2, 0)) as env:
        agent = build.restore_agent(path, config, content, env, torch.device("cpu"))
        assert agent.precision == "auto"
        assert torch.isfinite(agent.act(env.reset()[0])).all()
