"""Cart-pole in the manner of dflex, on MuJoCo: swing up or stabilise."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from pwm_fast.envs.tasks.base import Task, Variant, Variants, uniform

STARTS = {"hanging": -math.pi, "upright": 0.0}


class CartPole(Task):
    """A 1000 N motor pushes a 50 kg cart that carries a free 1 m pole of 2.5 kg.

    Observation (5): ``x, x', sin th, cos th, th'``; th = 0 is upright. Reward:
    ``-th^2 - 0.1 th'^2 - 0.05 x^2 - 0.1 x'^2`` with th in [-pi, pi]. Never terminates; 240 steps.

    Args:
        start: ``"hanging"`` (swing-up, as SHAC runs it) or ``"upright"`` (as PWM's code runs it).
        variant: ``"default"`` or ``"dflex"``, which are the same here.

    Raises:
        ValueError: another ``start`` or ``variant``.
    """

    name = "cartpole"
    asset = "cartpole.xml"
    obs_dim = 5
    action_dim = 1
    max_episode_steps = 240
    goal_angle = 0.2  # rad from upright: what counts as held
    variants: ClassVar[Variants] = {"default": Variant(), "dflex": Variant()}

    def __init__(self, start: str = "hanging", variant: str = "default") -> None:
        super().__init__(variant)
        if not isinstance(start, str) or start not in STARTS:
            raise ValueError(f"env.start must be one of {', '.join(STARTS)}, got {start!r}")
        self.start = start

    def observation(self, qpos: Tensor, qvel: Tensor, last_action: Tensor) -> Tensor:
        """See :class:`CartPole`."""
        x, th = qpos.unbind(-1)
        xd, thd = qvel.unbind(-1)
        return torch.stack((x, xd, th.sin(), th.cos(), thd), dim=-1)

    def reward(self, obs: Tensor, action: Tensor) -> Tensor:
        """See :class:`CartPole`."""
        x, xd, sin, cos, thd = obs.unbind(-1)
        th = torch.atan2(sin, cos)
        return -(th.square() + 0.1 * thd.square() + 0.05 * x.square() + 0.1 * xd.square())

    def goal(self, obs: Tensor) -> Tensor:
        """The pole is within 0.2 rad of upright."""
        return torch.atan2(obs[:, 2], obs[:, 3]).abs() < self.goal_angle

    def sample_reset(
        self, n: int, generator: torch.Generator, dtype: torch.dtype, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Position and angle within pi/2 of the start, velocities within 0.25."""
        qpos = uniform((n, 2), math.pi / 2, generator, dtype, device)
        qpos[:, 1] += STARTS[self.start]
        return qpos, uniform((n, 2), 0.25, generator, dtype, device)
