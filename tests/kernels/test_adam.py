"""Clipped Adam on each backend: against float64, and that what is not finite leaves no trace."""

from __future__ import annotations

import copy
import importlib.util

import pytest
import torch
from torch import Tensor, nn

from pwm_fast.agent.optim import GuardedAdam
from pwm_fast.backends import native, select
from pwm_fast.backends.optimizer import Group
from tests.helpers import assert_2x
from tests.kernels.harness import DEVICES

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)
needs_native = pytest.mark.skipif(
    native.why_missing() is not None, reason=f"no native kernels: {native.why_missing()}"
)
#: Backend and device.
WAYS = [
    *(pytest.param("triton", *d.values, marks=(*d.marks, needs_triton)) for d in DEVICES),
    pytest.param("native", "cpu", marks=needs_native),
]

SHAPES = ((5, 3), (0,), (41, 103), (), (7,))  # one of more than a chunk; some at odd addresses
BETAS = (0.7, 0.95)
STEPS = 3


def make(device: str, grad_norm: float = 1.0, dtype: torch.dtype = torch.float32) -> GuardedAdam:
    """An optimiser whose last parameters are slow; the values are those of the seed."""
    generator = torch.Generator().manual_seed(5)
    params = []
    for shape in SHAPES:
        values = torch.randn(shape, generator=generator).to(device, dtype)
        flat = torch.empty(values.numel() + 1, dtype=dtype, device=device)[1:]  # unaligned
        params.append(nn.Parameter(flat.view(shape).copy_(values)))
    return GuardedAdam(params, 0.1, BETAS, grad_norm, slow=params[3:], slow_scale=0.5)


def gradients(step: int, like: GuardedAdam) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(p.shape, generator=generator).to(p) for p in like.params]


def learn(optimizer: GuardedAdam, steps: int = STEPS) -> list[Tensor]:
    """Parameters, moments and norms after some steps."""
    loss = torch.ones((), device=optimizer.params[0].device)
    norms = [optimizer.apply(loss, gradients(i, optimizer)) for i in range(steps)]
    return [*state_of(optimizer), *norms]


def state_of(optimizer: GuardedAdam) -> list[Tensor]:
    state = optimizer.adam.state
    moments = [state[p][k] for p in optimizer.params for k in ("exp_avg", "exp_avg_sq", "step")]
    return [x.detach().clone().cpu() for x in (*optimizer.params, *moments)]


@pytest.mark.parametrize(("way", "device"), WAYS)
@pytest.mark.parametrize("grad_norm", [1.0, 1e9])
def test_as_right_as_torchs_fused_adam(grad_norm: float, way: str, device: str) -> None:
    with select.backend("reference"):
        truth = learn(make("cpu", grad_norm, torch.float64))
        theirs = learn(make("cpu", grad_norm))
    with select.backend(way):
        ours = learn(make(device, grad_norm))
    assert len(ours) == len(theirs) == len(truth) == 4 * len(SHAPES) + STEPS
    for kind, own in {
        "parameters": slice(len(SHAPES)),
        "first moments": slice(len(SHAPES), -STEPS, 3),
        "second moments": slice(len(SHAPES) + 1, -STEPS, 3),
        "step counts": slice(len(SHAPES) + 2, -STEPS, 3),
        "norms": slice(-STEPS, None),
    }.items():
        a, b, c = (torch.cat([x.cpu().flatten() for x in r[own]]) for r in (ours, theirs, truth))
        assert_2x(a, b, c.double(), kind)


