"""Guarded Adam: plain Adam with clipping, except that non-finite updates leave no trace."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pwm_fast.agent import optim
from pwm_fast.agent.optim import GuardedAdam, total_norm
from pwm_fast.backends import native, select
from tests.models.builders import same

needs_native = pytest.mark.skipif(
    native.why_missing() is not None, reason=f"no native kernels: {native.why_missing()}"
)


@pytest.fixture(autouse=True, params=[pytest.param("native", marks=needs_native), "reference"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """All of it in one native call, and with PyTorch's fused Adam."""
    with select.backend(request.param):
        yield request.param


def make(grad_norm: float = 1.0, lr: float = 0.1) -> tuple[nn.Linear, GuardedAdam]:
    torch.manual_seed(3)
    net = nn.Linear(4, 3)
    return net, GuardedAdam(net.parameters(), lr, (0.7, 0.95), grad_norm)


def loss_of(net: nn.Linear, x: Tensor) -> Tensor:
    return net(x).square().sum()


def state_of(net: nn.Linear, optimizer: GuardedAdam) -> list[Tensor]:
    values = [p.detach().clone() for p in net.parameters()]
    for p in net.parameters():
        values += [v.clone() for v in optimizer.adam.state[p].values()]
    return values


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_transposed_gradients_update_their_own_entries() -> None:
    """A batched product's weight gradient comes transposed; fused Adam alone would scramble it."""
    weight = nn.Parameter(torch.randn(2, 6, 4))
    reference = nn.Parameter(weight.detach().clone())
    optimizer = GuardedAdam([weight], 0.1, (0.7, 0.95), 1e9)
    adam = torch.optim.Adam([reference], lr=0.1, betas=(0.7, 0.95), fused=False)
    x = torch.randn(2, 5, 4)
    for _ in range(3):
        for p, step in ((weight, optimizer.step), (reference, None)):
            loss = torch.bmm(x, p.transpose(1, 2)).square().sum()
            if step is not None:
                step(loss)
            else:
                (reference.grad,) = torch.autograd.grad(loss, [reference])
                assert reference.grad.stride() != reference.stride()
                adam.step()
    same(weight, reference, rtol=1e-5, atol=1e-6)


def test_slow_parameters_learn_at_their_share_of_the_rate() -> None:
    """Adam's first step is the rate itself, whatever the gradient."""
    fast, slow = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2))
    optimizer = GuardedAdam([fast, slow], 0.1, (0.9, 0.999), 1e9, slow=[slow], slow_scale=0.3)
    optimizer.step(fast.sum() + slow.sum())
    same(fast, torch.full((3,), -0.1), rtol=1e-5)
    same(slow, torch.full((2,), -0.03), rtol=1e-5)
    optimizer.set_lr(0.2)
    state = copy.deepcopy(optimizer.state_dict())
    resumed = GuardedAdam([fast, slow], 0.1, (0.9, 0.999), 1e9, slow=[slow], slow_scale=0.3)
    resumed.load_state_dict(state)
    rates = [float(group["lr"]) for group in resumed.adam.param_groups]
    assert rates == pytest.approx([0.2, 0.06])


@pytest.mark.parametrize("grad_norm", [0.5, 1e9])
def test_equals_adam_with_clipping(grad_norm: float) -> None:
    """Against ``torch.optim.Adam`` (not fused) and ``clip_grad_norm_``; the norm is before it."""
    net, optimizer = make(grad_norm)
    reference = copy.deepcopy(net)
    adam = torch.optim.Adam(reference.parameters(), lr=0.1, betas=(0.7, 0.95), fused=False)
    for i in range(5):
        x = (1.0 + i) * torch.randn(6, 4)
        norm = optimizer.step(loss_of(net, x))
        adam.zero_grad()
        loss_of(reference, x).backward()
        expected = nn.utils.clip_grad_norm_(reference.parameters(), grad_norm)
        adam.step()
        same(norm, expected, rtol=1e-6)
        assert norm > 0.5
        for p, q in zip(net.parameters(), reference.parameters(), strict=True):
            same(p, q, rtol=1e-5, atol=1e-6)


