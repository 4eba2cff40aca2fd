"""Several tasks side by side, as one batch of envs with the widths of the largest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pwm_fast import seeding
from pwm_fast.envs import _checks
from pwm_fast.envs.dm_control_adapter import DMControlEnv
from pwm_fast.envs.protocol import SAME_STEP, Box, Tasks, VectorEnv, Viewer, viewer_of
from pwm_fast.seeding import Purpose

# Domains that TD-MPC2's names of tasks write in another way.
DOMAINS = {"cup": "ball_in_cup", "pointmass": "point_mass"}


class ManyTasks:
    """N envs of T tasks; implements :class:`pwm_fast.envs.protocol.VectorEnv`.

    Env i is of task ``i % T``. Observations are filled up with zeros at their end to the width of
    the widest. A task reads the first components of the action alone. Episodes end task by task,
    each at its own time limit.

    Args:
        make: an environment, on the CPU, of task k with n envs and a seed: ``make(k, n, seed)``.
        tasks: their names, each once.
        num_envs: N, at least T.
        seed: of the start states, in [0, 2^63).
        numbers: by which a model knows them, each once; 0 to T - 1 by default.
        obs_dim: O; the largest of the tasks by default.
        action_dim: A; the largest of the tasks by default.

    Raises:
        ValueError: names or numbers that are not all different, too few envs, or widths below a
            task's own.
    """

    def __init__(
        self,
        make: Callable[[int, int, int], VectorEnv],
        tasks: Sequence[str],
        num_envs: int,
        *,
        seed: int = 0,
        numbers: Sequence[int] | None = None,
        obs_dim: int | None = None,
        action_dim: int | None = None,
    ) -> None:
        _checks.positive(num_envs=num_envs)
        names, count = tuple(tasks), len(tasks)
        own = _numbers(numbers, count)
        _check(names, num_envs)
        self.num_envs = num_envs
        self._rows = [torch.arange(k, num_envs, count, device="cpu") for k in range(count)]
        self._parts: list[VectorEnv] = []
        try:
            for k, rows in enumerate(self._rows):
                self._parts.append(make(k, len(rows), _part_seed(seed, k)))
            self._set_up(names, own, obs_dim, action_dim)
        except BaseException:
            self.close()
            raise

    def _set_up(
        self,
        names: tuple[str, ...],
        numbers: tuple[int, ...],
        obs_dim: int | None,
        action_dim: int | None,
    ) -> None:
        """Everything of the construction that follows the envs."""
        parts = self._parts
        obs_dims = tuple(part.single_observation_space.shape[0] for part in parts)
        action_dims = tuple(part.single_action_space.shape[0] for part in parts)
        widths = (("obs_dim", obs_dim, obs_dims), ("action_dim", action_dim, action_dims))
        found = {}
        for name, given, own in widths:
            found[name] = most = max(own)
            if given is not None:
                _checks.positive(**{f"env.{name}": given})
                if given < most:
                    task = names[own.index(most)]
                    raise ValueError(f"env.{name} must be at least {most} ({task}), got {given}")
                found[name] = given
        self.single_observation_space = Box((found["obs_dim"],))
        self.single_action_space = Box((found["action_dim"],), -1.0, 1.0)
        self.device = torch.device("cpu")
        of_env = torch.zeros(self.num_envs, dtype=torch.int64, device="cpu")
        mask = torch.zeros(self.num_envs, found["action_dim"], device="cpu")
        for rows, number, width in zip(self._rows, numbers, action_dims, strict=True):
            of_env[rows] = number
            mask[rows, :width] = 1.0
        self.tasks = Tasks(names, numbers, action_dims, of_env, mask)
        self.max_episode_steps = max(part.max_episode_steps for part in parts)
        self.can_terminate = any(part.can_terminate for part in parts)
        self.metadata: dict[str, Any] = {"autoreset_mode": SAME_STEP}

    @property
    def divergence(self) -> str | None:
        """Why an env diverged first, if one did."""
        found = (getattr(part, "divergence", None) for part in self._parts)
        return next((why for why in found if why is not None), None)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Tensor, dict[str, Any]]:
        """Start new episodes in all envs, or where ``options["reset_mask"]`` ``[N]`` is True."""
        mask = _checks.reset_mask(options, self.num_envs)
        answers = [
            part.reset(
                seed=None if seed is None else _part_seed(seed, k),
                options={"reset_mask": mask[rows]},
            )[0]
            for k, (part, rows) in enumerate(zip(self._parts, self._rows, strict=True))
        ]
        return self._joined(answers), {}

    def step(self, action: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Any]]:
        """Advance all envs by one control step; see the protocol for what comes back."""
        tasks = self.tasks
        unit = _checks.unit_action(action, self.num_envs, self.single_action_space.shape[0])
        answers = [
            part.step(unit[rows, :width])
            for part, rows, width in zip(self._parts, self._rows, tasks.action_dims, strict=True)
        ]
        obs, reward, terminated, truncated, infos = zip(*answers, strict=True)
        info: dict[str, Any] = {
            "final_obs": self._joined([i["final_obs"] for i in infos]),
            "episode": {
                key: self._joined([i["episode"][key] for i in infos])
                for key in ("return", "length", "mask")
            },
        }
        for key in ("diverged", "goal"):
            if any(key in i for i in infos):
                none = torch.zeros_like
                info[key] = self._joined(
                    [i.get(key, none(t)) for i, t in zip(infos, terminated, strict=True)]
                )
        flags = self._joined(terminated), self._joined(truncated)
        return self._joined(obs), self._joined(reward), *flags, info

    def get_state(self) -> dict[str, Any]:
        """Everything that decides the future of all envs, task by task.

        Raises:
            StateNotSupported: one of the simulators cannot be saved to the bit.
        """
        return {"tasks": [part.get_state() for part in self._parts]}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue from a state of :meth:`get_state`, to the bit.

        Raises:
            StateNotSupported: one of the simulators cannot be restored to the bit.
            ValueError: the state is of other tasks or numbers of envs.
        """
        if len(state["tasks"]) != len(self._parts):
            raise ValueError(
                f"the saved state is of {len(state['tasks'])} tasks, this environment has "
                f"{len(self._parts)}"
            )
        for part, saved in zip(self._parts, state["tasks"], strict=True):
            part.set_state(saved)

    def viewer(self, width: int, height: int) -> Viewer:
        """Pictures of all tasks; they count as many seconds a step as the first one's.

        Raises:
            CannotRender: a task shows no pictures.
        """
        return _PartViewers([viewer_of(part, width, height) for part in self._parts])

    def close(self) -> None:
        """Close the envs of all tasks."""
        for part in self._parts:
            part.close()

    def _joined(self, answers: Sequence[Tensor]) -> Tensor:
        """One tensor ``[N, ...]`` of the tasks' ``[n, ...]``; observations are filled up."""
        first = answers[0]
        tail = (self.single_observation_space.shape[0],) if first.dim() == 2 else ()
        found = first.new_zeros((self.num_envs, *tail))
        for rows, part in zip(self._rows, answers, strict=True):
            if tail:
                found[rows, : part.shape[1]] = part
            else:
                found[rows] = part
        return found


