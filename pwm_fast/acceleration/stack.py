"""The module that takes the place of an ``nn.Sequential``."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pwm_fast import ops
from pwm_fast.acceleration.plan import Path, Plan, Step, Watched, at, tensor_of, unpatched
from pwm_fast.acceleration.shortcut import Shortcut, after
from pwm_fast.hooks import hooked, hooked_everywhere
from pwm_fast.ops import Layer


class AcceleratedStack(nn.Sequential):
    """The modules of an ``nn.Sequential``, run as one :func:`pwm_fast.ops.mlp`.

    It holds the very modules it was made of, so parameters, buffers and state_dict keys are theirs.
    Where they have changed since (a module replaced or appended, a hook, a parametrization, a
    dropout rate that was 0), it runs them one after another, as ``nn.Sequential`` does. So does
    what is made of it by slicing.
    """

    plan: Plan | None = None
    _shortcut: Shortcut | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles have modules of their own, to which the way is another."""
        return {name: value for name, value in self.__dict__.items() if name != "_shortcut"}

    def layers(self, parameters: Mapping[str, Any] | None = None) -> list[Layer]:
        """The parameters as the operations take them; empty without a plan.

        A Dropout in training mode is in them, as :attr:`pwm_fast.ops.Layer.dropout`.

        Args:
            parameters: tensors to take in place of the stack's own, as
                ``torch.func.stack_module_state`` returns them (``parameters["0.weight"]``) or as
                TD-MPC2's ensemble holds them (``parameters["0"]["weight"]``). Stacked ones make an
                ensemble, for ``ops.mlp(..., members=...)``.

        Raises:
            KeyError: ``parameters`` lacks one.
            ValueError: the modules are no longer what the plan was made for, or the stack has
                hooks, which who takes its layers would skip.
        """
        if self.plan is not None and (hooked(self) or not self._all_unchanged()):
            raise ValueError("the stack's modules or hooks have changed since: accelerate it again")
        layers = self._layers()
        if parameters is None or self.plan is None:
            return layers
        return [
            _with_parameters(layer, step, parameters)
            for layer, step in zip(layers, self.plan.steps, strict=True)
        ]

    def _layers(self) -> list[Layer]:
        layers = []
        for step in self.plan.steps if self.plan is not None else ():
            linear, gamma, beta, eps = at(self, step.linear), None, None, 1e-5
            if step.norm is not None:
                norm: Any = at(self, step.norm)
                gamma, beta, eps = tensor_of(norm, "weight"), tensor_of(norm, "bias"), norm.eps
            group: Any = 8 if step.simnorm is None else at(self, step.simnorm).dim
            drop: Any = None if step.dropout is None else at(self, step.dropout)
            layers.append(
                Layer(
                    tensor_of(linear, "weight"),
                    tensor_of(linear, "bias"),
                    gamma,
                    beta,
                    step.act,
                    group,
                    eps,
                    drop.p if drop is not None and drop.training else 0.0,
                )
            )
        return layers

    def intact(self) -> bool:
        """Whether the modules still are what the plan was made for, and nobody watches each."""
        return not hooked_everywhere() and self._all_unchanged()

    def _all_unchanged(self) -> bool:
        if self.plan is None:
            return False
        for watched in self.plan.watched:  # noqa: SIM110 - a generator would take a fifth longer
            if not _unchanged(self, watched):
                return False
        return True

    def forward(self, input: Tensor) -> Tensor:
        """``[..., K] -> [..., N]``."""
        if self.plan is None:
            return super().forward(input)
        shortcut = None if torch.compiler.is_compiling() else self._shortcut
        y = None if shortcut is None else shortcut.run(self, input)
        if y is not None:
            return y
        if not self.intact():
            return super().forward(input)
        layers = self._layers()
        y = ops.mlp((input,), layers, order=self.plan.order)
        if not torch.compiler.is_compiling():
            self._shortcut = after(shortcut, self, input, layers)
        return y


def assemble(stack: nn.Sequential, plan: Plan) -> AcceleratedStack:
    """A new module that shares the stack's modules and runs as planned."""
    module = AcceleratedStack.__new__(AcceleratedStack)
    module.__dict__.update(stack.__dict__)
    own_dictionaries(module)
    module.plan = plan
    return module


def _with_parameters(layer: Layer, step: Step, parameters: Mapping[str, Any]) -> Layer:
    """A layer with other tensors, found by the names of the modules' parameters."""
    weight = _named(parameters, (*step.linear, "weight"))
    bias = None if layer.bias is None else _named(parameters, (*step.linear, "bias"))
    layer = layer._replace(weight=weight, bias=bias)
    if step.norm is None:
        return layer
    gamma, beta = (_named(parameters, (*step.norm, name)) for name in ("weight", "bias"))
    return layer._replace(ln_weight=gamma, ln_bias=beta)


def _named(parameters: Any, path: Path) -> Any:
    name = ".".join(path)
    try:
        return parameters[name]
    except KeyError:
        pass
    for key in path:
        try:
            parameters = parameters[key]
        except (KeyError, IndexError):
            raise KeyError(f"parameters lacks {name!r}") from None
    return parameters


def own_dictionaries(module: nn.Module) -> None:
    """Give a module that shares another one's dictionaries copies of them; what they hold stays."""
    for name, value in nn.Module().__dict__.items():
        if isinstance(value, (dict, set)) and name in module.__dict__:
            module.__dict__[name] = copy.copy(module.__dict__[name])


def _unchanged(stack: nn.Module, watched: Watched) -> bool:
    path, kind, children, dropout, norm = watched
    module: Any = stack
    for name in path:
        module = module._modules.get(name)
        if module is None:
            return False
    own = module.__dict__
    found = own["_modules"]
    if found or children:
        if sum(child is not None for child in found.values()) != children:
            return False
        if not path:  # the stack itself: its own hooks run in any case
            return True
    checked: Any = module
    if type(module) is not kind or hooked(checked) or "forward" in own:
        return False
    if not unpatched(kind):
        return False
    if norm and (checked.weight is None or checked.bias is None):
        return False
    return not dropout or bool(checked.p == 0.0)