def test_clipped_gradients_are_kept_only_on_request() -> None:
    """Their total norm is at most the limit; otherwise ``.grad`` is None afterwards."""
    net, optimizer = make(grad_norm=0.5)
    norm = optimizer.step(loss_of(net, torch.randn(6, 4)))
    assert all(p.grad is None for p in net.parameters())
    assert norm > 1.0
    optimizer.keep_gradients = True
    optimizer.step(loss_of(net, torch.randn(6, 4)))
    grads = [p.grad for p in net.parameters() if p.grad is not None]
    assert len(grads) == 2
    assert torch.stack([g.square().sum() for g in grads]).sum().sqrt().item() == pytest.approx(
        0.5, rel=1e-4
    )


def test_the_largest_norm_can_be_set() -> None:
    net, optimizer = make(grad_norm=1e9)
    optimizer.keep_gradients = True
    optimizer.grad_norm = 0.25
    optimizer.step(loss_of(net, torch.randn(6, 4)))
    kept = [p.grad.flatten() for p in net.parameters() if p.grad is not None]
    assert torch.cat(kept).norm().item() == pytest.approx(0.25, rel=1e-4)


def test_unused_parameters_get_a_zero_gradient() -> None:
    """As if they had been part of the loss with weight 0."""
    net, optimizer = make()
    bias = net.bias.detach().clone()
    optimizer.step(net.weight.square().sum())
    assert torch.equal(net.bias, bias)


