"""Ant in the manner of dflex, on MuJoCo: run along +x."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from pwm_fast.envs.tasks.base import Variant, Variants
from pwm_fast.envs.tasks.floating import FloatingTask


class Ant(FloatingTask):
    """A four-legged robot of 36 kg with eight motors of 200 Nm: hip_1, ankle_1, ..., ankle_4.

    The variant ``dflex`` weighs 182 kg, as there: on MuJoCo's contacts a planner makes it walk, and
    the lighter one run (``python -m bench.attainable``).

    Observation (37): see :class:`FloatingTask`. Reward: ``v_x + 0.1 up + heading + height - 0.27``.
    Terminates where the centre of the torso, a sphere of 0.25 m, is below 0.27 m; 1000 steps.
    """

    name = "ant"
    asset = "ant.xml"
    obs_dim = 37
    action_dim = 8
    start_height = 0.75
    start_joints = (0.0, 1.0, 0.0, -1.0, 0.0, -1.0, 0.0, 1.0)
    termination_height = 0.27
    variants: ClassVar[Variants] = {"default": Variant(mass=0.2), "dflex": Variant()}

    def reward(self, obs: Tensor, action: Tensor) -> Tensor:
        """See :class:`Ant`."""
        return self.progress(obs) + (obs[:, 0] - self.termination_height)
