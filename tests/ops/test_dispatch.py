"""Which backend runs: argument, context, environment; what cannot run says why."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from pwm_fast import dispatch, ops
from pwm_fast.ops.fused import native
from tests.helpers import random_layer, tensors_of

needs_native = pytest.mark.skipif(
    native.why_missing() is not None, reason=f"no native kernels: {native.why_missing()}"
)


def layers(dtype: torch.dtype = torch.float32) -> list[ops.Layer]:
    return [
        random_layer(6, 9, "mish", dtype=dtype),
        random_layer(9, 4, norm=False, dtype=dtype),
    ]


def ran(monkeypatch: pytest.MonkeyPatch, call: Callable[[], object], operation: str = "mlp") -> str:
    """The backend that a call chose."""
    chosen = []
    original = dispatch.select

    def select(name: str, argument: str | None, described: dispatch.Call) -> str:
        result = original(name, argument, described)
        if name == operation:
            chosen.append(result)
        return result

    with monkeypatch.context() as patch:
        patch.setattr(dispatch, "select", select)
        call()
    assert len(chosen) == 1
    return chosen[0]


@needs_native
def test_order_of_precedence(monkeypatch: pytest.MonkeyPatch) -> None:
    x, net = torch.randn(3, 6), layers()
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)
    assert ran(monkeypatch, lambda: ops.mlp([x], net)) == "native"
    monkeypatch.setenv(dispatch.VARIABLE, "reference")
    assert ran(monkeypatch, lambda: ops.mlp([x], net)) == "reference"
    with dispatch.backend("torch"):
        assert ran(monkeypatch, lambda: ops.mlp([x], net)) == "torch"
        with dispatch.backend("auto"):
            assert ran(monkeypatch, lambda: ops.mlp([x], net)) == "native"
        assert ran(monkeypatch, lambda: ops.mlp([x], net, backend="native")) == "native"
        assert ran(monkeypatch, lambda: ops.mlp([x], net)) == "torch"
    assert ran(monkeypatch, lambda: ops.mlp([x], net)) == "reference"
    monkeypatch.setenv(dispatch.VARIABLE, "")
    assert ran(monkeypatch, lambda: ops.mlp([x], net)) == "native"


def test_context_ends_with_an_error() -> None:
    with pytest.raises(ZeroDivisionError), dispatch.backend("reference"):
        raise ZeroDivisionError
    assert dispatch.requested() == "auto"


def test_unknown_names(monkeypatch: pytest.MonkeyPatch) -> None:
    x, net = torch.randn(3, 6), layers()
    names = "auto, native, cuda, triton, torch, reference, got 'metal'"
    with pytest.raises(ValueError, match=f"backend must be one of {names}"):
        ops.mlp([x], net, backend="metal")
    with pytest.raises(ValueError, match=f"backend must be one of {names}"):
        dispatch.backend("metal").__enter__()
    monkeypatch.setenv(dispatch.VARIABLE, "metal")
    with pytest.raises(ValueError, match=f"{dispatch.VARIABLE} must be one of {names}"):
        ops.mlp([x], net)


def mixed() -> object:
    net = layers()
    net[1] = net[1]._replace(weight=net[1].weight.double(), bias=net[1].bias.double())
    return ops.mlp([torch.randn(3, 6)], net, backend="native")


def under_autocast() -> object:
    with torch.autocast("cpu", torch.bfloat16):
        return ops.mlp([torch.randn(3, 6)], layers(), backend="native")


REFUSALS: dict[str, tuple[Callable[[], object], str]] = {
    "float64": (
        lambda: ops.mlp([torch.randn(3, 6).double()], layers(torch.float64), backend="native"),
        "cannot run mlp: the tensors are torch.float64; it computes in float32",
    ),
    "dtypes": (mixed, "dtypes differ: torch.float32 and torch.float64"),
    "autocast": (under_autocast, "autocast is on, which only the reference follows"),
    "device": (
        lambda: ops.mlp(
            [torch.zeros(3, 6, device="meta")],
            [ops.Layer(*(t.to("meta") for t in tensors_of(layer))) for layer in layers()[:1]],
            backend="native",
        ),
        "the tensors are on meta; it runs on the CPU",
    ),
    "options": (
        lambda: ops.mlp(
            [torch.randn(3, 6)],
            [random_layer(6, 8, "simnorm", norm=False, dtype=torch.float32)],
            backend="native",
        ),
        "layer 0 is SimNorm without a LayerNorm before it",
    ),
}


@needs_native
@pytest.mark.parametrize("name", REFUSALS)
def test_refusals_give_the_reason(name: str) -> None:
    call, reason = REFUSALS[name]
    with pytest.raises(dispatch.BackendError, match=reason):
        call()


def test_without_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    """auto goes on with the reference; who asks for native is told."""
    monkeypatch.setattr(native, "_MISSING", "the native extension does not load (gone)")
    x, net = torch.randn(3, 6), layers()
    assert ran(monkeypatch, lambda: ops.mlp([x], net)) == "reference"
    with pytest.raises(dispatch.BackendError, match=r"does not load \(gone\)"):
        ops.mlp([x], net, backend="native")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_is_the_reference(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under autocast products are of its dtype; values and gradients are those of PyTorch."""
    x, net = torch.randn(5, 6, requires_grad=True), layers()
    with torch.autocast("cpu", dtype):
        assert ran(monkeypatch, lambda: ops.mlp([x], net)) == "reference"
        y = ops.mlp([x], net)
        first, last = net
        h = torch.nn.functional.linear(x, first.weight, first.bias)
        h = torch.nn.functional.layer_norm(h, (9,), first.ln_weight, first.ln_bias)
        expected = torch.nn.functional.linear(torch.nn.functional.mish(h), last.weight, last.bias)
    assert y.dtype == expected.dtype == dtype
    torch.testing.assert_close(y, expected, atol=2e-2, rtol=2e-2)
    (gradient,) = torch.autograd.grad(y.float().sum(), x, retain_graph=True)
    (wanted,) = torch.autograd.grad(expected.float().sum(), x)
    assert gradient.dtype == torch.float32
    torch.testing.assert_close(gradient, wanted, atol=5e-2, rtol=5e-2)


