"""Which backend runs: argument, context, environment; what cannot run says why."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import pwm_fast
from pwm_fast import ops
from pwm_fast.backends import native, select
from pwm_fast.ops.returns import discounted_return
from pwm_fast.run import installation
from tests.helpers import random_layer, tensors_of

needs_native = pytest.mark.skipif(
    native.why_missing() is not None, reason=f"no native kernels: {native.why_missing()}"
)


def layers(dtype: torch.dtype = torch.float32) -> list[ops.Layer]:
    return [
        random_layer(6, 9, "mish", dtype=dtype),
        random_layer(9, 4, norm=False, dtype=dtype),
    ]


def ran(call: Callable[[], object], operation: str = "mlp") -> str | None:
    """The backend that a call chose."""
    chosen: list[str | None] = []

    def note(name: str, asked: str, taken: str | None, described: select.Call) -> None:
        if name == operation:
            chosen.append(taken)

    with select.observed(note):
        call()
    assert len(chosen) == 1
    return chosen[0]


@needs_native
def test_order_of_precedence(monkeypatch: pytest.MonkeyPatch) -> None:
    x, net = torch.randn(3, 6), layers()
    monkeypatch.delenv(select.VARIABLE, raising=False)
    assert ran(lambda: ops.mlp([x], net)) == "native"
    monkeypatch.setenv(select.VARIABLE, "reference")
    assert ran(lambda: ops.mlp([x], net)) == "reference"
    with select.backend("torch"):
        assert ran(lambda: ops.mlp([x], net)) == "torch"
        with select.backend("auto"):
            assert ran(lambda: ops.mlp([x], net)) == "native"
        assert ran(lambda: ops.mlp([x], net, backend="native")) == "native"
        assert ran(lambda: ops.mlp([x], net)) == "torch"
    assert ran(lambda: ops.mlp([x], net)) == "reference"
    monkeypatch.setenv(select.VARIABLE, "")
    assert ran(lambda: ops.mlp([x], net)) == "native"


def test_context_ends_with_an_error() -> None:
    with pytest.raises(ZeroDivisionError), select.backend("reference"):
        raise ZeroDivisionError
    assert select.requested() == "auto"


def test_unknown_names(monkeypatch: pytest.MonkeyPatch) -> None:
    x, net = torch.randn(3, 6), layers()
    names = "auto, native, cuda, triton, torch, reference, got 'metal'"
    with pytest.raises(ValueError, match=f"backend must be one of {names}"):
        ops.mlp([x], net, backend="metal")
    with pytest.raises(ValueError, match=f"backend must be one of {names}"):
        select.backend("metal").__enter__()
    monkeypatch.setenv(select.VARIABLE, "metal")
    with pytest.raises(ValueError, match=f"{select.VARIABLE} must be one of {names}"):
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
    with pytest.raises(select.BackendError, match=reason):
        call()


def test_without_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    """auto goes on with the reference; who asks for native is told."""
    monkeypatch.setattr(native, "_MISSING", "the native extension does not load (gone)")
    x, net = torch.randn(3, 6), layers()
    assert ran(lambda: ops.mlp([x], net)) == "reference"
    with pytest.raises(select.BackendError, match=r"does not load \(gone\)"):
        ops.mlp([x], net, backend="native")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_is_the_reference(dtype: torch.dtype) -> None:
    """Under autocast products are of its dtype; values and gradients are those of PyTorch."""
    x, net = torch.randn(5, 6, requires_grad=True), layers()
    with torch.autocast("cpu", dtype):
        assert ran(lambda: ops.mlp([x], net)) == "reference"
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
    has = [b.name for b in select.OPERATIONS[name].backends]
    for backend, dtype in (("native", torch.float32), ("torch", torch.float64)):
        if backend not in has or (backend == "native" and native.why_missing() is not None):
            continue
        x = torch.randn(3, 8, dtype=dtype, requires_grad=True)
        y = TWICE[name](x, backend).pow(3).sum()
        (first,) = torch.autograd.grad(y, x, create_graph=True)
        message = r"has no second derivative; use backend='reference'"
        with pytest.raises(RuntimeError, match=message):
            torch.autograd.grad(first.sum(), x)
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(1)
    y = TWICE[name](x, "reference").pow(3).sum()
    (first,) = torch.autograd.grad(y, x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    assert second.isfinite().all() and second.abs().sum() > 0


# Calls of every operation that takes a backend, on float32 tensors without gradients.
CALLS: dict[str, Callable[[str | None], object]] = {
    "mlp": lambda b: ops.mlp([torch.randn(3, 6)], layers(), backend=b),
    "flow_step": lambda b: ops.flow_step(
        torch.randn(3, 8), torch.randn(3, 2), [random_layer(11, 8, dtype=torch.float32)], backend=b
    ),
    "latent_rollout": lambda b: ops.latent_rollout(
        torch.randn(3, 8),
        torch.randn(2, 3, 2),
        ops.LatentMap([random_layer(10, 8, dtype=torch.float32)]),
        backend=b,
    ),
    "layer_norm_act": lambda b: ops.layer_norm_act(
        torch.randn(3, 8), torch.ones(8), torch.zeros(8), backend=b
    ),
    "simnorm": lambda b: ops.simnorm(torch.randn(3, 8), backend=b),
    "two_hot_decode": lambda b: ops.two_hot_decode(torch.randn(3, 11), backend=b),
    "two_hot_cross_entropy": lambda b: ops.two_hot_cross_entropy(
        torch.randn(3, 11), torch.randn(3), backend=b
    ),
    "td_lambda": lambda b: ops.td_lambda(torch.randn(2, 3), torch.randn(3, 3), backend=b),
    "esnr": lambda b: ops.esnr(torch.randn(3, 5), backend=b),
    "esnr_update": lambda b: accumulated(b),
    "imagine": lambda b: imagined(b),
}


def accumulated(backend: str | None) -> ops.ESNR:
    accumulator = ops.EsnrAccumulator(backend=backend)
    for _ in range(3):
        accumulator.update([torch.randn(5)])
    return accumulator.result()


def imagined(backend: str | None) -> ops.ImaginedRollout:
    net = [random_layer(11, 8, dtype=torch.float32)]
    policy = ops.Policy([random_layer(8, 2, norm=False, dtype=torch.float32)], torch.rand(2))
    heads = ops.Heads([random_layer(10, 5, norm=False, dtype=torch.float32)])
    noise = torch.randn(2, 3, 2)
    return ops.imagine(
        torch.randn(3, 8), policy, ops.Flow(net), heads, noise=noise, backend=backend
    )


class Kernels(TorchDispatchMode):
    """Whose kernels run: the backends that operators are told."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "pwm_fast":
            names = [a.name for a in func._schema.arguments]
            if "backend" in names:
                self.told.append(args[names.index("backend")])
            else:
                assert "td_lambda" in func._schema.name
                self.told.append("triton")
        return func(*args, **(kwargs or {}))


