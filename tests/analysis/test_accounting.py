"""Parameters and FLOPs against the formulas, and against what a real agent computes."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pwm_fast.agent import PWM
from pwm_fast.analysis.accounting import (
    Flops,
    Networks,
    Spaces,
    count_flops,
    world_model_parameters,
)
from pwm_fast.backends import select
from pwm_fast.config import (
    ActorConfig,
    AlgConfig,
    CriticConfig,
    ModelLearningConfig,
    WorldModelConfig,
)
from pwm_fast.replay import Windows

O, A, D, H, B = 5, 3, 16, 6, 7  # noqa: E741


def config(**changes: Any) -> AlgConfig:
    """A small agent with another width everywhere; ``changes`` are of the world model."""
    model = WorldModelConfig(
        kind="flow", latent_dim=D, units=[14, 12], encoder_units=[11], reward_units=[10, 9]
    )
    return AlgConfig(
        world_model=dataclasses.replace(model, **changes),
        model_learning=ModelLearningConfig(batch_size=B, updates=3),
        actor=ActorConfig(units=[13], batch_size=8, updates=2),
        critic=CriticConfig(units=[15], members=2, passes=2, minibatches=3),
        horizon=H,
        steps_per_epoch=4,
        normalize_returns=False,
    )


def dense(*widths: int) -> int:
    """Parameters of Linear layers."""
    return sum(k * n + n for k, n in pairwise(widths))


def norms(*widths: int) -> int:
    return 2 * sum(widths)


@pytest.mark.parametrize("terminates", [False, True])
def test_parameters(terminates: bool) -> None:
    """By the formulas, without the termination head."""
    counts = Networks.build(config(), Spaces(O, A, terminates)).parameters()
    expected = {
        "encoder": dense(O, 11, D) + norms(11, D),
        "velocity": dense(D + A + 1, 14, 12, D) + norms(14, 12),
        "reward": dense(D + A, 10, 9, 101) + norms(10, 9),
    }
    expected["world_model"] = sum(expected.values())
    expected["actor"] = dense(D, 13, A) + norms(13) + A
    expected["critics"] = 2 * (dense(D, 15, 1) + norms(15))
    expected["total"] = expected["world_model"] + expected["actor"] + expected["critics"]
    assert counts == expected
    assert (
        world_model_parameters(config().world_model, Spaces(O, A, terminates))
        == (expected["world_model"])
    )


def test_nothing_is_allocated() -> None:
    nets = Networks.build(config(), Spaces(O, A, True))
    assert {p.device.type for net in nets for p in net.parameters()} == {"meta"}


@pytest.mark.parametrize(
    ("changes", "evaluations"),
    [
        ({}, 4),
        ({"substeps": 3}, 6),
        ({"integrator": "euler", "substeps": 3}, 3),
        ({"kind": "mlp"}, 1),
    ],
)
def test_macro_step(changes: dict, evaluations: int) -> None:
    """A multiply-add is 2 FLOPs, and Heun evaluates the field twice a substep."""
    costs = count_flops(config(**changes), Spaces(O, A, False), num_envs=2)
    inputs = D + A if changes.get("kind") == "mlp" else D + A + 1
    macs = inputs * 14 + 14 * 12 + 12 * D
    assert costs.macro_step == Flops(2 * macs * evaluations, 2 * macs * evaluations)


def test_acting() -> None:
    costs = count_flops(config(), Spaces(O, A, False), num_envs=2)
    macs = O * 11 + 11 * D + D * 13 + 13 * A
    assert costs.act == Flops(2 * macs, 2 * macs)


VARIANTS: dict[str, tuple[dict, bool, int]] = {
    "flow": ({}, False, H),
    "flow of one step": ({}, False, 1),
    "baseline": ({"kind": "mlp"}, False, H),
    "terminating, with tasks": ({"task_dim": 4, "num_tasks": 2}, True, 4),
    "scalar reward": ({"num_bins": 1}, False, 2),
    "some flow times": ({"integrator": "euler", "substeps": 1}, False, H),
    "imagines another horizon": ({}, True, H),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_updates_are_those_of_a_real_agent(name: str) -> None:
    """The agent's own update methods, on real tensors, at the full horizon."""
    changes, terminates, horizon = VARIANTS[name]
    alg = dataclasses.replace(config(**changes), horizon=horizon)
    if name == "some flow times":
        learning = dataclasses.replace(alg.model_learning, flow_share=0.3)
        alg = dataclasses.replace(alg, model_learning=learning)
    if name == "imagines another horizon":
        alg = dataclasses.replace(alg, imagination_horizon=horizon + 3)
    costs = count_flops(alg, Spaces(O, A, terminates), num_envs=2)
    agent = PWM(O, A, alg, can_terminate=terminates)
    windows = Windows(
        torch.randn(horizon + 1, B, O),
        torch.randn(horizon, B, A),
        torch.randn(horizon, B),
        torch.zeros(horizon, B),
        torch.arange(B) % 2,
    )
    task = torch.arange(8) % 2
    # The counter sees PyTorch's own products, not those inside an operator.
    with select.backend("reference"), FlopCounterMode(display=False) as counter:
        agent.update_world_model(windows)
    assert costs.world_model_update.total == counter.get_total_flops()
    with select.backend("reference"), FlopCounterMode(display=False) as counter:
        agent.update_policy(torch.randn(8, O), task)
    assert costs.actor_update.total + costs.critic_updates.total == counter.get_total_flops()
    with select.backend("reference"), FlopCounterMode(display=False) as counter:
        agent.act(torch.randn(1, O), task=task[:1])
    assert costs.act.total == counter.get_total_flops()
    for flops in (costs.world_model_update, costs.actor_update, costs.critic_updates):
        assert 0 < flops.forward < flops.total


def test_learning_is_spread_over_the_steps() -> None:
    """3 model updates and 2 policy updates after 4 steps in each of 5 envs."""
    costs = count_flops(config(), Spaces(O, A, False), num_envs=5)
    epoch = 3 * costs.world_model_update.total
    epoch += 2 * (costs.actor_update.total + costs.critic_updates.total)
    assert costs.learning_per_step == pytest.approx(epoch / 20)
    assert costs.per_step == pytest.approx(epoch / 20 + costs.act.total)


@pytest.mark.parametrize(
    ("form", "integrator", "substeps", "evaluations"),
    [
        ("ode", "euler", 4, 4),
        ("ode", "heun", 3, 6),
        ("gated", "euler", 2, 2),
        ("meanflow", "euler", 1, 1),
    ],
)
def test_a_flow_policy_counts_every_evaluation(
    form: str, integrator: str, substeps: int, evaluations: int
) -> None:
    own = ActorConfig(
        kind="flow", form=form, integrator=integrator, substeps=substeps, units=[13], batch_size=8
    )
    flow = dataclasses.replace(config(), actor=own)
    inputs, outputs = A + D + 1 + (form == "meanflow"), 2 * A if form == "gated" else A
    counts = Networks.build(flow, Spaces(O, A, False)).parameters()
    assert counts["actor"] == dense(inputs, 13, outputs) + norms(13) + A
    ours, gaussian = (count_flops(c, Spaces(O, A, False), 2) for c in (flow, config()))
    policy = 2 * 13 * (inputs + outputs) * evaluations
    more = policy - 2 * 13 * (D + A)
    assert ours.act.forward - gaussian.act.forward == more
    assert ours.actor_update.forward - gaussian.actor_update.forward == 8 * H * more
    assert ours.world_model_update == gaussian.world_model_update
    assert ours.macro_step == gaussian.macro_step
