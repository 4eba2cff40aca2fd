"""An agent's model as the cost of other libraries' planners."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pwm_fast import ops
from pwm_fast.agent import PWM, CostModel
from tests.agent.agents import (
    ACTION,
    OBS,
    changed,
    make_agent,
    make_obs,
    make_task,
    make_windows,
    snapshot,
)

KINDS: dict[str, dict[str, Any]] = {
    "mlp": {"kind": "mlp"},
    "flow": {"kind": "flow", "normalize_obs": True},
    "terminating": {"kind": "flow", "can_terminate": True},
    "multi-task": {"kind": "flow", "task_dim": 3, "num_tasks": 2, "can_terminate": True},
    "observations": {"kind": "residual", "encoder": "identity", "normalize_obs": True},
    "scaled values": {"kind": "mlp", "value_delay": 1, "value_scale": 0.3},
}
B, S, H = 3, 4, 5
TASK = 1


def candidates(seed: int = 0, steps: int = H, dtype: torch.dtype = torch.float32) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.rand(B, S, steps, ACTION, generator=g).to(dtype) * 2 - 1


def loop(agent: PWM, obs: Tensor, actions: Tensor) -> Tensor:
    """Costs ``[B, S]`` of observations ``[B, S, O]``, a step at a time."""
    model, config = agent.world_model, agent.config
    task = agent.task_numbers((B, S), torch.full((B, S), TASK))
    z = agent.encode(obs, task)
    total, weight = 0.0, torch.ones(B, S, dtype=z.dtype)
    for a in actions.unbind(2):
        total = total + weight * model.decode_reward(model.reward(z, a, task))
        weight = weight * config.gamma
        logit = model.termination(z, a, task)
        if logit is not None:
            weight = weight * (1.0 - torch.sigmoid(logit))
        z = model.next(z, a, task)
    value = agent._value(z, task) * config.gamma**config.value_delay / config.value_scale
    return -(total + weight * value)


@pytest.mark.parametrize("task", [None, -1, 2])
def test_a_task_that_the_model_has_not(task: int | None) -> None:
    with pytest.raises(ValueError, match=f"task must be a number from 0 to 1, .*got {task}"):
        CostModel(make_agent(**KINDS["multi-task"]), "x", task)


@pytest.mark.parametrize("same_obs", [True, False])
@pytest.mark.parametrize("name", KINDS)
def test_costs_and_gradients_are_those_of_a_plain_loop(name: str, same_obs: bool) -> None:
    agent = make_agent(double=True, **KINDS[name])
    agent.observe(make_obs(50, seed=9) * 3 + 1, torch.randn(50), make_task(50))
    agent.obs_rms.double()
    obs = make_obs(B * S, dtype=torch.float64).view(B, S, OBS)
    if same_obs:  # as solvers hand them out
        obs = obs[:, :1].expand(B, S, OBS)
    actions = candidates(dtype=torch.float64).requires_grad_()
    expected = loop(agent, obs, actions)
    (wanted,) = torch.autograd.grad(expected.square().sum(), actions)
    cost = CostModel(agent, "x", TASK).get_cost({"x": obs}, actions)
    assert cost.shape == (B, S)
    cost.square().sum().backward()
    torch.testing.assert_close(cost, expected, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(actions.grad, wanted, rtol=1e-9, atol=1e-10)
    for module in (agent.world_model, agent.actor, agent.critic):
        assert all(p.grad is None and p.requires_grad for p in module.parameters())


def test_costs_are_minus_what_a_plan_maximises() -> None:
    agent, obs = make_agent(kind="flow", can_terminate=True), make_obs(B)
    options = ops.MPPI(iterations=2, samples=12, elites=4, policy_trajectories=3)
    plan = agent.plan(obs, options)
    expanded = obs[:, None].expand(B, 12, OBS)
    cost = CostModel(agent).get_cost({"state": expanded}, plan.trajectories.permute(1, 2, 0, 3))
    assert torch.equal(cost, -plan.value)


def solve(model: CostModel, info: dict[str, Any], *, samples: int = 32, steps: int = 5) -> Tensor:
    """The cross-entropy method on the interface of stable-worldmodel's solvers (0.1.1).

    It expands what the info holds along the samples, works in inference mode and clamps nothing.
    """
    g = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        count = len(next(iter(info.values())))
        expanded = {
            k: v.unsqueeze(1).expand(count, samples, *v.shape[1:])
            if torch.is_tensor(v)
            else np.repeat(v[:, None], samples, axis=1)
            for k, v in info.items()
        }
        mean, std = torch.zeros(count, H, ACTION), torch.ones(count, H, ACTION)
        for _ in range(steps):
            noise = torch.randn(count, samples, H, ACTION, generator=g)
            drawn = noise * std[:, None] + mean[:, None]
            drawn[:, 0] = mean
            costs = model.get_cost(expanded, drawn)
            assert isinstance(costs, Tensor) and costs.shape == (count, samples)
            best = costs.topk(6, dim=1, largest=False).indices
            elites = drawn[torch.arange(count)[:, None], best]
            mean, std = elites.mean(1), elites.std(1)
        return mean


def test_a_solver_finds_better_actions_and_leaves_the_agent_as_it_was() -> None:
    agent, obs = make_agent(kind="flow"), make_obs(B)
    before, model = snapshot(agent), CostModel(agent)
    found = solve(model, {"state": obs, "pixels": np.zeros((B, 2, 2))}).clone()
    costs = [model.get_cost({"state": obs[:, None]}, x[:, None]) for x in (found, found * 0)]
    assert (costs[0] < costs[1]).all()
    same = solve(model, {"state": obs.numpy().astype(np.float64)})
    torch.testing.assert_close(same, found)
    assert not changed(before, snapshot(agent))
    agent.update_world_model(make_windows())  # what was packed in inference mode is not used
    agent.update_policy(make_obs())
    assert changed(before, snapshot(agent))


def test_descending_the_gradient() -> None:
    agent, obs = make_agent(kind="flow"), make_obs(B)
    model = CostModel(agent)
    actions = torch.zeros(B, 1, H, ACTION, requires_grad=True)
    sgd = torch.optim.SGD([actions], lr=0.02)
    costs = []
    for _ in range(6):
        cost = model.get_cost({"state": obs[:, None]}, actions)
        costs.append(cost.detach())
        sgd.zero_grad()
        cost.sum().backward()
        sgd.step()
    assert (costs[-1] < costs[0]).all()


def test_several_actions_a_step_and_a_time_axis() -> None:
    model, obs = CostModel(make_agent()), make_obs(B)
    actions = candidates(steps=6)
    info = {"state": obs[:, None].expand(B, S, OBS)}
    expected = model.get_cost(info, actions)
    assert torch.equal(model.get_cost(info, actions.reshape(B, S, 3, 2 * ACTION)), expected)
    earlier = torch.stack([obs * 0 + 7.0, obs], 1)
    info = {"state": earlier[:, None].expand(B, S, 2, OBS)}
    assert torch.equal(model.get_cost(info, actions), expected)


def test_candidates_are_clamped() -> None:
    model, info = CostModel(make_agent()), {"state": make_obs(B)[:, None].expand(B, S, OBS)}
    actions = (3.0 * candidates()).requires_grad_()
    cost = model.get_cost(info, actions)
    assert torch.equal(cost, model.get_cost(info, actions.clamp(-1.0, 1.0)))
    (grad,) = torch.autograd.grad(cost.sum(), actions)
    assert torch.equal(grad == 0.0, actions.abs() > 1.0)


def test_what_is_not_finite_costs_infinity() -> None:
    info = {"state": make_obs(B)[:, None].expand(B, S, OBS)}
    actions = candidates()
    actions[1, 2, 3, 0] = torch.nan
    cost = CostModel(make_agent()).get_cost(info, actions)
    assert cost.isinf().nonzero().tolist() == [[1, 2]] and cost[1, 2] > 0


STATE = torch.zeros(B, S, OBS)


@pytest.mark.parametrize(
    ("info", "actions", "error", "message"),
    [
        ({"pixels": 1}, candidates(), ValueError, "info_dict must hold 'state', got ['pixels']"),
        ({"state": STATE[:, :2]}, candidates(), ValueError, "must be [3, 4, 5]"),
        ({"state": STATE[..., :2]}, candidates(), ValueError, "got (3, 4, 2)"),
        ({"state": STATE[:, :, None][:, :, :0]}, candidates(), ValueError, "got (3, 4, 0, 5)"),
        ({"state": STATE}, candidates()[0], ValueError, "must be [B, S, H, 2], or wider"),
        ({"state": STATE}, candidates()[..., :1], ValueError, "got (3, 4, 5, 1)"),
        ({"state": STATE}, candidates()[:, :, :0], ValueError, "got (3, 4, 0, 2)"),
        ({"state": STATE}, candidates().long(), TypeError, "must be a floating tensor, got torch"),
        ({"state": STATE}, None, TypeError, "must be a floating tensor, got NoneType"),
        (
            {"state": STATE},
            candidates().to("meta"),
            ValueError,
            "must be on the agent's device cpu, got meta: make the solver with that device",
        ),
    ],
)
def test_errors(info: Any, actions: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        CostModel(make_agent()).get_cost(info, actions)
