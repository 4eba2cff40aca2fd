"""Agents of several tasks: each row is its own task's, in every update and in every action."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pwm_fast import ops
from pwm_fast.agent import PWM, Planner
from pwm_fast.agent.view import view_of
from pwm_fast.config import ConfigError
from tests.agent.agents import (
    ACTION,
    OBS,
    alg_config,
    make_agent,
    make_obs,
    make_task,
    make_windows,
)
from tests.helpers import Operators
from tests.models.builders import same

MANY: dict[str, Any] = {"kind": "flow", "task_dim": 3, "num_tasks": 2, "normalize_obs": True}
MASKED = {**MANY, "action_dims": {0: 1, 1: 2}}


def many(**changes: Any) -> PWM:
    """Tasks whose statistics differ by far."""
    agent = make_agent(**{**MANY, **changes})
    task = make_task(60)
    agent.observe(make_obs(60, seed=3) + 5.0 * task[:, None], torch.randn(60), task)
    return agent


def test_a_task_s_rows_do_not_depend_on_the_other_tasks() -> None:
    """A batch of one task gives what its rows of a mixed batch give."""
    agent, obs, task = many(), make_obs(8), make_task(8)
    mixed = agent.act(obs, task=task, deterministic=True)
    for number in (0, 1):
        own = task == number
        alone = agent.act(obs[own], task=task[own], deterministic=True)
        same(mixed[own], alone, rtol=1e-5, atol=1e-6)
    other = agent.act(obs, task=1 - task, deterministic=True)
    assert (mixed - other).abs().max() > 1e-3


def test_every_update_takes_the_tasks_to_heart() -> None:
    """With the numbers exchanged, losses and gradients are others."""
    for update in ("wm", "actor", "critic"):
        found = []
        for flip in (False, True):
            agent = many(passes=1, minibatches=1)
            windows, task = make_windows(), make_task()
            if flip:
                task = 1 - task
            torch.manual_seed(0)
            if update == "wm":
                found.append(agent.update_world_model(windows._replace(task=task))["wm_loss"])
            else:
                metrics = agent.update_policy(make_obs(), task)
                found.append(metrics["actor_loss" if update == "actor" else "value_loss"])
        assert (found[0] - found[1]).abs() > 1e-5, update


def test_networks_see_the_embedding_where_there_are_several() -> None:
    agent = many()
    assert agent.actor.task_dim == agent.critic.task_dim == 3
    assert make_agent(kind="flow", task_dim=3, num_tasks=1).actor.task_dim == 0
    plain = many(actor_task_input=False, critic_task_input=False)
    assert plain.actor.task_dim == plain.critic.task_dim == 0
    with pytest.raises(ValueError, match=r"alg.actor.task_input must be false or null"):
        make_agent(kind="flow", actor_task_input=True)


def test_without_numbers_several_tasks_are_refused() -> None:
    agent = many()
    for call in (
        lambda: agent.act(make_obs()),
        lambda: agent.update_policy(make_obs()),
        lambda: agent.update_world_model(make_windows()._replace(task=None)),
        lambda: view_of(agent),
    ):
        with pytest.raises(ValueError, match="task must be the numbers of 2 tasks, got None"):
            call()


def test_components_that_a_task_does_not_read_are_zero() -> None:
    """In actions, drawn or not, in plans and in imagination; the others are not."""
    agent, obs, task = many(**{"action_dims": {0: 1, 1: 2}}), make_obs(10), make_task(10)
    options = ops.MPPI(horizon=2, iterations=2, samples=20, elites=5, policy_trajectories=4)
    planner = Planner(agent, options, seed=0, task=task, eval_mode=False)
    first = torch.ones(10, dtype=torch.bool)
    actions: dict[str, Tensor] = {
        "deterministic": agent.act(obs, task=task, deterministic=True),
        "drawn": agent.act(obs, task=task),
        "planned": planner.act(obs, first),
        "imagined": agent._imagine(obs, task).rollout.action,
    }
    for name, action in actions.items():
        assert not action[..., task == 0, 1].any(), name
        assert action[..., task == 0, 0].abs().min() > 0.0, name
        assert action[..., task == 1, :].abs().min() > 0.0, name


def test_the_one_task_of_a_wider_action() -> None:
    """A model without embeddings: its task's components are masked in the same places."""
    agent, obs = make_agent(kind="flow", action_dims={0: 1}), make_obs(10)
    options = ops.MPPI(horizon=2, iterations=2, samples=20, elites=5, policy_trajectories=4)
    actions = {
        "drawn": agent.act(obs),
        "planned": agent.plan(obs, options).action,
        "imagined": agent._imagine(obs).rollout.action,
    }
    for name, action in actions.items():
        assert not action[..., 1].any() and action[..., 0].abs().min() > 0.0, name
    assert agent.update_policy(obs)["actor_loss"].isfinite()


