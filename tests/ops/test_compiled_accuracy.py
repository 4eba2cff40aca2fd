"""What the default compiler makes of elementwise formulas is as accurate as eager PyTorch.

Nearly all the time goes into starting a C++ compiler, so all formulas of a dtype are compiled at
once. Each has inputs of a length of its own, which keeps it in a loop of its own: the compiler
would fuse loops of one length, and choose for all of them whether they are vectorised.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pwm_fast import ops
from pwm_fast.backends import select

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None,
    reason="torch.compile needs a C++ compiler",
)


def decode(x: Tensor) -> Tensor:
    """Of two bins: the expectation is ``10 tanh(x)``."""
    with select.backend("reference"):
        return ops.two_hot_decode(torch.stack([-x, x], -1))


def decoded(x: Tensor) -> Tensor:
    value = torch.softmax(torch.stack([-x, x], -1), -1) @ x.new_tensor([-10.0, 10.0])
    # Not sign(x) expm1(|x|), whose slope at 0 is 0.
    return value.clamp_min(0.0).expm1() - torch.relu(-value).expm1()


def encode(x: Tensor) -> Tensor:
    return ops.two_hot_encode(x, 5, -3.0, 3.0)[..., 2:]


def encoded(x: Tensor) -> Tensor:
    y = (x.sign() * x.abs().log1p()).clamp(-3.0, 3.0) / 1.5
    return torch.stack([(1.0 - (y - i).abs()).clamp_min(0.0) for i in range(3)], -1)


FORMULAS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "symexp": (ops.symexp, lambda x: x.sign() * x.abs().expm1()),
    "symlog": (ops.symlog, lambda x: x.sign() * x.abs().log1p()),
    "mish": (ops.mish, lambda x: x * torch.tanh(torch.nn.functional.softplus(x))),
    "two_hot_decode": (decode, decoded),
    "two_hot_encode": (encode, encoded),
}


def inputs(name: str, dtype: torch.dtype) -> Tensor:
    """From 1e-30 to 80 of both signs, and 0; whole vectors of the CPU's and a rest."""
    x = torch.logspace(-30, 1.9, 1003 + 3 * list(FORMULAS).index(name), dtype=torch.float64)
    x = torch.cat([x, -x, torch.zeros(1)]).to(dtype)
    return x[x.abs() < 11.0] if dtype == torch.float16 else x  # beyond, symexp overflows


@functools.cache
def compiled(dtype: torch.dtype) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Inputs of all formulas, and their compiled values and slopes."""
    xs = [inputs(name, dtype).requires_grad_() for name in FORMULAS]
    assert len({len(x) for x in xs}) == len(FORMULAS)

    def all_of_them(*xs: Tensor) -> list[Tensor]:
        return [call(x) for (call, _), x in zip(FORMULAS.values(), xs, strict=True)]

    torch.compiler.reset()
    ys = torch.compile(all_of_them, fullgraph=True)(*xs)
    slopes = torch.autograd.grad(ys, xs, [torch.ones_like(y) for y in ys])
    return dict(zip(FORMULAS, zip(xs, ys, slopes, strict=True), strict=True))


def error(name: str, got: Tensor, truth: Tensor) -> Tensor:
    """Of each number relative to itself; of a two-hot code or mean, which cancels, to the largest.

    Below a dtype's normal numbers there are fewer digits.
    """
    tiny = torch.finfo(got.dtype).tiny
    size = truth.abs().max() if name.startswith("two_hot") else truth.abs().clamp_min(tiny)
    return (got.double() - truth).abs() / size


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FORMULAS)
def test_relative_error(name: str, dtype: torch.dtype) -> None:
    """Each value and slope, large or small, is right relative to itself."""
    plain = FORMULAS[name][1]
    x, y, slope = compiled(dtype)[name]
    exact = x.detach().double().requires_grad_()
    own, truth = plain(x), plain(exact)
    weight = torch.ones_like(truth)
    (own_slope,) = torch.autograd.grad(own, x, weight.to(dtype))
    (true_slope,) = torch.autograd.grad(truth, exact, weight)
    assert y.dtype == dtype and slope.dtype == dtype
    eps = torch.finfo(dtype).eps
    floor = 1e-13 if dtype == torch.float64 else 4.0 * eps  # the truth is float64 itself
    kept = exact.detach().abs() > 0.0  # sign(x) has no slope at 0
    pairs = [(y, own, truth), (slope, own_slope, true_slope)]
    if name == "two_hot_encode":  # rounding moves its kinks
        pairs.pop()
    for ours, theirs, right in pairs:
        allowed = 2.0 * error(name, theirs, right)[kept].nan_to_num(0.0).max() + floor
        found = error(name, ours, right)[kept].max()
        assert found <= allowed, f"{name}: {found:.2e} exceeds {allowed:.2e}"
    if name == "symexp":
        assert error(name, y, truth).max() <= 4.0 * eps
