"""What makes a robot a task, as torch functions of (qpos, qvel, last action) for any engine."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from importlib import resources
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor


class Variant(NamedTuple):
    """What one variant of a robot changes of the numbers in its MJCF model.

    Attributes:
        mass: factor of the density of every geom, so of masses and inertias.
        torque: factor of the gear of every motor.
        damping: Nms/rad (Ns/m on a slide) that is added to the damping of every hinge and slide.
        armature: factor of the armature of every hinge and slide.
    """

    mass: float = 1.0
    torque: float = 1.0
    damping: float = 0.0
    armature: float = 1.0


Variants = Mapping[str, Variant]


class Task(ABC):
    """Observation, reward, termination and reset of one robot.

    The functions are pure, batched and free of host synchronisation, so that an engine on the CPU
    and one inside a CUDA graph share them. States are MuJoCo's: z up, free joints as position and
    ``wxyz`` quaternion with world-frame linear and body-frame angular velocity.

    Attributes:
        name: what ``env=`` calls it.
        asset: file name of the MJCF model in ``pwm_fast/envs/assets``.
        obs_dim: O.
        action_dim: A.
        substeps: physics steps a control step.
        control_dt: seconds a control step.
        max_episode_steps: default time limit in control steps.
        can_terminate: whether :meth:`terminated` can be True.
        variants: physics of the robot by the name that ``env.variant`` gives it.

    Args:
        variant: one of ``variants``.

    Raises:
        ValueError: another ``variant``.
    """

    name: ClassVar[str]
    asset: ClassVar[str]
    obs_dim: ClassVar[int]
    action_dim: ClassVar[int]
    substeps: ClassVar[int] = 4
    control_dt: ClassVar[float] = 1.0 / 60.0
    max_episode_steps: ClassVar[int] = 1000
    can_terminate: ClassVar[bool] = False
    variants: ClassVar[Variants] = {"default": Variant()}
    variant: str = "default"

    def __init__(self, variant: str = "default") -> None:
        if not isinstance(variant, str) or variant not in self.variants:
            known = ", ".join(self.variants)
            raise ValueError(f"env.variant of {self.name} must be one of {known}, got {variant!r}")
        self.variant = variant

    def __init_subclass__(cls, abstract: bool = False) -> None:
        super().__init_subclass__()
        if abstract:  # what several robots share
            return
        needed = ("name", "asset", "obs_dim", "action_dim")
        missing = [key for key in needed if not hasattr(cls, key)]
        if missing:
            raise TypeError(f"the task {cls.__qualname__} lacks {', '.join(missing)}")

    def mjcf(self) -> str:
        """The MJCF model as text, before the variant changes it.

        Raises:
            FileNotFoundError: there is no such asset.
        """
        file = resources.files("pwm_fast.envs") / "assets" / self.asset
        if not file.is_file():
            raise FileNotFoundError(
                f"env {self.name!r} needs its MJCF model in pwm_fast/envs/assets/{self.asset}"
            )
        return file.read_text("utf-8")

    def model(self) -> Any:
        """The robot of this variant as a new ``mujoco.MjModel``.

        Raises:
            FileNotFoundError: there is no such asset.
        """
        return self.spec().compile()

    def spec(self) -> Any:
        """The robot of this variant as a new ``mujoco.MjSpec``, which may be added to.

        Raises:
            FileNotFoundError: there is no such asset.
        """
        import mujoco

        spec = mujoco.MjSpec.from_string(self.mjcf())
        change = self.variants[self.variant]
        for geom in spec.geoms:
            geom.density *= change.mass
            geom.mass *= change.mass  # NaN where the density gives it
        for motor in spec.actuators:
            motor.gear *= change.torque
        for joint in spec.joints:
            if joint.type in (mujoco.mjtJoint.mjJNT_HINGE, mujoco.mjtJoint.mjJNT_SLIDE):
                joint.damping[0] += change.damping  # of a polynomial, the linear term
                joint.armature *= change.armature
        return spec

    @abstractmethod
    def observation(self, qpos: Tensor, qvel: Tensor, last_action: Tensor) -> Tensor:
        """Observations ``[N, O]`` of states and last actions ``[N, A]``, zero after a reset."""

    @abstractmethod
    def reward(self, obs: Tensor, action: Tensor) -> Tensor:
        """Rewards ``r(s_t, a_t)`` ``[N]`` of observations and clipped actions ``[N, A]``."""

    def terminated(self, obs: Tensor) -> Tensor:
        """Where an observation ``[N, O]`` is of a terminal state: bool ``[N]``."""
        return torch.zeros(obs.shape[0], dtype=torch.bool, device=obs.device)

    def goal(self, obs: Tensor) -> Tensor | None:
        """Where an observation is of a state the task is after: bool ``[N]``; None if undefined."""
        return None

    @abstractmethod
    def sample_reset(
        self, n: int, generator: torch.Generator, dtype: torch.dtype, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """``n`` start states ``(qpos [n, nq], qvel [n, nv])``."""


def uniform(
    shape: tuple[int, ...],
    bound: float,
    generator: torch.Generator,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """Samples of ``U(-bound, bound)``."""
    return (torch.rand(shape, generator=generator, dtype=dtype, device=device) * 2.0 - 1.0) * bound
