"""``ops.mlp`` the short way: what goes it, the same numbers as the long way, and what must not."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import pwm_fast
from pwm_fast import ops
from pwm_fast.backends import select
from pwm_fast.fused import gemm, row_program
from pwm_fast.fused.blocked_mlp import Ready
from pwm_fast.fused.layerwise_mlp import ReadyLayers
from pwm_fast.ops import Layer, direct
from tests.helpers import random_layer

pytest.importorskip("pwm_fast._C", reason="the native extension is not built")

SHORT: list[str] = []
#: What the short way ends in, and the GEMMs with which it does.
WAYS = {"blocks": (Ready, "auto"), "layers": (ReadyLayers, "torch")}


@pytest.fixture(autouse=True, params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Write down what runs this short way; nothing is known at the start."""
    kind, gemms = WAYS[request.param]
    monkeypatch.delenv(select.VARIABLE, raising=False)
    monkeypatch.setenv(gemm.VARIABLE, gemms)
    monkeypatch.setattr(direct, "_KNOWN", {})
    for name in ("forward", "backward"):
        monkeypatch.setattr(kind, name, noted(name, getattr(kind, name)))
    SHORT.clear()
    yield request.param


def noted(name: str, function):
    def run(*args, **kwargs):
        out = function(*args, **kwargs)
        SHORT.append(name)
        return out

    return run


def short() -> list[str]:
    """What ran the short way since this was asked last."""
    found = [*SHORT]
    SHORT.clear()
    return found


def network(members: tuple[int, ...] = (), requires_grad: bool = False) -> list[Layer]:
    layers = [
        random_layer(7, 33, members=members, act="mish", dtype=torch.float32),
        random_layer(33, 5, members=members, norm=False, dtype=torch.float32),
    ]
    if requires_grad:
        layers = [with_tensors(p, lambda t: t.detach().requires_grad_()) for p in layers]
    return layers


def with_tensors(layer: Layer, change) -> Layer:
    return layer._replace(
        **{n: change(t) for n, t in zip(layer._fields[:4], layer[:4], strict=True) if t is not None}
    )


def gradients(y: Tensor, layers: list[Layer], *inputs: Tensor) -> list[Tensor]:
    leaves = [t for p in layers for t in p[:4] if t is not None and t.requires_grad]
    leaves += [x for x in inputs if x.requires_grad]
    return list(torch.autograd.grad(y.square().sum(), leaves)) if leaves else []


@pytest.mark.parametrize("members", [(), (3,)], ids=["one", "ensemble"])
@pytest.mark.parametrize("rows", [(1,), (12,), (2, 3)], ids=str)
@pytest.mark.parametrize("order", ["norm_act", "act_norm"])
def test_same_bits(order: ops.Order, rows: tuple[int, ...], members: tuple[int, ...]) -> None:
    """Values and every gradient are those of the long way, from the first call on."""
    layers = network(members, requires_grad=True)
    a, b = torch.randn(*rows, 4, requires_grad=True), torch.randn(*rows, 3)
    for inputs in ([torch.cat((a, b), -1).detach()], [a, b]):
        first = ops.mlp(inputs, layers, order=order, backend="native")
        expected = [first, *gradients(first, layers, *inputs)]
        assert short() == []
        again = ops.mlp(inputs, layers, order=order)
        found = [again, *gradients(again, layers, *inputs)]
        assert short() == ["forward", "backward"]
        with torch.no_grad():
            found.append(ops.mlp(inputs, layers, order=order))
        assert short() == ["forward"]
        for x, y in zip(found, [*expected, first], strict=True):
            assert torch.equal(x, y)


def test_some_gradients() -> None:
    """A gradient that nobody asked for is none; those of inputs alone need no others."""
    layers = network()
    x = torch.randn(12, 7, requires_grad=True)
    y = ops.mlp([x], layers)
    y.sum().backward()
    assert short() == ["forward", "backward"] and x.grad is not None
    layers[1].weight.requires_grad_()
    ops.mlp([x.detach()], layers).sum().backward()
    assert short() == ["forward", "backward"]
    assert layers[1].weight.grad is not None and layers[0].weight.grad is None


def goes_short(*args, **kwargs) -> bool:
    """Whether a call goes the short way, as one like it after it."""
    ways = []
    for _ in range(2):
        short()
        ops.mlp(*args, **kwargs)
        ways.append(short() == ["forward"])
    assert ways[0] == ways[1]
    return ways[0]


