"""Symlog and two-hot heads against their formulas in numpy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from pwm_fast import ops

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
BINS = [(101, -10.0, 10.0), (2, 0.0, 1.0), (7, -1.5, 0.3), (8, 0.0, 0.7)]


def np_symlog(x: np.ndarray) -> np.ndarray:
    return np.sign(x) * np.log(1.0 + np.abs(x))


def np_symexp(x: np.ndarray) -> np.ndarray:
    return np.sign(x) * (np.exp(np.abs(x)) - 1.0)


def np_two_hot(x: float, bins: int, vmin: float, vmax: float) -> np.ndarray:
    """Share the value between its neighbours among the centres, by distance."""
    centres = [vmin + i * (vmax - vmin) / (bins - 1) for i in range(bins)]
    out = np.zeros(bins)
    if x <= centres[0]:
        out[0] = 1.0
    elif x >= centres[-1]:
        out[-1] = 1.0
    else:
        above = next(i for i, centre in enumerate(centres) if centre > x)
        width = centres[above] - centres[above - 1]
        out[above - 1] = (centres[above] - x) / width
        out[above] = (x - centres[above - 1]) / width
    return out


def targets(vmin: float, vmax: float) -> Tensor:
    """Inside, outside, at the ends, and exactly at zero."""
    inside = vmin + (vmax - vmin) * torch.rand(20, dtype=torch.float64)
    outside = torch.tensor([vmin - 2.0, vmin, 0.0, vmax, vmax + 1e3], dtype=torch.float64)
    return torch.cat((inside, outside))


# symlog, symexp


def test_symlog_and_symexp_values() -> None:
    x = torch.cat((3.0 * torch.randn(100, dtype=torch.float64), torch.tensor([0.0, 1e-3, -8.0])))
    np.testing.assert_allclose(ops.symlog(x).numpy(), np_symlog(x.numpy()), rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(ops.symexp(x).numpy(), np_symexp(x.numpy()), rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(ops.symexp(ops.symlog(x)), x, rtol=1e-12, atol=1e-15)


def test_symlog_and_symexp_keep_tiny_values() -> None:
    """Near 0 both are the identity to first order; log(1 + x) and exp(x) - 1 would return 0."""
    x = torch.tensor([1e-20, -1e-20, 1e-9])
    torch.testing.assert_close(ops.symlog(x), x, rtol=1e-6, atol=0.0)
    torch.testing.assert_close(ops.symexp(x), x, rtol=1e-6, atol=0.0)


def test_symlog_and_symexp_of_special_values() -> None:
    x = torch.tensor([math.inf, -math.inf, math.nan, 0.0])
    for op in (ops.symlog, ops.symexp):
        torch.testing.assert_close(op(x), x, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", [ops.symlog, ops.symexp], ids=lambda f: f.__name__)
def test_slope_at_zero_is_one(op, dtype: torch.dtype) -> None:
    """Exactly: sign(x) * log1p(|x|) would have slope 0 there, and a zero reward no gradient."""
    x = torch.tensor([0.0, -0.0], dtype=dtype, requires_grad=True)
    (slope,) = torch.autograd.grad(op(x).sum(), x)
    assert slope.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("op", [ops.symlog, ops.symexp], ids=lambda f: f.__name__)
def test_symlog_and_symexp_derivatives(op) -> None:
    """The first one at 0 too; the second jumps there and is checked elsewhere."""
    x = torch.tensor([[0.0, 0.4, -1.3], [2.0, -2.5, 0.1]], dtype=torch.float64, requires_grad=True)
    assert gradcheck(op, (x,))
    away = x.detach()[:, 1:].clone().requires_grad_()
    assert gradgradcheck(op, (away,))


# two-hot


@pytest.mark.parametrize(("bins", "vmin", "vmax"), BINS)
@pytest.mark.parametrize("transform", [False, True])
def test_encode_value(bins: int, vmin: float, vmax: float, transform: bool) -> None:
    space = targets(vmin, vmax)
    x = ops.symexp(space.clamp(-20.0, 20.0)) if transform else space
    ours = ops.two_hot_encode(x, bins, vmin, vmax, transform=transform)
    values = np_symlog(x.numpy()) if transform else x.numpy()
    expected = np.stack([np_two_hot(v, bins, vmin, vmax) for v in values])
    np.testing.assert_allclose(ours.numpy(), expected, rtol=0.0, atol=1e-11)


@pytest.mark.parametrize(("bins", "vmin", "vmax"), BINS)
def test_encode_at_the_centres_is_one_hot(bins: int, vmin: float, vmax: float) -> None:
    centres = torch.linspace(vmin, vmax, bins, dtype=torch.float64)
    ours = ops.two_hot_encode(centres, bins, vmin, vmax, transform=False)
    torch.testing.assert_close(ours, torch.eye(bins, dtype=torch.float64), rtol=0.0, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("bins", "vmin", "vmax"), [*BINS, (72, 0.0, 1.1), (102, -0.1, 0.6), (129, -0.1, 0.6)]
)
def test_encode_is_a_distribution(bins: int, vmin: float, vmax: float, dtype: torch.dtype) -> None:
    """Never negative, at most two entries, sum 1; rounding must not pass the last bin."""
    x = targets(vmin, vmax).to(dtype).reshape(5, 5)
    p = ops.two_hot_encode(x, bins, vmin, vmax, transform=False)
    assert p.dtype == dtype
    assert p.shape == (5, 5, bins)
    assert p.min() >= 0.0
    assert ((p > 0.0).sum(-1) <= 2).all()
    assert ((p.double().sum(-1) - 1.0).abs() <= torch.finfo(dtype).eps).all()


def test_encode_of_nan_is_nan() -> None:
    """A NaN reward shows as NaN; it must not become an index out of bounds, fatal on a GPU."""
    p = ops.two_hot_encode(torch.tensor([math.nan, 1.0]))
    assert p[0].isnan().any()
    assert p[1].isfinite().all()


@pytest.mark.parametrize(("bins", "vmin", "vmax"), BINS)
@pytest.mark.parametrize("transform", [False, True])
def test_decode_value(bins: int, vmin: float, vmax: float, transform: bool) -> None:
    logits = 2.0 * torch.randn(3, 4, bins, dtype=torch.float64)
    centres = vmin + np.arange(bins) * (vmax - vmin) / (bins - 1)
    p = np.exp(logits.numpy())
    expected = (p * centres).sum(-1) / p.sum(-1)
    ours = ops.two_hot_decode(logits, vmin, vmax, transform=transform)
    expected = np_symexp(expected) if transform else expected
    np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("transform", [False, True])
def test_decode_inverts_encode(transform: bool) -> None:
    """The expectation over a two-hot code is the value, clamped to the range."""
    x = torch.tensor([-30.0, -3.0, -0.01, 0.0, 0.4, 2.5, 7.0, 500.0], dtype=torch.float64)
    logits = ops.two_hot_encode(x, 31, -3.0, 3.0, transform=transform).log()
    ends = ops.symexp(torch.tensor([-3.0, 3.0])) if transform else torch.tensor([-3.0, 3.0])
    expected = x.clamp(ends[0].item(), ends[1].item())
    ours = ops.two_hot_decode(logits, -3.0, 3.0, transform=transform)
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-12)


def test_decode_of_equal_logits_is_the_middle() -> None:
    """A zero-initialised head starts at 0, the middle of its range."""
    torch.testing.assert_close(ops.two_hot_decode(torch.zeros(3, 101)), torch.zeros(3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_decode_centres_are_rounded_once(dtype: torch.dtype) -> None:
    """A head that is certain of a bin returns its centre, off by the dtype's rounding alone."""
    logits = torch.full((101, 101), -1e4).fill_diagonal_(0.0).to(dtype)
    centres = torch.linspace(-10.0, 10.0, 101, dtype=torch.float64)
    ours = ops.two_hot_decode(logits, transform=False).double()
    torch.testing.assert_close(ours, centres, rtol=0.51 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize(("bins", "vmin", "vmax"), BINS)
@pytest.mark.parametrize("transform", [False, True])
def test_cross_entropy_value(bins: int, vmin: float, vmax: float, transform: bool) -> None:
    x = targets(vmin, vmax)
    logits = 2.0 * torch.randn(len(x), bins, dtype=torch.float64)
    ours = ops.two_hot_cross_entropy(logits, x, vmin, vmax, transform=transform)
    values = np_symlog(x.numpy()) if transform else x.numpy()
    log_q = logits.numpy() - np.log(np.exp(logits.numpy()).sum(-1, keepdims=True))
    expected = [
        -np.dot(np_two_hot(v, bins, vmin, vmax), row) for v, row in zip(values, log_q, strict=True)
    ]
    np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("scale", [1.0, 10.0])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_cross_entropy_keeps_the_digits_of_weights(backend: str, scale: float) -> None:
    """Near a bin the loss is little but a weight, which a float32 position leaves few digits of."""
    x = (0.2 * torch.arange(-40, 41) + 1e-4 * torch.randn(81, dtype=torch.float64)).float()
    codes = ops.two_hot_encode(x.double(), 101, -10.0, 10.0, transform=False)
    logits = (scale * (codes.clamp_min(1e-6).log() + torch.randn(81, 101))).float()
    ours = ops.two_hot_cross_entropy(logits, x, transform=False, backend=backend)
    wanted = -(codes * logits.double().log_softmax(-1)).sum(-1)
    plain = -(codes.float() * logits.log_softmax(-1)).sum(-1)
    error, allowed = (ours - wanted).abs().max(), (plain - wanted).abs().max()
    assert error <= 2 * allowed


def test_cross_entropy_gradient() -> None:
    """By the logits: softmax minus the code, for any leading shape."""
    x = torch.randn(2, 3, dtype=torch.float64)
    logits = torch.randn(2, 3, 11, dtype=torch.float64, requires_grad=True)
    loss = ops.two_hot_cross_entropy(logits, x, -2.0, 2.0)
    assert loss.shape == x.shape
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    expected = logits.detach().softmax(-1) - ops.two_hot_encode(x, 11, -2.0, 2.0)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-14)


