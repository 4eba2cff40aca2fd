"""TD(lambda) targets against the explicit sum of n-step returns."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from pwm_fast import ops
from pwm_fast.ops import extend


def n_step_return(
    rewards: list[float], values: list[float], continues: list[float], gamma: float, t: int, n: int
) -> float:
    total, discount = 0.0, 1.0
    for k in range(t, t + n):
        total += discount * rewards[k]
        discount *= gamma * continues[k]
    return total + discount * values[t + n]


def explicit_targets(
    rewards: list[float], values: list[float], continues: list[float], gamma: float, lam: float
) -> list[float]:
    """``(1 - lam) sum_n lam^(n-1) G^(n)``, with the weight of all longer returns on the longest."""
    horizon, out = len(rewards), []
    for t in range(horizon):
        longest = horizon - t
        weights = [(1.0 - lam) * lam ** (n - 1) for n in range(1, longest)] + [lam ** (longest - 1)]
        returns = [
            n_step_return(rewards, values, continues, gamma, t, n) for n in range(1, longest + 1)
        ]
        out.append(sum(w * g for w, g in zip(weights, returns, strict=True)))
    return out


def draw(horizon: int, *shape: int) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.randn(horizon, *shape, dtype=torch.float64),
        torch.randn(horizon + 1, *shape, dtype=torch.float64),
        torch.rand(horizon, *shape, dtype=torch.float64),
    )


@pytest.mark.parametrize("lam", [0.0, 0.3, 0.95, 1.0])
@pytest.mark.parametrize("gamma", [0.0, 0.99, 1.0])
@pytest.mark.parametrize("horizon", [1, 2, 16])
@pytest.mark.parametrize("ends", [False, True])
def test_targets_are_weighted_n_step_returns(
    horizon: int, gamma: float, lam: float, ends: bool
) -> None:
    """With and without termination probabilities."""
    rewards, values, continues = draw(horizon, 3)
    ours = ops.td_lambda(
        rewards, values, gamma=gamma, lam=lam, continues=continues if ends else None
    )
    if not ends:
        continues = torch.ones_like(continues)
    columns = [
        explicit_targets(
            rewards[:, i].tolist(), values[:, i].tolist(), continues[:, i].tolist(), gamma, lam
        )
        for i in range(3)
    ]
    expected = torch.tensor(columns, dtype=torch.float64).T
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-13)


def test_ends_of_lambda() -> None:
    """0 gives one-step targets, 1 the discounted return to the end; checked by hand."""
    rewards, values = torch.tensor([1.0, 2.0]).double(), torch.tensor([9.0, 10.0, 20.0]).double()
    one_step = ops.td_lambda(rewards, values, gamma=0.5, lam=0.0)
    assert one_step.tolist() == [1.0 + 0.5 * 10.0, 2.0 + 0.5 * 20.0]
    full = ops.td_lambda(rewards, values, gamma=0.5, lam=1.0)
    assert full.tolist() == [1.0 + 0.5 * 2.0 + 0.25 * 20.0, 2.0 + 0.5 * 20.0]


def test_defaults_are_those_of_pwm() -> None:
    rewards, values, _ = draw(4)
    expected = ops.td_lambda(rewards, values, gamma=0.99, lam=0.95)
    assert torch.equal(ops.td_lambda(rewards, values), expected)


def test_nothing_flows_across_an_end() -> None:
    """Targets up to an end depend on no later reward or value; the last one is its reward."""
    rewards, values, _ = draw(5)
    rewards.requires_grad_(), values.requires_grad_()
    continues = torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0], dtype=torch.float64)
    targets = ops.td_lambda(rewards, values, continues=continues)
    assert targets[2] == rewards[2]
    by_reward, by_value = torch.autograd.grad(targets[:3].sum(), (rewards, values))
    assert by_reward[:3].abs().min() > 0.0
    assert by_value[1:3].abs().min() > 0.0
    assert by_reward[3:].abs().max() == 0.0 == by_value[3:].abs().max()


def test_trailing_axes_are_independent() -> None:
    rewards, values, continues = draw(4, 3, 5)
    ours = ops.td_lambda(rewards, values, continues=continues)
    assert ours.shape == (4, 3, 5)
    for i in range(3):
        column = ops.td_lambda(rewards[:, i], values[:, i], continues=continues[:, i])
        assert torch.equal(ours[:, i], column)


@pytest.mark.parametrize("shape", [(0, 3), (4, 0)], ids=str)
def test_no_steps_or_no_rows(shape: tuple[int, ...]) -> None:
    rewards, values, continues = draw(*shape)
    assert ops.td_lambda(rewards, values).shape == shape
    assert ops.td_lambda(rewards, values, continues=continues).shape == shape


@pytest.mark.parametrize("horizon", [1, 4])
def test_derivatives(horizon: int) -> None:
    """In rewards, values and continuation probabilities."""
    inputs = [x.requires_grad_() for x in draw(horizon, 2)]

    def call(rewards: Tensor, values: Tensor, continues: Tensor) -> Tensor:
        return ops.td_lambda(rewards, values, gamma=0.9, lam=0.8, continues=continues)

    assert gradcheck(call, inputs)
    assert gradgradcheck(call, inputs)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
def test_dtype_is_kept(dtype: torch.dtype) -> None:
    rewards, values, continues = (x.to(dtype) for x in draw(4, 3))
    assert ops.td_lambda(rewards, values, continues=continues).dtype == dtype


@pytest.mark.parametrize("ends", [False, True])
def test_a_discount_for_each_row(ends: bool) -> None:
    """Each row's targets are to the bit those of its own number, and so are its gradients."""
    rewards, values, continues = draw(5, 2, 3)
    rewards.requires_grad_(), values.requires_grad_()
    gamma = torch.tensor([0.9, 0.0, 1.0], dtype=torch.float64)
    c = continues if ends else None
    whole = ops.td_lambda(rewards, values, gamma=gamma, continues=c)
    summed = extend.discounted_return(rewards, values[-1], gamma, c)
    grads = torch.autograd.grad(whole.square().sum(), (rewards, values), retain_graph=True)
    for i, number in enumerate(gamma.tolist()):
        own = None if c is None else c[:, :, i]
        one = ops.td_lambda(rewards[..., i], values[..., i], gamma=number, continues=own)
        assert torch.equal(whole[..., i], one)
        alone = extend.discounted_return(rewards[..., i], values[-1, :, i], number, own)
        torch.testing.assert_close(summed[..., i], alone, rtol=1e-15, atol=0.0)
        for grad, whole_grad in zip(
            torch.autograd.grad(one.square().sum(), (rewards, values)), grads, strict=True
        ):
            assert torch.equal(grad[..., i], whole_grad[..., i])
    rows = ops.td_lambda(rewards, values, gamma=gamma.new_tensor([[0.5], [0.7]]), continues=c)
    for i, number in enumerate((0.5, 0.7)):
        own = None if c is None else c[:, i]
        one = ops.td_lambda(rewards[:, i], values[:, i], gamma=number, continues=own)
        assert torch.equal(rows[:, i], one)


def test_derivatives_in_discounts() -> None:
    rewards, values, continues = draw(3, 2)
    gamma = torch.rand(2, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda g: ops.td_lambda(rewards, values, gamma=g, continues=continues), gamma)
    assert gradcheck(lambda g: extend.discounted_return(rewards, values[-1], g), gamma)


def test_discounts_that_do_not_fit() -> None:
    rewards, values, _ = draw(3, 2)
    with pytest.raises(ValueError, match=r"gamma must be a number or broadcast to \(2,\), got"):
        ops.td_lambda(rewards, values, gamma=torch.rand(3))
    with pytest.raises(ValueError, match=r"gamma must be a number or broadcast to \(2,\), got"):
        extend.discounted_return(rewards, values[-1], torch.rand(3, 2))
    with pytest.raises(TypeError, match="gamma must have a floating dtype"):
        ops.td_lambda(rewards, values, gamma=torch.ones(2, dtype=torch.int64))
