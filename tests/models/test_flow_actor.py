"""Flow policies as modules: names, values by formula, start, spread, and what is refused."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pwm_fast.config import ActorConfig, AlgConfig, ConfigError, WorldModelConfig
from pwm_fast.models import FlowActor, make_actor
from tests.models.builders import normal, randomize_, same

D, A, E = 16, 3, 2
KINDS: dict[str, dict[str, Any]] = {
    "ode": {"substeps": 3},
    "heun": {"substeps": 2, "integrator": "heun"},
    "act_norm": {"substeps": 2, "order": "act_norm"},
    "gated": {"form": "gated", "substeps": 3},
    "meanflow": {"form": "meanflow", "substeps": 1},
    "meanflow of two steps": {"form": "meanflow", "substeps": 2},
    "task": {"task_dim": E},
    "meanflow, task": {"form": "meanflow", "substeps": 1, "task_dim": E},
}


def make(**changes: Any) -> FlowActor:
    actor = FlowActor(D, A, [12, 10], **changes).double()
    randomize_(actor)
    with torch.no_grad():
        actor.init_logstd.fill_(-1.0)
    return actor


def by_hand(actor: FlowActor, z: Tensor, eps: Tensor, task: Tensor | None) -> Tensor:
    """From the parameters by their names alone."""
    p = dict(actor.named_parameters())

    def normed(h: Tensor, name: str) -> Tensor:
        return F.layer_norm(h, h.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"])

    def net(x: Tensor) -> Tensor:
        if actor.order == "act_norm":
            for i in (0, 3):
                h = x @ p[f"velocity_net.{i}.weight"].T + p[f"velocity_net.{i}.bias"]
                x = normed(F.mish(h), f"velocity_net.{i + 2}")
            return x @ p["velocity_net.6.weight"].T + p["velocity_net.6.bias"]
        for i in (0, 1):
            h = x @ p[f"velocity_net.{i}.weight"].T + p[f"velocity_net.{i}.bias"]
            x = F.mish(normed(h, f"velocity_net.{i}.ln"))
        return x @ p["velocity_net.2.weight"].T + p["velocity_net.2.bias"]

    def velocity(x: Tensor, tau: float) -> Tensor:
        inputs = [x, z, torch.full_like(x[:, :1], tau), *([] if task is None else [task])]
        if actor.form == "meanflow":
            inputs.append(torch.full_like(x[:, :1], 1.0 / actor.substeps))
        y = net(torch.cat(inputs, -1))
        return torch.sigmoid(y[:, A:]) * (y[:, :A] - x) if actor.form == "gated" else y

    x, dt = eps * p["init_logstd"].clamp(min=-1.427).exp(), 1.0 / actor.substeps
    for k in range(actor.substeps):
        slope = velocity(x, k * dt)
        if actor.integrator == "heun":
            slope = (slope + velocity(x + dt * slope, (k + 1) * dt)) / 2
        x = x + dt * slope
    return torch.tanh(x)


@pytest.mark.parametrize("kind", KINDS)
def test_actions_and_gradients(kind: str) -> None:
    actor = make(**KINDS[kind])
    z, eps = normal(5, D).requires_grad_(), normal(5, A)
    task = normal(5, E).requires_grad_() if actor.task_dim else None
    ours, slow = actor(z, eps, task), by_hand(actor, z, eps, task)
    same(ours, slow)
    same(actor(z, None, task), by_hand(actor, z, torch.zeros_like(eps), task))
    inputs = [z, *([] if task is None else [task]), *actor.parameters()]
    grads = (torch.autograd.grad(x.square().sum(), inputs) for x in (ours, slow))
    for g, expected in zip(*grads, strict=True):
        same(g, expected)
    assert actor(z[0], eps[0], None if task is None else task[0]).shape == (A,)
    more = None if task is None else task.expand(2, 5, E)
    same(actor(z.expand(2, 5, D), eps.expand(2, 5, A), more), ours.expand(2, 5, A))


@pytest.mark.parametrize("batch", [0, 1])
@pytest.mark.parametrize("kind", ["ode", "gated", "meanflow"])
def test_small_batches(kind: str, batch: int) -> None:
    assert make(**KINDS[kind])(normal(batch, D), normal(batch, A)).shape == (batch, A)


@pytest.mark.parametrize("kind", ["ode", "gated", "meanflow"])
def test_masks(kind: str) -> None:
    """A component that is left out is 0, and its noise moves nothing."""
    actor, z, eps = make(**KINDS[kind]), normal(5, D), normal(5, A)
    mask = torch.tensor([True, False, True])
    found = actor(z, eps, None, mask)
    assert not found[:, 1].any() and found[:, ::2].all()
    other = torch.where(mask, eps, 7.0)
    same(actor(z, other, None, mask), found, rtol=0, atol=0)
    assert not torch.equal(actor(z, other)[:, ::2], actor(z, eps)[:, ::2])


def test_modules_with_hooks_run_one_by_one() -> None:
    """And whole operations refuse them."""
    actor, z, eps = make(), normal(5, D), normal(5, A)
    expected, calls = actor(z, eps), []
    actor.velocity_net[1].register_forward_hook(lambda *_: calls.append(1))
    same(actor(z, eps), expected)
    assert len(calls) == 4
    with pytest.raises(ValueError, match="has hooks"):
        actor.policy()


# --- the start ------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["norm_act", "act_norm"])
def test_input_gain_is_on_latents_and_embeddings(order: str) -> None:
    torch.manual_seed(0)
    plain = FlowActor(D, A, [24], form="meanflow", order=order, task_dim=E)  # type: ignore[arg-type]
    torch.manual_seed(0)
    own = FlowActor(D, A, [24], form="meanflow", order=order, task_dim=E, input_gain=3.0)  # type: ignore[arg-type]
    factor = torch.ones(A + D + 1 + E + 1)
    factor[A : A + D] = factor[-1 - E : -1] = 3.0
    first, other = plain.velocity_net[0], own.velocity_net[0]
    assert isinstance(first, nn.Linear) and isinstance(other, nn.Linear)
    same(other.weight, first.weight * factor, rtol=1e-6)
    assert torch.allclose(first.weight.square().sum(0), torch.ones(23)), "orthogonal columns"


@pytest.mark.parametrize("substeps", [2, 4])
def test_an_open_gate_starts_close_to_its_candidate(substeps: int) -> None:
    """In closed form where the candidate looks at nothing: what of the noise is left."""
    actor = FlowActor(D, A, [12], form="gated", substeps=substeps)
    last = actor.velocity_net[-1]
    assert isinstance(last, nn.Linear)
    assert not last.weight[A:].any() and last.weight[:A].any()
    with torch.no_grad():
        last.weight[:A] = 0.0
    step = 1.0 - torch.sigmoid(torch.tensor(5.0)).item() / substeps
    eps = torch.randn(6, A)
    expected = torch.tanh(math.exp(-1.0) * step**substeps * eps)
    same(actor(torch.randn(6, D), eps), expected, rtol=1e-5, atol=1e-6)


def test_the_deviation_has_a_bound() -> None:
    actor = FlowActor(D, A)
    same(actor.std(), torch.full((A,), math.exp(-1.0)), rtol=1e-6)
    with torch.no_grad():
        actor.init_logstd.fill_(-9.0)
    same(actor.std(), torch.full((A,), math.exp(-1.427)), rtol=1e-6)


def test_unknown_initialisation() -> None:
    with pytest.raises(ValueError, match="init must be one of orthogonal, torch, got 'zeros'"):
        FlowActor(D, A, init="zeros")


# --- metrics, density, configuration --------------------------------------------------------------


def test_spread_is_the_deviation_of_what_a_flow_ends_in() -> None:
    """``x_1 = (1 + w) x_0`` with one Euler step, whose deviation is known."""
    torch.manual_seed(0)
    actor = FlowActor(D, 2, [], substeps=1).double()
    last = actor.velocity_net[0]
    assert isinstance(last, nn.Linear)
    with torch.no_grad():
        last.weight.zero_()
        last.weight[0, 0], last.weight[1, 1] = 1.0, -0.5
        actor.init_logstd.copy_(torch.tensor([0.0, 0.7]))
    expected = ((4.0 + 0.25 * math.exp(1.4)) / 2) ** 0.5
    found = actor.spread(normal(40_000, D))
    assert found.item() == pytest.approx(expected, rel=0.02) and not found.requires_grad


def test_the_density_is_not_known() -> None:
    with pytest.raises(NotImplementedError, match="density of a flow policy's actions is not"):
        make().entropy(normal(5, A), normal(5, A))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"entropy_coef": 0.02}, "alg.actor.entropy_coef must be 0 for a flow policy"),
        ({"form": "meanflow", "integrator": "heun"}, "alg.actor.integrator must be euler for form"),
        ({"form": "flow"}, "alg.actor.form must be one of ode, gated, meanflow, got 'flow'"),
        ({"substeps": 0}, "alg.actor.substeps must be"),
        ({"order": "x"}, "alg.actor.order must be one of norm_act, act_norm, got 'x'"),
    ],
)
def test_what_the_configuration_refuses(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        ActorConfig(kind="flow", **changes)


def test_made_as_configured() -> None:
    own = ActorConfig(
        kind="flow", units=[7], form="gated", integrator="heun", substeps=5, order="act_norm",
        init_logstd=0.5, min_logstd=0.1, input_gain=2.0, init="torch", task_input=True,
    )  # fmt: skip
    config = AlgConfig(actor=own, world_model=WorldModelConfig(task_dim=E))
    actor = make_actor(D, A, config)
    assert isinstance(actor, FlowActor)
    for key in ("form", "integrator", "substeps", "order", "min_logstd"):
        assert getattr(actor, key) == getattr(own, key)
    assert actor.task_dim == E and actor.init_logstd.eq(0.5).all()
    assert actor.velocity_net[0].weight.shape == (7, A + D + 1 + E)  # type: ignore[union-attr]
    other = dataclasses.replace(config, actor=dataclasses.replace(own, task_input=False))
    assert make_actor(D, A, other).task_dim == 0
