"""Episodes in files of their own: ``.npz`` of NumPy arrays or ``.pt`` of a dict of tensors."""

from __future__ import annotations

import zipfile
from collections.abc import Container, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pwm_fast import files
from pwm_fast.data import tensors
from pwm_fast.data.contents import Contents, Format, Part
from pwm_fast.data.errors import DataError
from pwm_fast.replay import Episode

SUFFIXES = (".npz", ".pt")
KEYS = ("obs", "action", "reward", "terminated")
BEYOND = 1e-5  # rounding by which an action may pass its bounds


def read_episode(path: Path, obs_dim: int, action_dim: int) -> Episode:
    """Read and check one episode; more arrays in the file than :data:`KEYS` are left alone.

    Args:
        path: a file with ``obs [T+1, O]``, ``action [T, A]`` in [-1, 1], ``reward [T]`` (floating)
            and ``terminated [T]`` (bool, True at most at the last step), and perhaps ``task``, the
            number of its task (an integer, 0 without one).
        obs_dim: O.
        action_dim: A.

    Returns:
        The episode in float32.

    Raises:
        DataError: the file is not readable, or an array is missing, of another shape or dtype, not
            finite, or out of range; the message names file, array and value.
    """
    arrays = _read_arrays(path)
    missing = [key for key in KEYS if key not in arrays]
    if missing:
        held = ", ".join(map(str, arrays)) or "nothing"
        raise DataError(f"{path} lacks {', '.join(missing)}; it holds {held}")
    terminated = arrays["terminated"]
    if terminated.dtype not in (np.bool_, torch.bool):
        raise DataError(f"{path}: terminated must be bool, got {terminated.dtype}")
    return checked_episode(str(path), arrays, obs_dim, action_dim, _task(path, arrays))


def checked_episode(
    where: str,
    arrays: Mapping[str, Any],
    obs_dim: int,
    action_dim: int,
    task: int = 0,
    *,
    first_row: int = 0,
) -> Episode:
    """An episode of arrays or tensors that are right; copies them.

    Args:
        where: names the episode in messages.
        arrays: those of :data:`KEYS`, see :func:`read_episode`.
        obs_dim: O.
        action_dim: A.
        task: number of its task.
        first_row: what the file calls the first step's row of action, reward and terminated.

    Raises:
        DataError: one is of another shape or dtype, not finite, or out of range.
    """
    steps = arrays["action"].shape[0] if arrays["action"].ndim else 0
    if steps < 1:
        raise DataError(f"{where}: action must be [T, {action_dim}] with T of 1 or more steps")
    shapes = {
        "action": ((steps, action_dim), f"[T, {action_dim}]"),
        "obs": ((steps + 1, obs_dim), f"[T+1, {obs_dim}]"),
        "reward": ((steps,), "[T]"),
        "terminated": ((steps,), "[T]"),
    }
    for key, (shape, named) in shapes.items():
        if tuple(arrays[key].shape) != shape:
            raise DataError(
                f"{where}: {key} must be {named}, here {list(shape)}, got {list(arrays[key].shape)}"
            )
    rows = {"obs": 0, "action": first_row, "reward": first_row}
    values = {key: _float32(where, key, arrays[key], row) for key, row in rows.items()}
    terminated = torch.as_tensor(arrays["terminated"], device="cpu").clone()
    if bool(terminated[:-1].any()):
        at = int(terminated.int().argmax()) + first_row
        raise DataError(
            f"{where}: terminated[{at}] is True, but the episode goes on to step "
            f"{steps - 1 + first_row}"
        )
    action = values["action"]
    far = action.abs() > 1.0 + BEYOND
    if bool(far.any()):
        place, value = first_true(far), action[far][0].item()
        place[0] += first_row
        raise DataError(f"{where}: action{place} is {value:.6g}, outside of [-1, 1]")
    return Episode(values["obs"], action.clamp_(-1.0, 1.0), values["reward"], terminated, task)


def write_episode(path: Path, episode: Episode) -> None:
    """Write one episode as ``.npz``; the same episode gives the same bytes.

    Raises:
        OSError: the disk is full or not writable; it names the file.
    """
    arrays = {key: getattr(episode, key).cpu().numpy() for key in KEYS}
    if episode.task:
        arrays["task"] = np.int64(episode.task)
    with files.replacing(path) as file:
        np.savez(file, **arrays)


