"""SHAC: what its rollouts hold, what its policy follows, and that it learns."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("mujoco.batch", reason="needs pip install 'pwm-fast[train]'")

from bench import shac
from bench.shac import SETTINGS, SHAC, Rollout, Settings
from pwm_fast.envs import TASKS, MujocoEnv


def small(name: str, limit: int, seed: int = 0) -> SHAC:
    """A learner in three envs with a time limit, whose critic is not zero."""
    env = MujocoEnv(TASKS[name](), 3, seed=seed, max_episode_steps=limit)
    torch.manual_seed(seed)
    return SHAC(env, Settings(horizon=5, actor_units=(8,), critic_units=(8,)), steps=150)


def test_rollouts_hold_what_the_environment_gives() -> None:
    """The time limit of 3 steps cuts each episode, whose last state has a value."""
    learner, twin = small("hopper", 3), small("hopper", 3).env
    learner.env.reset(seed=1)
    obs, _ = twin.reset(seed=1)
    learner.obs_rms.update(torch.randn(9, 11))
    torch.manual_seed(2)
    noise = torch.randn(5, 3, 3)
    torch.manual_seed(2)
    rollout = learner.rollout()

    def value(of: Tensor) -> Tensor:
        return learner.target(learner.obs_rms.normalize(of))

    for t in range(5):
        torch.testing.assert_close(rollout.obs[t], obs, rtol=0.0, atol=0.0)
        action = learner.actor(learner.obs_rms.normalize(obs), noise[t]).detach()
        obs, reward, _, truncated, info = twin.step(action)
        assert truncated.tolist() == [t == 2] * 3
        expected = reward
        if t == 2:
            expected = reward + 0.99 * value(info["final_obs"])
        torch.testing.assert_close(rollout.rewards[t].detach(), expected, rtol=1e-6, atol=1e-6)
        assert rollout.continues[t].tolist() == [float(t != 2)] * 3
    torch.testing.assert_close(rollout.obs[5], obs, rtol=0.0, atol=0.0)
    torch.testing.assert_close(rollout.last_value.detach(), value(obs))


def test_the_loss_is_of_every_episode() -> None:
    """Two envs of three steps, one of which ends after the first."""
    rewards = torch.tensor([[1.0, 10.0], [2.0, 20.0], [3.0, 30.0]])
    continues = torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 1.0]])
    last = torch.tensor([5.0, 50.0])
    loss = small("cartpole", 9).loss(Rollout(torch.empty(0), rewards, continues, last))
    g = 0.99
    first = 1.0 + g * 2.0 + g**2 * 3.0 + g**3 * 5.0
    second = 10.0 + (20.0 + g * 30.0 + g**2 * 50.0)
    assert float(loss) == pytest.approx(-(first + second) / 6.0)


def test_the_policy_follows_the_loss_s_slope() -> None:
    """Along its gradient, and past resets, against the loss of moved policies."""
    learner = small("cartpole", 3)
    state = learner.env.get_state()

    def loss() -> Tensor:
        learner.env.set_state(state)
        torch.manual_seed(1)
        return learner.loss(learner.rollout())

    params = list(learner.actor.parameters())
    grads = torch.autograd.grad(loss(), params)
    norm = torch.stack([g.square().sum() for g in grads]).sum().sqrt()
    moved = []
    for h in (1e-2, -2e-2):
        with torch.no_grad():
            for p, g in zip(params, grads, strict=True):
                p += h * g / norm
        moved.append(loss().item())
    slope = (moved[0] - moved[1]) / 2e-2
    assert norm > 0.01
    assert slope == pytest.approx(float(norm), rel=1e-2)


def test_rates_fall_and_the_target_follows() -> None:
    learner = small("hopper", 100)
    before = [p.clone() for p in learner.critic.parameters()]
    learner.learn(15)  # one update
    assert learner.env_steps == 15
    for old, new, target in zip(
        before, learner.critic.parameters(), learner.target.parameters(), strict=True
    ):
        torch.testing.assert_close(target, 0.2 * old + 0.8 * new)
    assert float(learner.obs_rms.count) == 15.0
    learner.learn(135)
    assert [float(o.lr) for o in learner.optimizers] == pytest.approx(
        [1e-5 + 0.1 * (5e-3 - 1e-5), 1e-5 + 0.1 * (1e-3 - 1e-5)]
    )
    assert int(learner.optimizers[0].skipped) == 0


def test_it_learns() -> None:
    """To keep a pole up for a while, in 40 updates of 16 envs: 20,480 steps."""
    task = TASKS["cartpole"](start="upright")
    torch.manual_seed(0)
    settings = replace(SETTINGS["cartpole"], passes=4)
    learner = SHAC(MujocoEnv(task, 16), settings, steps=20_480)
    judging = MujocoEnv(task, 16)

    def earned(policy: Callable[[Tensor], Tensor]) -> float:
        obs, _ = judging.reset(seed=1)
        total = torch.zeros(16)
        for _ in range(task.max_episode_steps):
            obs, reward, *_ = judging.step(policy(obs))
            total += reward
        return total.mean().item()

    idle = earned(lambda obs: torch.zeros(16, 1))
    before = earned(partial(learner.act, deterministic=True))
    learner.learn(20_480)
    assert earned(partial(learner.act, deterministic=True)) > max(idle, before) + 300.0


def test_what_is_kept(tmp_path: Path) -> None:
    given = ["--steps=4096", "--every=3000", f"--out={tmp_path}"]
    assert shac.main(["cartpole", *given]) == 0
    run = json.loads((tmp_path / "cartpole" / shac.NAME / "seed_0.json").read_text())
    curve = run["curve"]
    assert curve["env_steps"] == [0, 4096]
    assert curve.keys() == {"env_steps", "seconds", "cpu_seconds", "eval_reward"}
    assert curve["cpu_seconds"][1] > curve["cpu_seconds"][0] == 0.0
    assert len(run["returns"]) == 12
    assert curve["eval_reward"][1] == pytest.approx(sum(run["returns"]) / 12)
    assert 0.0 <= run["success"] <= 1.0
    assert (run["horizon"], run["num_envs"], run["steps"], run["seed"]) == (32, 64, 4096, 0)
    assert run["commit"].keys() == {"id", "dirty"} and run["machine"]["cpu"]
    assert shac.label(run).startswith("SHAC, H = 32, through MuJoCo 3.")
