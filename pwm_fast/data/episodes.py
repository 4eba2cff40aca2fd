"""Episodes in files: ``.npz`` of NumPy arrays or ``.pt`` of a dict of torch tensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pwm_fast import files
from pwm_fast.data.errors import DataError
from pwm_fast.replay import Episode

SUFFIXES = (".npz", ".pt")
KEYS = ("obs", "action", "reward", "terminated")
BEYOND = 1e-5  # rounding by which an action may pass its bounds


def read_episode(path: Path, obs_dim: int, action_dim: int) -> Episode:
    """Read and check one episode; more arrays in the file than :data:`KEYS` are left alone.

    Args:
        path: a file with ``obs [T+1, O]``, ``action [T, A]`` in [-1, 1], ``reward [T]`` (floating)
            and ``terminated [T]`` (bool, True at most at the last step).
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
    steps = arrays["action"].shape[0] if arrays["action"].ndim else 0
    if steps < 1:
        raise DataError(f"{path}: action must be [T, {action_dim}] with T of 1 or more steps")
    shapes = {
        "action": ((steps, action_dim), f"[T, {action_dim}]"),
        "obs": ((steps + 1, obs_dim), f"[T+1, {obs_dim}]"),
        "reward": ((steps,), "[T]"),
        "terminated": ((steps,), "[T]"),
    }
    for key, (shape, named) in shapes.items():
        if tuple(arrays[key].shape) != shape:
            raise DataError(
                f"{path}: {key} must be {named}, here {list(shape)}, got {list(arrays[key].shape)}"
            )
    if arrays["terminated"].dtype not in (np.bool_, torch.bool):
        raise DataError(f"{path}: terminated must be bool, got {arrays['terminated'].dtype}")
    values = {key: _float32(path, key, arrays[key]) for key in ("obs", "action", "reward")}
    terminated = torch.as_tensor(arrays["terminated"])
    if bool(terminated[:-1].any()):
        at = int(terminated.int().argmax())
        raise DataError(
            f"{path}: terminated[{at}] is True, but the episode goes on to step {steps - 1}: "
            "one file holds one episode"
        )
    action = values["action"]
    far = action.abs() > 1.0 + BEYOND
    if bool(far.any()):
        place = _first(far)
        raise DataError(
            f"{path}: action{place} is {action[tuple(place)].item():.6g}, outside of [-1, 1]"
        )
    return Episode(values["obs"], action.clamp(-1.0, 1.0), values["reward"], terminated)


def write_episode(path: Path, episode: Episode) -> None:
    """Write one episode as ``.npz``; the same episode gives the same bytes.

    Raises:
        OSError: the disk is full or not writable; it names the file.
    """
    arrays = {key: getattr(episode, key).cpu().numpy() for key in KEYS}
    with files.replacing(path) as file:
        np.savez(file, **arrays)


def _read_arrays(path: Path) -> Mapping[str, Any]:
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as archive:
                return {key: archive[key] for key in archive.files}
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise DataError(f"there is no file {path}") from error
    except Exception as error:  # what a damaged file raises depends on where it is damaged
        reason = "it is no file of tensors" if path.suffix == ".pt" else str(error).split("\n")[0]
        raise DataError(f"{path} is no readable {path.suffix} file: {reason}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} must hold a dict of tensors, got a {type(content).__name__}")
    for key in KEYS:
        if key in content and not isinstance(content[key], Tensor):
            raise DataError(f"{path}: {key} must be a tensor, got a {type(content[key]).__name__}")
    return content


def _float32(path: Path, key: str, array: np.ndarray | Tensor) -> Tensor:
    floating = array.is_floating_point() if isinstance(array, Tensor) else array.dtype.kind == "f"
    if not floating:
        raise DataError(f"{path}: {key} must be floating, got {array.dtype}")
    if isinstance(array, Tensor):
        value = array.detach().float()
    else:
        with np.errstate(over="ignore"):
            value = torch.from_numpy(array.astype(np.float32))
    bad = ~torch.isfinite(value)
    if bool(bad.any()):
        place = _first(bad)
        item = array[tuple(place)].item()
        beyond = ", beyond float32" if np.isfinite(item) else ""
        raise DataError(f"{path}: {key}{place} is {item}{beyond}; all values must be finite")
    return value


def _first(mask: Tensor) -> list[int]:
    """Index of the first True."""
    place: list[int] = mask.nonzero()[0].tolist()
    return place
