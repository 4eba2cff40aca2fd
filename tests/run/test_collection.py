"""Whole episodes of a policy: complete, in order, and as the environment gave them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pwm_fast.config import ConfigError
from pwm_fast.run.build import make_agent, make_env
from pwm_fast.run.collection import MixedPolicy, first_episodes, renew_random_actions
from tests.run.conftest import tiny_config


class Counting:
    """Envs whose episodes have known lengths; ``obs = [env, episode, step]``."""

    device = torch.device("cpu")
    max_episode_steps = 9

    def __init__(self, lengths: list[int]) -> None:
        self.lengths, self.num_envs = torch.tensor(lengths), len(lengths)

    def reset(self, *, seed: int | None = None) -> tuple[Tensor, dict[str, Any]]:
        self.state = torch.zeros(self.num_envs, 3)
        self.state[:, 0] = torch.arange(self.num_envs)
        return self.state, {}

    def step(self, action: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Any]]:
        reward = self.state[:, 2] + 100 * self.state[:, 1]
        self.state[:, 2] += 1  # in place: collecting has to copy
        final = self.state.clone()
        done = self.state[:, 2] >= self.lengths
        self.state[:, 1] += done
        self.state[:, 2] *= ~done
        ended = done & (self.lengths < self.max_episode_steps)
        return self.state, reward, ended, done & ~ended, {"final_obs": final}


def test_first_episodes() -> None:
    env = Counting([3, 1, 9, 4])
    episodes = first_episodes(env, lambda obs: obs[:, :1] * 0 + obs[:, 2:] / 10, 0)  # type: ignore[arg-type]
    assert [len(e.action) for e in episodes] == [3, 1, 9, 4], "also those that end late"
    for env, episode in enumerate(episodes):
        length = len(episode.action)
        steps = torch.arange(length + 1.0)
        expected = torch.stack([torch.full_like(steps, env), 0 * steps, steps], dim=-1)
        assert torch.equal(episode.obs, expected), "the last observation is of this episode"
        assert torch.equal(episode.reward, steps[:-1])
        assert torch.allclose(episode.action[:, 0], steps[:-1] / 10)
        flags = [False] * (length - 1) + [length < 9]
        assert episode.terminated.tolist() == flags


def test_an_episode_without_an_end() -> None:
    env = Counting([3, 50])
    with pytest.raises(RuntimeError, match="1 episodes were not over after max_episode_steps=9"):
        first_episodes(env, lambda obs: obs[:, :1], 0)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("share", "num_envs", "random"),
    [(0.0, 8, 0), (0.25, 8, 2), (0.5, 5, 3), (1.0, 8, 8), (0.3, 70, 21)],
)
def test_share_of_random_envs(share: float, num_envs: int, random: int, tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    agent = make_agent(config, make_env(config, 1, 0), torch.device("cpu"))
    act = MixedPolicy(agent, num_envs, 1, policy="deterministic", random_share=share)
    assert int(act.random.sum()) == random
    obs = torch.randn(num_envs, 5)
    own, first, second = agent.act(obs, deterministic=True), act(obs), act(obs)
    assert torch.equal(first[~act.random], own[~act.random])
    assert torch.equal(second[~act.random], own[~act.random])
    assert not (first[act.random] == second[act.random]).any()
    # Whatever part of the episodes is kept has its share.
    for k in range(1, num_envs + 1):
        assert abs(int(act.random[:k].sum()) - k * share) <= 1


def test_policies(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    agent = make_agent(config, make_env(config, 1, 0), torch.device("cpu"))
    obs = torch.randn(4, 5)
    actions = {
        policy: [MixedPolicy(agent, 4, 1, policy=policy)(obs) for _ in range(2)]
        for policy in ("stochastic", "deterministic", "random")
    }
    assert torch.equal(*actions["deterministic"])
    assert not torch.equal(*actions["stochastic"]) and not torch.equal(*actions["random"])
    assert torch.equal(actions["deterministic"][0], agent.act(obs, deterministic=True))
    MixedPolicy(None, 4, 1, policy="random")
    with pytest.raises(ConfigError, match="policy must be random without a checkpoint"):
        MixedPolicy(None, 4, 1, policy="stochastic", random_share=0.9)


def test_random_actions_are_held() -> None:
    held, changes, draws = torch.zeros(500, 2), 0, 200
    for _ in range(draws):
        new = renew_random_actions(held, 4)
        changed = (new != held).any(1)
        assert torch.equal(changed, (new != held).all(1)), "an action changes as a whole"
        changes, held = changes + int(changed.sum()), new
    assert changes / (500 * draws) == pytest.approx(0.25, abs=0.01)
    assert held.abs().max() <= 1.0
