"""What has a weight of 0 is left out of values and gradients, be it NaN or infinite."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pwm_fast import ops
from pwm_fast.agent import losses
from pwm_fast.analysis.prediction import draw_windows
from pwm_fast.backends import select
from pwm_fast.config import ModelLearningConfig
from pwm_fast.ops.returns import discounted_return
from pwm_fast.replay import Episode

GAMMA = 0.9
BAD = (math.nan, math.inf, -math.inf)
LAMBDAS = (0.0, 0.5, 1.0, None)  # None: the discounted return
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def returns(r: Tensor, v: Tensor, c: Tensor | None, lam: float | None) -> Tensor:
    if lam is None:
        return discounted_return(r, v[-1], GAMMA, c)[None]
    return ops.td_lambda(r, v, gamma=GAMMA, lam=lam, continues=c)


def episode(end: int, horizon: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """Three columns; the episode of the second ends at step ``end``."""
    continues = torch.ones(horizon, 3, dtype=dtype)
    continues[end, 1] = 0.0
    continues[:, 2] = 0.75
    return torch.randn(horizon, 3).to(dtype), torch.randn(horizon + 1, 3).to(dtype), continues


def spoil(tensors: tuple[Tensor, ...], end: int, bad: float, what: str) -> tuple[Tensor, ...]:
    """Something bad behind the end."""
    r, v, c = (x.clone() for x in tensors)
    if what in ("rewards", "all"):
        r[end + 1 :, 1] = bad
    if what in ("values", "all"):
        v[end + 1 :, 1] = bad
    if what in ("continues", "all"):
        c[end + 1 :, 1] = bad
    return r, v, c


def seen(out: Tensor, end: int) -> Tensor:
    """What a loss looks at: nothing behind the end."""
    return torch.cat((out[:, [0, 2]].flatten(), out[: end + 1, 1]))


def value_and_gradients(
    tensors: tuple[Tensor, ...], end: int, lam: float | None
) -> tuple[Tensor, ...]:
    leaves = tuple(x.detach().clone().requires_grad_() for x in tensors)
    out = seen(returns(*leaves, lam), end)
    gradients = torch.autograd.grad(out.sum(), leaves, create_graph=True)
    return (out, *gradients)


@pytest.mark.parametrize("what", ["rewards", "values", "continues", "all"])
@pytest.mark.parametrize("lam", LAMBDAS)
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("end", "horizon"), [(1, 3), (0, 1), (3, 6)])
def test_nothing_behind_an_end_counts(
    end: int, horizon: int, dtype: torch.dtype, bad: float, lam: float | None, what: str
) -> None:
    """Values and all gradients are those of an episode with ordinary numbers there."""
    clean = episode(end, horizon, dtype)
    wanted = value_and_gradients(clean, end, lam)
    ours = value_and_gradients(spoil(clean, end, bad, what), end, lam)
    assert torch.equal(ours[0], wanted[0])
    for a, b in zip(ours[1:3], wanted[1:3], strict=True):  # towards rewards and values
        assert torch.equal(a, b)
    to_continues = ours[3]
    assert to_continues.isfinite().all()
    others = torch.ones_like(to_continues, dtype=torch.bool)
    others[end, 1] = False  # there the derivative would be what is behind the end
    assert torch.equal(to_continues[others], wanted[3][others])
    with torch.no_grad():
        again = seen(returns(*spoil(clean, end, bad, what), lam), end)
    assert torch.equal(again, wanted[0])


@pytest.mark.parametrize("lam", LAMBDAS)
@pytest.mark.parametrize("bad", BAD)
def test_in_forward_mode_and_under_vmap(bad: float, lam: float | None) -> None:
    clean = episode(1, 4)
    dirty = spoil(clean, 1, bad, "all")

    def call(*x: Tensor) -> Tensor:
        return seen(returns(*x, lam), 1)

    tangents = tuple(torch.randn_like(x) for x in clean)
    tangents[2][1, 1] = 0.0
    wanted, ours = (torch.func.jvp(call, x, tangents) for x in (clean, dirty))
    torch.testing.assert_close(ours, wanted, rtol=0.0, atol=0.0)
    gradient = torch.func.grad(lambda *x: call(*x).sum(), (0, 1, 2))
    several = tuple(torch.stack((a, b)) for a, b in zip(clean, dirty, strict=True))
    for both in torch.vmap(gradient)(*several):
        assert both.isfinite().all()


@pytest.mark.slow
def test_compiled() -> None:
    """Reverse mode within a compiled function."""
    clean, end = episode(1, 3, torch.float32), 1
    dirty = spoil(clean, end, math.nan, "all")
    call = torch.compile(lambda *x: seen(returns(*x, 0.9), end).sum(), fullgraph=True)
    found = []
    for tensors in (clean, dirty):
        leaves = [x.clone().requires_grad_() for x in tensors]
        loss = call(*leaves)
        found.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
    for a, b in zip(found[1][:3], found[0][:3], strict=True):
        torch.testing.assert_close(a, b)
    assert found[1][3].isfinite().all()


@pytest.mark.parametrize("lam", [0.3, 1.0, None])
@pytest.mark.parametrize("weight", [1e-30, 0.5, 1.0])
@pytest.mark.parametrize("bad", BAD)
def test_any_other_weight_lets_it_pass(bad: float, weight: float, lam: float | None) -> None:
    r, v, c = episode(1, 3)
    v[3, 0] = bad
    c[:, 0] = weight
    for t in returns(r, v, c, lam):
        assert not t[0].isfinite() and t[1:].isfinite().all()


@pytest.mark.parametrize("bad", BAD)
def test_the_reward_of_the_last_step_counts(bad: float) -> None:
    r, v, c = episode(1, 3)
    r[1, 1] = bad
    for lam in LAMBDAS:
        out = returns(r, v, c, lam)
        assert not out[: 2 if lam else 1, 1].isfinite().any() or lam == 0.0
        assert out[:, [0, 2]].isfinite().all()


@pytest.mark.parametrize("bad", BAD)
def test_ends_of_lambda_and_gamma(bad: float) -> None:
    """A value counts nothing at lambda 1, a later target nothing at 0, both at gamma 0."""
    r, v, _ = episode(1, 3)
    spoiled = v.clone()
    spoiled[1:3] = bad
    ours = ops.td_lambda(r, spoiled, lam=1.0)
    assert torch.equal(ours, ops.td_lambda(r, v, lam=1.0))
    late = r.clone()
    late[2] = bad
    assert torch.equal(ops.td_lambda(late, v, lam=0.0)[:2], ops.td_lambda(r, v, lam=0.0)[:2])
    v.fill_(bad).requires_grad_()
    for continues in (None, torch.ones_like(r)):
        out = ops.td_lambda(r, v, gamma=0.0, continues=continues)
        assert torch.equal(out, r)
        (gradient,) = torch.autograd.grad(out.sum(), v)
        assert gradient.eq(0.0).all()


def test_derivatives_at_an_end() -> None:
    """Towards a continuation of 0 too, where what follows is finite: any number of times."""
    r, v, c = (x.requires_grad_() for x in episode(1, 3))

    def call(r: Tensor, v: Tensor, c: Tensor) -> Tensor:
        return ops.td_lambda(r, v, gamma=GAMMA, lam=0.8, continues=c)

    assert torch.autograd.gradcheck(call, (r, v, c), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(call, (r, v, c))


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_bin_without_weight_may_be_impossible(dtype: torch.dtype, backend: str) -> None:
    """Logits of -inf away from the target, and at one of its neighbours where it is on a bin."""
    logits = torch.randn(2, 5).to(dtype)
    logits[:, 0] = -math.inf
    logits[0, 3:] = -math.inf
    logits.requires_grad_()
    x = torch.tensor([2.0, 2.5], dtype=dtype)
    with select.backend(backend):
        loss = ops.two_hot_cross_entropy(logits, x, 0.0, 4.0, transform=False)
        (gradient,) = torch.autograd.grad(loss.sum(), logits)
    allowed = logits.detach().double()
    first = allowed[0, :3].log_softmax(0)
    second = allowed[1].log_softmax(0)
    wanted = torch.stack((-first[2], -0.5 * (second[2] + second[3]))).to(dtype)
    torch.testing.assert_close(loss, wanted)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("part", ["dynamics", "reward", "termination"])
def test_a_loss_without_weight_is_left_out(
    part: str, bad: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A coefficient of 0 takes a part out of the total, whatever it is."""
    from tests.models.builders import ACTION, OBS, normal, small_model

    found = {name: torch.tensor(2.0, requires_grad=True) for name in ("reward", "termination")}
    found["dynamics"] = torch.tensor(2.0, requires_grad=True)
    found[part] = torch.tensor(bad, requires_grad=True)
    result = ops.WindowLoss(**found, target=torch.zeros(1, 1, 8))
    monkeypatch.setattr(losses.ops, "world_model_loss", lambda *_, **__: result)
    config = ModelLearningConfig(**{f"{part}_coef": 0.0})
    model = small_model(True, kind="mlp")
    flat = normal(1, 2)
    total = losses.weighted_loss(
        model, normal(2, 2, OBS), normal(1, 2, ACTION), flat, flat, config, gamma=0.9
    ).total
    assert total.isfinite()
    gradients = torch.autograd.grad(total, list(found.values()))
    assert all(g.isfinite() for g in gradients)


def test_windows_behind_an_episodes_end() -> None:
    """The last step's NaN reward is that step's alone."""
    episodes = [
        Episode(
            torch.zeros(3, 2),
            torch.zeros(2, 1),
            torch.tensor([1.0, math.nan]),
            torch.tensor([False, True]),
        )
    ]
    drawn = draw_windows(episodes, 4, 2)
    assert drawn.reward[~drawn.valid].eq(0.0).all()
    assert int(drawn.reward.isnan().sum()) == 2
