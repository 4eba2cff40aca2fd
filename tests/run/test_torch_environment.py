"""Training in a batched torch environment that the command names by its factory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pwm_fast.config import ConfigError
from pwm_fast.run import checkpoint
from pwm_fast.run.evaluation import EvaluateConfig, evaluate_checkpoint
from pwm_fast.run.start import train
from tests.run.conftest import rows, tiny_config

pytestmark = pytest.mark.usefixtures("no_plots")

ENV = {"env__factory": "tests.envs.torch_envs:make", "env__max_episode_steps": None}

LEARNING: dict[str, Any] = {
    "num_envs": 16,
    "epochs": 16,
    "eval__every": 0,
    "eval__final_episodes": 64,
    "esnr__every": 0,
    "alg__steps_per_epoch": 20,
    "alg__random_epochs": 4,
    "alg__replay_capacity": 20_000,
    "alg__imagination_horizon": 8,
    "alg__normalize_obs": True,
    "alg__world_model__latent_dim": 32,
    "alg__world_model__units": [32],
    "alg__model_learning__updates": 8,
    "alg__model_learning__bootstrap_updates": 60,
    "alg__model_learning__batch_size": 32,
    "alg__model_learning__lr": 2e-3,
    "alg__actor__updates": 6,
    "alg__actor__batch_size": 64,
    "alg__actor__lr": 5e-3,
    "alg__critic__passes": 2,
    "alg__critic__lr": 3e-3,
}


def test_an_agent_learns(tmp_path: Path) -> None:
    """To hold the carts near 0 for all 20 steps; at first they run out of bounds in half."""
    summary, status = train(tiny_config(tmp_path / "run", "torch", **ENV, **LEARNING))
    assert status == 0
    assert rows(tmp_path / "run")[0]["eval_reward"] < 10.0
    assert summary["evaluation"]["reward_mean"] > 17.0
    assert summary["evaluation"]["episode_length_mean"] > 19.0
    path = tmp_path / "run" / "checkpoints" / "latest.pt"
    again = evaluate_checkpoint(EvaluateConfig(str(path), episodes=64, device="cpu"))
    assert again["reward_mean"] > 17.0


def test_a_run_goes_on_with_new_episodes(tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(tiny_config(run, "torch", **ENV, env__kwargs={"length": 9}, epochs=2))
    path = run / "checkpoints" / "latest.pt"
    assert checkpoint.load(path)["env"] is None
    train(tiny_config(run, "torch", **ENV, env__kwargs={"length": 9}, epochs=4))
    assert [row["epoch"] for row in rows(run)] == list(range(5))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"env__factory": None}, "env.factory must be module:function, got None"),
        ({"env__factory": "nowhere:make"}, "env.factory=nowhere:make: ModuleNotFoundError"),
        ({"env__max_episode_steps": 12}, "max_episode_steps=12 is not the limit of Carts"),
        ({"env__final_obs": "last"}, "final_obs must be one of auto, reset, extras, previous"),
    ],
)
def test_what_cannot_be_used_is_said_first(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        train(tiny_config(tmp_path / "run", "torch", **{**ENV, **changes}))
    assert not (tmp_path / "run").exists()
