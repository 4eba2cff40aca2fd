"""Environments: the protocol, the built-in robots and how to make one by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from pwm_fast.envs._gl import choose as choose_gl
from pwm_fast.envs.dm_control_adapter import DMControlEnv
from pwm_fast.envs.engines import ENGINES, Engine, choose, why_unusable
from pwm_fast.envs.gymnasium_adapter import GymnasiumEnv
from pwm_fast.envs.many_tasks import ManyTasks, dm_control_tasks
from pwm_fast.envs.mujoco_cpu import MujocoEnv
from pwm_fast.envs.mujoco_warp import MujocoWarpEnv
from pwm_fast.envs.offline import OfflineEnv
from pwm_fast.envs.protocol import (
    SAME_STEP,
    ActionNotFinite,
    Box,
    CannotRender,
    EnvironmentFault,
    StateNotSupported,
    Tasks,
    VectorEnv,
    Viewer,
    task_of,
    tasks_of,
    viewer_of,
)
from pwm_fast.envs.tasks import built_in
from pwm_fast.envs.tasks.base import Task
from pwm_fast.envs.torch_adapter import TorchVectorEnv

TASKS: dict[str, type[Task]] = built_in()
ADAPTERS: dict[str, Callable[..., VectorEnv]] = {
    "dmc": DMControlEnv,
    "dmc_tasks": dm_control_tasks,
    "gym": GymnasiumEnv.from_id,
    "offline": OfflineEnv,
    "torch": TorchVectorEnv.from_factory,
}

__all__ = [
    "ADAPTERS",
    "ENGINES",
    "SAME_STEP",
    "TASKS",
    "ActionNotFinite",
    "Box",
    "CannotRender",
    "DMControlEnv",
    "Engine",
    "EnvironmentFault",
    "GymnasiumEnv",
    "ManyTasks",
    "MujocoEnv",
    "MujocoWarpEnv",
    "OfflineEnv",
    "StateNotSupported",
    "Task",
    "Tasks",
    "TorchVectorEnv",
    "VectorEnv",
    "Viewer",
    "choose",
    "choose_gl",
    "make",
    "task_of",
    "tasks_of",
    "viewer_of",
    "why_unusable",
]


def make(
    name: str,
    num_envs: int,
    *,
    seed: int = 0,
    max_episode_steps: int | None = None,
    threads: int = 1,
    engine: str = "auto",
    device: torch.device | str = "cpu",
    **options: Any,
) -> VectorEnv:
    """Make N envs of a built-in robot or of another library.

    Args:
        name: one of :data:`TASKS` or of :data:`ADAPTERS`.
        num_envs: N.
        seed: of the reset states, in [0, 2^63); neighbouring seeds share no env.
        max_episode_steps: time limit; the task's own by default.
        threads: physics threads of the native engine; the adapters take 1.
        engine: of a built-in robot: ``mujoco`` (native, on the CPU), ``mujoco_warp`` (on
            ``device``) or ``auto``, see :func:`choose`; the adapters take ``auto``.
        device: the agent's; the envs' tensors are there where the engine runs there. ``torch``
            hands it to the factory.
        **options: the task's or adapter's own arguments, such as ``start`` of the cart-pole,
            ``id`` of ``gym``, ``domain`` and ``task`` of ``dmc``, ``tasks`` of ``dmc_tasks``,
            ``factory`` of ``torch``.

    Raises:
        ValueError: unknown name or option, a missing one, or a number out of range.
        ImportError: what the environment needs is missing or too old.
    """
    common: dict[str, Any] = {"seed": seed, "max_episode_steps": max_episode_steps}
    if name in TASKS:
        _check_options(name, TASKS[name], {}, options)
        task = TASKS[name](**options)
        chosen = choose(engine, torch.device(device))
        if chosen.name == "mujoco_warp":
            if engine != "auto" and threads != 1:
                raise ValueError(f"env.threads must be 1 for env.engine={engine}, got {threads}")
            return MujocoWarpEnv(task, num_envs, device=chosen.device, **common)
        return MujocoEnv(task, num_envs, threads=threads, **common)
    if name in ADAPTERS:
        if threads != 1:
            raise ValueError(f"env.threads must be 1 for env {name!r}, got {threads}")
        if engine != "auto":
            raise ValueError(f"env.engine must be auto for env {name!r}, got {engine!r}")
        common["num_envs"] = num_envs
        if name == "torch":
            common["device"] = device
        _check_options(name, ADAPTERS[name], common, options)
        return ADAPTERS[name](**common, **options)
    known = ", ".join(sorted((*TASKS, *ADAPTERS)))
    raise ValueError(f"env.name must be one of {known}, got {name!r}")


def _check_options(
    name: str, factory: Callable[..., Any], common: dict[str, Any], options: dict[str, Any]
) -> None:
    try:
        inspect.signature(factory).bind(**common, **options)
    except TypeError as error:
        raise ValueError(f"env {name!r}: {error}, got the options {sorted(options)}") from error
