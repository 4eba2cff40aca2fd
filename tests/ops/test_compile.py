"""torch.compile(fullgraph=True) around the operations: the same values and gradients as eager."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import vmap

from pwm_fast import ops
from pwm_fast.backends import select
from pwm_fast.ops import Layer
from tests.helpers import random_layer, tensors_of

BACKENDS = ("auto", "native", "torch", "reference")
D, A, H = 8, 2, 3


def net(widths: list[int], *, members: tuple[int, ...] = ()) -> list[Layer]:
    layers = [
        random_layer(k, n, "mish", members=members, dtype=torch.float32)
        for k, n in pairwise(widths[:-1])
    ]
    layers.append(random_layer(*widths[-2:], norm=False, members=members, dtype=torch.float32))
    for layer in layers:
        for x in tensors_of(layer):
            x.requires_grad_()
    return layers


class Function:
    """A function of latents and actions whose parameters are known."""

    def __init__(self, name: str, backend: str) -> None:
        self.backend = backend
        self.call: Callable[[Tensor, Tensor], Tensor] = getattr(self, f"_{name}")
        self.velocity = net([D + A + 1, 9, 7, D])
        self.flow = ops.Flow(self.velocity)
        self.policy = ops.Policy(net([D, 7, A]), torch.rand(A))
        self.heads = ops.Heads(net([D + A, 7, 11]), value=net([D, 7, 1], members=(2,)))

    def parameters(self) -> list[Tensor]:
        used = [*self.velocity, *self.policy.layers, *self.heads.reward, *(self.heads.value or ())]
        return [x for layer in used for x in tensors_of(layer)]

    def _mlp(self, z: Tensor, a: Tensor) -> Tensor:
        return ops.mlp([z, a], self.heads.reward, backend=self.backend)

    def _flow_step(self, z: Tensor, a: Tensor) -> Tensor:
        return ops.flow_step(z, a, self.velocity, backend=self.backend)

    def _latent_rollout(self, z: Tensor, a: Tensor) -> Tensor:
        actions = torch.stack([a, 0.5 * a, -a])
        return ops.latent_rollout(z, actions, self.flow, backend=self.backend)

    def _imagine(self, z: Tensor, a: Tensor) -> Tensor:
        noise = torch.stack([a, 0.5 * a, -a])
        out = ops.imagine(z, self.policy, self.flow, self.heads, noise=noise, backend=self.backend)
        assert out.value is not None
        return out.z.sum(-1) + out.value + out.reward.sum(0)


def latents(*rows: int) -> tuple[Tensor, Tensor]:
    return torch.randn(*rows, D, requires_grad=True), torch.randn(*rows, A)


def assert_same(function: Function, compiled: Callable, z: Tensor, a: Tensor) -> None:
    """Values and all gradients; what both run are the same operators, so to the bit.

    Not so on the reference, on which an imagined reward is decoded where the backend has no kernel.
    """
    exact = {"atol": 0.0, "rtol": 0.0}
    decoded = function.backend == "torch" and function.call == function._imagine
    close = {} if function.backend == "reference" or decoded else exact
    ours, theirs = compiled(z, a), function.call(z, a)
    torch.testing.assert_close(ours, theirs, **close)
    inputs, weight = [z, *function.parameters()], torch.randn_like(ours)
    grads = [
        torch.autograd.grad((y * weight).sum(), inputs, allow_unused=True) for y in (ours, theirs)
    ]
    for got, expected in zip(*grads, strict=True):
        assert (got is None) == (expected is None)
        if expected is not None:
            # What is between the operators may be summed in another order.
            rtol = 1e-4 if decoded else 1e-5
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=rtol)


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch._dynamo.reset()


def usable(backend: str) -> str:
    if backend == "native":
        pytest.importorskip("pwm_fast._C", reason="the native extension is not built")
    return backend


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        (name, backend)
        for name in ("mlp", "flow_step", "latent_rollout", "imagine")
        for backend in BACKENDS
        # Dynamo unrolls the reference for minutes; auto is native by another name.
        if backend in ("native", "torch") or name == "mlp"
    ],
)
def test_compiled_is_eager(name: str, backend: str) -> None:
    """Batches of changing sizes go through one dynamic graph after the first two."""
    function = Function(name, usable(backend))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function.call, fullgraph=True, backend=counter)
    for batch in (5, 6, 7, 2):
        assert_same(function, compiled, *latents(batch))
    assert counter.frame_count <= 2
    with torch.no_grad():
        z, a = latents(4)
        torch.testing.assert_close(compiled(z, a), function.call(z, a))


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        ("mlp", "auto"),  # which is native by another name
        ("mlp", "torch"),
        ("flow_step", "native"),
        ("flow_step", "torch"),
    ],
)
def test_ranks_without_a_reset(name: str, backend: str) -> None:
    """First 2-D, then 3-D inputs, then 2-D ones again."""
    function = Function(name, usable(backend))
    compiled = torch.compile(function.call, fullgraph=True, backend="aot_eager")
    for rows in ((5,), (2, 5), (3, 4), (6,)):
        assert_same(function, compiled, *latents(*rows))


def test_inductor() -> None:
    """The default compiler, once."""
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("torch.compile needs a C++ compiler")
    function = Function("imagine", "auto")

    def loss(z: Tensor, a: Tensor) -> Tensor:
        return torch.tanh(function.call(z, a) * 0.1)

    z, a = latents(3)
    compiled = torch.compile(loss, fullgraph=True)(z, a)
    expected = loss(z, a)
    torch.testing.assert_close(compiled, expected)
    inputs = [z, *function.parameters()]
    for got, wanted in zip(
        torch.autograd.grad(compiled.sum(), inputs),
        torch.autograd.grad(expected.sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)


def test_a_policy_step_by_step() -> None:
    """With a deviation for each state and a mask each network is an operator at each step."""
    policy = ops.Policy(net([D, 7, 2 * A]), None, "norm_act")
    dynamics, heads = ops.LatentMLP(net([D + A, 9, D])), ops.Heads(net([D + A, 1]))

    def call(z: Tensor, a: Tensor) -> Tensor:
        noise = torch.stack([a, 0.5 * a])
        return ops.imagine(z, policy, dynamics, heads, noise=noise, action_mask=a > 0.0).z

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(call, fullgraph=True, backend=counter)
    inputs = [x for layer in (*policy.layers, *dynamics.net) for x in tensors_of(layer)]
    for batch in (5, 3):
        z, a = latents(batch)
        for x in (z, a):  # else the second batch is compiled anew
            torch._dynamo.mark_dynamic(x, 0)
        ours, expected = compiled(z, a), call(z, a)
        torch.testing.assert_close(ours, expected, atol=0.0, rtol=0.0)
        grads = [torch.autograd.grad(y.square().sum(), [z, *inputs]) for y in (ours, expected)]
        for got, wanted in zip(*grads, strict=True):
            torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
    assert counter.frame_count == 1


def test_vmap_within() -> None:
    """A mapped operation inside a compiled function."""
    function = Function("mlp", "auto")
    compiled = torch.compile(vmap(function.call), fullgraph=True, backend="aot_eager")
    z, a = latents(2, 5)
    torch.testing.assert_close(compiled(z, a), function.call(z, a))


def test_context_is_followed() -> None:
    """A backend chosen by the context is part of what is compiled."""
    usable("native")
    function = Function("mlp", "auto")
    function.backend = None  # type: ignore[assignment]
    compiled = torch.compile(function.call, fullgraph=True, backend="aot_eager")
    z, a = latents(5)
    for name in ("reference", "native", "torch"):
        with select.backend(name):
            expected = function.call(z, a)
            got = compiled(z, a)
        torch.testing.assert_close(got, expected, atol=0.0, rtol=0.0)


def test_export() -> None:
    """torch.export sees one operator with fixed constants."""
    function = Function("mlp", "torch")

    class Module(torch.nn.Module):
        def forward(self, z: Tensor, a: Tensor) -> Tensor:
            return function.call(z, a)

    z, a = latents(5)
    with torch.no_grad():
        program = torch.export.export(Module(), (z.detach(), a))
        called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
        assert "pwm_fast.mlp.default" in called
        torch.testing.assert_close(program.module()(z.detach(), a), function.call(z, a))
