"""What happens around the modules of a network, and would not if they ran as one operation."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules import module as globals_of_torch


def hooked(module: nn.Module) -> bool:
    """Whether something happens around the module's forward or backward pass."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def hooked_everywhere() -> bool:
    """Whether there are hooks that torch calls around every module."""
    return bool(
        globals_of_torch._global_forward_hooks
        or globals_of_torch._global_forward_pre_hooks
        or globals_of_torch._global_backward_hooks
        or globals_of_torch._global_backward_pre_hooks
    )


def why_not_itself(module: nn.Module, forward: Any) -> str | None:
    """Why a module does not do, or not alone, what the function ``forward`` of a class says."""
    if hooked(module):
        return "has hooks"
    if type(module).forward is not forward or "forward" in module.__dict__:
        return "has a forward pass of its own"
    return None