def test_settings_hold(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a backend is chosen by is looked at in every call."""
    x, layers = torch.randn(12, 7), network()
    assert goes_short([x], layers)
    assert not goes_short([x], layers, backend="torch")
    assert not goes_short([x], layers, backend="native")
    with pwm_fast.backend("reference"):
        assert not goes_short([x], layers)
    with pwm_fast.backend("native"):
        assert goes_short([x], layers)
    with pwm_fast.precision("bf16"):
        assert not goes_short([x], layers)
    with ops.algebra(centre=True):
        assert not goes_short([x], layers)
    other = next(gemms for name, (_, gemms) in WAYS.items() if name != way)
    for name, value in ((select.VARIABLE, "reference"), (gemm.VARIABLE, other)):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert not goes_short([x], layers)
    with torch.autocast("cpu"):
        assert not goes_short([x], layers)
    assert goes_short([x], layers)


def test_observers_are_told() -> None:
    x, layers = torch.randn(12, 7), network()
    assert goes_short([x], layers)
    chosen: list[str] = []
    with select.observed(lambda operation, *_: chosen.append(operation)):
        ops.mlp([x], layers)
    assert chosen == ["mlp"]
    assert pwm_fast.explain(ops.mlp, [x], layers).selections


class Odd(Tensor):
    """A subclass that says what it does."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return super().__torch_function__(func, types, args, kwargs or {})


def test_other_tensors() -> None:
    """Tensors that are not what they seem go the long way, and are computed rightly."""
    x, layers = torch.randn(12, 7), network()
    expected = ops.mlp([x], layers, backend="reference")
    assert goes_short([x], layers)
    negative = torch.view_as_complex(torch.stack((torch.zeros(12, 7), -x), -1)).conj().imag
    assert negative.is_neg()
    for same in (
        negative,
        torch._neg_view(-x),
        x.as_subclass(Odd),
        x.t().contiguous().t(),
        torch.stack((x, x), -1)[..., 0],
    ):
        torch.testing.assert_close(ops.mlp([same], layers).as_subclass(Tensor), expected)
    with torch.inference_mode():
        torch.testing.assert_close(ops.mlp([x.clone()], layers), expected)
        made = x.clone()
    wanted = network(requires_grad=True)
    y = ops.mlp([made], wanted)
    assert len(gradients(ops.mlp([made], wanted), wanted)) == 6 and y.requires_grad
    mapped = torch.vmap(lambda row: ops.mlp([row], layers))(x)
    torch.testing.assert_close(mapped, expected)
    turned = layers[0]._replace(weight=layers[0].weight.t().contiguous().t())
    torch.testing.assert_close(ops.mlp([x], [turned, layers[1]]), expected)
    double = [with_tensors(p, Tensor.double) for p in layers]
    assert ops.mlp([x.double()], double).dtype == torch.float64
    assert ops.mlp([torch.randn(0, 7)], layers).shape == (0, 5)


def test_errors_stay() -> None:
    """A wrong call is refused as ever, after right ones like it."""
    x, layers = torch.randn(12, 7), network()
    assert goes_short([x], layers)
    with pytest.raises(ValueError, match=r"layers\[0\].weight takes 7 inputs, but 6 arrive"):
        ops.mlp([x[:, :6]], layers)
    with pytest.raises(ValueError, match=r"layers\[0\].bias must be \[33\]"):
        ops.mlp([x], [layers[0]._replace(bias=torch.randn(32)), layers[1]])
    with pytest.raises(ValueError, match="act must be one of"):
        ops.mlp([x], [layers[0]._replace(act="relu"), layers[1]])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"inputs\[0\] must be a torch.Tensor"):
        ops.mlp([7], layers)  # type: ignore[list-item]
    with pytest.raises(ValueError, match="must hold at least one"):
        ops.mlp([x], [])
    with pytest.raises(ValueError, match="leading shape"):
        ops.mlp([x[:, :4], x[:11, 4:]], layers)


def test_derivatives_of_the_gradient() -> None:
    """As the operator does, the short way refuses second derivatives and batched gradients."""
    layers = network(requires_grad=True)
    x = torch.randn(12, 7, requires_grad=True)
    ops.mlp([x], layers)
    y = ops.mlp([x], layers)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="has no second derivative"):
        dx.sum().backward()
    y = ops.mlp([x], layers)
    with pytest.raises(RuntimeError, match="is_grads_batched"):
        torch.autograd.grad(y, x, torch.randn(3, *y.shape), is_grads_batched=True)


def test_saved_tensors() -> None:
    """A parameter that was written to after the forward pass is an error of autograd."""
    layers = network(requires_grad=True)
    x = torch.randn(12, 7)
    ops.mlp([x], layers)
    y = ops.mlp([x], layers)
    with torch.no_grad():
        layers[1].weight.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_wide_layers(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They run block by block on a few rows alone: how few depends on how wide they are."""
    monkeypatch.setenv(gemm.VARIABLE, "auto")
    monkeypatch.setattr(gemm, "_WIDEST", 32)
    few, some = row_program.FEW, row_program.FEW_WIDE
    for widest, most in ((32, few), (33, some)):
        monkeypatch.setattr(row_program, "WIDE", widest)
        monkeypatch.setattr(direct, "_KNOWN", {})
        layers = network()
        for rows in (few, few + 1, some, some + 1) * 2:
            blocks = rows <= most
            assert goes_short([torch.randn(rows, 7)], layers) == (blocks == (way == "blocks"))


def test_the_choice_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    original = direct.remember
    monkeypatch.setattr(direct, "remember", lambda *a: made.append(1) or original(*a))
    layers = network()
    for rows, calls in ((20, 1), (4, 2), (20, 2), (4, 2)):
        ops.mlp([torch.randn(rows, 7)], layers)
        assert len(made) == calls
    with ops.algebra(fold=True):  # another kind of call
        ops.mlp([torch.randn(20, 7)], layers)
    assert len(made) == 3


def test_few_kinds_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "_LIMIT", 3)
    layers = network()
    for columns in ([7], [6, 1], [5, 2], [4, 3], [3, 4]):
        ops.mlp(list(torch.randn(12, 7).split(columns, 1)), layers)
        assert len(direct._KNOWN) <= 3
