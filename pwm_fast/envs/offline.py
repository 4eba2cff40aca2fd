"""An environment that is known by its data alone: what a world model is pretrained for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pwm_fast.envs._batch import EnvBatch
from pwm_fast.envs.protocol import EnvironmentFault, Tasks


class OfflineEnv(EnvBatch):
    """Has widths and tasks, but cannot be stepped.

    Args:
        num_envs: N.
        obs_dim: O.
        action_dim: A.
        max_episode_steps: steps of the longest episode.
        tasks: what the tasks are called; with one task, or none named, it says of none.
        numbers: by which a model knows them.
        can_terminate: episodes end in terminal states.
        rows: what a replay needs for all the data.
        seed: is not looked at.
    """

    def __init__(
        self,
        num_envs: int,
        *,
        obs_dim: int,
        action_dim: int,
        max_episode_steps: int,
        tasks: Sequence[str] = (),
        numbers: Sequence[int] = (),
        can_terminate: bool = False,
        rows: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(num_envs, obs_dim, action_dim, max_episode_steps, can_terminate)
        self.rows = rows
        if len(tasks) > 1:
            self.tasks = Tasks(
                tuple(tasks),
                tuple(numbers),
                (action_dim,) * len(tasks),
                torch.full((num_envs,), numbers[0], dtype=torch.int64, device="cpu"),
                torch.ones(num_envs, action_dim, device="cpu"),
            )

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Tensor, dict[str, Any]]:
        """Observations of zeros, which nobody acts on."""
        return self._obs.clone(), {}

    def step(self, action: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Any]]:
        """Raise EnvironmentFault."""
        raise EnvironmentFault(
            "this is a world model that was pretrained on data: there is no environment to act in; "
            "python -m pwm_fast.train init=PATH task=NAME learns a policy for one of its tasks"
        )

    def get_state(self) -> dict[str, Any]:
        """Nothing that changes."""
        return self._episodes_state()

    def set_state(self, state: dict[str, Any]) -> None:
        """Undo :meth:`get_state`."""
        self._restore_episodes(state)

    def close(self) -> None:
        """Nothing is held."""
