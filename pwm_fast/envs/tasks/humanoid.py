"""Humanoid in the manner of dflex, on MuJoCo: run along +x."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from pwm_fast.envs.tasks.base import Variant, Variants
from pwm_fast.envs.tasks.floating import FloatingTask


class Humanoid(FloatingTask):
    """A humanoid of 40.8 kg with 21 motors of 35 to 210 Nm against springs to zero angles.

    Joints: abdomen z, y, x; right hip x, z, y, knee, ankle y, x; the same of the left; right
    shoulder 1, 2, elbow; the same of the left. Measures and joint ranges are those of dm_control's
    humanoid, from which dflex's differs in some ranges of hips and shoulders. The variants are the
    same.

    Observation (76): see :class:`FloatingTask`. Reward: ``v_x + 0.1 up + heading + H -
    0.002 |a|^2`` with ``d = clip(height - 0.84, -1, 0.1)`` and ``H = 10 d``, or ``-200 d^2`` where
    ``d < 0``. Terminates where the height is below 0.74 m; 1000 steps.
    """

    name = "humanoid"
    asset = "humanoid.xml"
    obs_dim = 76
    action_dim = 21
    start_height = 1.35
    start_joints = (0.0,) * 21
    termination_height = 0.74
    variants: ClassVar[Variants] = {"default": Variant(), "dflex": Variant()}

    def reward(self, obs: Tensor, action: Tensor) -> Tensor:
        """See :class:`Humanoid`."""
        d = (obs[:, 0] - 0.84).clamp(-1.0, 0.1)
        height = torch.where(d < 0.0, -200.0 * d.square(), 10.0 * d)
        return self.progress(obs) + height - 0.002 * action.square().sum(-1)
