"""Lambda returns in one launch a direction, against the recursion in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

pytest.importorskip("triton")

from pwm_fast import ops
from pwm_fast.backends import select
from pwm_fast.ops.returns import discounted_return
from tests.helpers import assert_2x
from tests.kernels.harness import DEVICES

GAMMA = 0.97
SHAPES = [(1, 1), (5, 3, 41), (16, 130)]  # steps first; more columns than a program takes


def results(
    dtype: torch.dtype, device: str, shape: tuple[int, ...], lam: float | None, ends: bool
) -> list[Tensor]:
    """Returns and the gradients towards everything; without lambda the discounted return."""
    generator = torch.Generator().manual_seed(0)

    def leaf(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(device, dtype).requires_grad_()

    steps, *others = shape
    rewards, values = leaf(*shape), leaf(steps + 1, *others)
    continues = torch.rand(shape, generator=generator).to(device, dtype).requires_grad_()
    if lam is None:
        out = discounted_return(rewards, values[-1], GAMMA, continues if ends else None)
    else:
        out = ops.td_lambda(
            rewards, values, gamma=GAMMA, lam=lam, continues=continues if ends else None
        )
    weight = torch.randn(out.shape, generator=generator).to(device, dtype)
    inputs = [rewards, values, *([continues] if ends else [])]
    return [x.detach().cpu() for x in (out, *torch.autograd.grad((out * weight).sum(), inputs))]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("ends", [False, True])
@pytest.mark.parametrize("lam", [None, 0.0, 0.95, 1.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_right_as_the_recursion(
    shape: tuple[int, ...], lam: float | None, ends: bool, device: str
) -> None:
    with select.backend("reference"):
        truth = results(torch.float64, "cpu", shape, lam, ends)
        theirs = results(torch.float32, "cpu", shape, lam, ends)
    with select.backend("triton"):
        ours = results(torch.float32, device, shape, lam, ends)
    for i, (a, b, c) in enumerate(zip(ours, theirs, truth, strict=True)):
        assert_2x(a, b, c, f"result {i}")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("lam", [None, 0.0, 0.95, 1.0])
def test_nothing_behind_an_end_counts(lam: float | None, bad: float, device: str) -> None:
    """Neither in values nor in gradients; another probability lets it pass."""

    def run(spoilt: bool) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        rewards, values = (torch.randn(n, 3, generator=generator) for n in (5, 6))
        continues = torch.ones(5, 3)
        continues[2, 1], continues[:, 2] = 0.0, 0.5
        if spoilt:
            for x in (rewards, values, continues):
                x[3:, 1] = bad
        leaves = [x.to(device).requires_grad_() for x in (rewards, values, continues)]
        if lam is None:
            out = discounted_return(leaves[0], leaves[1][-1], GAMMA, leaves[2])[None]
        else:
            out = ops.td_lambda(*leaves[:2], gamma=GAMMA, lam=lam, continues=leaves[2])
        loss = out[:3].sum() + out[3:, 0].sum() + out[3:, 2].sum()
        to_rewards, to_values, to_continues = torch.autograd.grad(loss, leaves)
        assert to_continues.isfinite().all()
        return [x.detach().cpu() for x in (out[:3], to_rewards, to_values)]

    with select.backend("triton"):
        for ours, wanted in zip(run(True), run(False), strict=True):
            assert torch.equal(ours, wanted)
        rewards, values = torch.ones(3, 1, device=device), torch.full((4, 1), bad, device=device)
        passed = ops.td_lambda(rewards, values, continues=torch.full_like(rewards, 1e-3))
        torch.testing.assert_close(passed.isfinite().float(), torch.zeros_like(passed))


@pytest.mark.parametrize("device", DEVICES)
def test_operator(device: str) -> None:
    """Schema, fake implementation and gradient; strided and expanded arguments by the function."""
    r, v = (torch.randn(n, 7, device=device, requires_grad=True) for n in (3, 4))
    c = torch.rand(3, 7, device=device, requires_grad=True)
    for args in ((r, v, c, 0.9, 0.5), (r, v, None, 0.9, 0.5), (r, v[3:].detach(), c, 0.9, 1.0)):
        opcheck(torch.ops.pwm_fast.td_lambda.default, (*args, "triton", "exact"))
    strided = torch.randn(7, 3, device=device).t()
    shared = torch.randn(1, 7, device=device).expand(4, 7)
    ours = ops.td_lambda(strided, shared, backend="triton")
    truth = ops.td_lambda(strided.double(), shared.double(), backend="reference")
    torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_vmap(device: str) -> None:
    """Mapped axes join the rows, of a gradient too; what is not mapped is repeated."""
    r, v = torch.randn(2, 3, 7, device=device), torch.randn(4, 7, device=device)
    c = torch.rand(3, 2, 7, device=device)

    def run(r: Tensor, c: Tensor) -> Tensor:
        return ops.td_lambda(r, v, continues=c, backend="triton")

    leaves = r.requires_grad_(), c.requires_grad_()
    mapped = torch.vmap(run, (0, 1), 1)(*leaves)
    each = torch.stack([run(r[i], c[:, i]) for i in range(2)], 1)
    assert torch.equal(mapped, each)
    w = torch.randn_like(each)
    for ours, wanted in zip(
        *(torch.autograd.grad((y * w).sum(), leaves) for y in (mapped, each)), strict=True
    ):
        torch.testing.assert_close(ours, wanted)


@pytest.mark.parametrize("device", DEVICES)
def test_nothing_to_sum_is_left_to_the_reference(device: str) -> None:
    rewards, values = torch.ones(0, 2, device=device), torch.ones(1, 2, device=device)
    with pytest.raises(select.BackendError, match="there are no rewards"):
        ops.td_lambda(rewards, values, backend="triton")
    last = torch.ones(2, device=device)
    assert discounted_return(torch.ones(0, 2, device=device), last, 0.5).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("device", DEVICES)
def test_differentiating_twice_is_refused(device: str) -> None:
    r, v = (torch.randn(n, 7, device=device, requires_grad=True) for n in (3, 4))
    out = ops.td_lambda(r, v, backend="triton")
    (grad,) = torch.autograd.grad(out.square().sum(), v, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()
