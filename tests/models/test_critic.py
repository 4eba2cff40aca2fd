"""Ensembles of values and Q functions against loops over their members' parameters."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pwm_fast import ops
from pwm_fast.models import Critic, CriticEnsemble, QEnsemble, make_critic
from tests.helpers import assert_2x
from tests.models.builders import compose, normal, randomize_, same


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


def test_critics_of_tasks() -> None:
    """Members see the embedding behind the latent."""
    ensemble, critics = ensemble_and_members()
    own = CriticEnsemble(14, (12, 10), 3, task_dim=2).double()
    own.load_state_dict(ensemble.state_dict())
    z, task = normal(6, 14), normal(6, 2)
    expected = torch.stack([c(torch.cat([z, task], -1)) for c in critics])
    same(own(z, task=task), expected)
    same(own.values(z, None, task), expected)
    same(own.minimum(z, task=task), expected.amin(0))
    with pytest.raises(ValueError, match="task must be given to value functions that take it"):
        own(z)
    known = own.ensemble(scale=0.5)
    assert (known.reduce, known.scale, known.on_action, known.task_input) == (
        "min",
        0.5,
        False,
        True,
    )
    x = normal(6, 16)
    assert torch.equal(ensemble(x, task=task), ensemble(x))  # these have no input for it


# --- Q functions ----------------------------------------------------------------------------------

BINS, A, TASK = 11, 3, 2


def q_functions(members: int = 5, task_dim: int = TASK, bins: int = BINS) -> QEnsemble:
    found = QEnsemble(16, A, (12, 10), members, bins, -3.0, 4.0, task_dim).double()
    randomize_(found)
    return found


def by_hand(q: QEnsemble, x: Tensor) -> Tensor:
    """Logits ``[E, ..., bins]``: each member's Linear, LayerNorm, Mish, by the stored order."""
    params, found = [p for _, p in q.named_parameters()], []
    for e in range(q.members):
        p, h = [x[e] for x in params], x
        for i in (0, 4):
            h = h @ p[i].T + p[i + 1]
            h = h - h.mean(-1, keepdim=True)
            h = h / ((h**2).mean(-1, keepdim=True) + 1e-5).sqrt() * p[i + 2] + p[i + 3]
            h = h * torch.tanh(torch.log1p(torch.exp(h)))
        found.append(h @ p[8].T + p[9])
    return torch.stack(found)


def decoded(logits: Tensor) -> Tensor:
    value = torch.softmax(logits, -1) @ torch.linspace(-3.0, 4.0, BINS, dtype=logits.dtype)
    return value.sign() * value.abs().expm1()


def test_names_of_q_functions() -> None:
    """As TD-MPC2's stacked files: weight, bias, ln.weight, ln.bias of each layer, then the last."""
    q = QEnsemble(16, A, (12, 10), 5, BINS, task_dim=TASK)
    shapes = [(12, 21), (12,), (12,), (12,), (10, 12), (10,), (10,), (10,), (BINS, 10), (BINS,)]
    assert [p.shape for p in q.params] == [(5, *shape) for shape in shapes]
    assert list(q.state_dict()) == [f"params.{i}" for i in range(10)]
    assert not q.params[8].any() and not q.params[1].any() and q.params[2].eq(1).all()
    assert 0.015 < q.params[0].std() < 0.025 and not torch.equal(q.params[0][0], q.params[0][1])
    assert QEnsemble(16, A).params[8].shape == (5, 101, 512)


@pytest.mark.parametrize("members", [1, 2, 5])
@pytest.mark.parametrize("task_dim", [0, TASK])
def test_q_functions_equal_a_loop(members: int, task_dim: int) -> None:
    """Logits, values, least ones; gradients of everything."""
    q = q_functions(members, task_dim)
    z, a = normal(6, 16).requires_grad_(), normal(6, A).requires_grad_()
    task = normal(6, task_dim).requires_grad_() if task_dim else None
    parts = [z, a] if task is None else [z, task, a]
    expected = by_hand(q, torch.cat(parts, -1))
    same(q(z, a, task), expected, rtol=1e-11)
    same(q.values(z, a, task), decoded(expected))
    same(q.minimum(z, a, task), decoded(expected).amin(0))
    weight = normal(members, 6)
    inputs = [*parts, *q.parameters()]
    ours = torch.autograd.grad((q.values(z, a, task) * weight).sum(), inputs)
    slow = torch.autograd.grad((decoded(expected) * weight).sum(), inputs)
    for g, wanted in zip(ours, slow, strict=True):
        same(g, wanted)
    single, double = q_functions(members, task_dim).float(), [x.detach().float() for x in parts]
    single.load_state_dict(q.state_dict())
    found = single(double[0], double[-1], double[1] if task_dim else None)
    q.load_state_dict(single.state_dict())
    x = torch.cat(double, -1)
    assert_2x(found, by_hand(single, x), by_hand(q, x.double()), "logits")


