"""What lives in the CPU's memory does so whatever torch's default device is."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pwm_fast import config, ops
from pwm_fast.agent.optim import GuardedAdam, total_norm
from pwm_fast.ops import Layer
from pwm_fast.run import build
from pwm_fast.run.collection import MixedPolicy, first_episodes

CPU = torch.device("cpu")


def norm() -> Any:
    return total_norm([torch.ones(4, 3, device=CPU), torch.full((2,), 2.0, device=CPU)])


def adam() -> Any:
    p = torch.nn.Parameter(torch.ones(3, device=CPU))
    optimizer = GuardedAdam([p], 0.1, (0.9, 0.99), 1.0)
    optimizer.step((p * p).sum())
    return p.detach(), optimizer.skipped


def esnr() -> Any:
    grads = [[torch.arange(5.0, device=CPU) * i] for i in range(3)]
    accumulator = ops.EsnrAccumulator()
    for g in grads:
        accumulator.update(g)
    running = ops.RunningEsnr().update(ops.esnr(grads))
    return ops.esnr(grads).ratio, accumulator.result().ratio, running.ratio


def layers(*sizes: int) -> list[Layer]:
    g = torch.Generator(CPU).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, device=CPU, requires_grad=True)

    pairs = list(pairwise(sizes))
    normed = [Layer(normal(n, k), normal(n), normal(n), normal(n), "mish") for k, n in pairs[:-1]]
    return [*normed, Layer(normal(sizes[-1], sizes[-2]), normal(sizes[-1]))]


def rollout() -> Any:
    net, z = layers(16 + 3 + 1, 12, 16), torch.linspace(0, 1, 32, device=CPU).view(2, 16)
    policy = ops.Policy(layers(16, 9, 3), torch.full((3,), 0.2, device=CPU))
    heads = ops.Heads(layers(16 + 3, 9, 11), value=layers(16, 9, 11))
    noise = torch.linspace(-1, 1, 24, device=CPU).view(4, 2, 3)
    found = ops.imagine(z, policy, ops.Flow(net), heads, noise=noise)
    assert found.value is not None
    loss = found.z.sum() + found.reward.sum() + found.value.sum()
    returns = ops.td_lambda(found.reward.detach(), torch.zeros(5, 2, device=CPU))
    weights = [net[0].weight, policy.layers[0].weight, heads.reward[0].weight]
    return found.z.detach(), returns, torch.autograd.grad(loss, weights)


def plan() -> Any:
    z = torch.linspace(0, 1, 32, device=CPU).view(2, 16)
    q = [layers(16 + 3, 9, 11)] * 3
    found = ops.plan(
        z,
        ops.Policy(layers(16, 9, 3), torch.full((3,), 0.2, device=CPU)),
        ops.Flow(layers(16 + 3 + 1, 12, 16)),
        ops.Heads(layers(16 + 3, 9, 11)),
        values=ops.ValueEnsemble(q, "norm_act", on_action=True),
        options=ops.MPPI(iterations=2, samples=8, elites=3, policy_trajectories=2),
        generator=torch.Generator(CPU).manual_seed(0),
    )
    return tuple(found)


def heads() -> Any:
    x = torch.linspace(-5.0, 5.0, 7, device=CPU)
    code = ops.two_hot_encode(x)
    return code, ops.two_hot_decode(code), ops.two_hot_cross_entropy(code, x), ops.symexp(x)


def environment(*overrides: str) -> Callable[[], Any]:
    """Steps, a partial reset and a saved state."""

    def run() -> Any:
        chosen = config.compose(*overrides, "num_envs=3", "device=cpu", "alg=pwm_tiny")
        with closing(build.make_env(chosen, 3, 0)) as env:
            replay = build.make_replay(chosen, env, CPU)
            g = torch.Generator(CPU).manual_seed(0)
            actions = env.single_action_space.shape[0]
            obs, _ = env.reset()
            seen = [obs.clone()]
            for _ in range(20):
                action = torch.rand(3, actions, generator=g, device=CPU) * 2 - 1
                new, reward, terminated, truncated, info = env.step(action)
                over = terminated | truncated
                replay.add(obs, action, reward, terminated, over, info["final_obs"])
                obs = new.clone()
                seen += [obs, reward.clone(), terminated.clone(), info["final_obs"].clone()]
            env.set_state(env.get_state())
            policy = MixedPolicy(None, 3, actions, policy="random")
            policy(obs)
            episodes = first_episodes(env, lambda x: x.new_zeros(3, actions), 0)
            return seen, replay.state_dict(), episodes

    return run


WORK: dict[str, Callable[[], Any]] = {
    "total_norm": norm,
    "GuardedAdam": adam,
    "esnr": esnr,
    "imagine": rollout,
    "plan": plan,
    "heads": heads,
    "cartpole": environment("env=cartpole"),
    "hopper": environment("env=hopper"),
    "gym": environment("env=gym", "env.id=Hopper-v5"),
    "dmc": environment("env=dmc", "env.domain=cartpole", "env.task=swingup"),
}


@pytest.mark.parametrize("name", WORK)
def test_another_default_device(name: str) -> None:
    """The meta device stands for a GPU: what was made there by mistake has no values."""
    if name in ("gym", "dmc"):
        pytest.importorskip("gymnasium" if name == "gym" else "dm_control")
    wanted = WORK[name]()
    with torch.device("meta"):
        found = WORK[name]()
    pairs = list(zip(pytree.tree_leaves(found), pytree.tree_leaves(wanted), strict=True))
    assert any(isinstance(b, Tensor) for _, b in pairs)
    for a, b in pairs:
        if isinstance(b, Tensor):
            assert a.device == CPU
            torch.testing.assert_close(a, b, rtol=0.0, atol=0.0, equal_nan=True)
