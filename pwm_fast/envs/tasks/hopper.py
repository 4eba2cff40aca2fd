"""Hopper in the manner of dflex, on MuJoCo: hop forward without falling."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from pwm_fast.envs.tasks.base import Task, Variant, Variants, uniform


class Hopper(Task):
    """A planar robot of 15.8 kg with three motors of 200 Nm: thigh, leg, foot.

    Both variants are dflex's robot, with its drag and added mass: it can hop well enough.

    Observation (11): ``z, pitch, thigh, leg, foot`` and their rates with ``x'`` in front, where
    ``z`` is the torso's height over 1.25 m: ``z, pitch, thigh, leg, foot, x', z', pitch', thigh',
    leg', foot'``. Reward: ``x' + H + 1 - (pitch / 30 deg)^2 - 0.1 |a|^2`` with
    ``d = clip(z + 0.3, -1, 0.3)`` and ``H = d``, or ``-200 d^2`` where ``d < 0``. Terminates where
    ``z < -0.45``; 1000 steps.
    """

    name = "hopper"
    asset = "hopper.xml"
    obs_dim = 11
    action_dim = 3
    max_episode_steps = 1000
    can_terminate = True
    termination_height = -0.45  # m, over 1.25 m
    noise = 0.05  # m, rad, m/s, rad/s
    variants: ClassVar[Variants] = {"default": Variant(), "dflex": Variant()}

    def observation(self, qpos: Tensor, qvel: Tensor, last_action: Tensor) -> Tensor:
        """See :class:`Hopper`."""
        return torch.cat((qpos[:, 1:], qvel), dim=-1)

    def reward(self, obs: Tensor, action: Tensor) -> Tensor:
        """See :class:`Hopper`."""
        d = (obs[:, 0] + 0.3).clamp(-1.0, 0.3)
        height = torch.where(d < 0.0, -200.0 * d.square(), d)
        upright = 1.0 - (obs[:, 1] / (math.pi / 6.0)).square()
        return obs[:, 5] + height + upright - 0.1 * action.square().sum(-1)

    def terminated(self, obs: Tensor) -> Tensor:
        """The torso is below 0.8 m."""
        return obs[:, 0] < self.termination_height

    def sample_reset(
        self, n: int, generator: torch.Generator, dtype: torch.dtype, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Upright; every coordinate and velocity within 0.05."""
        qpos = uniform((n, 6), self.noise, generator, dtype, device)
        return qpos, uniform((n, 6), self.noise, generator, dtype, device)
