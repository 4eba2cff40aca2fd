"""What robots with a free root share: dflex's observation, termination and start states."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from pwm_fast.envs.tasks import rotation
from pwm_fast.envs.tasks.base import Task, uniform


class FloatingTask(Task, abstract=True):
    """A robot whose root moves freely and whose J other joints are hinges with a motor each.

    Observation (13 + 3 J), in dflex's frame with y up, ``(x, y, z)`` here being ``(x, z, -y)``
    there: height of the root; its quaternion ``xyzw``; its linear velocity; its angular velocity,
    both in the world's frame; J joint angles; J joint rates times 0.1; ``up``, the height of the
    root's vertical axis; ``heading``, the part of its forward axis along +x; last action (J), zero
    after a reset. Terminates where the height is below ``termination_height``.

    Attributes:
        start_height: of the root, m.
        start_joints: J angles, rad.
        termination_height: m.
    """

    can_terminate = True
    start_height: ClassVar[float]
    start_joints: ClassVar[tuple[float, ...]]
    termination_height: ClassVar[float]

    def observation(self, qpos: Tensor, qvel: Tensor, last_action: Tensor) -> Tensor:
        """See :class:`FloatingTask`."""
        quat = qpos[:, 3:7]
        w, x, y, z = quat.unbind(-1)
        linear = qvel[:, :3]
        angular = rotation.rotate(quat, qvel[:, 3:6])
        # -90 deg about x, then the rotation of the root.
        quat_y_up = math.sqrt(0.5) * torch.stack((x - w, y + z, z - y, w + x), dim=-1)
        up = 1.0 - 2.0 * (x.square() + y.square())
        # dflex's target is far ahead: a drift to the side hardly changes its direction.
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

    def progress(self, obs: Tensor) -> Tensor:
        """``v_x + 0.1 up + heading`` ``[N]``, the part of the reward that all have."""
        joints = 11 + 2 * len(self.start_joints)
        return obs[:, 5] + 0.1 * obs[:, joints] + obs[:, joints + 1]

    def terminated(self, obs: Tensor) -> Tensor:
        """The root is below ``termination_height``."""
        return obs[:, 0] < self.termination_height

    def sample_reset(
        self, n: int, generator: torch.Generator, dtype: torch.dtype, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Standing over the origin with noise.

        Position within 0.1 m, turned by up to 7.5 deg about a random axis, joints within 0.2 rad,
        all velocities within 0.25, where the linear one is that of the point of the (extended)
        root that is at the world's origin, as in dflex.
        """
        hinges = len(self.start_joints)
        position = uniform((n, 3), 0.1, generator, dtype, device)
        angle = uniform((n, 1), math.pi / 24.0, generator, dtype, device)
        axis = uniform((n, 3), 0.5, generator, dtype, device)
        joints = uniform((n, hinges), 0.2, generator, dtype, device)
        qvel = uniform((n, 6 + hinges), 0.25, generator, dtype, device)

        # Column by column: a tensor made from Python numbers would be a copy from the host.
        position[:, 2] += self.start_height
        for i, start in enumerate(self.start_joints):
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
