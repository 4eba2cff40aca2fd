"""ANYmal in the manner of dflex, on MuJoCo: run along +x."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from pwm_fast.envs.tasks.base import Variant, Variants
from pwm_fast.envs.tasks.floating import FloatingTask


class Anymal(FloatingTask):
    """A four-legged robot of 37.7 kg with twelve motors of 200 Nm against springs to zero angles.

    Joints: HAA, HFE and KFE of the legs LF, RF, LH and RH, without limits; springs of 85 Nm/rad.
    Hips and thighs, which weigh nothing in dflex, weigh 0.05 kg each. The variants are the same.

    Observation (49): see :class:`FloatingTask`. Reward: ``v_x + 0.1 up + heading + height - 0.25 -
    0.005 |a|^2``. Terminates where the height is below 0.25 m; 1000 steps.
    """

    name = "anymal"
    asset = "anymal.xml"
    obs_dim = 49
    action_dim = 12
    start_height = 0.55
    start_joints = (0.03, 0.4, -0.8, -0.03, 0.4, -0.8, 0.03, -0.4, 0.8, -0.03, -0.4, 0.8)
    termination_height = 0.25
    variants: ClassVar[Variants] = {"default": Variant(), "dflex": Variant()}

    def reward(self, obs: Tensor, action: Tensor) -> Tensor:
        """See :class:`Anymal`."""
        height = obs[:, 0] - self.termination_height
        return self.progress(obs) + height - 0.005 * action.square().sum(-1)
