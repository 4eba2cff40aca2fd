"""Operators in ``torch.library``: schemas from annotations, shapes, gradients, rules for vmap."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

from pwm_fast.backends import select

_LIB = torch.library.Library("pwm_fast", "DEF")
IMPLEMENTATIONS: dict[str, Any] = {}  # what runs inside each operator, for looking into it

_TYPES = {
    "Tensor": "Tensor",
    "Tensor | None": "Tensor?",
    "list[Tensor]": "Tensor[]",
    "list[Tensor | None]": "Tensor?[]",
    "list[bool]": "bool[]",
    "bool": "bool",
    "int": "int",
    "float": "float",
    "str": "str",
}
WHERE = ("backend", "precision")  # the last two arguments of every operator


def parameters(function: Any) -> tuple[str, ...]:
    """Names of a function's parameters after the kernels."""
    return tuple(inspect.signature(function).parameters)[1:]


def _schema(function: Any, mutates: Sequence[str]) -> str:
    listed = list(inspect.signature(function).parameters.values())[1:]
    arguments = []
    for i, p in enumerate(listed):
        kind = _TYPES[p.annotation]
        if p.name in mutates:
            kind = kind.replace("Tensor", f"Tensor({chr(ord('a') + i)}!)")
        arguments.append(f"{kind} {p.name}")
    arguments += [f"str {name}" for name in WHERE]
    returned = inspect.signature(function).return_annotation.replace(" | None", "")
    if returned == "None":
        result = "()"
    elif returned.startswith("tuple["):
        result = f"({', '.join(_TYPES[t] for t in returned[6:-1].split(', '))})"
    else:
        result = _TYPES[returned]
    return f"({', '.join(arguments)}) -> {result}"


def define(name: str, function: Any, fake: Any, family: str, mutates: Sequence[str] = ()) -> None:
    """Register ``pwm_fast::name``: its schema, what runs, and the shapes that it returns."""

    def inside(*args: Any) -> Any:
        *own, backend, precision = args
        return function(select.kernels(family, backend, precision), *own)

    IMPLEMENTATIONS[name] = inside

    def run(*args: Any) -> Any:
        if forward_ad._current_level >= 0:
            _check_tangents(name, args)
        return inside(*args)

    names = parameters(function)

    def shapes(*args: Any) -> Any:
        *own, backend, precision = args
        named = SimpleNamespace(**dict(zip(names, own, strict=True)))
        return fake(select.kernels(family, backend, precision), named)

    _LIB.define(f"{name}{_schema(function, mutates)}")
    _LIB.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"pwm_fast::{name}", shapes, lib=_LIB)


def _check_tangents(name: str, args: Sequence[Any]) -> None:
    """Raise if a forward-mode derivative would be lost."""
    for x in pytree.tree_leaves(args):
        if isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None:
            raise RuntimeError(
                f"pwm_fast::{name} has no forward-mode derivative; use backend='reference'"
            )


def check_alone(name: str, *grads: Any) -> None:
    """Raise if gradients come many at a time by autograd's own batching, which takes no lists."""
    if torch.compiler.is_dynamo_compiling():
        return
    for g in grads:
        if isinstance(g, Tensor) and torch._C._functorch.is_legacy_batchedtensor(g):
            raise RuntimeError(
                f"pwm_fast::{name} takes no gradients from is_grads_batched or vectorize=True; use "
                "torch.func.vmap, or backend='reference'"
            )


def registered(name: str) -> Any:
    """The operator of that name."""
    return getattr(torch.ops.pwm_fast, name).default


def register_vmap(name: str, rule: Any) -> None:
    """Register what ``torch.vmap`` does with an operator."""
    torch.library.register_vmap(f"pwm_fast::{name}", rule, lib=_LIB)


def register_gradient(name: str, backward: Any, setup_context: Any) -> None:
    """Register an operator's gradient."""
    torch.library.register_autograd(
        f"pwm_fast::{name}", backward, setup_context=setup_context, lib=_LIB
    )


def keep_nothing(ctx: Any, inputs: Any, output: Any) -> None:
    """Keep nothing."""


def first_order_only(name: str) -> None:
    """Make differentiating a backward operator an error."""

    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(
            f"pwm_fast::{name} has no second derivative; use backend='reference' to differentiate "
            "twice"
        )

    register_gradient(name, backward, keep_nothing)


def no_gradient(name: str, argument: str) -> RuntimeError:
    """What is raised where a gradient is asked for that an operator does not compute."""
    return RuntimeError(
        f"pwm_fast::{name} has no gradient towards {argument}; use backend='reference'"
    )
