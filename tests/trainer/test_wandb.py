"""Weights & Biases, offline: no login, no network."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.trainer.conftest import Launcher, rows, tiny_arguments

pytest.importorskip("wandb")


def test_offline_run_and_its_resume(launcher: Launcher, whole_run: Path, tmp_path: Path) -> None:
    arguments = tiny_arguments(tmp_path / "run", "wandb.mode=offline", "wandb.gradients=true")
    outcome = launcher.run(tmp_path, *arguments, "epochs=4")
    assert (outcome.status, outcome.err) == (0, "")
    outcome = launcher.run(tmp_path, *arguments)
    assert (outcome.status, outcome.err) == (0, "")
    assert [r["epoch"] for r in rows(tmp_path / "run")] == list(range(7))

    first, second = sorted((tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb"))
    assert first.name == second.name, "a resumed run continues its wandb run"
    data = first.read_bytes()
    for text in ("cartpole-pwm_tiny_flow-seed0", "latent_dim", "best_reward", "gradients/actor."):
        assert text.encode() in data, text
    for name in ("imagined_return", "esnr_db", "actor_std", "env_steps", "final_reward"):
        assert name.encode() in data, name


def test_online_without_a_login(launcher: Launcher, tmp_path: Path) -> None:
    arguments = tiny_arguments(tmp_path / "run", "wandb.mode=online")
    home = {"HOME": str(tmp_path), "WANDB_CONFIG_DIR": str(tmp_path), "NETRC": str(tmp_path / "no")}
    outcome = launcher.run(tmp_path, *arguments, env=home)
    assert outcome.status == 2
    assert len(outcome.err.splitlines()) == 1, outcome.err
    assert "wandb.mode=online cannot start" in outcome.err and "offline" in outcome.err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