class _PartViewers:
    """The viewers of T tasks as one; env i is of task ``i % T``."""

    def __init__(self, viewers: Sequence[Viewer]) -> None:
        self._viewers = viewers
        self.step_seconds = viewers[0].step_seconds

    def frame(self, env: int) -> np.ndarray:
        row, task = divmod(env, len(self._viewers))
        return self._viewers[task].frame(row)

    def close(self) -> None:
        for viewer in self._viewers:
            viewer.close()


def dm_control_tasks(
    num_envs: int,
    *,
    tasks: Sequence[str],
    seed: int = 0,
    max_episode_steps: int | None = None,
    action_repeat: int = 2,
    numbers: Sequence[int] | None = None,
    obs_dim: int | None = None,
    action_dim: int | None = None,
) -> ManyTasks:
    """Tasks of the dm_control suite side by side.

    Args:
        num_envs: N, at least as many as tasks.
        tasks: such as ``["walker-walk", "cheetah-run"]``: domain and task as TD-MPC2 names them.
        seed: see :class:`ManyTasks`.
        max_episode_steps: see :class:`~pwm_fast.envs.dm_control_adapter.DMControlEnv`.
        action_repeat: likewise.
        numbers: see :class:`ManyTasks`, and so on.
        obs_dim: O.
        action_dim: A.

    Raises:
        ImportError: dm_control is missing.
        ValueError: see :class:`ManyTasks` and
            :class:`~pwm_fast.envs.dm_control_adapter.DMControlEnv`.
    """
    if not _is_list(tasks) or not all(isinstance(name, str) for name in tasks):
        raise ValueError(f"env.tasks must be a list of names such as [walker-walk], got {tasks!r}")
    named = [domain_and_task(name) for name in tasks]

    def make(k: int, count: int, seed: int) -> VectorEnv:
        try:
            return DMControlEnv(
                *named[k],
                count,
                seed=seed,
                max_episode_steps=max_episode_steps,
                action_repeat=action_repeat,
            )
        except ValueError as error:  # which of the tasks it is
            raise ValueError(f"{tasks[k]} of env.tasks: {error}") from error

    return ManyTasks(
        make,
        tasks,
        num_envs,
        seed=seed,
        numbers=numbers,
        obs_dim=obs_dim,
        action_dim=action_dim,
    )


def domain_and_task(name: str) -> tuple[str, str]:
    """dm_control's names of what TD-MPC2 calls ``"walker-walk"`` or the like.

    Raises:
        ValueError: it is not of that form.
    """
    domain, hyphen, task = name.partition("-")
    if not hyphen:
        raise ValueError(f"env.tasks must name domain and task as in walker-walk, got {name!r}")
    return DOMAINS.get(domain, domain), task.replace("-", "_")


def _part_seed(seed: int, part: int) -> int:
    return seeding.stream(seed, Purpose.TASK, part)


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _numbers(given: Sequence[int] | None, count: int) -> tuple[int, ...]:
    """The numbers of so many tasks."""
    if given is None:
        return tuple(range(count))
    whole = _is_list(given) and all(type(n) is int and n >= 0 for n in given)
    if not whole or len(set(given)) < len(given) or len(given) != count:
        raise ValueError(
            f"env.numbers must be a number of 0 or more for each of {count} tasks, all different, "
            f"got {given!r}"
        )
    return tuple(given)


def _check(tasks: tuple[str, ...], num_envs: int) -> None:
    if not tasks:
        raise ValueError("env.tasks must name at least one task, got none")
    if len(set(tasks)) < len(tasks):
        raise ValueError(f"env.tasks must all be different, got {list(tasks)}")
    if num_envs < len(tasks):
        raise ValueError(
            f"{len(tasks)} tasks need as many envs or episodes at least, one each, got {num_envs}"
        )