TWICE: dict[str, Callable[[Tensor, str], Tensor]] = {
    "mlp": lambda x, b: ops.mlp([x], [random_layer(8, 8, "mish", dtype=x.dtype)], backend=b),
    "flow_step": lambda x, b: ops.flow_step(
        x, x[:, :2], [random_layer(11, 8, "mish", dtype=x.dtype)], backend=b
    ),
    "layer_norm_act": lambda x, b: ops.layer_norm_act(
        x, torch.ones(8, dtype=x.dtype), torch.zeros(8, dtype=x.dtype), backend=b
    ),
    "simnorm": lambda x, b: ops.simnorm(x, backend=b),
    "two_hot_decode": lambda x, b: ops.two_hot_decode(x, backend=b),
    "two_hot_cross_entropy": lambda x, b: ops.two_hot_cross_entropy(
        x, torch.zeros(3, dtype=x.dtype), backend=b
    ),
}


@pytest.mark.parametrize("name", TWICE)
def test_differentiating_twice(name: str) -> None:
    """A first-order operator refuses; the reference does it."""
    torch_too = name in ("mlp", "flow_step")
    for backend, dtype in (("native", torch.float32), ("torch", torch.float64)):
        if backend == "native" and native.why_missing() is not None:
            continue
        refused = backend == "native" or torch_too
        x = torch.randn(3, 8, dtype=dtype, requires_grad=True)
        y = TWICE[name](x, backend).pow(3).sum()
        (first,) = torch.autograd.grad(y, x, create_graph=True)
        message = r"has no second derivative; use backend='reference'"
        with pytest.raises(RuntimeError, match=message) if refused else nullcontext():
            torch.autograd.grad(first.sum(), x)
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(1)
    y = TWICE[name](x, "reference").pow(3).sum()
    (first,) = torch.autograd.grad(y, x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    assert second.isfinite().all() and second.abs().sum() > 0