def choices_of(call: Callable[[], object]) -> tuple[list[tuple[str, str, str | None]], list[str]]:
    """What was asked for and said to be taken, and whose kernels ran."""
    said: list[tuple[str, str, str | None]] = []
    kernels = Kernels()
    with kernels, select.observed(lambda op, asked, taken, _: said.append((op, asked, taken))):
        call()
    return said, kernels.told


@pytest.mark.parametrize("backend", [n for n in select.NAMES if n != "auto"])
@pytest.mark.parametrize("operation", CALLS)
def test_an_argument_is_taken_or_refused(operation: str, backend: str) -> None:
    """Nothing runs under another's name, and what refuses lists what there is."""
    has = [b.name for b in select.OPERATIONS[operation].backends]
    try:
        said, kernels = choices_of(lambda: CALLS[operation](backend))
    except select.BackendError as error:
        if backend in has:
            assert f"backend '{backend}' cannot run {operation}: " in str(error)
        else:
            there = ", ".join(has)
            assert f"{operation} has no backend '{backend}'; it has {there}, and auto" in str(error)
        return
    assert backend in has
    assert (operation, backend, backend) in said
    # Parts of the operation that have no such backend are on the reference, and say that.
    for part, asked, taken in said:
        there = [b.name for b in select.OPERATIONS[part].backends]
        assert asked == taken == (backend if backend in there else "reference")
    assert {name.partition("+")[0] for name in kernels} == {backend} - {"reference"}


