"""pwm_fast.explain says what a call then does, and does nothing itself."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import pwm_fast
from pwm_fast import ops
from pwm_fast.backends import select, triton_support
from pwm_fast.backends.native import why_missing
from tests.helpers import Operators, random_layer, tensors_of

needs_native = pytest.mark.skipif(
    why_missing() is not None, reason=f"no native kernels: {why_missing()}"
)
B, D, A, H = 4, 16, 2, 3


def net(widths: list[int], *, grad: bool = False) -> list[ops.Layer]:
    layers = [random_layer(k, n, "mish", dtype=torch.float32) for k, n in pairwise(widths[:-1])]
    layers.append(random_layer(*widths[-2:], norm=False, dtype=torch.float32))
    for layer in layers:
        for x in tensors_of(layer):
            x.requires_grad_(grad)
    return layers


def arguments(*, grad: bool = False) -> tuple[Tensor, Tensor, list[ops.Layer]]:
    z = torch.randn(B, D, requires_grad=True)
    return z, torch.randn(B, A), net([D + A + 1, 9, 9, D], grad=grad)


@needs_native
def test_backend_and_verdicts() -> None:
    z, a, layers = arguments()
    told = pwm_fast.explain(ops.flow_step, z, a, layers)
    assert told.op == "flow_step" and told.backend == "native" and told.error is None
    (selection,) = told.selections
    assert selection.asked == "auto"
    assert [(v.backend, v.reason, v.automatic) for v in selection.verdicts] == [
        ("native", None, True),
        ("triton", triton_support.why_not("cpu"), True),
        ("torch", None, False),
        ("reference", None, True),
    ]
    assert pwm_fast.explain("flow_step", z, a, layers) == told
    with pwm_fast.backend("reference"):
        told = pwm_fast.explain("flow_step", z, a, layers)
    assert told.backend == "reference" and told.selections[0].asked == "reference"
    assert told.operators == ()


@needs_native
def test_reasons() -> None:
    z, a, layers = arguments()
    with torch.autocast("cpu", torch.bfloat16):
        told = pwm_fast.explain(ops.flow_step, z, a, layers)
    assert told.backend == "reference"
    assert "autocast is on" in (told.selections[0].verdicts[0].reason or "")
    told = pwm_fast.explain(ops.flow_step, z.double(), a, layers, backend="native")
    assert told.backend is None
    assert told.error is not None and "BackendError: backend 'native' cannot run" in told.error
    text = str(told)
    assert "cannot: the tensors are torch.float64" in text and "raises" in text


@pytest.mark.parametrize(
    ("fold", "frozen", "expected"),
    [(None, True, True), (None, False, False), (False, True, False), (True, False, True)],
)
def test_fold(fold: bool | None, frozen: bool, expected: bool) -> None:
    z, a, layers = arguments(grad=not frozen)
    told = pwm_fast.explain(
        ops.flow_step, z, a, layers, fold=fold, backend="torch" if why_missing() else None
    )
    assert told.fold is expected
    assert pwm_fast.explain(ops.mlp, [z], net([D, 9, 3])).fold is None


def test_gradients() -> None:
    z, a, layers = arguments(grad=True)
    layers[0].weight.requires_grad_(False)
    told = pwm_fast.explain(ops.flow_step, z, a, layers)
    assert told.gradients == ("z", "net (9 of 10 tensors)")
    assert told.constants == ("a",)
    with torch.no_grad():
        told = pwm_fast.explain(ops.flow_step, z, a, layers)
    assert told.gradients == () and told.constants == ("z", "a", "net")
    if why_missing() is None:
        assert all("gradients of parameters: no" in line for line in told.operators)


@needs_native
def test_copies() -> None:
    layers = net([D + A, 9, 3])
    x, a = torch.randn(D, B).t(), torch.randn(B, A)
    told = pwm_fast.explain(ops.mlp, [x, a], layers)
    assert told.copies == (f"inputs[0] made contiguous, {B * D * 4 / 1024:.1f} KiB",)
    assert pwm_fast.explain(ops.mlp, [x.contiguous(), a], layers).copies == ()
    rows = torch.randn(B, 2 * D)[:, :D]  # rows further apart are no reason to copy
    assert pwm_fast.explain(ops.mlp, [rows, a], layers).copies == ()
    told = pwm_fast.explain(ops.mlp, [rows, a], layers, backend="reference")
    assert {line.partition(",")[0] for line in told.copies} == {
        "inputs[0] concatenated",
        "inputs[1] concatenated",
    }


def imagine_arguments() -> tuple[tuple[Any, ...], dict[str, Any]]:
    z, _, layers = arguments()
    policy = ops.Policy(net([D, 7, A], grad=True), torch.rand(A))
    heads = ops.Heads(net([D + A, 7, 11]))
    return (z, policy, ops.Flow(layers), heads), {"noise": torch.randn(H, B, A)}


def masked_arguments() -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A policy with a deviation for each state."""
    (z, _, dynamics, heads), kwargs = imagine_arguments()
    policy = ops.Policy(net([D, 7, 2 * A], grad=True), None, "norm_act")
    return (z, policy, dynamics, heads), {**kwargs, "action_mask": torch.ones(B, A)}


