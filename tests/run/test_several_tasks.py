"""What a run of several tasks is refused for before it starts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from pwm_fast.config import ConfigError
from pwm_fast.envs import make
from pwm_fast.envs.many_tasks import ManyTasks
from pwm_fast.run import build
from pwm_fast.run.start import train
from tests.run.conftest import tiny_config

TASKS = ("near", "far", "further")
MODEL = {"alg__world_model__num_tasks": 3, "alg__world_model__task_dim": 4}


def env_of(names: tuple[str, ...] = TASKS, **options: Any) -> ManyTasks:
    """Cart-poles, which differ by their names alone."""

    def cartpoles(k: int, count: int, seed: int) -> Any:
        return make("cartpole", count, seed=seed, max_episode_steps=12)

    return ManyTasks(cartpoles, names, 4, **options)


@pytest.mark.parametrize("key", ["episodes", "final_episodes"])
def test_too_few_episodes_for_the_tasks(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The final evaluation comes last: a run must not learn for days towards an error."""
    monkeypatch.setattr(build, "make_env", lambda *_: env_of())
    given = {"eval__episodes": 3, "eval__final_episodes": 3, f"eval__{key}": 2}
    config = tiny_config(tmp_path / "run", **MODEL, **given)
    message = (
        f"eval.{key} must be at least 3, an episode for each of the environment's tasks, got 2"
    )
    with pytest.raises(ConfigError, match=re.escape(message)):
        train(config)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({}, {}, "an environment of 3 tasks wants a model that can tell them apart"),
        ({**MODEL, "alg__world_model__num_tasks": 2}, {}, "numbers [0, 1, 2]"),
        (MODEL, {"numbers": [0, 1, 3]}, "alg.world_model.num_tasks=3 are 0 to 2"),
        ({**MODEL, "alg__discounts": [0.9]}, {}, "alg.discounts must be one for each of"),
    ],
)
def test_models_that_cannot_tell_them_apart(
    changes: dict[str, Any], options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    config = tiny_config(tmp_path / "run", **changes)
    with pytest.raises(ConfigError, match=re.escape(message)):
        build.make_agent(config, env_of(**options), torch.device("cpu"))


def test_a_model_without_embeddings_knows_number_0_alone(tmp_path: Path) -> None:
    config, cpu = tiny_config(tmp_path / "run"), torch.device("cpu")
    build.make_agent(config, env_of(TASKS[:1]), cpu)
    with pytest.raises(ConfigError, match=r"numbers \[3\].*num_tasks=1 are 0 to 0"):
        build.make_agent(config, env_of(TASKS[:1], numbers=[3], action_dim=2), cpu)
