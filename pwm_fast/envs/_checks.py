"""Checks of what a caller hands to an environment."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from pwm_fast.envs.protocol import ActionNotFinite


def at_most(most: int, **numbers: int) -> None:
    """Raise ValueError, naming it, where a number is above ``most``."""
    for name, value in numbers.items():
        if value > most:
            raise ValueError(f"{name} must be at most {most}, got {value}")


def positive(**numbers: int) -> None:
    """Raise ValueError, naming it, where a number is below 1 or not whole."""
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int | np.integer):
            raise ValueError(f"{name} must be a whole number, at least 1, got {value!r}")
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def unit_action(action: Tensor, num_envs: int, action_dim: int) -> Tensor:
    """The action ``[N, A]`` on the CPU in float32, clipped to [-1, 1].

    Raises:
        ValueError: another shape.
        ActionNotFinite: a value that is not finite.
    """
    action_shape(action, num_envs, action_dim)
    action = action.detach().to(device="cpu", dtype=torch.float32)
    finite = torch.isfinite(action).all(-1)
    if not bool(finite.all()):
        envs = (~finite).nonzero().flatten().tolist()
        shown = ", ".join(map(str, envs[:8])) + (", ..." if len(envs) > 8 else "")
        plural = "s" if len(envs) > 1 else ""
        raise ActionNotFinite(f"action has non-finite values, in env{plural} {shown}")
    return action.clamp(-1.0, 1.0)


def action_shape(action: Tensor, num_envs: int, action_dim: int) -> None:
    """Raise ValueError for an action of another shape than ``[N, A]``."""
    expected = (num_envs, action_dim)
    if tuple(action.shape) != expected:
        raise ValueError(f"action must have shape {expected}, got {tuple(action.shape)}")


def saved_state(state: dict[str, Any], engine: str, shape: tuple[int, ...]) -> None:
    """Raise ValueError where a saved state cannot be continued.

    Args:
        state: of an environment's ``get_state``; without ``engine`` it is of ``mujoco``.
        engine: of this environment.
        shape: ``[N, n]`` of this environment's ``physics``.
    """
    of_engine = state.get("engine", "mujoco")
    if of_engine != engine:
        raise ValueError(
            f"the saved state is of the physics engine {of_engine}, this environment runs "
            f"{engine}; env.engine={of_engine} continues it"
        )
    saved = tuple(state["physics"].shape)
    if saved != shape:
        raise ValueError(
            f"the saved state holds {saved[0]} envs of {saved[1]} numbers, this environment "
            f"has {shape[0]} of {shape[1]}"
        )


def reset_mask(options: dict[str, Any] | None, num_envs: int) -> Tensor:
    """``options["reset_mask"]`` as a bool tensor ``[N]`` on the CPU; all True if not given.

    Raises:
        ValueError: another dtype or shape.
    """
    mask = (options or {}).get("reset_mask")
    if mask is None:
        return torch.ones(num_envs, dtype=torch.bool, device="cpu")
    mask = torch.as_tensor(mask, device="cpu")
    if mask.dtype != torch.bool or tuple(mask.shape) != (num_envs,):
        raise ValueError(
            f"reset_mask must be a bool tensor [{num_envs}], got {mask.dtype} {tuple(mask.shape)}"
        )
    return mask
