"""Throughput of the reference backend: what every faster path will be compared with.

``pytest bench --benchmark-only``; rows of one group stand side by side.
"""

from __future__ import annotations

import pytest
import torch

from pwm_fast import envs, ops
from pwm_fast.agent import PWM
from pwm_fast.agent.imagination import discounted_return, frozen, imagine
from pwm_fast.config import AlgConfig, WorldModelConfig
from pwm_fast.replay import Replay, Windows

OBS, ACTION, HORIZON = 37, 8, 16  # Ant's sizes
MODELS = {
    "5M": WorldModelConfig(kind="mlp"),
    "5M_flow": WorldModelConfig(kind="flow", units=[510, 510]),
}


def make_agent(name: str) -> PWM:
    torch.manual_seed(0)
    return PWM(OBS, ACTION, AlgConfig(name=name, world_model=MODELS[name]))


@pytest.fixture(params=MODELS)
def agent(request: pytest.FixtureRequest) -> PWM:
    return make_agent(request.param)


@pytest.mark.parametrize("batch", [64, 256])
@pytest.mark.benchmark(group="imagined rollout, forward + backward to the actor")
def test_imagined_rollout(benchmark, agent: PWM, batch: int) -> None:
    obs = torch.randn(batch, OBS)
    noise = torch.randn(HORIZON, batch, ACTION)
    params = list(agent.actor.parameters())

    def rollout() -> torch.Tensor:
        with frozen(agent.world_model, agent.critic):
            z = agent.world_model.encode(obs)
            result = imagine(agent.world_model, agent.actor, z, noise)
            value = agent.critic.minimum(result.z[-1])
            loss = -discounted_return(result, value, 0.99).mean()
            return torch.autograd.grad(loss, params)[0]

    grad = benchmark(rollout)
    assert torch.isfinite(grad).all()


@pytest.mark.benchmark(group="world-model update, 64 windows")
def test_world_model_update(benchmark, agent: PWM) -> None:
    windows = Windows(
        torch.randn(HORIZON + 1, 64, OBS),
        torch.rand(HORIZON, 64, ACTION) * 2 - 1,
        torch.randn(HORIZON, 64),
        torch.zeros(HORIZON, 64),
    )
    metrics = benchmark.pedantic(
        agent.update_world_model, args=(windows,), rounds=5, warmup_rounds=1
    )
    assert torch.isfinite(metrics["wm_loss"])


@pytest.mark.benchmark(group="actor update and 32 critic updates, 128 rollouts")
def test_policy_update(benchmark, agent: PWM) -> None:
    obs = torch.randn(128, OBS)
    metrics = benchmark.pedantic(agent.update_policy, args=(obs,), rounds=3, warmup_rounds=1)
    assert torch.isfinite(metrics["actor_loss"])


@pytest.mark.parametrize(("name", "worlds"), [("cartpole", 64), ("hopper", 64), ("ant", 128)])
@pytest.mark.benchmark(group="environment step")
def test_env_step(benchmark, name: str, worlds: int) -> None:
    env = envs.make(name, worlds, seed=0)
    actions = torch.rand(worlds, env.single_action_space.shape[0]) * 2 - 1
    for _ in range(60):  # past the fall onto the ground
        env.step(actions)
    obs = benchmark(lambda: env.step(actions)[0])
    assert torch.isfinite(obs).all()


@pytest.mark.benchmark(group="replay, 1M transitions of Ant")
@pytest.mark.parametrize("batch", [256])
def test_replay_sample(benchmark, batch: int) -> None:
    replay = Replay(1_000_000, 128, OBS, ACTION, HORIZON)
    obs, action = torch.randn(128, OBS), torch.randn(128, ACTION)
    ended = torch.zeros(128, dtype=torch.bool)
    for _ in range(200):
        replay.add(obs, action, torch.zeros(128), ended, ended, obs)
    windows = benchmark(replay.sample, batch)
    assert windows.obs.shape == (HORIZON + 1, batch, OBS)


@pytest.mark.benchmark(group="replay, 1M transitions of Ant")
def test_replay_add(benchmark) -> None:
    replay = Replay(1_000_000, 128, OBS, ACTION, HORIZON)
    obs, action = torch.randn(128, OBS), torch.randn(128, ACTION)
    ended = torch.zeros(128, dtype=torch.bool)
    benchmark(replay.add, obs, action, torch.zeros(128), ended, ended, obs)
    assert len(replay) > 0


@pytest.mark.parametrize("elements", [100_000, 1_500_000])
@pytest.mark.benchmark(group="ESNR of 16 gradient samples")
def test_esnr(benchmark, elements: int) -> None:
    grads = [[torch.randn(elements // 4) for _ in range(4)] for _ in range(16)]
    result = benchmark(ops.esnr, grads)
    assert result.noise > 0
