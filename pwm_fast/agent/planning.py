"""Acting by planning in the agent's world model."""

from __future__ import annotations

import torch
from torch import Tensor

from pwm_fast import ops
from pwm_fast.agent.pwm import PWM


class Planner:
    """Plans every action; each env's plan starts from the one before, one step on.

    Its random numbers are its own: the global generators are left alone.

    Args:
        agent: whose networks plan.
        options: of the plans.
        seed: of the random numbers.
        task: int64 ``[N]``, the numbers of the envs' tasks, where the model has several.
        eval_mode: add no noise to the actions.
    """

    def __init__(
        self,
        agent: PWM,
        options: ops.MPPI,
        seed: int,
        *,
        task: Tensor | None = None,
        eval_mode: bool = True,
    ) -> None:
        self.agent = agent
        self.options = options
        self.task = task
        self.eval_mode = eval_mode
        self.generator = torch.Generator(agent.device).manual_seed(seed)
        self.mean: Tensor | None = None

    def act(self, obs: Tensor, first: Tensor) -> Tensor:
        """Actions ``[N, A]`` for observations ``[N, O]``.

        Args:
            obs: of the same N envs in each call.
            first: bool ``[N]``: envs whose episode begins with this observation.
        """
        plan = self.agent.plan(
            obs,
            self.options,
            task=self.task,
            previous=self.mean,
            first=first.to(self.agent.device),
            eval_mode=self.eval_mode,
            generator=self.generator,
        )
        self.mean = plan.mean
        return plan.action
