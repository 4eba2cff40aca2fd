"""What the trainer asks of an environment: a batch of envs with torch tensors in and out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

SAME_STEP = "SameStep"


class StateNotSupported(RuntimeError):
    """The environment cannot save or restore its state to the bit; see ``get_state``."""


class EnvironmentFault(RuntimeError):
    """An environment answered what cannot be used; the message says which, when and what."""


class ActionNotFinite(ValueError):
    """An environment was given an action with NaN or infinite values; no env was stepped."""


class CannotRender(RuntimeError):
    """There are no pictures of an environment; the message says why."""


@dataclass(frozen=True)
class Box:
    """Bounds of one env's observations or actions, with the attributes of Gymnasium's ``Box``.

    Attributes:
        shape: shape of one item.
        low: lower bound of every entry.
        high: upper bound of every entry.
        dtype: dtype of the tensors.
    """

    shape: tuple[int, ...]
    low: float = -float("inf")
    high: float = float("inf")
    dtype: torch.dtype = field(default=torch.float32)


@dataclass(frozen=True)
class Tasks:
    """The tasks of an environment that has several.

    Attributes:
        names: what they are called.
        numbers: by which a model knows them.
        action_dims: components of the action, the first ones, that each reads.
        of_env: int64 ``[N]``, the number of each env's task.
        action_mask: ``[N, A]``, 1.0 where the task of an env reads a component, else 0.0.
    """

    names: tuple[str, ...]
    numbers: tuple[int, ...]
    action_dims: tuple[int, ...]
    of_env: Tensor
    action_mask: Tensor

    @property
    def action_dims_by_number(self) -> dict[int, int]:
        """``action_dims`` by the tasks' numbers."""
        return dict(zip(self.numbers, self.action_dims, strict=True))


def tasks_of(env: VectorEnv) -> Tasks | None:
    """The tasks of an environment that says of any; else None."""
    found: Tasks | None = getattr(env, "tasks", None)
    return found


def task_of(env: VectorEnv) -> Tensor | None:
    """The number of each env's task, int64 ``[N]``, where the environment says of any."""
    found = tasks_of(env)
    return None if found is None else found.of_env


class Viewer(Protocol):
    """Pictures of the envs of an environment.

    Attributes:
        step_seconds: seconds of a control step, so that what is filmed plays in real time.
    """

    step_seconds: float

    def frame(self, env: int) -> np.ndarray:
        """The state that an env is in now: uint8 ``[height, width, 3]``, red, green and blue.

        Raises:
            CannotRender: there is no picture.
        """
        ...

    def close(self) -> None:
        """Release what it draws with."""
        ...


def viewer_of(env: VectorEnv, width: int, height: int) -> Viewer:
    """A new viewer of an environment's envs, which lives no longer than the environment.

    Args:
        env: the environment; nothing that it computes changes.
        width: of a picture, pixels.
        height: likewise.

    Raises:
        CannotRender: the environment shows no pictures, or not here.
    """
    make = getattr(env, "viewer", None)
    if make is None:
        raise CannotRender(f"{type(env).__name__} shows no pictures: it has no viewer()")
    found: Viewer = make(width, height)
    return found


@runtime_checkable
class VectorEnv(Protocol):
    """A batch of N envs with Gymnasium's 5-tuple, torch tensors and same-step autoreset.

    ``step`` takes actions ``[N, A]`` in [-1, 1] (clipped inside) and returns

    - ``obs`` ``[N, O]`` float32: the observation to act on next, of the new episode where one
      ended;
    - ``reward`` ``[N]`` float32: ``r(s_t, a_t)``, from the state and action before the step;
    - ``terminated`` ``[N]`` bool: the episode ended in a terminal state (no bootstrap);
    - ``truncated`` ``[N]`` bool: it ended by its time limit (bootstrap);
    - ``info``: ``final_obs`` ``[N, O]``, always dense: the true next observation before any reset,
      equal to ``obs`` where no episode ended; ``episode``, a dict of ``return`` ``[N]``, ``length``
      ``[N]`` and ``mask`` ``[N]`` (True where an episode ended in this step); optionally
      ``diverged`` ``[N]`` bool: the env terminated since its simulation broke down, with its last
      sound observation as ``final_obs``; and ``goal`` ``[N]`` bool: the state reached (before a
      reset) is one the task is after.

    An environment may say in an attribute ``divergence`` why an env diverged first, if one did.

    One of several tasks has them in an attribute ``tasks`` (:class:`Tasks`).

    One that can be filmed has a method ``viewer(width, height)`` (:func:`viewer_of`).

    Attributes:
        num_envs: N.
        device: where the tensors live.
        single_observation_space: ``shape`` is ``(O,)``.
        single_action_space: ``shape`` is ``(A,)``, bounds -1 and 1.
        max_episode_steps: time limit of an episode, in steps.
        can_terminate: False where ``terminated`` is never True in normal operation.
        metadata: ``metadata["autoreset_mode"]`` is :data:`SAME_STEP`.
    """

    num_envs: int
    device: torch.device
    single_observation_space: Any
    single_action_space: Any
    max_episode_steps: int
    can_terminate: bool
    metadata: dict[str, Any]

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Tensor, dict[str, Any]]:
        """Start new episodes in all envs, or where ``options["reset_mask"]`` ``[N]`` is True.

        Args:
            seed: of all that is random from here on, each env in a stream of its own that no
                other seed's env has; None goes on with the random numbers that there are.
            options: the mask.
        """
        ...

    def step(self, action: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Any]]:
        """Advance all envs by one control step."""
        ...

    def get_state(self) -> dict[str, Any]:
        """Everything that decides the future: physics, counters, last action, random numbers.

        Raises:
            StateNotSupported: the simulator cannot be saved to the bit.
        """
        ...

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue from a state of :meth:`get_state`, to the bit.

        Raises:
            StateNotSupported: the simulator cannot be restored to the bit.
            ValueError: the state is of another environment or number of envs.
        """
        ...

    def close(self) -> None:
        """Release what the envs hold."""
        ...