class InfiniteGradient(torch.autograd.Function):
    """A finite value whose gradient is not."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return torch.full_like(grad, float("inf"))


BAD = {
    "nan loss": lambda net: loss_of(net, torch.randn(6, 4)) * float("nan"),
    "inf loss": lambda net: loss_of(net, torch.randn(6, 4)) * float("inf"),
    # An infinite loss whose gradient is zero: only the loss tells.
    "inf loss, finite gradient": lambda net: loss_of(net, torch.randn(6, 4)) + float("inf"),
    "inf gradient": lambda net: InfiniteGradient.apply(loss_of(net, torch.randn(6, 4))),
    "one nan entry": lambda net: (
        loss_of(net, torch.randn(6, 4)) + (net.bias[0] - net.bias[0].detach()).sqrt()
    ),
}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("first", [True, False])
def test_non_finite_update_leaves_everything_bitwise_unchanged(kind: str, first: bool) -> None:
    """Parameters, moments and step counts; also as the very first update."""
    net, optimizer = make()
    if not first:
        optimizer.step(loss_of(net, torch.randn(6, 4)))
    before = state_of(net, optimizer)
    weights = [p.detach().clone() for p in net.parameters()]
    optimizer.step(BAD[kind](net))
    after = state_of(net, optimizer)
    assert all(torch.equal(p, w) for p, w in zip(net.parameters(), weights, strict=True))
    if first:
        moments = after[len(weights) :]
        assert moments and all(v.eq(0).all() for v in moments)
    else:
        assert equal(before, after)
    assert (int(optimizer.skipped), int(optimizer.skipped_in_a_row)) == (1, 1)
    optimizer.step(BAD[kind](net))
    assert (int(optimizer.skipped), int(optimizer.skipped_in_a_row)) == (2, 2)
    optimizer.step(loss_of(net, torch.randn(6, 4)))
    assert (int(optimizer.skipped), int(optimizer.skipped_in_a_row)) == (2, 0)
    assert not equal(state_of(net, optimizer), after)


def test_goes_on_as_if_nothing_had_been() -> None:
    """After skipped updates the next one equals, to the bit, that of an optimiser without them."""
    (net, optimizer), (other, clean) = make(), make()
    batches = [torch.randn(6, 4) for _ in range(3)]
    for x in batches:
        optimizer.step(loss_of(net, x))
        optimizer.step(loss_of(net, x) * float("nan"))
        clean.step(loss_of(other, x))
        assert equal(state_of(net, optimizer), state_of(other, clean))


def test_a_rate_is_exact_in_double_precision() -> None:
    """Against ``torch.optim.Adam`` with a Python number; also after a state with a float32 rate."""
    net, optimizer = make(1e9, lr=1e-3)
    net.double()
    old = copy.deepcopy(optimizer.state_dict())
    for group in old["adam"]["param_groups"]:
        group["lr"] = group["lr"].float()
    optimizer.load_state_dict(old)
    optimizer.set_lr(5e-4)
    reference = copy.deepcopy(net)
    adam = torch.optim.Adam(reference.parameters(), lr=5e-4, betas=(0.7, 0.95), fused=False)
    for _ in range(3):
        x = torch.randn(6, 4, dtype=torch.float64)
        optimizer.step(loss_of(net, x))
        adam.zero_grad()
        loss_of(reference, x).backward()
        adam.step()
    for p, q in zip(net.parameters(), reference.parameters(), strict=True):
        same(p, q, rtol=1e-14, atol=1e-15)


def test_set_lr_acts_in_place() -> None:
    """Rate 0 moves nothing; the tensor stays the one that a captured graph would read."""
    net, optimizer = make()
    tensor = optimizer.lr
    optimizer.set_lr(0.0)
    before = [p.detach().clone() for p in net.parameters()]
    optimizer.step(loss_of(net, torch.randn(6, 4)))
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))
    assert optimizer.lr is tensor is optimizer.adam.param_groups[0]["lr"]
    assert optimizer.initial_lr == 0.1


def test_round_trip_continues_to_the_bit_and_shares_nothing() -> None:
    (net, optimizer), (other, restored) = make(), make()
    for _ in range(3):
        optimizer.step(loss_of(net, torch.randn(6, 4)))
    optimizer.step(loss_of(net, torch.randn(6, 4)) * float("nan"))
    optimizer.set_lr(0.03)
    other.load_state_dict(net.state_dict())
    tensor = restored.lr
    restored.load_state_dict(optimizer.state_dict())
    assert restored.lr is tensor is restored.adam.param_groups[0]["lr"]
    assert restored.lr.item() == pytest.approx(0.03)
    assert (int(restored.skipped), int(restored.skipped_in_a_row)) == (1, 1)
    x = torch.randn(6, 4)
    before = state_of(other, restored)
    optimizer.step(loss_of(net, x))
    assert equal(state_of(other, restored), before), "both write to the same moments"
    restored.step(loss_of(other, x))
    assert equal(state_of(net, optimizer), state_of(other, restored))


def test_loading_keeps_this_runs_betas() -> None:
    """A checkpoint that is continued with new settings does not bring its own."""
    _, saved = make()
    net = nn.Linear(4, 3)
    optimizer = GuardedAdam(net.parameters(), 0.1, (0.5, 0.6), 1.0)
    optimizer.load_state_dict(saved.state_dict())
    assert optimizer.adam.param_groups[0]["betas"] == (0.5, 0.6)


@pytest.mark.parametrize("scale", [1e-30, 1e-22, 1e18, 1e19, 1e20, 1e30, 3e38])
def test_the_norm_of_finite_gradients_skips_nothing(scale: float) -> None:
    """Clipped by their true norm, which float32 squares do not hold, and 3e38 itself not either."""
    params = [nn.Parameter(torch.zeros(30, 7)), nn.Parameter(torch.zeros(5))]
    optimizer = GuardedAdam(params, 0.1, (0.7, 0.95), grad_norm=0.5)
    optimizer.keep_gradients = True
    grads = [scale * (0.5 + 0.5 * torch.rand(p.shape)) for p in params]
    flat = torch.cat([g.flatten() for g in grads]).double()
    true = torch.linalg.vector_norm(flat)
    norm = optimizer.apply(torch.ones(()), [g.clone() for g in grads])
    assert int(optimizer.skipped) == 0
    same(norm, true.float(), rtol=1e-6, atol=0.0)
    kept = torch.cat([p.grad.flatten() for p in params if p.grad is not None]).double()
    factor = min(0.5 / (true.item() + 1e-6), 1.0)
    same(kept, factor * flat, rtol=1e-5, atol=1e-37)
    if scale > 1.0:
        for p in params:
            same(p.detach(), torch.full_like(p, -0.1), rtol=1e-5)  # Adam's first step


@pytest.mark.parametrize("scale", [1e-300, 1e-170, 1.0, 1e160, 1e300])
def test_the_norm_in_double(scale: float) -> None:
    """Squares that float64 does not hold either."""
    grads = [torch.rand(30, 7, dtype=torch.float64), torch.zeros(2).double(), torch.rand(5)]
    true = torch.linalg.vector_norm(torch.cat([g.flatten().double() for g in grads[:2]]))
    same(total_norm([scale * g for g in grads[:2]]), scale * true, rtol=1e-12, atol=0.0)
    assert total_norm([torch.zeros(3).double()]).item() == 0.0
    assert total_norm([torch.zeros(0).double()]).item() == 0.0
    same(total_norm([grads[0], torch.zeros(0).double()]), total_norm(grads[:1]), rtol=1e-15)
    for bad in (float("nan"), float("inf")):
        spoilt = torch.tensor([1e200, bad], dtype=torch.float64)
        assert not total_norm([*grads, spoilt]).isfinite()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_bad_entry_among_large_ones_skips(bad: float) -> None:
    params = [nn.Parameter(torch.zeros(30, 7)), nn.Parameter(torch.zeros(5))]
    optimizer = GuardedAdam(params, 0.1, (0.7, 0.95), grad_norm=0.5)
    grads = [torch.full_like(p, 1e30) for p in params]
    grads[1][3] = bad
    norm = optimizer.apply(torch.ones(()), grads)
    assert not norm.isfinite() and int(optimizer.skipped) == 1
    assert all(p.eq(0.0).all() for p in params)


# ------------------------------------------------------------------------------ which way it goes


def took_kernels(monkeypatch: pytest.MonkeyPatch, step: Callable[[], Any]) -> bool:
    """Whether ``step`` went through kernels, not through PyTorch's Adam."""
    taken: list[bool] = []

    def spied(params: list[Tensor]) -> Any:
        found = step_kernels(params)
        taken.append(found is not None)
        return found

    step_kernels = optim.step_kernels
    monkeypatch.setattr(optim, "step_kernels", spied)
    step()
    assert len(taken) == 1
    return taken[0]