def test_tasks_of_one_width_are_masked_as_one() -> None:
    """In one operator, to the same policy, values and actions as row by row."""
    found = []
    for each in (False, True):
        agent = many(action_dims={0: 1, 1: 1}, actor_task_input=False)
        obs, task = make_obs(10), make_task(10)
        assert agent.action_mask is not None and agent.action_mask.dtype == torch.bool
        if each:
            agent.action_mask = agent.action_mask.float().expand(2, ACTION)
        torch.manual_seed(0)
        with Operators() as operators:
            agent._imagine(obs, task)
        assert ("pwm_fast::imagine" in operators.names) != each
        metrics = agent.update_policy(obs, task)
        names = ("actor_loss", "value_loss", "actor_grad_norm")
        found.append([*(metrics[k] for k in names), agent.act(obs, task=task)])
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_tasks_of_no_known_width_read_all() -> None:
    agent = many(action_dims={0: 1})
    action = agent.act(make_obs(10), task=make_task(10))
    assert (action == 0.0).sum(1).tolist() == [1, 0] * 5


def test_without_smaller_tasks_nothing_is_masked() -> None:
    """Then rollouts stay one operator."""
    assert many(action_dims={0: ACTION, 1: ACTION}).action_mask is None
    assert PWM(OBS, ACTION, alg_config()).action_mask is None


def test_each_task_has_its_discount() -> None:
    """Returns and targets are those of agents with that discount alone."""
    obs, task = make_obs(8).double(), make_task(8)
    both = many(discounts=[0.5, 0.9], double=True)
    torch.manual_seed(0)
    returns = both._imagine(obs, task).returns
    for number, gamma in enumerate((0.5, 0.9)):
        alone = many(gamma=gamma, double=True)
        alone.load_state_dict(both.state_dict(), optimizers=False)
        torch.manual_seed(0)
        expected = alone._imagine(obs, task).returns
        same(returns[task == number], expected[task == number], rtol=1e-12)
        other = expected[task != number] - returns[task != number]
        assert other.abs().min() > 1e-6


def test_the_discount_of_one_task_without_an_embedding() -> None:
    found = []
    for changes in ({"discounts": [0.5]}, {"gamma": 0.5}):
        agent = make_agent(kind="flow", **changes)
        torch.manual_seed(0)
        found.append(agent._imagine(make_obs()).returns)
    assert torch.equal(*found)


def test_discounts_and_a_delayed_value_do_not_go_together() -> None:
    with pytest.raises(ConfigError, match=r"alg.discounts must be null with alg.value_delay=1"):
        alg_config(discounts=[0.9], value_delay=1)


def test_q_functions_value_the_policy_s_actions() -> None:
    """TD-MPC2's critics: what a plan and an imagined rollout end in is worth Q(z, pi(z))."""
    agent = make_agent(kind="mlp", critic_kind="tdmpc2", actor_kind="tdmpc2", members=2)
    z = agent.encode(make_obs(), None)
    expected = agent.critic.values(z, agent.actor(z)).amin(0)
    same(agent._value(z, None), expected)
    options = ops.MPPI(horizon=2, iterations=2, samples=20, elites=5, policy_trajectories=4)
    assert agent.plan(make_obs(), options).action.isfinite().all()
    gradients = agent.actor_gradients(make_obs(), 2)
    assert all(g.isfinite().all() for g in gradients[0])


def test_pieces_of_windows_keep_their_tasks() -> None:
    """A window's pieces are of its task: as if each piece had been a window of its own."""
    windows = make_windows()
    whole = many(rollout_steps=1)
    torch.manual_seed(0)
    found = whole.update_world_model(windows)["reward_loss"]
    apart = many(horizon=1)
    cut = windows._replace(
        obs=torch.cat([windows.obs[t : t + 2] for t in range(3)], 1),
        action=windows.action.flatten(0, 1)[None],
        reward=windows.reward.flatten()[None],
        terminated=windows.terminated.flatten()[None],
        task=make_task().repeat(3),
    )
    same(found, apart.update_world_model(cut)["reward_loss"], rtol=1e-5)
