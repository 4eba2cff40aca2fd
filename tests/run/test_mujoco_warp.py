"""Training on the robots of mujoco-warp, on its CPU device."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from pwm_fast.envs import MujocoWarpEnv
from pwm_fast.run import provenance, trainer
from pwm_fast.run.checkpoint import CheckpointError
from pwm_fast.run.start import train
from tests.envs.engines import needs_warp
from tests.run.conftest import rows, tiny_config


@needs_warp
def test_a_stopped_run_goes_on_to_the_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trainer, "plot_run", lambda *_: [])
    changes: dict[str, Any] = {
        "env__engine": "mujoco_warp",
        "env__max_episode_steps": 6,
        "epochs": 4,
        "esnr__every": 0,
    }
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train(tiny_config(whole, **changes))[1] == 0
    assert "physics: mujoco_warp on cpu\n" in capsys.readouterr().out
    assert provenance.read(whole / "provenance.json")[0]["physics"] == "mujoco_warp"

    step, count = MujocoWarpEnv.step, 0

    def stopping(self: MujocoWarpEnv, action: Any) -> Any:
        nonlocal count
        count += 1
        if count == 6 + 4 + 3:  # after an evaluation and an epoch, within the second
            signal.raise_signal(signal.SIGTERM)
        return step(self, action)

    with monkeypatch.context() as patch:
        patch.setattr(MujocoWarpEnv, "step", stopping)
        assert train(tiny_config(parts, **changes))[1] == 128 + signal.SIGTERM
    with pytest.raises(CheckpointError, match="of the physics engine mujoco_warp, this"):
        latest = parts / "checkpoints" / "latest.pt"
        native = {**changes, "env__engine": "mujoco", "resume": str(latest)}
        train(tiny_config(tmp_path / "other", **native))
    assert train(tiny_config(parts, **changes))[1] == 0
    assert rows(parts) == rows(whole)
