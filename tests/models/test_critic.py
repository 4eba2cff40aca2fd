"""The critic ensemble against a loop over single critics with the same parameters."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pwm_fast.models import Critic, CriticEnsemble
from tests.models.builders import normal, randomize_, same


def ensemble_and_members(
    members: int = 3, units: tuple[int, ...] = (12, 10)
) -> tuple[CriticEnsemble, list[Critic]]:
    """Random parameters, shared by name: ``params.i`` stacks the i-th parameter of each critic."""
    ensemble = CriticEnsemble(16, units, members).double()
    singles = [Critic(16, units).double() for _ in range(members)]
    for critic in singles:
        randomize_(critic)
    with torch.no_grad():
        for i, p in enumerate(ensemble.params):
            p.copy_(torch.stack([list(c.parameters())[i] for c in singles]))
    return ensemble, singles


def test_names() -> None:
    """``critic.{0,3,6}`` are Linear, ``critic.{2,5}`` LayerNorm; stacked they are ``params.i``."""
    critic = Critic(16)
    assert [n for n, _ in critic.named_parameters()] == [
        f"critic.{i}.{p}" for i in (0, 2, 3, 5, 6) for p in ("weight", "bias")
    ]
    assert [i for i, m in enumerate(critic.critic) if isinstance(m, nn.Linear)] == [0, 3, 6]
    assert [i for i, m in enumerate(critic.critic) if isinstance(m, nn.LayerNorm)] == [2, 5]
    ensemble = CriticEnsemble(16)
    assert list(ensemble.state_dict()) == [f"params.{i}" for i in range(10)]
    for stacked, single in zip(ensemble.parameters(), critic.parameters(), strict=True):
        assert stacked.shape == (3, *single.shape)


@pytest.mark.parametrize("members", [1, 3])
@pytest.mark.parametrize("units", [(12, 10), (7,), ()])
def test_equals_a_loop_over_critics(members: int, units: tuple[int, ...]) -> None:
    """Values, and gradients of every parameter and of the input."""
    ensemble, critics = ensemble_and_members(members, units)
    z = normal(6, 16).requires_grad_()
    weight = normal(members, 6)
    values = ensemble(z)
    expected = torch.stack([c(z) for c in critics])
    same(values, expected)
    (grad_z,) = torch.autograd.grad((values * weight).sum(), z, retain_graph=True)
    (slow_grad_z,) = torch.autograd.grad((expected * weight).sum(), z, retain_graph=True)
    same(grad_z, slow_grad_z)
    ours = torch.autograd.grad((values * weight).sum(), list(ensemble.parameters()))
    for i, g in enumerate(ours):
        for e, critic in enumerate(critics):
            p = list(critic.parameters())[i]
            (single,) = torch.autograd.grad((expected * weight).sum(), p, retain_graph=True)
            same(g[e], single, msg=f"params.{i}, member {e}")


def test_critic_is_linear_mish_layernorm() -> None:
    """A member against the formula."""
    critic = Critic(16, [12, 10]).double()
    randomize_(critic)
    p, z = dict(critic.named_parameters()), normal(5, 16)
    h = z
    for i in (0, 3):
        h = h @ p[f"critic.{i}.weight"].T + p[f"critic.{i}.bias"]
        h = h * torch.tanh(torch.log1p(torch.exp(h)))
        h = h - h.mean(-1, keepdim=True)
        h = h / ((h**2).mean(-1, keepdim=True) + 1e-5).sqrt()
        h = h * p[f"critic.{i + 2}.weight"] + p[f"critic.{i + 2}.bias"]
    same(critic(z), (h @ p["critic.6.weight"].T + p["critic.6.bias"])[:, 0])


@pytest.mark.parametrize("lead", [(), (0,), (1,), (4, 3), (2, 0)])
def test_leading_shapes(lead: tuple[int, ...]) -> None:
    """One latent, empty batches, time x batch: the same values as row by row."""
    ensemble, _ = ensemble_and_members()
    z = normal(*lead, 16)
    values = ensemble(z)
    assert values.shape == (3, *lead)
    assert ensemble.minimum(z).shape == lead
    rows = z.reshape(-1, 16)
    for i, row in enumerate(rows):
        same(values.reshape(3, -1)[:, i], ensemble(row))


def test_minimum() -> None:
    """The least member's value; its gradient reaches that member alone."""
    ensemble, critics = ensemble_and_members()
    z = normal(50, 16)
    values = torch.stack([c(z) for c in critics])
    same(ensemble.minimum(z), values.min(0).values)
    assert len(values.argmin(0).unique()) > 1
    chosen = int(values[:, 0].argmin())
    grads = torch.autograd.grad(ensemble.minimum(z[0]), list(ensemble.parameters()))
    for g in grads:
        for e in range(3):
            assert (g[e].abs().max() > 0) == (e == chosen)


def test_initialisation() -> None:
    """Orthogonal weights of gain sqrt(2), zero biases, another draw for every member."""
    ensemble = CriticEnsemble(16, [12, 10])
    weights = [p for p in ensemble.params if p.dim() == 3]
    assert len(weights) == 3
    for w in weights:
        for member in w.double():
            gram = member @ member.T
            same(gram, 2.0 * torch.eye(len(gram), dtype=torch.float64), atol=1e-5)
        assert not torch.equal(w[0], w[1])
    params = list(ensemble.params)
    for i in (1, 3, 5, 7, 9):
        assert params[i].eq(0).all()
    for i in (2, 6):
        assert params[i].eq(1).all()


def test_state_dict_round_trip() -> None:
    (ensemble, _), (other, _) = ensemble_and_members(), ensemble_and_members()
    z = normal(4, 16)
    assert not torch.equal(ensemble(z), other(z))
    other.load_state_dict(ensemble.state_dict())
    assert torch.equal(ensemble(z), other(z))


@pytest.mark.parametrize("gain", [1.0, 8.0])
def test_input_gain(gain: float) -> None:
    """Only the first layer's initial weights carry it: orthogonal rows of norm gain * sqrt(2)."""
    first, second = (CriticEnsemble(16, (12, 10), input_gain=gain).params[i] for i in (0, 4))
    for weight, norm in ((first, gain * 2.0**0.5), (second, 2.0**0.5)):
        assert torch.allclose(weight.norm(dim=-1), torch.full(weight.shape[:2], norm))
