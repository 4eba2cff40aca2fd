"""Weights & Biases, offline: no login, no network."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.trainer.conftest import Launcher, rows, tiny_arguments

needs_wandb = pytest.mark.skipif(find_spec("wandb") is None, reason="wandb is not installed")


@needs_wandb
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


@needs_wandb
def test_online_without_a_login(launcher: Launcher, tmp_path: Path) -> None:
    arguments = tiny_arguments(tmp_path / "run", "wandb.mode=online")
    home = {"HOME": str(tmp_path), "WANDB_CONFIG_DIR": str(tmp_path), "NETRC": str(tmp_path / "no")}
    outcome = launcher.run(tmp_path, *arguments, env=home)
    assert outcome.status == 2
    assert len(outcome.err.splitlines()) == 1, outcome.err
    assert "wandb.mode=online cannot start" in outcome.err and "offline" in outcome.err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize("error", ["ImportError", "TypeError"])
def test_a_broken_installation_is_told_from_none(
    error: str, launcher: Launcher, tmp_path: Path
) -> None:
    """The package's own error is said, as nothing but it helps."""
    (tmp_path / "wandb.py").write_text(f"raise {error}('libfoo.so.3 is missing')\n")
    arguments = tiny_arguments(tmp_path / "run", "wandb.mode=offline")
    hook = f"import sys\nsys.path.insert(0, {str(tmp_path)!r})\nsys.modules.pop('wandb', None)\n"
    outcome = launcher.run(tmp_path, *arguments, hook=hook)
    assert outcome.status == 2
    assert len(outcome.err.splitlines()) == 1, outcome.err
    assert "libfoo.so.3 is missing" in outcome.err and "pwm-fast[wandb]" in outcome.err


def test_a_missing_installation(launcher: Launcher, tmp_path: Path) -> None:
    arguments = tiny_arguments(tmp_path / "run", "wandb.mode=offline")
    hide = """import sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name == "wandb":
            raise ModuleNotFoundError("No module named 'wandb'", name="wandb")
sys.meta_path.insert(0, Hide())
sys.modules.pop("wandb", None)
"""
    outcome = launcher.run(tmp_path, *arguments, hook=hide)
    assert outcome.status == 2
    expected = "error: wandb.mode=offline needs wandb: pip install 'pwm-fast[wandb]'\n"
    assert outcome.err == expected
