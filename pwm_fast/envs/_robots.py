"""What both physics engines share: a batch of envs of a built-in robot."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from pwm_fast import memory, seeding
from pwm_fast.envs import _checks, _rendering
from pwm_fast.envs._batch import EnvBatch
from pwm_fast.envs.tasks.base import Task


class RobotBatch(EnvBatch, ABC):
    """N envs of one task on one engine.

    Args:
        task: the robot and its task.
        num_envs: N, at least 1.
        max_episode_steps: time limit; None is the task's own.
        device: where physics and tensors live.
        seed: of the reset states, in [0, 2^63).

    Raises:
        ValueError: a number out of range.
        OutOfMemory: the envs certainly do not fit on the device.
    """

    _engine: ClassVar[str]  # its name in saved states
    _number_bytes: ClassVar[int]  # of one number of the physics
    # Views ``[N, n]`` of what the engine reads and writes, and of its times ``[N]``.
    _qpos: Tensor
    _qvel: Tensor
    _ctrl: Tensor  # doubles as the last action
    _warmstart: Tensor
    _time: Tensor

    def __init__(
        self,
        task: Task,
        num_envs: int,
        max_episode_steps: int | None,
        device: torch.device | str,
        seed: int,
    ) -> None:
        if max_episode_steps is None:
            max_episode_steps = task.max_episode_steps
        _checks.positive(num_envs=num_envs, max_episode_steps=max_episode_steps)
        import mujoco

        self._compiled = task.model()
        floats = mujoco.mj_stateSize(self._compiled, int(mujoco.mjtState.mjSTATE_FULLPHYSICS))
        memory.require(
            num_envs * (self._number_bytes * floats + 4 * (4 * task.obs_dim + 2)),
            f"{num_envs} envs of {task.name}",
            memory.ENVS,
            device,
        )
        super().__init__(
            num_envs, task.obs_dim, task.action_dim, max_episode_steps, task.can_terminate, device
        )
        self.task = task
        self._generator = torch.Generator(self.device)
        self._generator.manual_seed(seeding.generator_seed(seed))

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Tensor, dict[str, Any]]:
        """Start new episodes in all envs, or where ``options["reset_mask"]`` ``[N]`` is True."""
        if seed is not None:
            self._generator.manual_seed(seeding.generator_seed(seed))
        mask = _checks.reset_mask(options, self.num_envs).to(self.device)
        self._restart(mask, *self._sample_reset())
        self._obs.copy_(torch.where(mask.unsqueeze(-1), self._observe(), self._obs))
        return self._obs.clone(), {}

    def get_state(self) -> dict[str, Any]:
        """Everything that decides the future: physics, counters, last action, random numbers."""
        return {
            "engine": self._engine,
            "physics": torch.cat(self._physics(), dim=-1),
            **self._episodes_state(),
            "generator": self._generator.get_state(),
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue from a state of :meth:`get_state`, on the CPU to the bit.

        Raises:
            ValueError: the state is of another engine, robot, number of envs or kind of device.
        """
        fields = self._physics()
        widths = [field.shape[-1] for field in fields]
        _checks.saved_state(state, self._engine, (self.num_envs, sum(widths)))
        random = state["generator"].cpu()
        if random.numel() != self._generator.get_state().numel():
            raise ValueError(
                "the saved state was made on another kind of device: its random numbers cannot be "
                f"continued on {self.device.type}"
            )
        for field, saved in zip(fields, state["physics"].split(widths, dim=-1), strict=True):
            field.copy_(saved)
        self._restore_episodes(state)
        self._generator.set_state(random)

    def viewer(self, width: int, height: int) -> _rendering.MujocoViewer:
        """Pictures of the robots, with a floor and a camera that follows them.

        Raises:
            CannotRender: there is no OpenGL.
        """
        return _rendering.of_robot(self.task, self._qpos, width, height)

    @abstractmethod
    def _physics(self) -> tuple[Tensor, ...]:
        """Views ``[N, n]`` of all that the physics carries from one step to the next."""

    def _sample_reset(self) -> tuple[Tensor, Tensor]:
        return self.task.sample_reset(self.num_envs, self._generator, self._qpos.dtype, self.device)

    def _observe(self) -> Tensor:
        return self.task.observation(self._qpos, self._qvel, self._ctrl).float()

    def _restart(self, mask: Tensor, qpos: Tensor, qvel: Tensor) -> None:
        """Put the envs of ``mask`` ``[N]`` into those start states."""
        rows = mask.unsqueeze(-1)
        self._qpos.copy_(torch.where(rows, qpos, self._qpos))
        self._qvel.copy_(torch.where(rows, qvel, self._qvel))
        # masked_fill, not a product with zero: a diverged env holds NaN.
        self._ctrl.masked_fill_(rows, 0.0)
        self._warmstart.masked_fill_(rows, 0.0)
        self._time.masked_fill_(mask, 0.0)
        self._clear(mask)