@pytest.mark.parametrize("way", ["context", "environment"])
@pytest.mark.parametrize("backend", [n for n in select.NAMES if n != "auto"])
@pytest.mark.parametrize("operation", CALLS)
def test_a_context_for_a_whole_program(
    operation: str, backend: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """native and torch: what has no such backend runs on the reference, and is reported as that."""
    if way == "environment":
        monkeypatch.setenv(select.VARIABLE, backend)
    has = [b.name for b in select.OPERATIONS[operation].backends]
    context = select.backend(backend) if way == "context" else nullcontext()
    call = select.Call([torch.zeros(1)])
    with context:
        if backend not in has and not select.BACKENDS[backend].runs_all:
            with pytest.raises(select.BackendError, match=f"has no backend '{backend}'; it has"):
                CALLS[operation](None)
            return
        expected = backend if backend in has else "reference"
        reasons = {v.backend.name: v.reason for v in select.verdicts(operation, call)}
        if reasons[expected] is not None:
            with pytest.raises(select.BackendError, match=f"'{backend}' cannot run {operation}"):
                CALLS[operation](None)
            return
        said, kernels = choices_of(lambda: CALLS[operation](None))
        assert {asked for _, asked, _ in said} == {backend}
        assert {taken for part, _, taken in said if part == operation} == {expected}
        assert {name.partition("+")[0] for name in kernels} <= {backend}
        assert (kernels == []) is all(taken == "reference" for _, _, taken in said)


def test_discounted_return_says_what_runs() -> None:
    for backend in ("native", "torch", "reference"):
        with select.backend(backend):
            said, _ = choices_of(lambda: discounted_return(torch.randn(2, 3), torch.randn(3), 0.9))
        assert said == [("td_lambda", backend, "reference")]


@pytest.mark.parametrize("operation", CALLS)
def test_explain_names_what_runs(operation: str) -> None:
    """For each way to ask for a backend."""
    if operation == "esnr_update":
        pytest.skip("no function of its own")
    args: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    original = getattr(ops, operation)

    def caught(*given: Any, **named: Any) -> Any:
        args.append((given, named))
        return original(*given, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, operation, caught)
        CALLS[operation](None)
    given, named = args[0]
    named.pop("backend")
    for backend in ("native", "torch", "reference", "auto"):
        told = pwm_fast.explain(operation, *given, backend=backend, **named)
        with select.backend(backend):
            within = pwm_fast.explain(operation, *given, **named)
            said, _ = choices_of(lambda: original(*given, **named))
        assert within.backend == said[0][2]
        if told.error is None:
            said, _ = choices_of(lambda: original(*given, backend=backend, **named))  # noqa: B023
            assert told.backend == said[0][2]
            assert {(s.operation, s.backend) for s in told.selections} == {
                (op, taken) for op, _, taken in said
            }
        else:
            assert told.backend is None and "BackendError" in told.error
            with pytest.raises(select.BackendError):
                original(*given, backend=backend, **named)


def test_info_lists_what_there_is() -> None:
    """A dash where an operation has no such backend."""
    rows = installation.report()
    names = [n for n in select.NAMES if n != "auto"]
    for operation, declared in select.OPERATIONS.items():
        cells = dict(zip(names, re.split(" {2,}", rows[f"  {operation}"]), strict=True))
        has = {b.name for b in declared.backends}
        assert {n for n in names if cells[n] == "-"} == set(names) - has
