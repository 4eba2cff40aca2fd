"""The agent's updates: what they compute, what they must not touch, and how they fail."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import pwm_fast
from pwm_fast import ops
from pwm_fast.agent import PWM
from pwm_fast.agent.imagination import imagine
from pwm_fast.agent.losses import pieces, weighted_loss
from pwm_fast.models import GaussianActor
from pwm_fast.ops import ImaginedRollout, extend
from pwm_fast.ops.extend import RegressionStep, discounted_return
from tests.agent.agents import (
    ACTION,
    AGENTS,
    OBS,
    OBSERVATIONS,
    alg_config,
    changed,
    make_agent,
    make_obs,
    make_task,
    make_windows,
    snapshot,
)
from tests.models.builders import SlowModel, same

NAN = float("nan")


def normalized(agent: PWM, obs: Tensor) -> Tensor:
    """Observations ``[..., B, O]`` of :func:`make_task` as the agent's networks see them."""
    if not agent.config.normalize_obs:
        return obs
    rms, limit = agent.obs_rms, agent.config.obs_clip
    assert limit is not None
    mean, var = rms.mean, rms.var
    if agent.config.world_model.num_tasks > 1:
        task = make_task(obs.shape[-2])
        mean, var = mean[task], var[task]
    return ((obs - mean) / (var + 1e-5).sqrt()).clip(-limit, limit).float()


def wanted_rewards(agent: PWM, reward: Tensor) -> Tensor:
    """Rewards as the agent's head learns them."""
    config, rms = agent.config, agent.reward_rms
    if not config.normalize_rewards:
        return reward
    scaled = (reward - (rms.mean if config.centre_rewards else 0.0)) / (rms.var + 1e-5).sqrt()
    limit = config.reward_clip
    return (scaled if limit is None else scaled.clip(-limit, limit)).float()


# Acting and observing


@pytest.mark.parametrize("name", AGENTS)
def test_act(name: str) -> None:
    """``tanh(mu + std noise)`` of the encoded observation; deterministic on request."""
    agent, obs, task = make_agent(**AGENTS[name]), make_obs(7), make_task(7)
    agent.observe(make_obs(50, seed=1), torch.randn(50), make_task(50))
    x, own = normalized(agent, obs), agent.task_numbers((7,), task)
    z = agent.world_model.encode(x, own)
    e = agent.world_model.task_input(own, z)
    found = agent.act(obs, task=task, deterministic=True)
    same(found, agent.actor(z, None, e, agent._mask(own)), rtol=1e-5, atol=1e-6)
    torch.manual_seed(4)
    action = agent.act(obs, task=task)
    torch.manual_seed(4)
    same(action, agent.actor(z, torch.randn(7, ACTION), e, agent._mask(own)), rtol=1e-5, atol=1e-6)
    assert not action.requires_grad
    assert not torch.equal(agent.act(obs, task=task), action)


def test_observe_updates_only_what_is_normalised() -> None:
    obs, reward = make_obs(50), torch.randn(50) * 4
    plain = make_agent()
    plain.observe(obs, reward)
    assert plain.obs_rms.count == 0 and plain.reward_rms.count == 0
    agent = make_agent(num_bins=1, normalize_rewards=True, normalize_obs=True)
    agent.observe(obs, reward)
    same(agent.obs_rms.mean, obs.double().mean(0))
    same(agent.reward_rms.var, reward.double().var(correction=0))
    assert agent.return_rms.count == 0


# World model


