"""The module that takes the place of an ``nn.Sequential``."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from pwm_fast import ops
from pwm_fast.hooks import hooked, hooked_everywhere
from pwm_fast.ops import Activation, Layer, Order

Path = tuple[str, ...]
"""Names of children from the stack down to a module."""


class Step(NamedTuple):
    """Where the parts of one layer are.

    Attributes:
        linear: the Linear.
        norm: its LayerNorm, or None.
        act: what its activation is.
        simnorm: the SimNorm whose ``dim`` is the group width, or None.
    """

    linear: Path
    norm: Path | None
    act: Activation
    simnorm: Path | None


class Watched(NamedTuple):
    """A module as it was when the stack was matched.

    Attributes:
        path: where it is.
        kind: its class.
        children: how many it has.
        dropout: it is a Dropout, whose rate was 0.
        norm: it is a LayerNorm, which had both parameters.
    """

    path: Path
    kind: type
    children: int
    dropout: bool
    norm: bool = False  # a default, for modules that were pickled without


class Plan(NamedTuple):
    """How a stack runs as one operation.

    Attributes:
        order: of LayerNorm and activation.
        steps: a layer each, first to last.
        watched: everything whose change makes the plan void.
    """

    order: Order
    steps: tuple[Step, ...]
    watched: tuple[Watched, ...]


class AcceleratedStack(nn.Sequential):
    """The modules of an ``nn.Sequential``, run as one :func:`pwm_fast.ops.mlp`.

    It holds the very modules it was made of, so parameters, buffers and state_dict keys are theirs.
    Where they have changed since (a module replaced or appended, a hook, a parametrization, a
    dropout rate), it runs them one after another, as ``nn.Sequential`` does. So does what is made
    of it by slicing.
    """

    plan: Plan | None = None

    def layers(self) -> list[Layer]:
        """The parameters as the operations take them; empty without a plan.

        Raises:
            ValueError: the modules are no longer what the plan was made for, or the stack has
                hooks, which who takes its layers would skip.
        """
        if self.plan is not None and (hooked(self) or not self._all_unchanged()):
            raise ValueError("the stack's modules or hooks have changed since: accelerate it again")
        return self._layers()

    def _layers(self) -> list[Layer]:
        layers = []
        for step in self.plan.steps if self.plan is not None else ():
            linear: Any = at(self, step.linear)
            norm: Any = None if step.norm is None else at(self, step.norm)
            group = 8 if step.simnorm is None else at(self, step.simnorm).dim
            layers.append(
                Layer(
                    linear.weight,
                    linear.bias,
                    None if norm is None else norm.weight,
                    None if norm is None else norm.bias,
                    step.act,
                    group,  # type: ignore[arg-type]
                    1e-5 if norm is None else norm.eps,
                )
            )
        return layers

    def intact(self) -> bool:
        """Whether the modules still are what the plan was made for, and nobody watches each."""
        return not hooked_everywhere() and self._all_unchanged()

    def _all_unchanged(self) -> bool:
        return self.plan is not None and all(_unchanged(self, w) for w in self.plan.watched)

    def forward(self, input: Tensor) -> Tensor:
        """``[..., K] -> [..., N]``."""
        if self.plan is None or not self.intact():
            return super().forward(input)
        return ops.mlp((input,), self._layers(), order=self.plan.order)


def assemble(stack: nn.Sequential, plan: Plan) -> AcceleratedStack:
    """A new module that shares the stack's modules and runs as planned."""
    module = AcceleratedStack.__new__(AcceleratedStack)
    module.__dict__.update(stack.__dict__)
    own_dictionaries(module)
    module.plan = plan
    return module


def own_dictionaries(module: nn.Module) -> None:
    """Give a module that shares another one's dictionaries copies of them; what they hold stays."""
    for name, value in nn.Module().__dict__.items():
        if isinstance(value, (dict, set)) and name in module.__dict__:
            module.__dict__[name] = copy.copy(module.__dict__[name])


def at(module: nn.Module, path: Path) -> nn.Module:
    """The module at the end of a path.

    Raises:
        KeyError: there is none.
    """
    for name in path:
        child = module._modules[name]
        if child is None:
            raise KeyError(name)
        module = child
    return module


def forward_of(kind: type[nn.Module]) -> Any:
    """The forward pass that a class had when this was asked first."""
    return _FORWARDS.setdefault(kind, kind.forward)


_FORWARDS: WeakKeyDictionary[type[nn.Module], Any] = WeakKeyDictionary()


def _unchanged(stack: nn.Module, watched: Watched) -> bool:
    module = stack
    for name in watched.path:
        child = module._modules.get(name)
        if child is None:
            return False
        module = child
    if sum(child is not None for child in module._modules.values()) != watched.children:
        return False
    if not watched.path:  # the stack itself: its own hooks run in any case
        return True
    if type(module) is not watched.kind or hooked(module) or "forward" in module.__dict__:
        return False
    if watched.kind.forward is not forward_of(watched.kind):
        return False
    if watched.norm and (module.weight is None or module.bias is None):
        return False
    return not watched.dropout or bool(module.p == 0.0)