def first_true(mask: Tensor) -> list[int]:
    """Index of the first True."""
    place: list[int] = mask.nonzero()[0].tolist()
    return place


def _holds(path: Path) -> bool:
    return path.suffix in SUFFIXES


def _contents(path: Path) -> Contents:
    shapes, arrays = _shapes(path)
    obs, action = (shapes.get(key, ()) for key in ("obs", "action"))
    if len(obs) != 2 or len(action) != 2 or action[0] < 1:
        read_episode(path, obs[-1] if obs else 0, action[-1] if action else 0)  # says what is wrong
    steps = action[0]
    return Contents(obs[1], action[1], {_task(path, arrays): Part(1, steps, steps, steps)})


def _episodes(path: Path, tasks: Container[int]) -> Iterator[tuple[str, Episode]]:
    contents = _contents(path)
    if next(iter(contents.tasks)) in tasks:
        yield str(path), read_episode(path, contents.obs_dim, contents.action_dim)


EPISODE = Format("episode file", _holds, _contents, _episodes)


def _shapes(path: Path) -> tuple[dict[str, tuple[int, ...]], Mapping[str, Any]]:
    """The shapes of a file's arrays, from their headers alone, and its ``task`` if it has one."""
    if path.suffix != ".npz":
        arrays = _read_arrays(path)
        return {k: tuple(v.shape) for k, v in arrays.items() if isinstance(v, Tensor)}, arrays
    try:
        with zipfile.ZipFile(path) as archive, np.load(path, allow_pickle=False) as arrays:
            shapes = {}
            for key in arrays.files:
                with archive.open(f"{key}.npy") as stream:
                    read_header = {
                        (1, 0): np.lib.format.read_array_header_1_0,
                        (2, 0): np.lib.format.read_array_header_2_0,
                    }[np.lib.format.read_magic(stream)]
                    shapes[key] = read_header(stream)[0]
            return shapes, {key: arrays[key] for key in ("task",) if key in arrays}
    except Exception as error:
        raise _unreadable(path, error) from error


def _task(path: Path, arrays: Mapping[str, Any]) -> int:
    task = arrays.get("task", 0)
    if isinstance(task, (np.ndarray, np.generic, Tensor)) and task.ndim == 0:
        task = task.item()
    if type(task) is not int or task < 0:
        raise DataError(f"{path}: task must be an integer of 0 or more, got {task!r}")
    return task


def _read_arrays(path: Path) -> Mapping[str, Any]:
    if path.suffix == ".npz":
        try:
            with np.load(path, allow_pickle=False) as archive:
                return {key: archive[key] for key in archive.files}
        except FileNotFoundError as error:
            raise DataError(f"there is no file {path}") from error
        except Exception as error:  # what a damaged file raises depends on where it is damaged
            raise _unreadable(path, error) from error
    content = tensors.load(path).values
    for key in KEYS:
        if key in content and not isinstance(content[key], Tensor):
            raise DataError(f"{path}: {key} must be a tensor, got a {type(content[key]).__name__}")
    return content


def _unreadable(path: Path, error: Exception) -> DataError:
    reason = str(error).split("\n")[0]
    return DataError(f"{path} is no readable {path.suffix} file: {reason}")


def _float32(where: str, key: str, array: np.ndarray | Tensor, first_row: int) -> Tensor:
    floating = array.is_floating_point() if isinstance(array, Tensor) else array.dtype.kind == "f"
    if not floating:
        raise DataError(f"{where}: {key} must be floating, got {array.dtype}")
    if isinstance(array, Tensor):
        value = array.detach().to(torch.float32, copy=True)
    else:
        with np.errstate(over="ignore"):
            value = torch.from_numpy(array.astype(np.float32))
    bad = ~torch.isfinite(value)
    if bool(bad.any()):
        place = first_true(bad)
        item = array[tuple(place)].item()
        beyond = ", beyond float32" if np.isfinite(item) else ""
        place[0] += first_row
        raise DataError(f"{where}: {key}{place} is {item}{beyond}; all values must be finite")
    return value