def test_the_backend_in_force_takes_the_step(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net, optimizer = make()
    loss = loss_of(net, torch.randn(6, 4))
    assert took_kernels(monkeypatch, lambda: optimizer.step(loss)) == (backend == "native")


@needs_native
def test_auto_takes_the_native_step(monkeypatch: pytest.MonkeyPatch) -> None:
    net, optimizer = make()
    loss = loss_of(net, torch.randn(6, 4))
    with select.backend("auto"):
        assert took_kernels(monkeypatch, lambda: optimizer.step(loss))


def strided() -> nn.Parameter:
    return nn.Parameter(torch.randn(3, 4).t())


OTHERS = {  # what only PyTorch's Adam does
    "float64": lambda: [nn.Parameter(torch.randn(4, 3, dtype=torch.float64))],
    "two dtypes": lambda: [
        nn.Parameter(torch.randn(3)),
        nn.Parameter(torch.randn(3, dtype=torch.float64)),
    ],
    "a transposed parameter": lambda: [strided(), nn.Parameter(torch.randn(3))],
    "autocast": lambda: [nn.Parameter(torch.randn(4, 3))],
}


@pytest.mark.parametrize("kind", OTHERS)
def test_what_kernels_do_not_cover_goes_pytorchs_way(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = OTHERS[kind]()
    own = [nn.Parameter(p.detach().clone()) for p in params]
    optimizer = GuardedAdam(own, 0.1, (0.7, 0.95), 1e9)
    adam = torch.optim.Adam(params, lr=0.1, betas=(0.7, 0.95), fused=False)
    for p in params:
        p.grad = torch.randn_like(p)
    grads = [None if p.grad is None else p.grad.clone() for p in params]
    with torch.autocast("cpu") if kind == "autocast" else nullcontext():
        assert not took_kernels(monkeypatch, lambda: optimizer.apply(torch.ones(()), grads))
    adam.step()
    for p, q in zip(own, params, strict=True):
        same(p, q.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [None, float("nan"), float("inf")])
def test_a_loss_of_any_dtype(bad: float | None, dtype: torch.dtype) -> None:
    net, optimizer = make()
    loss = torch.tensor(1.0 if bad is None else bad, dtype=dtype)
    optimizer.apply(loss, [torch.ones_like(p) for p in net.parameters()])
    assert int(optimizer.skipped) == (bad is not None)


def test_a_loss_beyond_float32_is_finite() -> None:
    net, optimizer = make()
    optimizer.apply(
        torch.tensor(1e300, dtype=torch.float64), [torch.ones_like(p) for p in net.parameters()]
    )
    assert int(optimizer.skipped) == 0


def test_expanded_gradients() -> None:
    """A sum's gradient is one number for all entries."""
    (net, optimizer), (other, plain) = make(), make()
    optimizer.step(net.weight.sum() + net.bias.sum())
    plain.apply(torch.ones(()), [torch.ones_like(p) for p in other.parameters()])
    assert equal(state_of(net, optimizer), state_of(other, plain))


def test_gradients_of_other_shapes_are_refused() -> None:
    net, optimizer = make()
    before = [p.detach().clone() for p in net.parameters()]
    with pytest.raises((ValueError, RuntimeError)):
        optimizer.apply(torch.ones(()), [torch.ones(3, 4), torch.ones(7)])
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))


