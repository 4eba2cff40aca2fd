"""The Gaussian policy: order of its layers, names, standard deviation, actions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from pwm_fast.models import GaussianActor
from tests.models.builders import normal, randomize_, same


def by_hand(actor: GaussianActor, z: Tensor) -> Tensor:
    """``mu`` of a policy with three hidden layers: Linear, Mish, LayerNorm, by published names."""
    p = dict(actor.named_parameters())
    for i in (0, 3, 6):
        h = z @ p[f"mu_net.{i}.weight"].T + p[f"mu_net.{i}.bias"]
        h = h * torch.tanh(torch.log1p(torch.exp(h)))
        h = h - h.mean(-1, keepdim=True)
        h = h / ((h**2).mean(-1, keepdim=True) + 1e-5).sqrt()
        z = h * p[f"mu_net.{i + 2}.weight"] + p[f"mu_net.{i + 2}.bias"]
    return z @ p["mu_net.9.weight"].T + p["mu_net.9.bias"]


def make(seed_scale: float = 1.0) -> GaussianActor:
    actor = GaussianActor(16, 3, [12, 10, 9]).double()
    randomize_(actor, seed_scale)
    return actor


def test_names_and_types() -> None:
    """``mu_net.{0,3,6,9}`` Linear, ``mu_net.{2,5,8}`` LayerNorm, ``logstd``: the published keys."""
    actor = GaussianActor(16, 3)
    names = {f"mu_net.{i}.{p}" for i in (0, 2, 3, 5, 6, 8, 9) for p in ("weight", "bias")}
    assert set(actor.state_dict()) == names | {"logstd"}
    kinds = {i: type(m) for i, m in enumerate(actor.mu_net) if isinstance(m, nn.Linear)}
    assert list(kinds) == [0, 3, 6, 9]
    norms = [i for i, m in enumerate(actor.mu_net) if isinstance(m, nn.LayerNorm)]
    assert norms == [2, 5, 8]
    widths = [actor.mu_net[i].out_features for i in (0, 3, 6, 9)]
    assert widths == [400, 200, 100, 3]


def test_value_is_linear_mish_layernorm() -> None:
    """Against the formula; a LayerNorm before the Mish would give something else."""
    actor, z, noise = make(), normal(5, 16), normal(5, 3)
    mu = by_hand(actor, z)
    same(actor(z), torch.tanh(mu))
    same(actor(z, noise), torch.tanh(mu + actor.std() * noise))
    same(actor(z[0], noise[0]), actor(z, noise)[0])
    same(actor(z.reshape(5, 1, 16)), actor(z).reshape(5, 1, 3))


def test_gradients_agree_with_the_formula() -> None:
    actor, z, noise = make(), normal(5, 16).requires_grad_(), normal(5, 3)
    params = [z, *actor.parameters()]
    std = actor.logstd.clamp_min(-1.427).exp()
    ours = torch.autograd.grad(actor(z, noise).square().sum(), params)
    slow = torch.tanh(by_hand(actor, z) + std * noise).square().sum()
    for g, expected in zip(ours, torch.autograd.grad(slow, params), strict=True):
        same(g, expected)


def test_std_starts_at_exp_minus_1_and_stays_above_its_bound() -> None:
    actor = GaussianActor(16, 3)
    same(actor.std(), torch.full((3,), math.exp(-1.0)), rtol=1e-6)
    with torch.no_grad():
        actor.logstd.copy_(torch.tensor([-5.0, -1.427, 0.5]))
    expected = torch.tensor([math.exp(-1.427), math.exp(-1.427), math.exp(0.5)])
    same(actor.std(), expected, rtol=1e-6)
    same(actor(torch.zeros(3, 16), torch.eye(3)).atanh().diagonal(), expected, rtol=1e-5)


def test_entropy_of_drawn_actions() -> None:
    """``-log pi(a|z)`` of the squashed Gaussian; finite at the bounds, gradient included."""
    actor, z, noise = make(), normal(500, 16), normal(500, 3)
    action = actor(z, noise)
    base = torch.distributions.Normal(actor(z).atanh(), actor.std())
    squashed = torch.distributions.TransformedDistribution(
        base, torch.distributions.TanhTransform(cache_size=1)
    )
    inside = (action.abs() < 0.99).all(-1)
    assert inside.sum() > 100
    expected = -squashed.log_prob(action).sum(-1)
    same(actor.entropy(action, noise)[inside], expected[inside], rtol=1e-3, atol=1e-4)
    actor, far = make(30.0).float(), 10.0 * normal(500, 16).float()
    noise = noise.float()
    action = actor(far, noise)
    assert (action.abs() == 1.0).any()
    found = actor.entropy(action, noise)
    grads = torch.autograd.grad(found.sum(), list(actor.parameters()))
    assert torch.isfinite(found).all() and all(torch.isfinite(g).all() for g in grads)


def test_actions_lie_within_bounds_and_noise_0_is_deterministic() -> None:
    actor, z = make(3.0), normal(40, 16)
    sampled = actor(z, 5.0 * normal(40, 3))
    assert sampled.abs().max() <= 1.0
    assert sampled.abs().max() > 0.9
    assert torch.equal(actor(z), actor(z))
    same(actor(z), actor(z, torch.zeros(40, 3, dtype=torch.float64)))


@pytest.mark.parametrize("batch", [0, 1])
def test_small_batches(batch: int) -> None:
    assert make()(normal(batch, 16), normal(batch, 3)).shape == (batch, 3)


def test_state_dict_round_trip() -> None:
    actor, other, z = make(), make(), normal(4, 16)
    assert not torch.equal(actor(z), other(z))
    other.load_state_dict(actor.state_dict())
    assert torch.equal(actor(z), other(z))


@pytest.mark.parametrize("gain", [1.0, 8.0])
def test_input_gain(gain: float) -> None:
    """Only the first layer's initial weights carry it: orthogonal rows of norm ``gain``."""
    net = GaussianActor(16, 2, [12, 10], input_gain=gain).mu_net
    assert torch.allclose(net[0].weight.norm(dim=-1), torch.full((12,), gain))
    assert torch.allclose(net[3].weight.norm(dim=-1), torch.ones(10))