def plan_arguments() -> tuple[tuple[Any, ...], dict[str, Any]]:
    arguments, _ = imagine_arguments()
    q = [net([D + A, 7, 11]) for _ in range(3)]
    return arguments, {
        "values": ops.ValueEnsemble(q, "norm_act", on_action=True),
        "options": ops.MPPI(iterations=2, samples=6, elites=3, policy_trajectories=2),
    }


CALLS: dict[str, Callable[[], tuple[tuple[Any, ...], dict[str, Any]]]] = {
    "flow_step": lambda: (arguments(), {}),
    "imagine": imagine_arguments,
    "imagine masked": masked_arguments,
    "plan": plan_arguments,
    "simnorm": lambda: ((torch.randn(B, D),), {}),
    "two_hot_cross_entropy": lambda: ((torch.randn(B, 11), torch.randn(B)), {}),
    "esnr": lambda: ((torch.randn(4, 10),), {}),
    "td_lambda": lambda: ((torch.randn(3, B), torch.randn(4, B)), {}),
}


@pytest.mark.parametrize("name", CALLS)
def test_what_is_told_is_what_happens(name: str) -> None:
    args, kwargs = CALLS[name]()
    name = name.partition(" ")[0]
    told = pwm_fast.explain(name, *args, **kwargs)
    chosen: list[tuple[str, str | None]] = []
    operators = Operators()
    with operators, select.observed(lambda op, _, taken, call: chosen.append((op, taken))):
        getattr(ops, name)(*args, **kwargs)
    assert {(s.operation, s.backend) for s in told.selections} == set(chosen)
    assert {line.partition(" (")[0].split()[-1] for line in told.operators} == set(operators.names)
    if not chosen:
        assert told.backend == "reference" and "plain PyTorch" in str(told)


def test_nothing_is_done() -> None:
    """No random numbers are drawn, no function with effects of its own is needed."""
    args, kwargs = imagine_arguments()
    before = torch.get_rng_state()
    copies = [x.clone() for x in (args[0], kwargs["noise"])]
    told = pwm_fast.explain(ops.imagine, *args, **kwargs)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(copies[0], args[0]) and torch.equal(copies[1], kwargs["noise"])
    assert args[0].grad is None
    assert "policy.layers (6 of 6 tensors)" in told.gradients
    text = str(told)
    assert [way.name for way in told.architecture] == ["cluster", "persistent", "blocks", "layers"]
    assert told.architecture[-1].reason is None
    assert "macro steps" in text and "it is for backend triton" in text
    assert text.startswith("ops.imagine\n") and "gradients" in text and "copies" in text


def test_integrate_with_any_velocity() -> None:
    """A callable may hold tensors that explain does not see."""
    weight = torch.randn(D, D)
    told = pwm_fast.explain(ops.integrate, lambda z, tau: z @ weight, torch.randn(B, D))
    assert told.backend == "reference" and told.selections == ()


def test_errors() -> None:
    z, a, layers = arguments()
    with pytest.raises(ValueError, match=r"op must be a function of pwm_fast.ops .*flow_step.*'x'"):
        pwm_fast.explain("x", z)
    with pytest.raises(ValueError, match="op must be a function"):
        pwm_fast.explain(torch.relu, z)
    with pytest.raises(ValueError, match="leading shape"):
        pwm_fast.explain(ops.flow_step, z, a[:2], layers)
    with pytest.raises(TypeError, match="missing a required argument"):
        pwm_fast.explain(ops.flow_step, z)


def test_precision() -> None:
    z, a = torch.randn(3, D), torch.randn(3, A)
    with pwm_fast.precision("bf16"):
        told = pwm_fast.explain(ops.flow_step, z, a, net([D + A + 1, 9, D]), backend="torch")
    assert "precision: bf16" in str(told)
    assert "precision" not in str(
        pwm_fast.explain(ops.flow_step, z, a, net([D + A + 1, 9, D]), backend="torch")
    )
