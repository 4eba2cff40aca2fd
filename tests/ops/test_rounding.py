"""16-bit tensors are computed in float32 at least and rounded once, inside autocast and without.

The truth is the operation in float64 on the same rounded inputs; its formulas are tested elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from pwm_fast import ops
from pwm_fast.agent.normalizers import RunningMeanStd
from pwm_fast.backends import select
from pwm_fast.ops import Layer
from pwm_fast.ops.returns import discounted_return

HALVES = (torch.bfloat16, torch.float16)
AUTOCAST = (None, torch.bfloat16, torch.float16)
NOISE = 4e-6  # of float32, next to numbers of order 1

Inputs = list[Tensor]


class Case(NamedTuple):
    """An operation and inputs for it; gradients towards ``differentiated`` of them are compared."""

    name: str
    build: Callable[[], Inputs]
    call: Callable[..., Tensor | tuple[Tensor, ...]]
    differentiated: int


def normal(*shape: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, dtype=torch.float64)


def steps(horizon: int) -> Inputs:
    return [
        0.01 + normal(horizon, 3, scale=0.001),
        normal(horizon + 1, 3),
        0.9 + 0.1 * torch.rand(horizon, 3, dtype=torch.float64),
    ]


def td(gamma: float, lam: float) -> Callable[..., Tensor]:
    return lambda r, v, c: ops.td_lambda(r, v, gamma=gamma, lam=lam, continues=c)


def standing(bias: Tensor, inputs: int) -> Layer:
    """A layer whose output is ``bias``, whatever goes in."""
    return Layer(bias.new_zeros(bias.shape[0], inputs), bias)


def window_loss(kind: str) -> Callable[..., tuple[Tensor, ...]]:
    """Losses of networks that stand still: their tensors are exact in any dtype."""

    def call(obs: Tensor, action: Tensor, reward: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        encoded, moved, logits, ending, flags, tau = rest
        width = encoded.shape[0] + action.shape[-1]
        flow = kind == "flow"
        net = [standing(moved, width + flow)]
        loss = ops.world_model_loss(
            obs,
            action,
            reward,
            encoder=[standing(encoded, obs.shape[-1])],
            dynamics=ops.Flow(net, 2, "heun") if flow else ops.LatentMap(net),
            heads=ops.Heads(
                [standing(logits, width)], symlog=True, termination=[standing(ending, width)]
            ),
            terminated=flags,
            tau=tau,
            start="teacher",
        )
        assert loss.termination is not None
        return loss.dynamics, loss.reward, loss.termination

    return call


def window_inputs(bins: int) -> Inputs:
    flags = (torch.rand(5, 4) < 0.5).double()
    parts = [normal(8), normal(8), normal(bins, scale=3.0), normal(1), flags]
    tau = torch.rand(5, 4, dtype=torch.float64)
    return [normal(6, 4, 3), normal(5, 4, 2), normal(5, 4, scale=300.0), *parts, tau]


CASES = (
    Case("symlog", lambda: [normal(200, scale=1e3)], ops.symlog, 1),
    Case("symexp", lambda: [normal(200, scale=3.0)], ops.symexp, 1),
    Case("two_hot_encode", lambda: [normal(200, scale=4e3)], ops.two_hot_encode, 0),
    Case("two_hot_decode", lambda: [normal(50, 101, scale=4.0)], ops.two_hot_decode, 1),
    Case(
        "two_hot_cross_entropy",
        lambda: [normal(50, 101, scale=4.0), normal(50, scale=4e3)],
        ops.two_hot_cross_entropy,
        1,
    ),
    Case("td_lambda", lambda: steps(16), td(0.99, 0.95), 3),
    Case("td_lambda_long", lambda: steps(1200)[:2], lambda r, v: ops.td_lambda(r, v, gamma=1.0), 2),
    Case("td_lambda_one_step", lambda: steps(16), td(0.99, 0.0), 3),
    Case(
        "discounted_return",
        lambda: [steps(1200)[0], normal(3)],
        lambda r, v: discounted_return(r, v, 0.999),
        2,
    ),
    Case("simnorm", lambda: [normal(9, 64, scale=3.0)], ops.simnorm, 0),
    Case("project_simplex", lambda: [0.1 + normal(9, 64, scale=0.1).abs()], ops.project_simplex, 1),
    Case("mish", lambda: [normal(200, scale=3.0)], ops.mish, 0),
    Case(
        "flow_interpolate",
        lambda: [normal(9, 8), normal(9, 8), torch.rand(9, dtype=torch.float64)],
        ops.flow_interpolate,
        3,
    ),
    Case(
        "integrate",
        lambda: [1.0 + normal(9, 8), normal(8)],
        lambda z, v: ops.integrate(lambda _, tau: v / 64, z, 64),
        1,
    ),
    Case("world_model_loss_map", lambda: window_inputs(101), window_loss("map"), 0),
    Case("world_model_loss_flow", lambda: window_inputs(101), window_loss("flow"), 0),
    Case("world_model_loss_scalar", lambda: window_inputs(1), window_loss("map"), 0),
)


def results(case: Case, inputs: Inputs) -> list[Tensor]:
    leaves = [
        x.detach().clone().requires_grad_(i < case.differentiated) for i, x in enumerate(inputs)
    ]
    found = case.call(*leaves)
    outputs = list(found) if isinstance(found, tuple) else [found]
    if not case.differentiated:
        return outputs
    generator = torch.Generator().manual_seed(1)
    weights = [
        torch.randn(y.shape, dtype=torch.float64, generator=generator).bfloat16().to(y)
        for y in outputs
    ]
    return outputs + list(torch.autograd.grad(outputs, leaves[: case.differentiated], weights))


def assert_rounded_once(ours: Tensor, truth: Tensor, dtype: torch.dtype, what: str) -> None:
    assert ours.dtype == dtype, what
    limit = torch.finfo(dtype)
    inside = truth.abs() < limit.max * (1.0 - limit.eps / 4)
    assert torch.equal(ours.isinf(), ~inside), f"{what}: infinite where {dtype} holds the value"
    spare = NOISE * (1.0 + truth.abs())
    allowed = 0.5 * limit.eps * truth.abs() + limit.smallest_normal * limit.eps + spare
    error = (ours.double() - truth).abs()
    worst = (error / allowed)[inside].max().item() if inside.any() else 0.0
    assert worst <= 1.0, f"{what}: {worst:.2f} times the error of one rounding"


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("autocast", AUTOCAST, ids=str)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_one_rounding(
    case: Case, dtype: torch.dtype, autocast: torch.dtype | None, backend: str
) -> None:
    """Values and gradients of 16-bit tensors."""
    inputs = [x.to(dtype) for x in case.build()]
    if autocast not in (None, dtype) and case.name.startswith("world_model_loss"):
        pytest.skip("PyTorch concatenates no tensors of the other 16 bits under autocast")
    truth = results(case, [x.double() for x in inputs])
    context = nullcontext() if autocast is None else torch.autocast("cpu", autocast)
    with select.backend(backend), context:
        ours = results(case, inputs)
    for i, (a, b) in enumerate(zip(ours, truth, strict=True)):
        assert_rounded_once(a, b, dtype, f"{case.name}: result {i}")


@pytest.mark.parametrize("autocast", AUTOCAST[1:], ids=str)
@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_autocast_rounds_no_float32_tensor(case: Case, autocast: torch.dtype) -> None:
    """Nor its gradient; the networks of the losses stand still, as their products are rounded."""
    inputs = [x.bfloat16().to(torch.float16).float() for x in case.build()]
    truth = results(case, [x.double() for x in inputs])
    with torch.autocast("cpu", autocast):
        ours = results(case, inputs)
    for i, (a, b) in enumerate(zip(ours, truth, strict=True)):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), b, rtol=3e-5, atol=1e-5, msg=f"result {i}")


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_the_first_cases(dtype: torch.dtype) -> None:
    """As they were found: 3640 for 4000, 3824 for it under autocast, and 4.0 for 10."""
    x = torch.tensor([4000.0], dtype=dtype)
    assert torch.equal(ops.two_hot_encode(x), ops.two_hot_encode(x.double()).to(dtype))
    logits = ops.two_hot_encode(torch.tensor([4000.0]), 101).clamp_min(1e-9).log()
    with torch.autocast("cpu", dtype):
        decoded = ops.two_hot_decode(logits)
    torch.testing.assert_close(decoded, torch.tensor([4000.0]), rtol=1e-5, atol=0.0)
    rewards, values = torch.full((1000, 1), 0.01, dtype=dtype), torch.zeros(1001, 1, dtype=dtype)
    total = ops.td_lambda(rewards, values, gamma=1.0, lam=1.0)[0].item()
    assert abs(total - 1000 * rewards[0].item()) < 0.04


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_mixed_dtypes_promote(dtype: torch.dtype) -> None:
    """The logits of autocast against float32 rewards: a float32 loss."""
    logits, x = torch.randn(4, 101).to(dtype), 50.0 * torch.randn(4)
    loss = ops.two_hot_cross_entropy(logits, x)
    wanted = ops.two_hot_cross_entropy(logits.double(), x.double())
    torch.testing.assert_close(loss, wanted.float(), rtol=1e-6, atol=1e-6)
    rewards, values = torch.randn(5, 2), torch.randn(6, 2).to(dtype)
    wanted = ops.td_lambda(rewards.double(), values.double())
    torch.testing.assert_close(ops.td_lambda(rewards, values), wanted.float())


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_rollout_carries_its_state_unrounded(dtype: torch.dtype) -> None:
    """64 steps of 1/256 from 1, each less than bfloat16 tells from 1: the end is 1.25."""
    velocity = torch.full((8,), 1 / 256, dtype=dtype)
    net = [standing(velocity, 8 + 2 + 1)]
    z, action = torch.ones(3, 8, dtype=dtype), torch.zeros(64, 3, 2, dtype=dtype)
    latents = ops.latent_rollout(z, action, ops.Flow(net, 2, "heun"))
    assert latents.dtype == dtype
    assert latents[-1].eq(1.25).all()
    policy = ops.Policy([standing(velocity[:2], 8)], velocity[:2])
    rollout = ops.imagine(
        z, policy, ops.Flow(net), ops.Heads([standing(velocity[:1], 10)]), noise=action
    )
    assert rollout.z[-1].eq(1.25).all()


@pytest.mark.parametrize("autocast", AUTOCAST[1:], ids=str)
def test_imagined_rewards_under_autocast_are_of_the_latents_dtype(autocast: torch.dtype) -> None:
    """A product's logits come in 16 bits; what is decoded from them is not rounded to these."""
    logits = ops.two_hot_encode(torch.tensor(4000.0)).clamp_min(1e-6).log()
    heads = ops.Heads(
        [standing(logits, 10)],
        termination=[standing(torch.tensor([-6.0]), 10)],
        value=[standing(torch.tensor([3.3]), 8)],
    )
    policy = ops.Policy([standing(torch.zeros(2), 8)], torch.ones(2))
    with torch.autocast("cpu", autocast):
        found = ops.imagine(
            torch.ones(3, 8),
            policy,
            ops.LatentMap([standing(torch.ones(8), 10)]),
            heads,
            noise=torch.zeros(4, 3, 2),
        )
    assert {x.dtype for x in found if x is not None} == {torch.float32}
    wanted = ops.two_hot_decode(logits.to(autocast).double())
    torch.testing.assert_close(found.reward.double(), wanted.expand(4, 3), rtol=1e-5, atol=0.0)
    assert found.continues is not None
    assert abs(found.continues[0, 0].item() - 0.997527) < 1e-5


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_esnr_of_16_bit_gradients(dtype: torch.dtype) -> None:
    """All at once, streamed, and smoothed, also under autocast."""
    samples = [[(3.0 + normal(300)).to(dtype), (1e-3 * normal(7)).to(dtype)] for _ in range(9)]
    wanted = ops.esnr([[g.double() for g in sample] for sample in samples])
    with torch.autocast("cpu", torch.bfloat16):
        accumulator, running = ops.EsnrAccumulator(), ops.RunningEsnr()
        for sample in samples:
            accumulator.update(sample)
        for found in (ops.esnr(samples), accumulator.result(), running.update(wanted)):
            torch.testing.assert_close(found.ratio, wanted.ratio, rtol=1e-10, atol=0.0)


@pytest.mark.parametrize("autocast", AUTOCAST, ids=str)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_observations_are_normalised_unrounded(
    dtype: torch.dtype, autocast: torch.dtype | None
) -> None:
    """A deviation of 0.5 around 100.3, which 16 bits do not hold."""
    statistics = RunningMeanStd()
    x = (100.3 + 0.5 * torch.randn(1000)).to(dtype)
    statistics.update(100.3 + 0.5 * torch.randn(1000))
    context = nullcontext() if autocast is None else torch.autocast("cpu", autocast)
    with context:
        ours = statistics.normalize(x)
    wanted = (x.double() - statistics.mean) / (statistics.var + 1e-5).sqrt()
    assert ours.dtype == dtype
    allowed = 0.5 * torch.finfo(dtype).eps * wanted.abs() + 5e-5
    assert ((ours.double() - wanted.clamp(-10.0, 10.0)).abs() <= allowed).all()
