"""``env=dmc_tasks`` against the environments of its tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pwm_fast import seeding
from pwm_fast.envs import ManyTasks, VectorEnv, make
from pwm_fast.seeding import Purpose
from tests.envs.engines import continues_to_the_bit, random_actions
from tests.envs.suites import dm_control_suite
from tests.envs.test_many_tasks import assert_joined

dm_control_suite()

NAMES = ["cartpole-swingup", "cup-catch", "finger-turn-easy"]
ALONE = [("cartpole", "swingup"), ("ball_in_cup", "catch"), ("finger", "turn_easy")]


def many(num_envs: int = 5, **options: Any) -> ManyTasks:
    env = make("dmc_tasks", num_envs, **{"tasks": NAMES, **options})
    assert isinstance(env, ManyTasks)
    return env


def test_each_env_is_that_of_its_task_alone() -> None:
    env = many(seed=2, max_episode_steps=8)
    parts: list[VectorEnv] = [
        make(
            "dmc",
            n,
            domain=domain,
            task=task,
            seed=seeding.stream(2, Purpose.TASK, k),
            max_episode_steps=8,
        )
        for k, ((domain, task), n) in enumerate(zip(ALONE, (2, 2, 1), strict=True))
    ]
    assert isinstance(env, VectorEnv)
    assert (env.single_observation_space.shape, env.single_action_space.shape) == ((12,), (2,))
    assert env.tasks.action_dims == (1, 2, 2)
    for action in random_actions(env, 19):
        assert_joined(env.step(action), parts, action)


def test_the_tasks_own_time_limits() -> None:
    """A thousand of their own steps, at two repeats; given ones are for all."""
    assert many().max_episode_steps == 500
    assert many(action_repeat=4).max_episode_steps == 250
    assert many(max_episode_steps=7).max_episode_steps == 7


def test_saved_state_continues_to_the_bit(tmp_path: Path) -> None:
    env = many(seed=6, max_episode_steps=9)
    restored = many(seed=60, max_episode_steps=9)
    continues_to_the_bit(env, restored, random_actions(env, 30), 11, tmp_path)


def test_divergence_of_one_task() -> None:
    env = many()
    parts: Any = env._parts
    parts[2]._envs[0].physics.data.qvel[0] = 1e12
    with pytest.warns(RuntimeWarning, match=r"finger turn_easy: 1 of 1 envs diverged"):
        _, _, terminated, _, info = env.step(torch.zeros(5, 2))
    assert info["diverged"].tolist() == terminated.tolist() == [False, False, True, False, False]
    assert env.divergence is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"tasks": ["walker-fly"]},
            r"^walker-fly of env\.tasks: .* is one of \['stand',",
        ),
        ({"tasks": ["cheetah-run-front"]}, r"^cheetah-run-front of env\.tasks: .*\['run'\]"),
        ({"tasks": ["giraffe-run"]}, r"^giraffe-run of env\.tasks: .* env\.domain is one of"),
        ({"tasks": ["lqr-lqr-2-1"]}, r"^lqr-lqr-2-1 of env\.tasks: lqr lqr_2_1: entry 0 of the"),
        ({"max_episode_steps": 0}, r"^cartpole-swingup of env\.tasks: max_episode_steps must be"),
        ({"action_repeat": 1.5}, r"of env\.tasks: action_repeat must be a whole number"),
        ({"num_envs": 2}, "3 tasks need as many envs or episodes at least"),
        ({"obs_dim": 3}, r"env\.obs_dim must be at least 12 \(finger-turn-easy\), got 3"),
        ({"threads": 2}, r"env\.threads must be 1 for env 'dmc_tasks'"),
        ({"task": "run"}, r"env 'dmc_tasks': got an unexpected keyword argument 'task'"),
    ],
)
def test_make_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        many(**options)
