"""TD-MPC2's multi-task data: ``.pt`` files of many episodes as one TensorDict.

The format is that of TD-MPC2's data sets mt30 and mt80 (Hansen et al., arXiv 2310.16828) and of its
``common/buffer.py``: ``obs [E, T+1, O]``, ``action [E, T+1, A]``, ``reward [E, T+1]``, ``task`` and
in newer ones ``terminated``. Row t holds the observation at time t, and the action and the reward
that led to it: ``action[:, t + 1]`` was taken in ``obs[:, t]``. So row 0 of action, reward and
terminated says nothing and is not looked at, whatever stands there: NaN, a filler, or, in an
episode that was cut into pieces, the step before.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pwm_fast.data import tensors
from pwm_fast.data.contents import Contents, Format, by_task
from pwm_fast.data.episodes import checked_episode
from pwm_fast.data.errors import DataError
from pwm_fast.replay import Episode

SHAPES = {"obs": "[E, T+1, O]", "action": "[E, T+1, A]", "reward": "[E, T+1]"}


def _holds(path: Path) -> bool:
    if path.suffix != ".pt":
        return False
    values, is_tensordict = tensors.load(path)
    obs = values.get("obs")
    return is_tensordict or (isinstance(obs, Tensor) and obs.ndim == 3)


def _contents(path: Path) -> Contents:
    values = _open(path)
    episodes, rows, obs_dim = values["obs"].shape
    steps = torch.full((episodes,), rows - 1, device="cpu")
    action_dim = values["action"].shape[-1]
    return Contents(obs_dim, action_dim, by_task(values["task"][:, 0], steps))


def _episodes(path: Path, tasks: Container[int]) -> Iterator[tuple[str, Episode]]:
    values = _open(path)
    obs, action, reward, task = (values[key] for key in ("obs", "action", "reward", "task"))
    terminated = values.get("terminated")
    for e in range(len(obs)):
        where = f"{path}: episode {e}"
        number = int(task[e, 0])
        other = task[e] != number
        if bool(other.any()):
            row = int(other.int().argmax())
            raise DataError(
                f"{where}: task[{row}] is {int(task[e, row])}, task[0] is {number}: an episode is "
                "of one task"
            )
        if number in tasks:
            flags = None if terminated is None else terminated[e]
            arrays = {
                "obs": obs[e],
                "action": action[e, 1:],
                "reward": reward[e, 1:],
                "terminated": _flags(where, flags, obs.shape[1] - 1),
            }
            yield (
                where,
                checked_episode(
                    where, arrays, obs.shape[-1], action.shape[-1], number, first_row=1
                ),
            )


CHUNK = Format("TD-MPC2 chunk", _holds, _contents, _episodes)


def _open(path: Path) -> dict[str, Tensor]:
    """The tensors of a chunk, of shapes that fit together; ``task`` is ``[E, 1]`` or ``[E, T+1]``.

    Raises:
        DataError: one is missing, or no tensor, or of another shape or dtype.
    """
    values = dict(tensors.load(path).values)
    missing = [key for key in SHAPES if key not in values]
    if missing:
        held = ", ".join(map(str, values)) or "nothing"
        raise DataError(f"{path} lacks {', '.join(missing)}; it holds {held}")
    for key in (*SHAPES, "task", "terminated"):
        if key in values and not isinstance(values[key], Tensor):
            raise DataError(f"{path}: {key} must be a tensor, got a {_kind(values[key])}")
    obs = values["obs"]
    if obs.ndim != 3 or obs.shape[0] < 1 or obs.shape[1] < 2:
        raise DataError(
            f"{path}: obs must be [E, T+1, O] with 1 or more episodes of T of 1 or more steps, got "
            f"{list(obs.shape)}"
        )
    rows = list(obs.shape[:2])
    shaped = {**SHAPES, "terminated": "[E, T+1]"}
    for key in shaped.keys() & values.keys():
        shape = list(values[key].shape)
        if shape[:2] != rows or len(shape) != shaped[key].count(",") + 1:
            raise DataError(f"{path}: {key} must be {shaped[key]} of obs's {rows}, got {shape}")
    task = values.get("task", torch.zeros(rows[0], dtype=torch.int64, device="cpu"))
    integer = not (task.is_floating_point() or task.is_complex() or task.dtype == torch.bool)
    if list(task.shape) not in (rows, rows[:1]) or not integer:
        raise DataError(
            f"{path}: task must be integers [E, T+1] or [E] of obs's {rows}, got {task.dtype} "
            f"{list(task.shape)}"
        )
    task = task.reshape(rows[0], -1)
    if bool((task[:, 0] < 0).any()):
        e = int((task[:, 0] < 0).int().argmax())
        raise DataError(f"{path}: episode {e}: task[0] is {int(task[e, 0])}, it must be 0 or more")
    values["task"] = task
    return values


def _flags(where: str, given: Tensor | None, steps: int) -> Tensor:
    """Whether each step ended in a terminal state, bool ``[T]``; TD-MPC2 keeps 0.0 and 1.0."""
    if given is None:
        return torch.zeros(steps, dtype=torch.bool, device="cpu")
    flags = given[1:]
    wrong = (flags != 0) & (flags != 1)  # NaN as well
    if bool(wrong.any()):
        row = int(wrong.int().argmax())
        raise DataError(f"{where}: terminated[{row + 1}] is {flags[row].item()}, it must be 0 or 1")
    return flags != 0


def _kind(value: Any) -> str:
    if isinstance(value, tensors.TensorDictState):
        return "TensorDict of several tensors; join them along the last axis first"
    return type(value).__name__
