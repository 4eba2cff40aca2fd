"""Drift off the simplices, and ESNR over horizons, against closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pwm_fast import ops
from pwm_fast.agent.imagination import imagine
from pwm_fast.analysis.gradients import gradient_esnr
from pwm_fast.analysis.simplex import simplex_drift
from tests.agent.agents import ACTION, AGENTS, make_agent, make_obs, make_task
from tests.analysis.closed_forms import normal
from tests.models.builders import simplex


def test_on_the_simplices_there_is_no_drift() -> None:
    drift = simplex_drift(simplex(4, 5, 16))
    assert drift["negative_mass"].tolist() == drift["negative_share"].tolist() == [0.0] * 4
    assert drift["sum_error_max"].max() < 1e-12


def test_known_drift() -> None:
    """Step h takes 2 h from an entry of 1 of every second group: mass and sum are known."""
    z = torch.zeros(3, 5, 16, dtype=torch.float64)
    z[..., 0] = z[..., 8] = 1.0
    for h in range(3):
        z[h, :, 8] -= 2.0 * h
    drift = simplex_drift(z)
    assert drift["negative_mass"].tolist() == [0.0, 0.5, 1.5]  # of 2 groups one has 0, 1, 3
    assert drift["negative_share"].tolist() == pytest.approx([0.0, 1 / 16, 1 / 16])
    assert drift["sum_error"].tolist() == [0.0, 1.0, 2.0]
    assert drift["sum_error_max"].tolist() == [0.0, 2.0, 4.0]


def test_negative_entries_that_others_make_up_for() -> None:
    """The sum of a group says nothing of its negative entries."""
    z = torch.zeros(1, 1, 8, dtype=torch.float64)
    z[..., 0], z[..., 1] = 1.25, -0.25
    drift = simplex_drift(z)
    assert drift["negative_mass"].item() == 0.25 and drift["sum_error"].item() == 0.0


@pytest.mark.parametrize(
    "name", [name for name in AGENTS if AGENTS[name].get("encoder") != "identity"]
)
def test_drift_of_agents(name: str) -> None:
    """0 for the baseline and for a projected flow, not for what is free."""
    changes = AGENTS[name]
    for project in (False, True):
        own = changes | ({"flow_share": 1.0} if project and "flow_share" in changes else {})
        agent = make_agent(double=True, project=project, **own)
        task = agent.task_numbers((6,), make_task())
        z = agent.encode(make_obs(dtype=torch.float64), task)
        noise = torch.randn(5, 6, ACTION, dtype=torch.float64)
        drift = simplex_drift(imagine(agent.world_model, agent.actor, z, noise, task=task).z)
        assert drift["sum_error_max"][0] < 1e-9 and drift["negative_mass"][0] == 0.0
        if changes["kind"] == "mlp" or (changes["kind"] == "flow" and project):
            assert drift["negative_mass"].max() == 0.0
            assert drift["sum_error_max"].max() < 1e-9
        else:
            assert drift["sum_error"][1:].min() > 1e-3


# ESNR


def known_gradients(horizon: int, samples: int) -> list[tuple[Tensor, ...]]:
    """``g_i = (horizon mu, 0) +- (0, s)``: signal ``|horizon mu|^2``, noise ``s^2``, M even."""
    mu, s = torch.tensor([3.0, 4.0]).double(), 2.0
    signs = [1.0 if i % 2 == 0 else -1.0 for i in range(samples)]
    return [(horizon * mu, torch.tensor([sign * s]).double()) for sign in signs]


def test_known_esnr() -> None:
    rows = gradient_esnr(known_gradients, [1, 2, 6], [2, 8])
    assert [(row["horizon"], row["samples"]) for row in rows] == [
        (h, m) for h in (1, 2, 6) for m in (2, 8)
    ]
    for row in rows:
        h, m = row["horizon"], row["samples"]
        assert row["signal"] == pytest.approx(25.0 * h**2)
        assert row["noise"] == pytest.approx(4.0)
        assert row["esnr"] == pytest.approx(25.0 * h**2 / 4.0)
        assert row["esnr_db"] == pytest.approx(10 * math.log10(25.0 * h**2 / 4.0))
        assert row["esnr_debiased"] == pytest.approx((25.0 * h**2 - 4.0 / m) / 4.0)


def test_gradients_are_computed_once_a_horizon() -> None:
    calls = []

    def gradients(horizon: int, samples: int) -> list[tuple[Tensor, ...]]:
        calls.append((horizon, samples))
        return known_gradients(horizon, samples)

    gradient_esnr(gradients, [4, 2], [8, 2, 4])
    assert calls == [(4, 8), (2, 8)]


def test_no_signal_is_no_crash() -> None:
    rows = gradient_esnr(lambda h, m: [(torch.zeros(3),)] * m, [1], [2])
    assert rows[0]["esnr"] == 0.0 and rows[0]["esnr_db"] == -math.inf


@pytest.mark.parametrize("name", AGENTS)
def test_gradients_of_agents(name: str) -> None:
    """At any horizon those of an agent of that horizon, and its logged ESNR is theirs."""
    agent = make_agent(double=True, **AGENTS[name])
    obs, task = make_obs(8, dtype=torch.float64), make_task(8)
    for horizon in (1, 3, 5):
        changes = {**AGENTS[name], "horizon": horizon}
        if horizon == 1 and changes.get("start_noise") == "auto":
            continue  # windows of one step have no error to measure
        other = make_agent(double=True, **changes)
        torch.manual_seed(3)
        ours = agent.actor_gradients(obs, 4, horizon, task=task)
        torch.manual_seed(3)
        theirs = other.actor_gradients(obs, 4, task=task)
        assert len(ours) == 4
        for a, b in zip(ours, theirs, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
        torch.manual_seed(3)
        assert other.actor_esnr(obs, 4, task=task)["esnr"] == ops.esnr(ours).ratio


def test_the_gradient_is_the_loss_s_slope() -> None:
    """A finite difference of the loss at a horizon other than the configured one."""
    agent = make_agent(double=True, **AGENTS["flow"])
    agent.config.actor.detach = False  # else a difference sees paths that the gradient leaves out
    obs = make_obs(4, dtype=torch.float64)

    def loss() -> Tensor:
        torch.manual_seed(1)
        return agent._actor_loss(agent._imagine(obs, horizon=2)[1])

    bias = dict(agent.actor.named_parameters())["mu_net.6.bias"]
    index = [p is bias for p in agent.actor.parameters()].index(True)
    direction, eps = normal(*bias.shape), 1e-5
    torch.manual_seed(1)
    gradients = agent.actor_gradients(obs, 1, 2)[0]
    with torch.no_grad():
        bias.add_(eps * direction)
        above = loss()
        bias.sub_(2 * eps * direction)
        below = loss()
        bias.add_(eps * direction)
    slope = (above - below) / (2 * eps)
    assert (gradients[index] * direction).sum().item() == pytest.approx(slope.item(), rel=1e-5)
