"""Evaluation counts the first episode of every env, and nothing else."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import Tensor

from pwm_fast.agent import PWM
from pwm_fast.envs import VectorEnv
from pwm_fast.run.evaluation import GOAL_STEPS, evaluate


class Scripted:
    """Env i ends after ``lengths[i]`` steps, and starts again; step t rewards t."""

    def __init__(
        self,
        lengths: list[int],
        goal_from: list[int] | None = None,
        lost: list[bool] | None = None,
    ) -> None:
        self.lengths = torch.tensor(lengths)
        self.goal_from = None if goal_from is None else torch.tensor(goal_from)
        self.lost = None if lost is None else torch.tensor(lost)  # diverges at the end
        self.num_envs = len(lengths)
        self.max_episode_steps = max(lengths)
        self.device = torch.device("cpu")

    def reset(self, *, seed: int | None = None) -> tuple[Tensor, dict[str, Any]]:
        self.seed = seed
        self.t = torch.zeros(self.num_envs, dtype=torch.int64)
        return torch.zeros(self.num_envs, 1), {}

    def step(self, action: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Any]]:
        self.t += 1
        reward, done = self.t.float(), self.t >= self.lengths
        info = {} if self.goal_from is None else {"goal": self.t >= self.goal_from}
        if self.lost is not None:
            info["diverged"] = done & self.lost
            self.lost = self.lost ^ done  # the other kind in the next episode
        self.t = torch.where(done, 0, self.t)
        return torch.zeros(self.num_envs, 1), reward, done, torch.zeros_like(done), info


class Idle:
    def act(
        self, obs: Tensor, *, task: Tensor | None = None, deterministic: bool = False
    ) -> Tensor:
        assert deterministic and task is None
        return torch.zeros(obs.shape[0], 1)


def run(env: Scripted, **options: Any) -> Any:
    return evaluate(cast(PWM, Idle()), cast(VectorEnv, env), 7, **options)


def test_first_episodes_alone() -> None:
    env = Scripted([2, 3, 10])
    result = run(env)
    assert env.seed == 7
    assert result.lengths.tolist() == [2, 3, 10]
    assert result.returns.tolist() == [3, 6, 55]
    assert result.held is None
    row = result.row()
    assert row["eval_reward"] == pytest.approx(64 / 3)
    assert row["eval_episode_length"] == 5
    assert "eval_success" not in row


def test_goal_must_hold_to_the_end() -> None:
    n = GOAL_STEPS
    # In the goal for exactly the last second; a step less; from the start; in the next episode.
    result = run(Scripted([n + 5, n + 5, n, 5], [6, 7, 1, 1]))
    assert result.held.tolist() == [True, False, True, False]
    assert result.row()["eval_success"] == 0.5


def test_diverged_episodes() -> None:
    n = GOAL_STEPS
    # The goal held in all; the next episodes, which end the other way, do not count.
    result = run(Scripted([n, n + 5, 2 * n + 9], [1, 1, 1], [True, False, True]))
    assert result.diverged.tolist() == [True, False, True]
    assert result.held.tolist() == [False, True, False]
    assert result.row()["eval_diverged"] == result.summary()["diverged"] == 2
    assert run(Scripted([2, 3])).row()["eval_diverged"] == 0, "where it does not say"


def test_one_episode_has_no_spread() -> None:
    result = run(Scripted([4]))
    assert result.row()["eval_reward_std"] == 0.0
    assert result.summary()["episode_length_std"] == 0.0


def test_can_be_stopped() -> None:
    calls = iter(range(3))

    def check() -> None:
        next(calls)

    with pytest.raises(StopIteration):
        run(Scripted([10]), check=check)


def test_endless_episode_is_an_error() -> None:
    env = Scripted([5, 9])
    env.max_episode_steps = 8
    with pytest.raises(RuntimeError, match="1 episodes were not over"):
        run(env)
