"""What the calls of an accelerated stack need, looked up once.

A stack's modules may change between two calls, so each call looks through them. To follow the plan
to them takes longer than a small call's arithmetic. Therefore what it leads to is kept: a call sees
that every module is in its place, of its class, without hooks and with its options, takes the
parameters that are there now, and runs the program of calls like it. Anything else goes by the
plan, which says what it means.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from pwm_fast.acceleration.plan import Plan, at, forward_of, tensor_of
from pwm_fast.backends.transforms import PLAIN
from pwm_fast.hooks import hooked_everywhere
from pwm_fast.ops import Layer, direct

_LIMIT = 16  # situations that are told apart


class Shortcut:
    """A stack that is as its plan says.

    Args:
        stack: it.
        plan: of the stack.

    Raises:
        KeyError: a parameter is not where modules register them.
    """

    def __init__(self, stack: nn.Module, plan: Plan) -> None:
        self._places: list[tuple[nn.Module, str]] = []
        self._absent: list[nn.Module] = []  # without a bias
        for path in [p for step in plan.steps for p in (step.linear, step.norm) if p is not None]:
            module = at(stack, path)
            self._places.append((module, "weight"))
            if tensor_of(module, "bias") is None:
                self._absent.append(module)
            else:
                self._places.append((module, "bias"))
        params: Any = [module._parameters[name] for module, name in self._places]
        # Programs see the sizes of all, but not whether a weight is that of an ensemble of one.
        self._shapes = [x.shape for x in params if x.dim() > 1]
        self._inputs = params[0].shape[-1:]
        self._weights = [i for i, x in enumerate(params) if x.dim() > 1]
        self._plan, self._held = plan, stack._modules
        self._children = (*stack._modules.values(),)
        watched = [at(stack, each.path) for each in plan.watched if each.path]
        self._modules = [(m, type(m), (*m._modules.values(),)) for m in watched]
        self._forwards = [(kind, forward_of(kind)) for kind in {type(m) for m in watched}]
        self._options = [*_options(stack, plan)]
        self._known: dict[Any, direct.Known] = {}

    def run(self, stack: Any, x: Tensor) -> Tensor | None:
        """The stack's output; None where the plan is to be followed."""
        if type(x) not in PLAIN or x.shape[-1:] != self._inputs:
            return None
        known = self._known.get(direct.situation(x))
        if known is None or known.ready is None:
            return None
        params = self._parameters(stack)
        return None if params is None else direct.run(known, (x,), params)

    def holds(self, stack: Any) -> bool:
        """Whether the stack is as it was."""
        params = self._parameters(stack)
        return params is not None and all(x is not None for x in params)

    def _parameters(self, stack: Any) -> list[Tensor] | None:
        """The parameters that there are now; None where anything else has changed.

        A parameter that is gone shows where the tensors are looked at.
        """
        if stack.plan is not self._plan or stack._modules is not self._held or hooked_everywhere():
            return None
        if not _same(self._held, self._children):
            return None
        for module, kind, children in self._modules:
            own = module.__dict__
            if (
                type(module) is not kind
                or own["_forward_hooks"]
                or own["_forward_pre_hooks"]
                or own["_backward_hooks"]
                or own["_backward_pre_hooks"]
                or "forward" in own
            ):
                return None
            found = own["_modules"]
            if (found or children) and not _same(found, children):
                return None
        for kind, forward in self._forwards:
            if kind.forward is not forward:
                return None
        for module, name, value in self._options:
            if getattr(module, name) != value:
                return None
        for module in self._absent:
            if tensor_of(module, "bias") is not None:
                return None
        try:
            params: Any = [m.__dict__["_parameters"][name] for m, name in self._places]
            return params if [params[i].shape for i in self._weights] == self._shapes else None
        except (AttributeError, KeyError):  # it is None, or not registered
            return None


def after(
    before: Shortcut | None, stack: Any, x: Tensor, layers: Sequence[Layer]
) -> Shortcut | None:
    """The shortcut for calls like the one that has just been made by the plan.

    It is the one ``before`` if that has nothing to learn from the call.
    """
    if x.dtype != torch.float32 or any(layer.drops for layer in layers):
        return before
    around = direct.situation(x)
    if around is None:
        return before
    found = before if before is not None and before.holds(stack) else None
    if found is not None and around in found._known:
        return found
    known = direct.find((x,), layers, stack.plan.order)
    if known is None:
        return before
    try:
        found = found or Shortcut(stack, stack.plan)
    except KeyError:
        return None
    if len(found._known) >= _LIMIT:
        found._known.clear()
    found._known[around] = known
    return found


def _same(held: dict[str, nn.Module | None], children: tuple[nn.Module | None, ...]) -> bool:
    return len(held) == len(children) and all(map(is_, held.values(), children))


def _options(stack: nn.Module, plan: Plan) -> Iterator[tuple[nn.Module, str, object]]:
    """Attributes of modules with the values that the operation was chosen for."""
    for step in plan.steps:
        if step.norm is not None:
            norm = at(stack, step.norm)
            yield norm, "eps", norm.eps
        if step.simnorm is not None:
            act = at(stack, step.simnorm)
            yield act, "dim", act.dim
        if step.dropout is not None:  # which drops nothing now
            dropout = at(stack, step.dropout)
            yield (dropout, "training", False) if dropout.p else (dropout, "p", 0.0)
    for each in plan.watched:
        if each.dropout:
            yield at(stack, each.path), "p", 0.0