@pytest.mark.parametrize("name", AGENTS)
def test_world_model_update(name: str) -> None:
    """Metrics are those of the loss on the (normalised) windows; only the world model moves."""
    agent, windows = make_agent(**AGENTS[name]), make_windows()
    agent.observe(make_obs(50, seed=1), 5.0 * torch.randn(50), make_task(50))
    config = agent.config
    before, others = snapshot(agent, "wm"), snapshot(agent, "actor", "critic")
    torch.manual_seed(4)
    cut = pieces(
        config.model_learning.rollout_steps,
        normalized(agent, windows.obs),
        windows.action,
        wanted_rewards(agent, windows.reward),
        windows.terminated,
    )
    task = make_task().repeat_interleave(cut[1].shape[1] // 6)
    expected = weighted_loss(
        agent.world_model,
        *cut,
        config.model_learning,
        gamma=config.gamma,
        task=task if config.world_model.task_dim else None,
    )
    grads = torch.autograd.grad(expected.total, list(agent.world_model.parameters()))
    torch.manual_seed(4)
    metrics = agent.update_world_model(windows)
    tolerance = {"rtol": 1e-5, "atol": 1e-6}
    same(metrics["wm_loss"], expected.total, **tolerance)
    same(metrics["dynamics_loss"], expected.dynamics, **tolerance)
    same(metrics["reward_loss"], expected.reward, **tolerance)
    same(metrics["latent_std"], expected.latent_std, **tolerance)
    norm = torch.stack([g.square().sum() for g in grads]).sum().sqrt()
    same(metrics["wm_grad_norm"], norm, rtol=1e-4, atol=1e-6)
    assert ("termination_loss" in metrics) == (agent.world_model._termination is not None)
    if "termination_loss" in metrics:
        same(metrics["termination_loss"], expected.termination, **tolerance)
    assert all(m.shape == () and not m.requires_grad for m in metrics.values())
    assert changed(others, snapshot(agent, "actor", "critic")) == []
    moved = changed(before, snapshot(agent, "wm"))
    assert {k for k in before if ".ln." not in k} <= set(moved)


@pytest.mark.parametrize("name", AGENTS)
def test_world_model_learns_fixed_windows(name: str) -> None:
    agent, windows = make_agent(**AGENTS[name], model_learning_lr=3e-3), make_windows(32)
    agent.observe(windows.obs[0], windows.reward[0], windows.task)

    def loss() -> float:
        torch.manual_seed(4)
        return agent.update_world_model(windows)["wm_loss"].item()

    first = loss()
    for _ in range(60):
        agent.update_world_model(windows)
    assert loss() < 0.7 * first


def test_the_reported_norm_is_before_clipping() -> None:
    """Clipped to 1e-3, still the same figure; the kept gradients have the clipped norm."""
    norms = []
    for limit in (1e-3, 1e9):
        agent = make_agent(model_learning_grad_norm=limit)
        agent.optimizers["wm"].keep_gradients = True
        torch.manual_seed(4)
        norms.append(agent.update_world_model(make_windows())["wm_grad_norm"].item())
        clipped = torch.stack([g.square().sum() for g in agent.gradients().values()]).sum().sqrt()
        assert clipped.item() == pytest.approx(min(limit, norms[-1]), rel=1e-4)
    assert norms[0] == norms[1] > 0.1


# Policy: gradients


def fixed_noise(agent: PWM, noise: Tensor) -> None:
    agent._noise = lambda *shape: noise  # type: ignore[method-assign]


def objective(
    agent: PWM, obs: Tensor, noise: Tensor, seen: list[Tensor] | None
) -> tuple[Tensor, list[Tensor]]:
    """Mean imagined return written out, and the latents the policy saw.

    With ``seen`` the policy sees these latents instead of its own: what "detached" means.
    """
    config, slow = agent.config, SlowModel(agent.world_model)
    z = slow.encode(obs)
    total = torch.zeros(len(obs), dtype=torch.float64)
    alive = torch.ones(len(obs), dtype=torch.float64)
    visited = []
    for t in range(config.horizon):
        visited.append(z)
        a = agent.actor(z if seen is None else seen[t], noise[t])
        reward = ops.two_hot_decode(slow.reward(z, a), -10.0, 10.0)
        if config.actor.entropy_coef:
            std, drawn = agent.actor.std(), torch.atanh(a)
            log = torch.distributions.Normal(drawn - std * noise[t], std).log_prob(drawn)
            log = log - torch.log(1.0 - a.square() + 1e-6)
            reward = reward - config.actor.entropy_coef * log.sum(-1)
        reward = reward * config.value_scale
        total = total + config.gamma**t * alive * reward
        if agent.world_model._termination is not None:
            alive = alive * torch.sigmoid(-slow.termination(z, a))
        z = slow.next(z, a)
    value = agent.critic(z).min(0).values
    return (total + config.gamma**config.horizon * alive * value).mean(), visited


@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("name", ["mlp", "flow", "terminating", "entropy"])
def test_actor_gradient_equals_finite_differences(name: str, detach: bool) -> None:
    """Every entry of every parameter, float64; the loss is divided by the returns' deviation."""
    agent = make_agent(
        **AGENTS[name],
        detach=detach,
        double=True,
        actor_units=[4],
        actor_grad_norm=1e9,
        passes=0,
        value_scale=0.5,
        normalize_returns=name != "mlp",
    )
    agent.optimizers["actor"].keep_gradients = True
    agent.set_progress(0.0)
    agent.optimizers["actor"].set_lr(0.0)  # the update itself leaves the policy where it is
    obs, noise = make_obs(5).double(), torch.randn(3, 5, ACTION, dtype=torch.float64)
    fixed_noise(agent, noise)
    metrics = agent.update_policy(obs)
    with torch.no_grad():
        value, visited = objective(agent, obs, noise, None)
        seen = visited if detach else None
        scale = 1.0
        if agent.config.normalize_returns:
            scale = float(agent.return_rms.var + 1e-5) ** 0.5
            assert abs(scale - 1.0) > 0.01
        assert metrics["actor_loss"].item() == pytest.approx(-value.item() / scale, rel=1e-6)
        largest = 0.0
        for key, p in agent.actor.named_parameters():
            assert p.grad is not None
            for i in range(p.numel()):
                flat, h = p.view(-1), 1e-6
                start = flat[i].item()
                flat[i] = start + h
                above = objective(agent, obs, noise, seen)[0]
                flat[i] = start - h
                below = objective(agent, obs, noise, seen)[0]
                flat[i] = start
                expected = -(above - below).item() / (2 * h) / scale
                gradient = p.grad.view(-1)[i].item()
                assert gradient == pytest.approx(expected, rel=1e-4, abs=1e-7), f"{key}[{i}]"
                largest = max(largest, abs(expected))
    assert largest > 1e-3


def test_detached_gradient_is_another_one() -> None:
    """The switch does something: both gradients differ."""
    grads = []
    for detach in (True, False):
        agent = make_agent(detach=detach, passes=0, actor_grad_norm=1e9)
        agent.optimizers["actor"].keep_gradients = True
        torch.manual_seed(4)
        agent.update_policy(make_obs(), make_task())
        grads.append(agent.gradients()["actor.mu_net.0.weight"].clone())
    assert (grads[0] - grads[1]).abs().max() > 1e-4


# Policy: what it must not touch


@pytest.mark.parametrize("name", AGENTS)
def test_policy_update_leaves_world_model_and_critics_alone(name: str) -> None:
    """Bitwise; without gradients of theirs; all are trainable again afterwards."""
    agent = make_agent(**AGENTS[name], passes=0)
    agent.update_world_model(make_windows())
    frozen_parameters = [*agent.world_model.parameters(), *agent.critic.parameters()]
    asked = []

    def spy(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            asked.append(any(p.requires_grad for p in frozen_parameters))
            return function(*args, **kwargs)

        return call

    for module, method in (
        (agent.world_model, "encode"),
        (agent.world_model, "dynamics"),
        (agent.world_model, "heads"),
        (agent.critic, "minimum"),
    ):
        setattr(module, method, spy(getattr(module, method)))
    before, actor = snapshot(agent, "wm", "critic"), snapshot(agent, "actor")
    agent.update_policy(make_obs(), make_task())
    assert len(asked) >= 4
    assert not any(asked[:4])
    assert changed(before, snapshot(agent, "wm", "critic")) == []
    assert len(changed(actor, snapshot(agent, "actor"))) > 5
    assert all(p.grad is None for p in frozen_parameters)
    assert all(p.requires_grad for p in frozen_parameters)


def test_critic_updates_leave_world_model_and_actor_alone() -> None:
    """Nothing but the critics moves after the actor's own update."""
    one, both = make_agent(passes=0), make_agent(passes=2)
    for agent in (one, both):
        torch.manual_seed(4)
        agent.update_policy(make_obs(), make_task())
    difference = changed(snapshot(one), snapshot(both))
    assert difference and all(k.startswith("critic.") for k in difference)
    assert all(p.grad is None for p in both.critic.parameters())


@pytest.mark.parametrize("name", AGENTS)
def test_policy_metrics(name: str) -> None:
    """Every figure under its name, as a scalar on the device."""
    agent = make_agent(**AGENTS[name], value_scale=0.25, normalize_returns=False)
    torch.manual_seed(4)
    metrics = agent.update_policy(make_obs(), make_task())
    assert set(metrics) == {
        "actor_loss",
        "actor_grad_norm",
        "imagined_return",
        "actor_std",
        "value_loss",
        "critic_grad_norm",
        *(["entropy"] if agent.config.actor.entropy_coef else []),
    }
    assert all(m.shape == () and not m.requires_grad for m in metrics.values())
    # In the environment's units, whatever the scale that the critics learn in.
    same(metrics["imagined_return"] * 0.25, -metrics["actor_loss"], rtol=1e-5, atol=1e-6)
    if isinstance(agent.actor, GaussianActor):
        assert abs(metrics["actor_std"].item() - np.exp(-1.0)) < 0.01


def test_policy_update_raises_the_imagined_return() -> None:
    """On the same starts and noise, many updates earn more."""
    agent = make_agent(actor_lr=3e-3, passes=0)
    noise, obs = torch.randn(3, 16, ACTION), make_obs(16)
    fixed_noise(agent, noise)
    first = agent.update_policy(obs)["imagined_return"].item()
    for _ in range(40):
        agent.update_policy(obs)
    assert agent.update_policy(obs)["imagined_return"].item() > first + 0.1


def test_returns_are_divided_by_their_running_deviation() -> None:
    """Over all returns seen so far, this update's included; ESNR does not count."""
    agent = make_agent(passes=0)
    agent.optimizers["actor"].set_lr(0.0)
    seen: list[np.ndarray] = []
    for i in range(3):
        obs, noise = make_obs(9, seed=i) * (1 + i), torch.randn(3, 9, ACTION)
        fixed_noise(agent, noise)
        rollout = imagine(agent.world_model, agent.actor, agent.world_model.encode(obs), noise)
        value = agent.critic(rollout.z[-1]).min(0).values
        returns = discounted_return(
            rollout.reward, value, agent.config.gamma, rollout.continues
        ).detach()
        seen.append(returns.double().numpy())
        metrics = agent.update_policy(obs)
        scale = np.sqrt(np.concatenate(seen).var() + 1e-5)
        assert metrics["actor_loss"].item() == pytest.approx(-seen[-1].mean() / scale, rel=1e-4)
    count = agent.return_rms.count.clone()
    fixed_noise(agent, torch.randn(3, 3, ACTION))
    agent.actor_esnr(make_obs(9), 3)
    assert torch.equal(agent.return_rms.count, count)


# Critics


def forward_view(rewards: Tensor, values: Tensor, c: Tensor, gamma: float, lam: float) -> Tensor:
    """TD(lambda) by its definition: the lambda-weighted mean of all n-step returns."""
    horizon = len(rewards)
    targets = []
    for t in range(horizon):
        target = torch.zeros_like(rewards[0])
        n_step, discount = torch.zeros_like(rewards[0]), torch.ones_like(rewards[0])
        for n in range(1, horizon - t + 1):
            n_step = n_step + discount * rewards[t + n - 1]
            discount = discount * gamma * c[t + n - 1]
            last = n == horizon - t
            weight = lam ** (n - 1) if last else (1 - lam) * lam ** (n - 1)
            target = target + weight * (n_step + discount * values[t + n])
        targets.append(target)
    return torch.stack(targets)


def random_rollout(agent: PWM, batch: int = 8, terminating: bool = True) -> ImaginedRollout:
    horizon, dim = agent.config.horizon, agent.world_model.latent_dim
    z = torch.randn(horizon + 1, batch, dim).unflatten(-1, (-1, 8)).softmax(-1).flatten(-2)
    continues = torch.rand(horizon, batch) if terminating else None
    return ImaginedRollout(
        z, torch.zeros(horizon, batch, ACTION), torch.randn(horizon, batch), continues
    )


@pytest.mark.parametrize("terminating", [True, False])
def test_critic_loss_is_the_error_against_td_lambda(terminating: bool) -> None:
    """Every member against the same target, from the minimum of all members' values."""
    agent = make_agent(passes=1, minibatches=1, gamma=0.9, lam=0.8)
    rollout = random_rollout(agent, terminating=terminating)
    values = agent.critic(rollout.z).min(0).values
    c = torch.ones_like(rollout.reward) if rollout.continues is None else rollout.continues
    targets = forward_view(rollout.reward, values, c, 0.9, 0.8)
    errors = agent.critic(rollout.z[:-1]) - targets
    metrics = agent._update_critic(rollout)
    same(metrics["value_loss"], errors.square().mean(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("members", [1, 3])
def test_critics_learn_the_same_past_autograd(
    members: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a last minibatch of fewer states, and gradients that are kept."""
    ends, original = [], extend.regression
    for direct in (True, False):
        agent = make_agent(passes=2, minibatches=4, members=members)
        agent.optimizers["critic"].keep_gradients = True
        taken = []

        def regression(
            *given: Any, direct: bool = direct, taken: list[bool] = taken
        ) -> RegressionStep | None:
            step = original(*given) if direct else None
            taken.append(step is not None)
            return step

        with monkeypatch.context() as patch:
            patch.setattr(extend, "regression", regression)
            with pwm_fast.backend("torch"):
                torch.manual_seed(4)
                metrics = agent._update_critic(random_rollout(agent, batch=7))
        assert taken == [direct] * 2  # of 6 states, and of 3
        kept = [p.grad for p in agent.critic.parameters() if p.grad is not None]
        assert len(kept) == len(agent.optimizers["critic"].params)
        ends.append([*agent.critic.parameters(), *metrics.values(), *kept])
    for ours, theirs in zip(*ends, strict=True):
        same(ours, theirs, rtol=1e-4, atol=1e-6)


def test_kept_gradients_of_the_critics_are_those_of_the_last_update() -> None:
    """The next update computes its own elsewhere."""
    agent = make_agent(passes=1, minibatches=2)
    agent.optimizers["critic"].keep_gradients = True
    agent._update_critic(random_rollout(agent))
    first = [p.grad for p in agent.critic.parameters() if p.grad is not None]
    before = [g.clone() for g in first]
    assert before
    agent._update_critic(random_rollout(agent))
    assert all(torch.equal(a, b) for a, b in zip(first, before, strict=True))


def test_targets_are_fixed_while_the_critics_learn() -> None:
    """All passes regress on the targets from before; their loss on fixed data decreases."""
    agent = make_agent(passes=150, minibatches=2, critic_lr=3e-3)
    rollout = random_rollout(agent)
    assert rollout.continues is not None
    with torch.no_grad():
        values = agent.critic(rollout.z).min(0).values
        targets = forward_view(rollout.reward, values, rollout.continues, 0.99, 0.95)
        before = (agent.critic(rollout.z[:-1]) - targets).square().mean()
    agent._update_critic(rollout)
    after = (agent.critic(rollout.z[:-1]) - targets).square().mean()
    assert after < 0.3 * before


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize(("passes", "minibatches"), [(1, 1), (2, 3), (3, 4)])
def test_every_state_is_visited_once_a_pass(passes: int, minibatches: int, shuffle: bool) -> None:
    """3 steps x 7 rollouts in as many minibatches as asked for, all states in each pass."""
    agent = make_agent(passes=passes, minibatches=minibatches, shuffle=shuffle)
    rollout = random_rollout(agent, batch=7)
    visited: list[Tensor] = []
    original = agent._critic_step

    def step(states: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
        visited.append(states)
        return original(states, *others)

    agent._critic_step = step  # type: ignore[method-assign]
    agent._update_critic(rollout)
    assert len(visited) == passes * minibatches
    states = rollout.z[:-1].flatten(0, 1)
    order = []
    for i in range(passes):
        part = torch.cat(visited[i * minibatches : (i + 1) * minibatches])
        index = torch.cdist(part, states).argmin(1)
        assert sorted(index.tolist()) == list(range(21))
        order.append(index.tolist())
    if shuffle:
        assert passes == 1 or order[0] != order[1]
    else:  # in order of time, and no random number is drawn
        assert order == [list(range(21))] * passes


# Learning rates


def test_learning_rates_decay_linearly_to_the_final_one() -> None:
    """All three; one that starts at or below the final rate stays where it is."""
    agent = make_agent(model_learning_lr=3e-4, actor_lr=5e-4, critic_lr=4e-6, final_lr=1e-5)
    for fraction in (0.0, 0.25, 0.5, 1.0):
        rates = agent.set_progress(fraction)
        assert rates == {
            "lr_wm": pytest.approx(3e-4 + fraction * (1e-5 - 3e-4)),
            "lr_actor": pytest.approx(5e-4 + fraction * (1e-5 - 5e-4)),
            "lr_critic": 4e-6,
        }
        for name, optimizer in agent.optimizers.items():
            assert optimizer.lr.item() == pytest.approx(rates[f"lr_{name}"])
            assert optimizer.adam.param_groups[0]["lr"] is optimizer.lr


def test_configured_optimisers() -> None:
    agent = make_agent(model_learning_betas=[0.1, 0.2], critic_grad_norm=7.0)
    assert agent.optimizers["wm"].adam.param_groups[0]["betas"] == (0.1, 0.2)
    assert agent.optimizers["actor"].adam.param_groups[0]["betas"] == (0.7, 0.95)
    limits = {k: o.grad_norm for k, o in agent.optimizers.items()}
    assert limits == {"wm": 20.0, "actor": 1.0, "critic": 7.0}


# What is not finite


def poisoned(part: str) -> Any:
    windows = make_windows()
    getattr(windows, part)[1, 2] = NAN
    return windows


@pytest.mark.parametrize(
    ("name", "part"),
    [
        *itertools.product(["mlp", "flow", "scalar reward"], ["obs", "action", "reward"]),
        ("terminating", "terminated"),
    ],
)
def test_non_finite_windows_leave_the_world_model_as_it_was(name: str, part: str) -> None:
    """One NaN anywhere: parameters, moments and step counts stay to the bit; then it goes on."""
    agent, clean = make_agent(**AGENTS[name]), make_agent(**AGENTS[name])

    def update(agent: PWM, windows: Any) -> dict[str, Tensor]:
        torch.manual_seed(4)
        return agent.update_world_model(windows)

    for a in (agent, clean):
        update(a, make_windows())
    before = snapshot(agent)
    for i in range(1, 3):
        assert not torch.isfinite(update(agent, poisoned(part))["wm_loss"])
        counts = {k: int(v) for k, v in agent.skipped_updates().items()}
        assert counts == {"skipped_updates": i, "skipped_in_a_row": i}
    assert changed(before, snapshot(agent)) == []
    for a in (agent, clean):
        update(a, make_windows())
    assert changed(snapshot(clean), snapshot(agent)) == []
    assert len(changed(before, snapshot(agent))) > 5
    counts = {k: int(v) for k, v in agent.skipped_updates().items()}
    assert counts == {"skipped_updates": 2, "skipped_in_a_row": 0}


@pytest.mark.parametrize("name", ["mlp", "flow", "terminating"])
def test_non_finite_start_leaves_the_actor_as_it_was(name: str) -> None:
    """Statistics of the returns stay finite, and no critic ever becomes NaN."""
    agent = make_agent(**AGENTS[name])
    agent.update_policy(make_obs(), make_task())
    before = snapshot(agent, "actor", "wm")
    obs = make_obs()
    obs[3, 1] = NAN
    metrics = agent.update_policy(obs)
    assert not torch.isfinite(metrics["actor_loss"])
    assert changed(before, snapshot(agent, "actor", "wm")) == []
    assert int(agent.optimizers["actor"].skipped) == 1
    assert torch.isfinite(agent.return_rms.var) and agent.return_rms.count == 6 + 5
    assert all(torch.isfinite(p).all() for p in agent.critic.parameters())
    # Of a pass's two minibatches one or both hold a NaN target: 3 states of 18 are bad.
    assert 2 <= int(agent.optimizers["critic"].skipped) <= 4
    agent.update_policy(make_obs(), make_task())
    assert len(changed(before, snapshot(agent, "actor"))) > 5
    assert int(agent.optimizers["actor"].skipped_in_a_row) == 0


def test_skipped_updates_reports_the_worst_row_and_the_sum() -> None:
    agent = make_agent()
    for name, skipped, row in (("wm", 3, 0), ("actor", 5, 4), ("critic", 7, 2)):
        agent.optimizers[name].skipped.fill_(skipped)
        agent.optimizers[name].skipped_in_a_row.fill_(row)
    counts = {k: int(v) for k, v in agent.skipped_updates().items()}
    assert counts == {"skipped_updates": 15, "skipped_in_a_row": 4}


# ESNR


@pytest.mark.parametrize("name", ["flow", "terminating", "all normalised"])
def test_actor_esnr(name: str) -> None:
    """``ops.esnr`` of gradients computed one by one, without anything frozen."""
    agent, obs = make_agent(**AGENTS[name]), make_obs(11)
    obs[9:] = NAN  # 3 samples of 3 rows: the last two are not used
    agent.obs_rms.update(make_obs(40, seed=5))
    agent.return_rms.update(torch.randn(20) * 3)
    before = snapshot(agent)
    torch.manual_seed(4)
    metrics = agent.actor_esnr(obs, 3)
    assert changed(before, snapshot(agent)) == []
    assert all(p.requires_grad and p.grad is None for p in agent.world_model.parameters())

    torch.manual_seed(4)
    params = dict(agent.actor.named_parameters())
    samples = []
    for i in range(3):
        part = obs[3 * i : 3 * i + 3]
        x = agent.obs_rms.normalize(part) if agent.config.normalize_obs else part
        z = agent.world_model.encode(x)
        rollout = imagine(
            agent.world_model,
            agent.actor,
            z,
            torch.randn(3, 3, ACTION),
            detach=agent.config.actor.detach,
        )
        value = agent.critic(rollout.z[-1]).min(0).values
        loss = -discounted_return(
            rollout.reward, value, agent.config.gamma, rollout.continues
        ).mean()
        samples.append(torch.autograd.grad(loss, list(params.values())))
    expected = ops.esnr(samples)
    same(metrics["esnr"], expected.ratio, rtol=1e-3)
    same(metrics["esnr_db"], expected.db, rtol=1e-3, atol=1e-3)
    by_layer = {k: v for k, v in metrics.items() if "/" in k}
    assert list(by_layer) == [f"esnr_by_layer/{k}" for k in params]
    same(torch.stack(list(by_layer.values())), expected.tensor_ratio, rtol=1e-3)
    assert expected.ratio > 1e-3


# The whole of it


@pytest.mark.parametrize("name", AGENTS)
def test_a_round_of_everything(name: str) -> None:
    """Each kind of agent acts, observes, learns and measures, with finite results."""
    agent = make_agent(**AGENTS[name])
    task = make_task()
    action = agent.act(make_obs(), task=task)
    agent.observe(make_obs(), torch.randn(6), task)
    metrics = agent.update_world_model(make_windows())
    metrics |= agent.update_policy(make_obs(), task)
    metrics |= agent.actor_esnr(make_obs(), 2, task=task)
    assert action.shape == (6, ACTION)
    assert all(torch.isfinite(v) for v in metrics.values())
    assert int(agent.skipped_updates()["skipped_updates"]) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"normalize_obs": False}, "see observations in whatever units they have"),
        ({"start_grad": "encoder"}, "the same as none where no encoder learns"),
    ],
)
def test_observations_as_latents_warn(changes: dict[str, Any], message: str) -> None:
    with pytest.warns(UserWarning, match=message):
        PWM(OBS, ACTION, alg_config(**{**OBSERVATIONS, **changes}))


def test_midpoint_warns() -> None:
    """The published mode is an ablation here; no other configuration warns."""
    with pytest.warns(UserWarning, match="tau_sampling=midpoint trains the velocity at tau = 0.5"):
        PWM(OBS, ACTION, alg_config(tau_sampling="midpoint"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PWM(OBS, ACTION, alg_config())
        PWM(OBS, ACTION, alg_config(**OBSERVATIONS))
        PWM(OBS, ACTION, alg_config(kind="mlp", tau_sampling="midpoint"))
