"""How a stack of modules runs as one operation, and what of it is to stay for that."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

from pwm_fast.ops import Activation, Order

Path = tuple[str, ...]
"""Names of children from the stack down to a module."""


class Step(NamedTuple):
    """Where the parts of one layer are.

    Attributes:
        linear: the Linear.
        norm: its LayerNorm, or None.
        act: what its activation is.
        simnorm: the SimNorm whose ``dim`` is the group width, or None.
        dropout: the Dropout of the Linear's output, or None.
    """

    linear: Path
    norm: Path | None
    act: Activation
    simnorm: Path | None
    dropout: Path | None = None  # a default, for modules that were pickled without


class Watched(NamedTuple):
    """A module as it was when the stack was matched.

    Attributes:
        path: where it is.
        kind: its class.
        children: how many it has.
        dropout: it is a Dropout that no step runs: its rate was 0.
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


def tensor_of(module: nn.Module, name: str) -> Any:
    """``getattr(module, name)``, for a parameter in a fifth of the time."""
    found = module._parameters.get(name)
    return getattr(module, name) if found is None else found


def forward_of(kind: type[nn.Module]) -> Any:
    """The forward pass that a class had when this was asked first."""
    return _FORWARDS.setdefault(kind, kind.forward)


_FORWARDS: dict[type[nn.Module], Any] = {}  # not weak: looking there would take twice as long


def unpatched(kind: type[nn.Module]) -> bool:
    """Whether a class still has that forward pass."""
    return _FORWARDS.get(kind) is kind.forward
