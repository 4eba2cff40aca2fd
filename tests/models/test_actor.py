"""The Gaussian policies: order of their layers, names, standard deviations, actions, densities."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from pwm_fast import ops
from pwm_fast.models import Actor, GaussianActor, TDMPC2Actor, make_actor
from tests.helpers import assert_2x
from tests.models.builders import compose, normal, randomize_, same


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


# --- TD-MPC2's, and what both kinds share ---------------------------------------------------------

TASK = 2  # width of embeddings
LOW, HIGH = -3.0, 1.0


def tdmpc2(task_dim: int = 0, action_dim: int = 3) -> TDMPC2Actor:
    actor = TDMPC2Actor(16, action_dim, [12, 10], LOW, HIGH, task_dim).double()
    randomize_(actor)
    return actor


def published(
    actor: TDMPC2Actor, z: Tensor, eps: Tensor, task: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean action, drawn action and log standard deviation as TD-MPC2 has them, masked there."""
    p = dict(actor.named_parameters())
    x = z if task is None else torch.cat([z, task], -1)
    for i in (0, 1):
        h = x @ p[f"_pi.{i}.weight"].T + p[f"_pi.{i}.bias"]
        h = h - h.mean(-1, keepdim=True)
        h = h / ((h**2).mean(-1, keepdim=True) + 1e-5).sqrt()
        h = h * p[f"_pi.{i}.ln.weight"] + p[f"_pi.{i}.ln.bias"]
        x = h * torch.tanh(torch.log1p(torch.exp(h)))
    out = x @ p["_pi.2.weight"].T + p["_pi.2.bias"]
    mu, raw = out[..., : out.shape[-1] // 2], out[..., out.shape[-1] // 2 :]
    log_std = LOW + 0.5 * (HIGH - LOW) * (torch.tanh(raw) + 1)
    if mask is not None:
        mu, log_std, eps = mu * mask, log_std * mask, eps * mask
    return torch.tanh(mu), torch.tanh(mu + eps * log_std.exp()), log_std


def test_names_of_tdmpc2() -> None:
    actor = TDMPC2Actor(16, 3, [12, 10], task_dim=TASK)
    hidden = {f"_pi.{i}.{p}" for i in (0, 1) for p in ("weight", "bias", "ln.weight", "ln.bias")}
    assert set(actor.state_dict()) == hidden | {"_pi.2.weight", "_pi.2.bias"}
    assert actor._pi[0].weight.shape == (12, 18) and actor._pi[2].weight.shape == (6, 10)
    assert actor._pi[0].weight.abs().max() < 0.1 and not actor._pi[2].bias.any()
    same(actor.std(torch.zeros(1, 16), torch.zeros(1, TASK)).log().mean(), torch.tensor(-4.0),
         rtol=0.05)  # fmt: skip
    assert (TDMPC2Actor(16, 3).min_logstd, TDMPC2Actor(16, 3).max_logstd) == (-10.0, 2.0)


@pytest.mark.parametrize("task_dim", [0, TASK])
@pytest.mark.parametrize("masked", [False, True])
def test_actions_of_tdmpc2(task_dim: int, masked: bool) -> None:
    """Values and all gradients against the published order of things."""
    actor, z, noise = tdmpc2(task_dim), normal(5, 16).requires_grad_(), normal(5, 3)
    task = normal(5, task_dim).requires_grad_() if task_dim else None
    mask = torch.tensor([[1, 1, 0], [0, 1, 0], [1, 1, 1], [0, 0, 0], [1, 0, 1]]) > 0
    given = mask if masked else None
    mean, action, log_std = published(actor, z, noise, task, given)
    same(actor(z, None, task, given), mean, rtol=1e-12)
    found = actor(z, noise, task, given)
    same(found, action, rtol=1e-12)
    std = actor.std(z, task)
    same(std if given is None else torch.where(mask, std, 1.0), log_std.exp(), rtol=1e-12)
    same(actor(z[0], noise[0], None if task is None else task[0]),
         published(actor, z[0], noise[0], None if task is None else task[0], None)[1])  # fmt: skip
    if given is not None:
        same(actor(z, noise, task, mask.double()), found, rtol=0, atol=0)
    inputs = [z, *([] if task is None else [task]), *actor.parameters()]
    ours = torch.autograd.grad((found.square() + std).sum(), inputs)
    slow = action.square() + published(actor, z, noise, task, None)[2].exp()
    for g, expected in zip(ours, torch.autograd.grad(slow.sum(), inputs), strict=True):
        same(g, expected)


@pytest.mark.parametrize("masked", [False, True])
def test_actions_of_tdmpc2_in_float32(masked: bool) -> None:
    actor, z, noise, task = (
        x.float() for x in (tdmpc2(TASK), *map(normal, (199,) * 3, (16, 3, 2)))
    )
    mask = (torch.rand(199, 3) < 0.5).float() if masked else None
    plain = published(actor, z, noise, task, mask)[1]
    ours = actor(z, noise, task, mask)
    double = (x if x is None else x.double() for x in (z, noise, task, mask))
    assert_2x(ours, plain, published(actor.double(), *double)[1])


@pytest.mark.parametrize("lead", [(), (0,), (1,), (4, 3)])
def test_leading_shapes_of_tdmpc2(lead: tuple[int, ...]) -> None:
    actor, z, task = tdmpc2(TASK), normal(*lead, 16), normal(*lead, TASK)
    noise = normal(*lead, 3)
    assert actor(z, noise, task).shape == (*lead, 3)
    assert actor.entropy(noise.tanh(), noise, z, task).shape == lead


@pytest.mark.parametrize("kind", ["pwm", "tdmpc2"])
@pytest.mark.parametrize("masked", [False, True])
def test_entropies_against_torch_distributions(kind: str, masked: bool) -> None:
    """``1e-6`` beside ``1 - a^2`` adds exactly ``log1p(1e-6 / (1 - a^2))`` a component."""
    actor: Actor = tdmpc2(TASK) if kind == "tdmpc2" else GaussianActor(16, 3, [12], task_dim=TASK)
    randomize_(actor.double())
    z, task, noise = normal(400, 16), normal(400, TASK), normal(400, 3)
    mask = torch.rand(400, 3) < 0.6 if masked else None
    action = actor(z, noise, task)
    base = torch.distributions.Normal(actor(z, None, task).atanh(), actor.std(z, task))
    squashed = torch.distributions.TransformedDistribution(
        base, torch.distributions.TanhTransform(cache_size=0)
    )
    inside = (action.abs() < 0.999).all(-1)
    assert inside.sum() > 100
    each = -squashed.log_prob(action) + torch.log1p(1e-6 / (1 - action.square()))
    expected = (each if mask is None else torch.where(mask, each, 0.0)).sum(-1)
    found = actor.entropy(action if mask is None else action * mask, noise, z, task, mask)
    same(found[inside], expected[inside], rtol=1e-8, atol=1e-8)  # of the inverse tanh


@pytest.mark.parametrize("kind", ["pwm", "tdmpc2"])
def test_densities_integrate_to_probabilities(kind: str) -> None:
    """Of an action of one component in an interval, against how often it is drawn there."""
    actor = tdmpc2(action_dim=1) if kind == "tdmpc2" else GaussianActor(16, 1, [12]).double()
    randomize_(actor, 0.5)
    for z in normal(5, 16):
        mu, std = actor(z).atanh(), actor.std(z)
        for low, high in ((-0.9, -0.2), (-0.5, 0.6), (0.3, 0.95)):
            a = torch.linspace(low, high, 20001, dtype=torch.float64)[:, None]
            noise = (a.atanh() - mu) / std
            density = torch.exp(-actor.entropy(a, noise, z.expand(len(a), -1)))
            ends = torch.tensor([low, high], dtype=torch.float64).atanh()
            cdf = torch.distributions.Normal(mu, std).cdf(ends)
            same(torch.trapezoid(density, a[:, 0]), cdf[1] - cdf[0], rtol=2e-5, atol=2e-6)


def test_entropy_at_the_bounds() -> None:
    """Finite, and so are its gradients."""
    actor, far = tdmpc2().float(), 50.0 * normal(200, 16).float()
    noise = 20.0 * normal(200, 3).float()
    action = actor(far, noise)
    assert (action.abs() == 1.0).any()
    found = actor.entropy(action, noise, far)
    grads = torch.autograd.grad(found.sum(), list(actor.parameters()))
    assert found.isfinite().all() and all(g.isfinite().all() for g in grads)


def test_gaussian_actors_of_tasks() -> None:
    """The embedding stands behind the latent; masks leave out components."""
    actor = GaussianActor(14, 3, [12, 10, 9], task_dim=2).double()
    randomize_(actor)
    z, task, noise = normal(5, 14), normal(5, 2), normal(5, 3)
    mask = torch.rand(5, 3) < 0.5
    mu = by_hand(actor, torch.cat([z, task], -1))
    same(actor(z, None, task), torch.tanh(mu))
    same(actor(z, noise, task, mask), mask * torch.tanh(mu + actor.std() * noise))
    handle = actor.mu_net[0].register_forward_hook(lambda *_: None)  # its modules run themselves
    same(actor(z, None, task), torch.tanh(mu))
    handle.remove()


@pytest.mark.parametrize("kind", ["pwm", "tdmpc2"])
@pytest.mark.parametrize("task_dim", [0, TASK])
def test_policies_act_as_their_modules(kind: str, task_dim: int) -> None:
    """In an imagined rollout each action is the module's in that latent."""
    actor: Actor = tdmpc2(task_dim)
    if kind == "pwm":
        actor = GaussianActor(16, 3, [12], task_dim=task_dim).double()
        randomize_(actor)
    z, noise, mask = normal(5, 16), normal(2, 5, 3), torch.rand(5, 3) < 0.7
    task = normal(5, TASK)  # the world model's; an actor without an input for it leaves it alone
    step = ops.Layer(normal(16, 21), normal(16))
    out = ops.imagine(
        z, actor.policy(), ops.LatentMLP([step]), ops.Heads([ops.Layer(normal(1, 21))]),
        noise=noise, task=task, action_mask=mask,
    )  # fmt: skip
    for t in range(2):
        same(out.action[t], actor(out.z[t], noise[t], task, mask))
    whole = actor(out.z[:-1], noise, task.expand(2, -1, -1), mask)
    same(out.action, whole)


def test_what_a_policy_would_skip() -> None:
    actor = tdmpc2()
    handle = actor._pi[0].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"layer 0 \(NormedLinear\) has hooks"):
        actor.policy()
    handle.remove()
    handle = actor.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="TDMPC2Actor has hooks"):
        actor.policy()