def test_cross_entropy_of_large_logits_is_finite() -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0]])
    loss = ops.two_hot_cross_entropy(logits, torch.tensor([0.0]), -1.0, 1.0)
    torch.testing.assert_close(loss, torch.tensor([2e4]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtype_is_kept(dtype: torch.dtype) -> None:
    x, logits = torch.randn(3, dtype=dtype), torch.randn(3, 9, dtype=dtype)
    assert ops.symlog(x).dtype == ops.symexp(x).dtype == dtype
    assert ops.two_hot_encode(x, 9).dtype == dtype
    assert ops.two_hot_decode(logits).dtype == dtype
    assert ops.two_hot_cross_entropy(logits, x).dtype == dtype


@pytest.mark.parametrize("transform", [False, True])
def test_two_hot_derivatives(transform: bool) -> None:
    """In values (between centres, where the code is smooth) and in logits."""
    x = torch.tensor([[0.13, -0.58], [0.81, -0.3]], dtype=torch.float64, requires_grad=True)
    logits = torch.randn(2, 2, 5, dtype=torch.float64, requires_grad=True)

    def encode(x: Tensor) -> Tensor:
        return ops.two_hot_encode(x, 5, -1.0, 1.0, transform=transform)

    def decode(logits: Tensor) -> Tensor:
        return ops.two_hot_decode(logits, -1.0, 1.0, transform=transform)

    def cross_entropy(logits: Tensor, x: Tensor) -> Tensor:
        return ops.two_hot_cross_entropy(logits, x, -1.0, 1.0, transform=transform)

    for op, inputs in ((encode, (x,)), (decode, (logits,)), (cross_entropy, (logits, x))):
        assert gradcheck(op, inputs)
        if transform or op is not encode:  # the plain code is piecewise linear
            assert gradgradcheck(op, inputs)


def test_encode_gradient_outside_the_range_is_zero() -> None:
    x = torch.tensor([-5.0, 5.0], requires_grad=True)
    p = ops.two_hot_encode(x, 5, -1.0, 1.0, transform=False)
    (gradient,) = torch.autograd.grad((p * torch.arange(5.0)).sum(), x)
    assert gradient.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("yes", [np.True_, 1])
def test_what_counts_as_true_is_true(yes: Any) -> None:
    """NumPy's own too, on every backend."""
    logits, x = torch.randn(4, 7), torch.randn(4)
    assert torch.equal(ops.two_hot_decode(logits, transform=yes), ops.two_hot_decode(logits))
    ours = ops.two_hot_cross_entropy(logits, x, transform=yes)
    assert torch.equal(ours, ops.two_hot_cross_entropy(logits, x))
