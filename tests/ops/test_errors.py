"""Every documented error: its type, and a message with the argument's name and what was given."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pwm_fast import ops
from pwm_fast.ops import Layer

X = torch.zeros(4, 6)
A = torch.zeros(4, 2)
INTS = torch.zeros(4, 6, dtype=torch.int64)
SCALAR = torch.tensor(1.0)
V = torch.zeros(6)
VECTOR_2D = torch.zeros(4)
NET = [Layer(torch.zeros(6, 9))]  # z 6, a 2, tau 1
GOOD = Layer(torch.zeros(6, 6), V, V, V)
ENSEMBLE = Layer(torch.zeros(3, 5, 6), *(torch.zeros(3, 5) for _ in range(3)))


def identity(z: Tensor, tau: float) -> Tensor:
    return z


def td(**changes) -> Tensor:
    arguments = {"rewards": torch.zeros(3, 2), "values": torch.zeros(4, 2)} | changes
    return ops.td_lambda(**arguments)


def meta(x: Tensor) -> Tensor:
    """Put a tensor on another device that every machine has."""
    return x.to("meta")


# What is called, and parts of its message in order.
TYPE_ERRORS: dict[str, tuple[Callable[[], object], list[str]]] = {
    "simnorm x int": (lambda: ops.simnorm(INTS), ["x", "torch.int64"]),
    "simnorm x list": (lambda: ops.simnorm([0.0]), ["x", "list"]),
    "simnorm x complex": (lambda: ops.simnorm(X.cfloat()), ["x", "torch.complex64"]),
    "mish x": (lambda: ops.mish(INTS), ["x", "torch.int64"]),
    "layer_norm_act x": (lambda: ops.layer_norm_act(INTS, V, V), ["x", "torch.int64"]),
    "layer_norm_act weight": (lambda: ops.layer_norm_act(X, V.int(), V), ["weight", "torch.int32"]),
    "layer_norm_act bias": (lambda: ops.layer_norm_act(X, V, None), ["bias", "NoneType"]),
    "linear_norm_act x": (lambda: ops.linear_norm_act(INTS, GOOD), ["x", "torch.int64"]),
    "linear_act_norm x": (lambda: ops.linear_act_norm(INTS, GOOD), ["x", "torch.int64"]),
    "mlp inputs[0]": (lambda: ops.mlp([INTS], [GOOD]), ["inputs[0]", "torch.int64"]),
    "mlp inputs[1]": (lambda: ops.mlp([X, None], [GOOD]), ["inputs[1]", "NoneType"]),
    "integrate velocity": (lambda: ops.integrate(3.0, X), ["velocity", "float"]),
    "integrate z": (lambda: ops.integrate(identity, INTS), ["z", "torch.int64"]),
    "velocity_field z": (lambda: ops.velocity_field(INTS, A, SCALAR, NET), ["z", "torch.int64"]),
    "velocity_field a": (lambda: ops.velocity_field(X, A.int(), SCALAR, NET), ["a", "torch.int32"]),
    "velocity_field tau": (lambda: ops.velocity_field(X, A, 0.5, NET), ["tau", "float"]),
    "velocity_field task": (
        lambda: ops.velocity_field(X, A, SCALAR, NET, task=A.int()),
        ["task", "torch.int32"],
    ),
    "flow_step z": (lambda: ops.flow_step(INTS, A, NET), ["z", "torch.int64"]),
    "flow_step a": (lambda: ops.flow_step(X, None, NET), ["a", "NoneType"]),
    "flow_step task": (lambda: ops.flow_step(X, A, NET, task=A.int()), ["task", "torch.int32"]),
    "flow_interpolate z0": (lambda: ops.flow_interpolate(INTS, X, SCALAR), ["z0", "torch.int64"]),
    "flow_interpolate z1": (lambda: ops.flow_interpolate(X, INTS, SCALAR), ["z1", "torch.int64"]),
    "flow_interpolate tau": (lambda: ops.flow_interpolate(X, X, 0.5), ["tau", "float"]),
    "symlog x": (lambda: ops.symlog(INTS), ["x", "torch.int64"]),
    "symexp x": (lambda: ops.symexp(1.0), ["x", "float"]),
    "two_hot_encode x": (lambda: ops.two_hot_encode(INTS), ["x", "torch.int64"]),
    "two_hot_decode logits": (lambda: ops.two_hot_decode(INTS), ["logits", "torch.int64"]),
    "two_hot_cross_entropy logits": (
        lambda: ops.two_hot_cross_entropy(INTS, VECTOR_2D),
        ["logits", "torch.int64"],
    ),
    "two_hot_cross_entropy x": (
        lambda: ops.two_hot_cross_entropy(X, VECTOR_2D.int()),
        ["x", "torch.int32"],
    ),
    "td_lambda rewards": (lambda: td(rewards=INTS), ["rewards", "torch.int64"]),
    "td_lambda values": (lambda: td(values=INTS), ["values", "torch.int64"]),
    "td_lambda continues": (
        lambda: td(continues=torch.ones(3, 2, dtype=torch.bool)),
        ["continues", "torch.bool"],
    ),
    "esnr stacked": (lambda: ops.esnr(INTS), ["grads", "torch.int64"]),
    "esnr None": (lambda: ops.esnr([[None], [V]]), ["grads[0][0]", "NoneType"]),
    "esnr ints": (lambda: ops.esnr([[V, V], [V, V.int()]]), ["grads[1][1]", "torch.int32"]),
    "esnr tensors": (lambda: ops.esnr([V, V]), ["grads[0]", "(6,)"]),
}

VALUE_ERRORS: dict[str, tuple[Callable[[], object], list[str]]] = {
    "simnorm dim": (lambda: ops.simnorm(X, 4), ["x", "6", "4"]),
    "simnorm dim 0": (lambda: ops.simnorm(X, 0), ["dim", "0"]),
    "simnorm scalar": (lambda: ops.simnorm(SCALAR), ["x", "scalar"]),
    "layer_norm_act weight": (
        lambda: ops.layer_norm_act(X, VECTOR_2D, V),
        ["weight", "[6]", "(4,)"],
    ),
    "layer_norm_act bias": (lambda: ops.layer_norm_act(X, V, X), ["bias", "[6]", "(4, 6)"]),
    "layer_norm_act act": (lambda: ops.layer_norm_act(X, V, V, act="relu"), ["act", "'relu'"]),
    "layer_norm_act simnorm_dim": (
        lambda: ops.layer_norm_act(X, V, V, act="simnorm"),
        ["x", "6", "8"],
    ),
    "layer_norm_act simnorm_dim 2.0": (
        lambda: ops.layer_norm_act(X, V, V, act="simnorm", simnorm_dim=2.0),
        ["simnorm_dim", "2.0"],
    ),
    "layer_norm_act scalar": (lambda: ops.layer_norm_act(SCALAR, V, V), ["x", "scalar"]),
    "linear_act_norm axes": (
        lambda: ops.linear_act_norm(X, Layer(torch.zeros(2, 3, 5, 6))),
        ["layer.weight", "4 axes"],
    ),
    "linear_act_norm ensemble x axes": (
        lambda: ops.linear_act_norm(torch.zeros(6), ENSEMBLE),
        ["x", "(6,)"],
    ),
    "linear_act_norm ensemble x members": (
        lambda: ops.linear_act_norm(torch.zeros(2, 4, 6), ENSEMBLE),
        ["x", "3", "(2, 4, 6)"],
    ),
    "linear_act_norm ensemble inputs": (
        lambda: ops.linear_act_norm(A, ENSEMBLE),
        ["layer.weight", "6", "2"],
    ),
    "linear_act_norm ensemble bias": (
        lambda: ops.linear_act_norm(X, ENSEMBLE._replace(bias=torch.zeros(1, 5))),
        ["layer.bias", "[3, 5]", "(1, 5)"],
    ),
    "mlp inputs": (lambda: ops.mlp([], [GOOD]), ["inputs", "at least one"]),
    "mlp leading": (
        lambda: ops.mlp([X, torch.zeros(5, 2)], [GOOD]),
        ["inputs[1]", "(5,)", "inputs[0]", "(4,)"],
    ),
    "mlp input device": (
        lambda: ops.mlp([X, meta(A)], [GOOD]),
        ["inputs[1]", "meta", "inputs[0]", "cpu"],
    ),
    "mlp layers": (lambda: ops.mlp([X], []), ["layers", "at least one"]),
    "mlp widths": (lambda: ops.mlp([X, A], [GOOD]), ["layers[0].weight", "6", "8"]),
    "mlp chain": (
        lambda: ops.mlp([X], [GOOD, Layer(torch.zeros(3, 5))]),
        ["layers[1].weight", "5", "6"],
    ),
    "integrate substeps 0": (lambda: ops.integrate(identity, X, 0), ["substeps", "0"]),
    "integrate substeps 2.0": (lambda: ops.integrate(identity, X, 2.0), ["substeps", "2.0"]),
    "integrate substeps True": (lambda: ops.integrate(identity, X, True), ["substeps", "True"]),
    "integrate method": (lambda: ops.integrate(identity, X, 2, "rk4"), ["method", "'rk4'"]),
    "velocity_field tau": (
        lambda: ops.velocity_field(X, A, torch.zeros(3), NET),
        ["tau", "(4,)", "(4, 1)", "(3,)"],
    ),
    "velocity_field tau device": (
        lambda: ops.velocity_field(X, A, meta(SCALAR), NET),
        ["tau", "meta", "z", "cpu"],
    ),
    "velocity_field a": (
        lambda: ops.velocity_field(X, A[:3], SCALAR, NET),
        ["a", "(3,)", "z", "(4,)"],
    ),
    "flow_step z": (lambda: ops.flow_step(SCALAR, A, NET), ["z", "scalar"]),
    "flow_step a": (lambda: ops.flow_step(X, A[:3], NET), ["a", "(3,)", "z", "(4,)"]),
    "flow_step task": (
        lambda: ops.flow_step(X, A, NET, task=A[:3]),
        ["task", "(3,)", "z", "(4,)"],
    ),
    "flow_step task width": (
        lambda: ops.flow_step(X, A, NET, task=A),
        ["net[0].weight", "9", "11"],
    ),
    "flow_step device": (lambda: ops.flow_step(X, meta(A), NET), ["a", "meta", "z", "cpu"]),
    "flow_step net device": (
        lambda: ops.flow_step(X, A, [Layer(meta(torch.zeros(6, 9)))]),
        ["net[0].weight", "meta", "cpu"],
    ),
    "flow_step net": (lambda: ops.flow_step(X, A, []), ["net", "at least one"]),
    "flow_step output": (
        lambda: ops.flow_step(X, A, [Layer(torch.zeros(5, 9))]),
        ["net", "5", "z", "6"],
    ),
    "flow_step substeps": (lambda: ops.flow_step(X, A, NET, -1), ["substeps", "-1"]),
    "flow_step method": (lambda: ops.flow_step(X, A, NET, 2, "rk4"), ["method", "'rk4'"]),
    "flow_interpolate z1": (
        lambda: ops.flow_interpolate(X, A, SCALAR),
        ["z1", "(4, 6)", "(4, 2)"],
    ),
    "flow_interpolate tau": (
        lambda: ops.flow_interpolate(X, X, torch.zeros(3)),
        ["tau", "(4,)", "(4, 1)", "(3,)"],
    ),
    "two_hot_encode bins": (lambda: ops.two_hot_encode(X, 1), ["bins", "1"]),
    "two_hot_encode range": (
        lambda: ops.two_hot_encode(X, 5, 2.0, 2.0),
        ["vmin", "vmax", "vmin=2.0", "vmax=2.0"],
    ),
    "two_hot_decode bins": (lambda: ops.two_hot_decode(torch.zeros(3, 1)), ["bins", "1"]),
    "two_hot_decode range": (
        lambda: ops.two_hot_decode(X, 3.0, -3.0),
        ["vmin", "vmax", "vmin=3.0", "vmax=-3.0"],
    ),
    "two_hot_decode scalar": (lambda: ops.two_hot_decode(SCALAR), ["logits", "scalar"]),
    "two_hot_cross_entropy x": (
        lambda: ops.two_hot_cross_entropy(X, torch.zeros(4, 1)),
        ["x", "(4,)", "(4, 1)"],
    ),
    "two_hot_cross_entropy bins": (
        lambda: ops.two_hot_cross_entropy(torch.zeros(4, 1), VECTOR_2D),
        ["bins", "1"],
    ),
    "two_hot_cross_entropy range": (
        lambda: ops.two_hot_cross_entropy(X, VECTOR_2D, 1.0, 0.0),
        ["vmin", "vmax", "vmin=1.0", "vmax=0.0"],
    ),
    "td_lambda rewards": (lambda: td(rewards=SCALAR), ["rewards", "scalar"]),
    "td_lambda values": (
        lambda: td(values=torch.zeros(3, 2)),
        ["values", "(4, 2)", "(3, 2)"],
    ),
    "td_lambda continues": (
        lambda: td(continues=torch.ones(4, 2)),
        ["continues", "(3, 2)", "(4, 2)"],
    ),
    "td_lambda gamma": (lambda: td(gamma=1.01), ["gamma", "1.01"]),
    "td_lambda lam": (lambda: td(lam=-0.5), ["lam", "-0.5"]),
    "td_lambda lam nan": (lambda: td(lam=float("nan")), ["lam", "nan"]),
    "esnr one sample": (lambda: ops.esnr(torch.zeros(1, 3)), ["grads", "2", "1"]),
    "esnr one list": (lambda: ops.esnr([[V]]), ["grads", "2", "1"]),
    "esnr scalar": (lambda: ops.esnr(SCALAR), ["grads", "2", "0"]),
    "esnr no tensors": (lambda: ops.esnr([[], []]), ["grads[0]", "at least one", "none"]),
    "esnr shapes": (
        lambda: ops.esnr([[V, V], [V, VECTOR_2D]]),
        ["grads[1]", "(6,)", "(4,)"],
    ),
    "esnr counts": (lambda: ops.esnr([[V, V], [V]]), ["grads[1]", "[(6,), (6,)]", "[(6,)]"]),
}

# A faulty layer makes the same complaint wherever a layer is taken.
LAYER_TYPE_ERRORS: dict[str, tuple[Layer, list[str]]] = {
    "weight": (GOOD._replace(weight=None), ["weight", "NoneType"]),
    "bias": (GOOD._replace(bias=V.int()), ["bias", "torch.int32"]),
    "ln_weight": (GOOD._replace(ln_weight=V.int()), ["ln_weight", "torch.int32"]),
    "ln_bias": (GOOD._replace(ln_bias=[0.0] * 6), ["ln_bias", "list"]),
}
LAYER_VALUE_ERRORS: dict[str, tuple[Layer, list[str]]] = {
    "weight": (GOOD._replace(weight=torch.zeros(6, 5)), ["weight", "5", "6"]),
    "weight axes": (GOOD._replace(weight=V), ["weight", "[N, K]"]),
    "bias": (GOOD._replace(bias=VECTOR_2D), ["bias", "[6]", "(4,)"]),
    "ln_weight": (GOOD._replace(ln_weight=X), ["ln_weight", "[6]", "(4, 6)"]),
    "ln_bias": (GOOD._replace(ln_bias=VECTOR_2D), ["ln_bias", "[6]", "(4,)"]),
    "ln_bias alone": (GOOD._replace(ln_weight=None), ["ln_weight", "ln_bias", "together"]),
    "ln_weight alone": (GOOD._replace(ln_bias=None), ["ln_weight", "ln_bias", "together"]),
    "act": (GOOD._replace(act="gelu"), ["act", "'gelu'"]),
    "simnorm width": (GOOD._replace(act="simnorm"), ["6", "8"]),
    "simnorm_dim": (GOOD._replace(act="simnorm", simnorm_dim=-2), ["simnorm_dim", "-2"]),
    "weight device": (GOOD._replace(weight=meta(GOOD.weight)), ["weight", "meta", "cpu"]),
    "bias device": (GOOD._replace(bias=meta(V)), ["bias", "meta", "cpu"]),
}
TAKERS: dict[str, tuple[str, Callable[[Layer], Tensor]]] = {
    "linear_norm_act": ("layer", lambda layer: ops.linear_norm_act(X, layer)),
    "linear_act_norm": ("layer", lambda layer: ops.linear_act_norm(X, layer)),
    "mlp": ("layers[1]", lambda layer: ops.mlp([X], [GOOD, layer])),
    "flow_step": ("net[1]", lambda layer: ops.flow_step(X, A, [NET[0], layer])),
}


def assert_raises(error: type[Exception], call: Callable[[], object], parts: list[str]) -> None:
    """The message has the parts in this order, none of them within another word or number."""
    pattern = ".*".join(rf"(?<!\w)(?<!\d\.){re.escape(part)}(?!\w)" for part in parts)
    with pytest.raises(error, match=pattern):
        call()


@pytest.mark.parametrize(("call", "parts"), TYPE_ERRORS.values(), ids=TYPE_ERRORS)
def test_type_errors(call: Callable[[], object], parts: list[str]) -> None:
    assert_raises(TypeError, call, parts)


@pytest.mark.parametrize(("call", "parts"), VALUE_ERRORS.values(), ids=VALUE_ERRORS)
def test_value_errors(call: Callable[[], object], parts: list[str]) -> None:
    assert_raises(ValueError, call, parts)


@pytest.mark.parametrize(("argument", "call"), TAKERS.values(), ids=TAKERS)
@pytest.mark.parametrize(("layer", "parts"), LAYER_TYPE_ERRORS.values(), ids=LAYER_TYPE_ERRORS)
def test_layer_type_errors(
    layer: Layer, parts: list[str], argument: str, call: Callable[[Layer], Tensor]
) -> None:
    field, given = parts
    assert_raises(TypeError, lambda: call(layer), [f"{argument}.{field}", given])


@pytest.mark.parametrize(("argument", "call"), TAKERS.values(), ids=TAKERS)
@pytest.mark.parametrize(("layer", "parts"), LAYER_VALUE_ERRORS.values(), ids=LAYER_VALUE_ERRORS)
def test_layer_value_errors(
    layer: Layer, parts: list[str], argument: str, call: Callable[[Layer], Tensor]
) -> None:
    """The argument, then the field where one is at fault."""
    assert_raises(ValueError, lambda: call(layer), [argument, *parts])