def test_the_mean_of_two() -> None:
    """Of two that differ, every pair now and then; of an ensemble of two, of both."""
    q, z, a, task = q_functions(4), normal(6, 16), normal(6, A), normal(6, TASK)
    each = q.values(z, a, task)
    pairs = {(i, j): (each[i] + each[j]) / 2 for i in range(4) for j in range(i)}
    seen = set()
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        found = q.mean_of_two(z, a, task, generator=generator)
        (pair,) = [k for k, mean in pairs.items() if torch.allclose(found, mean, rtol=1e-9)]
        seen.add(pair)
    assert seen == set(pairs)
    q = q_functions(2)
    same(q.mean_of_two(z, a, task), q.values(z, a, task).mean(0))


@pytest.mark.parametrize("lead", [(), (0,), (1,), (4, 3)])
def test_leading_shapes_of_q_functions(lead: tuple[int, ...]) -> None:
    q, z, a, task = q_functions(), normal(*lead, 16), normal(*lead, A), normal(*lead, TASK)
    assert q(z, a, task).shape == (5, *lead, BINS)
    assert q.values(z, a, task).shape == (5, *lead)
    assert q.minimum(z, a, task).shape == q.mean_of_two(z, a, task).shape == lead


def test_scalar_q_functions() -> None:
    q, z, a = q_functions(bins=1, task_dim=0), normal(6, 16), normal(6, A)
    same(q.values(z, a), by_hand(q, torch.cat([z, a], -1))[..., 0])


def test_q_functions_in_a_plan() -> None:
    """A plan of one step without a reward is worth what the pair of members says there."""
    q, z, task = q_functions(3), normal(4, 16), normal(4, TASK)
    known = q.ensemble(scale=0.7)
    assert known.reduce == "two" and known.on_action and known.draws_members
    policy = ops.Policy([ops.Layer(normal(A, 16))], torch.zeros(A, dtype=torch.float64))
    step = ops.Layer(normal(16, 16 + TASK + A) * 0.1)
    options = ops.MPPI(1, 1, samples=5, elites=5, policy_trajectories=0)
    noise = ops.PlanNoise.draw(4, A, options, known, dtype=torch.float64)
    plan = ops.plan(
        z, policy, ops.LatentMLP([step]), ops.Heads([ops.Layer(torch.zeros_like(step.weight[:1]))]),
        values=known, options=options, noise=noise, task=task, gamma=0.5,
    )  # fmt: skip
    x = torch.cat([z[:, None].expand(-1, 5, -1), task[:, None].expand(-1, 5, -1),
                   plan.trajectories[0]], -1)  # fmt: skip
    end = x @ step.weight.T
    last = torch.tanh(end @ policy.layers[0].weight.T)
    pair = q.values(end, last, x[..., 16 : 16 + TASK])[noise.members[0]]  # type: ignore[index]
    same(plan.value, 0.5 * 0.7 * pair.mean(0), rtol=1e-9)


def test_actions_that_are_missing() -> None:
    with pytest.raises(ValueError, match="a must be given to value functions that take it"):
        q_functions().values(normal(6, 16), task=normal(6, TASK))


def test_value_functions_by_configuration() -> None:
    tiny = compose("alg=pwm_tiny").alg
    plain = make_critic(16, A, tiny)
    assert isinstance(plain, CriticEnsemble) and plain.members == tiny.critic.members
    config = compose(
        "alg=pwm_tiny", "alg.critic.kind=tdmpc2", "alg.critic.members=5", "alg.critic.units=[9]"
    ).alg
    q = make_critic(16, A, config)
    assert isinstance(q, QEnsemble) and q.params[4].shape == (5, config.world_model.num_bins, 9)
    config.critic.task_input = True
    with pytest.raises(ValueError, match=r"alg.critic.task_input must be false or null where"):
        make_critic(16, A, config)
