"""Weights & Biases, offline: no login, no network."""

from __future__ import annotations

import itertools
from importlib.util import find_spec
from pathlib import Path

import pytest

from pwm_fast.config import ConfigError
from pwm_fast.run import wandb
from tests.run.conftest import Launcher, rows, tiny_arguments
from tests.run.wandb_files import history

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
def test_going_back_drops_no_row(launcher: Launcher, tmp_path: Path) -> None:
    """wandb ignores what is logged at an earlier step than the last, so its steps only count."""
    run = tmp_path / "run"
    arguments = tiny_arguments(run, "wandb.mode=offline", "wandb.gradients=true")
    previous = f"resume={run}/checkpoints/latest.previous.pt"
    for extra in (["epochs=4"], [], [previous], [previous, "epochs=8"]):
        outcome = launcher.run(tmp_path, *arguments, *extra)
        assert (outcome.status, outcome.err) == (0, "")
    assert [row["epoch"] for row in rows(run)] == list(range(9))

    kept = [history(path) for path in sorted((run / "wandb").glob("offline-run-*/run-*.wandb"))]
    epochs = [[row["epoch"] for row in part] for part in kept]
    assert epochs == [[0, 1, 2, 3, 4], [5, 6], [5, 6], [5, 6, 7, 8]]
    assert all(row["env_steps"] == 16 * row["epoch"] for part in kept for row in part)
    steps = [row["_step"] for part in kept for row in part]
    assert all(a < b for a, b in itertools.pairwise(steps)), steps
    assert [row["_step"] for row in kept[0]] == epochs[0], "epochs, as long as none is repeated"
    with_gradients = [row["epoch"] for row in kept[3] if any("gradients/" in k for k in row)]
    assert with_gradients == [6, 8], "in the rows of their evaluations"


@needs_wandb
def test_going_on_with_a_run_of_steps_that_were_epochs(launcher: Launcher, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = tiny_arguments(run, "wandb.mode=offline")
    assert launcher.run(tmp_path, *arguments).status == 0
    (run / "wandb_step").unlink()  # no older version had it
    previous = run / "checkpoints" / "latest.previous.pt"
    assert launcher.run(tmp_path, *arguments, f"resume={previous}").status == 0
    last = sorted((run / "wandb").glob("offline-run-*/run-*.wandb"))[-1]
    assert [(row["epoch"], row["_step"]) for row in history(last)] == [(5, 7), (6, 8)]


@needs_wandb
def test_online_without_a_login(launcher: Launcher, tmp_path: Path) -> None:
    arguments = tiny_arguments(tmp_path / "run", "wandb.mode=online")
    home = {"HOME": str(tmp_path), "WANDB_CONFIG_DIR": str(tmp_path), "NETRC": str(tmp_path / "no")}
    outcome = launcher.run(tmp_path, *arguments, env=home)
    assert outcome.status == 2
    assert len(outcome.err.splitlines()) == 1, outcome.err
    assert "wandb.mode=online cannot start" in outcome.err and "offline" in outcome.err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    left = [p.name for p in (tmp_path / "run").glob("*")]
    assert left in ([], ["wandb"]), "nothing but what wandb writes of itself"


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


@pytest.mark.parametrize("data", [b"", b"\n", b"\xff\xfe\x00", b"a b", b"x" * 200, b"../up"])
def test_a_damaged_id_is_named(tmp_path: Path, data: bytes) -> None:
    """It says which wandb run to continue; another would be started, or nothing understood."""
    file = tmp_path / "wandb_id"
    file.write_bytes(data)
    with pytest.raises(ConfigError, match=r"wandb_id is damaged: it must hold the id of a wandb"):
        wandb._run_id(file)
    assert file.read_bytes() == data
    file.unlink()
    made = wandb._run_id(file)
    assert made == wandb._run_id(file)