@needs_triton
@pytest.mark.parametrize("device", DEVICES)
def test_in_several_launches(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """More tensors than a launch has room for: the same bits."""
    from pwm_fast.kernels import adam

    with select.backend("triton"):
        once = learn(make(device))
        monkeypatch.setattr(adam, "MOST", 2)
        parts = learn(make(device))
    assert all(torch.equal(a, b) for a, b in zip(once, parts, strict=True))


@pytest.mark.parametrize(("way", "device"), WAYS)
@pytest.mark.parametrize("bad", ["nan", "inf", "nan loss", "inf loss"])
def test_what_is_not_finite_is_skipped(bad: str, way: str, device: str) -> None:
    """Everything stays as it is, also at first; the next step is as if nothing had been."""
    with select.backend(way):
        optimizer, clean = make(device), make(device)
        for done in range(2):
            before = state_of(optimizer) if done else None
            loss = torch.ones((), device=device)
            grads = gradients(9, optimizer)
            if "loss" in bad:
                loss *= float(bad.split()[0])
            else:
                grads[2][40, 102] = float(bad)
            for skips in (1, 2):
                norm = optimizer.apply(loss, [g.clone() for g in grads])
                assert bool(norm.isfinite()) == ("loss" in bad)
                assert int(optimizer.skipped) == skips + 2 * done
                assert int(optimizer.skipped_in_a_row) == skips
            if before is not None:
                after = state_of(optimizer)
                assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
            ours, theirs = learn(optimizer, 1), learn(clean, 1)
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
            assert int(optimizer.skipped_in_a_row) == 0


@pytest.mark.parametrize(("way", "device"), WAYS)
@pytest.mark.parametrize("scale", [1e-30, 1e18, 1e19, 1e30, 3e37])
def test_takes_the_steps_that_torch_takes(scale: float, way: str, device: str) -> None:
    """Gradients of any finite size, whose norm float32 may not hold; and the same clipping."""
    kept, norms = [], []
    for backend in (way, "reference"):
        optimizer = make(device)
        optimizer.keep_gradients = True
        grads = [scale * g for g in gradients(0, optimizer)]
        with select.backend(backend):
            norms.append(optimizer.apply(torch.ones((), device=device), grads))
        assert int(optimizer.skipped) == 0
        kept.append([p.grad for p in optimizer.params])
    torch.testing.assert_close(norms[0], norms[1], rtol=1e-6, atol=0.0)
    torch.testing.assert_close(kept[0], kept[1], rtol=1e-5, atol=1e-37)


@pytest.mark.parametrize(("way", "device"), WAYS)
def test_kept_gradients_are_clipped(way: str, device: str) -> None:
    with select.backend(way):
        optimizer, other = make(device), make(device)
        optimizer.keep_gradients = True
        ours, theirs = learn(optimizer, 1), learn(other, 1)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    kept = [p.grad for p in optimizer.params if p.grad is not None]
    assert len(kept) == len(SHAPES)
    square = torch.stack([g.double().square().sum() for g in kept]).sum().item()
    assert square == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize(("way", "device"), WAYS)
def test_goes_on_from_the_state_of_torchs_adam_and_back(way: str, device: str) -> None:
    """A checkpoint says nothing of who took its steps; step counts are one a parameter."""
    optimizer, other = make(device), make(device)
    with select.backend("reference"):
        learn(other)
        learn(optimizer, 1)
    with select.backend(way):
        loss = torch.ones((), device=device)
        optimizer.apply(loss, gradients(1, optimizer))
        restored = make(device)
        restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for p, q in zip(restored.params, optimizer.params, strict=True):
            p.data.copy_(q.data)
        for each in (optimizer, restored):
            each.apply(loss, gradients(2, each))
    for a, b, c in zip(*map(state_of, (optimizer, restored, other)), strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c, rtol=1e-5, atol=1e-6)
    with select.backend("reference"):
        restored.apply(loss, gradients(3, restored))
    steps = [float(restored.adam.state[p]["step"]) for p in restored.params]
    assert steps == [4.0] * len(SHAPES)


@needs_triton
def test_strided_tensors_are_refused() -> None:
    from pwm_fast.kernels import adam

    x = [torch.zeros(3, 2).t()]
    group = Group([torch.zeros(2, 3)], x, x, x, torch.zeros(1), torch.zeros(()))
    counts = torch.zeros((), dtype=torch.int64)
    with pytest.raises(ValueError, match=r"grads\[0\] of group 0 must be contiguous"):
        adam.guarded_step([group], torch.zeros(4), torch.zeros(()), counts, counts)
