"""Imagined rollouts, their returns, and what is frozen meanwhile."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pwm_fast import ops
from pwm_fast.agent.imagination import frozen, imagine
from pwm_fast.models import GaussianActor
from pwm_fast.ops import ImaginedRollout
from pwm_fast.ops.extend import discounted_return
from tests.models.builders import ACTION, SlowModel, normal, randomize_, same, simplex, small_model

HORIZON, BATCH = 4, 3
CASES = {
    "mlp": {"kind": "mlp"},
    "flow": {"kind": "flow"},
    "scalar reward": {"kind": "flow", "num_bins": 1},
    "terminating": {"kind": "flow", "can_terminate": True},
    "task": {"kind": "mlp", "task_dim": 3, "num_tasks": 4, "can_terminate": True},
}


def make_actor() -> GaussianActor:
    actor = GaussianActor(16, ACTION, [12, 10]).double()
    randomize_(actor)
    return actor


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("detach", [True, False])
def test_rollout_equals_a_hand_written_loop(name: str, detach: bool) -> None:
    """Values of every field, and the gradient into the start and the policy."""
    case = dict(CASES[name])
    model = small_model(bool(case.pop("can_terminate", False)), **case)
    task = 2 if name == "task" else None
    numbers = None if task is None else torch.full((BATCH,), task)
    actor, slow = make_actor(), SlowModel(model, task)
    z0 = simplex(BATCH, 16).requires_grad_()
    noise = normal(HORIZON, BATCH, ACTION)
    rollout = imagine(model, actor, z0, noise, detach=detach, task=numbers)

    z, zs, actions, rewards, continues = z0, [z0], [], [], []
    for t in range(HORIZON):
        a = actor(z.detach() if detach else z, noise[t])
        logits = slow.reward(z, a)
        rewards.append(
            logits[:, 0] if model.config.num_bins == 1 else ops.two_hot_decode(logits, -10.0, 10.0)
        )
        if model._termination is not None:
            continues.append(1 - 1 / (1 + torch.exp(-slow.termination(z, a))))
        z = slow.next(z, a)
        zs.append(z)
        actions.append(a)
    same(rollout.z, torch.stack(zs))
    same(rollout.action, torch.stack(actions))
    same(rollout.reward, torch.stack(rewards))
    assert rollout.z.shape == (HORIZON + 1, BATCH, 16)
    outputs = [(rollout.z[-1], zs[-1]), (rollout.reward.sum(0), torch.stack(rewards).sum(0))]
    if continues:
        assert rollout.continues is not None
        same(rollout.continues, torch.stack(continues))
        outputs.append((rollout.continues, torch.stack(continues)))
    else:
        assert rollout.continues is None
    inputs = [z0, *actor.parameters()]
    ours = torch.autograd.grad(sum(x.square().sum() for x, _ in outputs), inputs)  # type: ignore[arg-type]
    slow_grads = torch.autograd.grad(sum(y.square().sum() for _, y in outputs), inputs)  # type: ignore[arg-type]
    for g, expected in zip(ours, slow_grads, strict=True):
        same(g, expected, atol=1e-9)
        assert expected.abs().max() > 1e-6


def test_detach_cuts_the_policy_s_view_of_the_latents() -> None:
    """With dynamics that ignore z, the start reaches later actions through the policy alone."""
    model, actor = small_model(kind="mlp", num_bins=1), make_actor()
    with torch.no_grad():
        model._dynamics[0].weight[:, :16] = 0.0  # type: ignore[operator, union-attr, index]
    noise = normal(2, BATCH, ACTION)
    for detach in (True, False):
        z0 = simplex(BATCH, 16).requires_grad_()
        rollout = imagine(model, actor, z0, noise, detach=detach)
        (grad,) = torch.autograd.grad(rollout.z[-1].square().sum(), z0, allow_unused=True)
        if detach:
            assert grad is None or grad.eq(0).all()
        else:
            assert grad.abs().max() > 1e-8


@pytest.mark.parametrize("terminating", [True, False])
def test_discounted_return(terminating: bool) -> None:
    """``sum_t gamma^t prod_(s<t) c_s r_t + gamma^H prod_s c_s V``, written out."""
    gamma = 0.9
    reward, value = normal(HORIZON, BATCH), normal(BATCH)
    continues = torch.rand(HORIZON, BATCH, dtype=torch.float64) if terminating else None
    rollout = ImaginedRollout(
        normal(HORIZON + 1, BATCH, 8), normal(HORIZON, BATCH, 2), reward, continues
    )
    ours = discounted_return(rollout.reward, value, gamma, rollout.continues)
    for b in range(BATCH):
        expected, alive = 0.0, 1.0
        for t in range(HORIZON):
            expected += gamma**t * alive * reward[t, b].item()
            if continues is not None:
                alive *= continues[t, b].item()
        expected += gamma**HORIZON * alive * value[b].item()
        assert ours[b].item() == pytest.approx(expected, rel=1e-12)


def test_frozen_restores_what_it_found() -> None:
    """Also after an error, and a parameter that was frozen before stays so."""
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    second.bias.requires_grad_(False)

    def flags() -> list[bool]:
        return [p.requires_grad for m in (first, second) for p in m.parameters()]

    before = flags()
    with frozen(first, second):
        assert flags() == [False] * 4
        x = torch.ones(1, 2, requires_grad=True)
        assert second(first(x)).requires_grad
        assert not second(first(x.detach())).requires_grad
    assert flags() == before == [True, True, True, False]
    with pytest.raises(RuntimeError, match="inside"), frozen(first, second):
        raise RuntimeError("inside")
    assert flags() == before


def test_no_parameter_gradient_is_computed_inside_frozen() -> None:
    """The graph of a frozen model holds no parameter: nothing of it is saved for them."""
    model, actor = small_model(kind="flow"), make_actor()
    with frozen(model):
        rollout = imagine(model, actor, simplex(BATCH, 16), normal(2, BATCH, ACTION))
    leaves, todo = set(), [rollout.reward.sum().grad_fn, rollout.z.sum().grad_fn]
    seen = set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if isinstance(variable, Tensor):
            leaves.add(id(variable))
        todo += [n for n, _ in node.next_functions]
    assert leaves == {id(p) for p in actor.parameters()}


def test_symlog_rewards_are_the_expected_bin_centres() -> None:
    """Without symexp the reward is the plain expectation over the centres."""
    model, actor = small_model(kind="flow"), make_actor()
    randomize_(model)
    z, noise = simplex(BATCH, 16), normal(HORIZON, BATCH, ACTION)
    plain = imagine(model, actor, z, noise)
    symlog = imagine(model, actor, z, noise, symlog_rewards=True)
    logits = model.reward(plain.z[:-1], plain.action)
    config = model.config
    centres = torch.linspace(config.vmin, config.vmax, config.num_bins, dtype=logits.dtype)
    same(symlog.reward, (logits.softmax(-1) * centres).sum(-1))
    same(plain.reward, ops.symexp(symlog.reward))
