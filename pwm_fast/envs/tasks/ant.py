"""Ant in the manner of dflex, on MuJoCo: run along +x."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pwm_fast.envs.tasks import rotation
from pwm_fast.envs.tasks.base import Task, uniform

START_HEIGHT = 0.75  # m
START_JOINTS = (0.0, 1.0, 0.0, -1.0, 0.0, -1.0, 0.0, 1.0)  # rad: hip_1, ankle_1, ...


class Ant(Task):
    """A four-legged robot of 182 kg with eight motors of 200 Nm: hip_1, ankle_1, ..., ankle_4.

    Observation (37), in dflex's frame with y up, ``(x, y, z)`` here being ``(x, z, -y)`` there:
    height; quaternion ``xyzw``; linear velocity of the torso's centre; angular velocity, both in
    the world's frame; 8 joint angles; 8 joint rates times 0.1; ``up``, the height of the torso's
    vertical axis; ``heading``, the part of its forward axis along +x; last action (8), zero after a
    reset. Reward: ``v_x + 0.1 up + heading + height - 0.27``. Terminates where the height is below
    0.27 m; 1000 steps.
    """

    name = "ant"
    asset = "ant.xml"
    obs_dim = 37
    action_dim = 8
    max_episode_steps = 1000
    can_terminate = True
    termination_height = 0.27  # m

    def observation(self, qpos: Tensor, qvel: Tensor, last_action: Tensor) -> Tensor:
        """See :class:`Ant`."""
        quat = qpos[:, 3:7]
        w, x, y, z = quat.unbind(-1)
        linear = qvel[:, :3]
        angular = rotation.rotate(quat, qvel[:, 3:6])
        # -90 deg about x, then the rotation of the torso.
        quat_y_up = math.sqrt(0.5) * torch.stack((x - w, y + z, z - y, w + x), dim=-1)
        up = 1.0 - 2.0 * (x.square() + y.square())
        # dflex's target is 10 km ahead: a drift to the side hardly changes its direction.
        heading = 1.0 - 2.0 * (y.square() + z.square())
        return torch.cat(
            (
                qpos[:, 2:3],
                quat_y_up,
                _y_up(linear),
                _y_up(angular),
                qpos[:, 7:],
                0.1 * qvel[:, 6:],
                torch.stack((up, heading), dim=-1),
                last_action,
            ),
            dim=-1,
        )

    def reward(self, obs: Tensor, action: Tensor) -> Tensor:
        """See :class:`Ant`."""
        height = obs[:, 0] - self.termination_height
        return obs[:, 5] + 0.1 * obs[:, 27] + obs[:, 28] + height

    def terminated(self, obs: Tensor) -> Tensor:
        """The centre of the torso, a sphere of 0.25 m, is below 0.27 m."""
        return obs[:, 0] < self.termination_height

    def sample_reset(
        self, n: int, generator: torch.Generator, dtype: torch.dtype, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Standing over the origin with noise.

        Position within 0.1 m, turned by up to 7.5 deg about a random axis, joints within 0.2 rad,
        all velocities within 0.25, where the linear one is that of the point of the (extended)
        torso that is at the world's origin, as in dflex.
        """
        position = uniform((n, 3), 0.1, generator, dtype, device)
        angle = uniform((n, 1), math.pi / 24.0, generator, dtype, device)
        axis = uniform((n, 3), 0.5, generator, dtype, device)
        joints = uniform((n, 8), 0.2, generator, dtype, device)
        qvel = uniform((n, 14), 0.25, generator, dtype, device)

        # Column by column: a tensor made from Python numbers would be a copy from the host.
        position[:, 2] += START_HEIGHT
        for i, start in enumerate(START_JOINTS):
            if start:
                joints[:, i] += start
        quat = rotation.from_axis_angle(axis, angle)
        angular = qvel[:, 3:6]
        linear = qvel[:, :3] + torch.linalg.cross(angular, position)
        qvel = torch.cat((linear, rotation.rotate_back(quat, angular), qvel[:, 6:]), dim=-1)
        return torch.cat((position, quat, joints), dim=-1), qvel


def _y_up(v: Tensor) -> Tensor:
    """Vectors ``[N, 3]`` of a frame with z up in dflex's frame with y up."""
    return torch.stack((v[:, 0], v[:, 2], -v[:, 1]), dim=-1)
