"""Ensembles whose members' parameters are stacked, as TD-MPC2, PWM and ``torch.func`` hold them."""

from __future__ import annotations

from collections.abc import Iterator
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

_INTERNAL = frozenset(nn.Module().__dict__)
_OPTIONS = ("in_dims", "out_dims", "randomness", "chunk_size")


def _closure(function: FunctionType) -> dict[str, Any]:
    cells = function.__closure__ or ()
    return {
        name: cell.cell_contents
        for name, cell in zip(function.__code__.co_freevars, cells, strict=True)
    }


def mapped_module(value: object) -> nn.Module | None:
    """The module of which ``value`` is ``torch.vmap(module, ...)``; None if it is anything else.

    So PWM and TD-MPC2 before 2025 hold what functorch's ``combine_state_for_ensemble`` returns.
    """
    if not isinstance(value, FunctionType) or value.__code__ is not torch.vmap(len).__code__:
        return None
    held = _closure(value)
    module = held.get("func")
    return module if isinstance(module, nn.Module) and set(_OPTIONS) <= set(held) else None


def mapped_again(value: Any, module: nn.Module) -> Any:
    """``value`` of :func:`mapped_module` for another module."""
    held = _closure(value)
    return torch.vmap(module, **{name: held[name] for name in _OPTIONS})


def holds_stacked(module: nn.Module) -> bool:
    """Whether one of its attributes holds parameters of members, stacked along a first axis."""
    own = [x for key, x in module.__dict__.items() if key not in _INTERNAL]
    return any(_stacked(x) for x in [*module._modules.values(), *own])


def _stacked(held: object) -> bool:
    """A container of weights ``[E, N, K]`` and vectors ``[E, N]`` of one E, and nothing else."""
    # A module that multiplies with such a weight itself, as ensembles of MBPO do, is no container.
    if isinstance(held, nn.Module) and not isinstance(held, (nn.ParameterList, nn.ParameterDict)):
        held = dict(held.named_parameters()) if hasattr(held, "keys") else None
    tensors = [x for x in _leaves(held) if not is_lazy(x)]
    axes = [x.dim() for x in tensors]
    if set(axes) != {2, 3} or axes.count(3) < 2:
        return False
    return len({x.shape[0] for x in tensors}) == 1


def _leaves(held: object) -> Iterator[Tensor]:
    if isinstance(held, Tensor):
        yield held
    elif isinstance(held, (list, tuple, nn.ParameterList)):
        for x in held:
            yield from _leaves(x)
    elif isinstance(held, (dict, nn.ParameterDict)):
        for x in held.values():
            yield from _leaves(x)
