"""An agent's world model as the cost that planners of other libraries minimise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pwm_fast.agent.pwm import PWM


class CostModel:
    """Costs of candidate action sequences, for the solvers of stable-worldmodel and their like.

    The cost is minus what :meth:`PWM.plan` maximises: the discounted rewards of the imagined steps
    and the critics' value of where they end. It is differentiable in the candidates, for solvers
    that descend it; no gradient reaches the agent's parameters. The agent may go on learning.

    Candidates are clamped to [-1, 1], which is what the agent's environments do to actions: outside
    the gradient is 0. A candidate whose value is not finite costs infinity.

    Args:
        agent: whose networks judge.
        key: of the observations in a solver's info.
        task: the number of the task that is solved, where the agent's model has several.

    Raises:
        ValueError: the model has several tasks, and none of this number.
    """

    def __init__(self, agent: PWM, key: str = "state", task: int | None = None) -> None:
        count = agent.config.world_model.num_tasks
        if count > 1 and task not in range(count):
            raise ValueError(
                f"task must be a number from 0 to {count - 1}, one of the model's, got {task!r}"
            )
        self.agent = agent
        self.key = key
        self.task = task

    def get_cost(self, info_dict: Mapping[str, Any], action_candidates: Tensor) -> Tensor:
        """Costs ``[B, S]``, least is best, of S candidates for each of B envs.

        Args:
            info_dict: under ``key`` a tensor or array of observations, ``[B, S, O]``, or
                ``[B, S, T, O]`` of which the last in time is the present one. Where a tensor is
                expanded along S, its one observation of each env is encoded once.
            action_candidates: ``[B, S, H, n A]``, on the agent's device. With n above 1 (a
                solver's ``action_block``) each of the H steps is n of the agent's.

        Raises:
            TypeError: candidates that are no floating tensor.
            ValueError: the key is missing, or shapes or devices do not fit.
        """
        actions = self._actions(action_candidates)
        obs = self._obs(info_dict, *action_candidates.shape[:2])
        steps, batch, count, width = actions.shape
        if count == 1 or obs.stride(1) == 0:
            value = self._values(obs[:, 0], actions)
        else:
            rows = actions.reshape(steps, batch * count, 1, width)
            value = self._values(obs.flatten(0, 1), rows).view(batch, count)
        cost = torch.where(value.isfinite(), -value, torch.inf)
        return cost.to(action_candidates.dtype)

    def _values(self, obs: Tensor, actions: Tensor) -> Tensor:
        """As :meth:`PWM.trajectory_values`, of the one task."""
        task = None
        if self.task is not None:
            task = torch.full((len(obs),), self.task, device=obs.device)
        return self.agent.trajectory_values(obs.to(actions.dtype), actions, task=task)

    def _actions(self, candidates: Tensor) -> Tensor:
        """The candidates as the agent takes them, ``[H, B, S, A]``."""
        agent = self.agent
        if not isinstance(candidates, Tensor) or not candidates.is_floating_point():
            kind = candidates.dtype if isinstance(candidates, Tensor) else type(candidates).__name__
            raise TypeError(f"action_candidates must be a floating tensor, got {kind}")
        width = agent.action_dim
        shape = tuple(candidates.shape)
        if len(shape) != 4 or 0 in shape or shape[3] % width:
            raise ValueError(
                f"action_candidates must be [B, S, H, {width}], or wider by a whole number of "
                f"actions, got {shape}"
            )
        if candidates.device != agent.device:
            raise ValueError(
                f"action_candidates must be on the agent's device {agent.device}, got "
                f"{candidates.device}: make the solver with that device"
            )
        dtype = next(agent.world_model.parameters()).dtype
        actions = candidates.to(dtype).clamp(-1.0, 1.0)
        return actions.reshape(*shape[:2], -1, width).permute(2, 0, 1, 3)

    def _obs(self, info: Mapping[str, Any], batch: int, count: int) -> Tensor:
        """The present observations ``[B, S, O]``."""
        if self.key not in info:
            raise ValueError(f"info_dict must hold {self.key!r}, got {sorted(info)}")
        obs = torch.as_tensor(info[self.key], device=self.agent.device)
        width = self.agent.obs_rms.mean.shape[-1]
        present = obs[..., -1, :] if obs.dim() == 4 and obs.shape[2] else obs
        if tuple(present.shape) != (batch, count, width):
            raise ValueError(
                f"info_dict[{self.key!r}] must be [{batch}, {count}, {width}], perhaps with a time "
                f"axis before the last, got {tuple(obs.shape)}"
            )
        return present
