"""Planning with an agent's networks, and carrying plans from step to step."""

from __future__ import annotations

import pytest
import torch

from pwm_fast import ops
from pwm_fast.agent import Planner
from tests.agent.agents import ACTION, AGENTS, make_agent, make_obs, make_task
from tests.models.builders import same

OPTIONS = ops.MPPI(iterations=2, samples=12, elites=4, policy_trajectories=3)


@pytest.mark.parametrize("name", AGENTS)
def test_trajectories_are_worth_what_the_actor_learns_from(name: str) -> None:
    """In the rewards' units: returns are those of imagined rollouts, without ``value_scale``.

    And without what entropy earns.
    """
    changes = AGENTS[name] | {"actor_entropy_coef": 0.0}
    agent, obs = make_agent(value_scale=0.3, **changes), make_obs(5)
    one = ops.MPPI(horizon=3, iterations=1, samples=1, elites=1, policy_trajectories=1)
    torch.manual_seed(4)
    task = make_task(5)
    returns = agent._imagine(obs, agent.task_numbers((5,), task), 3).returns
    torch.manual_seed(4)
    eps = torch.randn(3, 5, ACTION)
    noise = ops.PlanNoise.draw(5, ACTION, one)._replace(policy=eps.unsqueeze(2))
    plan = agent.plan(obs, one, task=task, noise=noise, eval_mode=True)
    same(0.3 * plan.value[:, 0], returns, rtol=2e-5, atol=1e-6)
    same(plan.action, plan.trajectories[0, :, 0])
    assert not plan.value.requires_grad


@pytest.mark.parametrize("kind", ["flow", "mlp"])
def test_a_planner_carries_each_plan_until_its_episode_ends(kind: str) -> None:
    agent = make_agent(kind=kind)
    planner = Planner(agent, OPTIONS, seed=5, eval_mode=False)
    generator, mean = torch.Generator().manual_seed(5), None
    before = torch.get_rng_state()
    for step in range(4):
        obs = make_obs(3, seed=step)
        first = torch.tensor([step == 0, step in (0, 2), step == 0])
        found = planner.act(obs, first)
        # Where it is an env's first step, the mean of its other plans does not matter.
        previous = None if mean is None else mean.masked_fill(first.view(1, 3, 1), 7.0)
        plan = agent.plan(obs, OPTIONS, previous=previous, first=first, generator=generator)
        assert torch.equal(found, plan.action) and found.shape == (3, ACTION)
        mean = plan.mean
    assert torch.equal(torch.get_rng_state(), before)
    again = Planner(agent, OPTIONS, seed=6, eval_mode=False)
    everyone = torch.ones(3, dtype=torch.bool)
    assert not torch.equal(
        again.act(obs, everyone), Planner(agent, OPTIONS, seed=5).act(obs, everyone)
    )


def test_eval_mode_adds_no_noise() -> None:
    agent, obs = make_agent(), make_obs(4)
    noise = ops.PlanNoise.draw(4, ACTION, OPTIONS, generator=torch.Generator().manual_seed(1))
    exact = agent.plan(obs, OPTIONS, noise=noise, eval_mode=True)
    noisy = agent.plan(obs, OPTIONS, noise=noise)
    wanted = (exact.action + exact.std[0] * noise.action).clamp(-1.0, 1.0)
    assert torch.equal(noisy.action, wanted) and not torch.equal(noisy.action, exact.action)