def test_what_is_missing() -> None:
    for actor in (tdmpc2(TASK), GaussianActor(16, 3, task_dim=TASK).double()):
        with pytest.raises(ValueError, match="needs task embeddings, got task=None"):
            actor(normal(5, 16))
    with pytest.raises(ValueError, match="z must be latents, which the standard deviation"):
        tdmpc2().std()


def test_actors_by_configuration() -> None:
    """``kind``, and embeddings where there are several tasks or they are asked for."""
    tiny = ("alg=pwm_tiny", "alg.actor.units=[12,10]")
    plain = make_actor(16, 3, compose(*tiny).alg)
    assert isinstance(plain, GaussianActor) and plain.task_dim == 0
    own = make_actor(16, 3, compose(*tiny, "alg.actor.kind=tdmpc2", "alg.actor.min_logstd=-10").alg)
    assert isinstance(own, TDMPC2Actor) and (own.min_logstd, own.max_logstd) == (-10.0, 2.0)
    assert [m.weight.shape for m in own._pi] == [(12, 16), (10, 12), (6, 10)]
    config = compose(*tiny, "alg.world_model.task_dim=4").alg
    assert make_actor(16, 3, config).task_dim == 0
    config.world_model.num_tasks = 2
    assert make_actor(16, 3, config).task_dim == 4
    config.actor.task_input = False
    assert make_actor(16, 3, config).task_dim == 0
    config = compose(*tiny, "alg.actor.task_input=true").alg
    with pytest.raises(ValueError, match=r"alg.actor.task_input must be false or null where"):
        make_actor(16, 3, config)