def test_stale_gradients_do_not_count() -> None:
    """What ``.grad`` held before is no part of the step, and gone after it."""
    (net, optimizer), (other, clean) = make(), make()
    for p in net.parameters():
        p.grad = torch.full_like(p, 7.0)
    x = torch.randn(6, 4)
    for model, each in ((net, optimizer), (other, clean)):
        each.apply(torch.ones(()), torch.autograd.grad(loss_of(model, x), list(model.parameters())))
    assert equal(state_of(net, optimizer), state_of(other, clean))
    assert all(p.grad is None for p in net.parameters())


def test_a_copy_goes_on_by_itself() -> None:
    net, optimizer = make()
    x = torch.randn(6, 4)
    optimizer.step(loss_of(net, x))
    other, copied = copy.deepcopy((net, optimizer))
    before = state_of(net, optimizer)
    copied.step(loss_of(other, x))
    assert equal(state_of(net, optimizer), before)
    optimizer.step(loss_of(net, x))
    assert equal(state_of(net, optimizer), state_of(other, copied))


def test_moments_that_others_replace_are_seen() -> None:
    """Those of a state that Adam itself loads, and a tensor put in a moment's place."""
    net, optimizer = make()
    x = torch.randn(6, 4)
    optimizer.step(loss_of(net, x))
    old = copy.deepcopy(optimizer.adam.state_dict())
    for _ in range(2):
        optimizer.step(loss_of(net, x))
    optimizer.adam.load_state_dict(old)
    state = optimizer.adam.state[net.bias]
    state["exp_avg"] = torch.full((3,), 5.0)
    optimizer.apply(torch.ones(()), [torch.zeros(3, 4), torch.zeros(3)])
    assert float(state["step"]) == 2.0
    same(state["exp_avg"], torch.full((3,), 3.5))


def test_ways_can_change_in_the_middle(backend: str) -> None:
    """A state says nothing of who took its steps."""
    (net, optimizer), (other, plain) = make(), make()
    for i in range(6):
        x = torch.randn(6, 4)
        bad = float("nan") if i in (2, 3) else 1.0
        with select.backend("reference" if i % 3 == 0 else backend):
            optimizer.step(bad * loss_of(net, x))
        with select.backend("reference"):
            plain.step(bad * loss_of(other, x))
    for a, b in zip(state_of(net, optimizer), state_of(other, plain), strict=True):
        same(a, b, rtol=1e-5, atol=1e-6)
    assert int(optimizer.skipped) == int(plain.skipped) == 2
    saved, theirs = optimizer.state_dict()["adam"]["state"], plain.state_dict()["adam"]["state"]
    assert saved.keys() == theirs.keys()
    for index, values in theirs.items():
        assert saved[index].keys() == values.keys()
        for name, value in values.items():
            assert (saved[index][name].dtype, saved[index][name].shape) == (
                value.dtype,
                value.shape,
            ), name


@pytest.mark.parametrize("place", [0, 1])
def test_moments_are_as_pytorch_keeps_them(place: int) -> None:
    """Also before the first step: names in one order, as checkpoints have them."""
    net, optimizer = make()
    p = list(net.parameters())[place]
    optimizer.step(float("nan") * loss_of(net, torch.randn(6, 4)))
    state = optimizer.adam.state[p]
    assert list(state) == ["step", "exp_avg", "exp_avg_sq"]
    assert state["step"].shape == () and state["step"].dtype == torch.float32
    assert state["exp_avg"].shape == state["exp_avg_sq"].shape == p.shape
