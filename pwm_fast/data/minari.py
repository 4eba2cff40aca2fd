"""Minari's data sets: a folder with ``metadata.json`` and ``main_data.hdf5``.

The files are read with h5py. Minari's own package would import what the metadata name as the
environment's code where they lack a space.
"""

from __future__ import annotations

import json
from collections.abc import Container, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from pwm_fast import files, optional
from pwm_fast.data.contents import Contents, Format, by_task
from pwm_fast.data.episodes import BEYOND, checked_episode
from pwm_fast.data.errors import DataError
from pwm_fast.replay import Episode

METADATA, DATA = "metadata.json", "main_data.hdf5"
CACHE = 1 << 20  # bytes of HDF5's descriptions of groups and arrays to keep
ARRAYS = ("observations", "actions", "rewards", "terminations")


class Space(NamedTuple):
    """A Box, flat.

    Attributes:
        width: its components.
        low: float64 ``[width]``.
        high: float64 ``[width]``.
    """

    width: int
    low: np.ndarray
    high: np.ndarray


def _holds(path: Path) -> bool:
    return path.name == METADATA and "minari_version" in _metadata(path)


def _contents(path: Path) -> Contents:
    obs, action = _spaces(path)
    with _groups(path) as groups:
        steps = torch.tensor(
            [_array(path, group, "rewards").shape[0] for group in groups], device="cpu"
        )
    return Contents(obs.width, action.width, by_task(torch.zeros_like(steps), steps))


def _episodes(path: Path, tasks: Container[int]) -> Iterator[tuple[str, Episode]]:
    if 0 not in tasks:
        return
    obs, action = _spaces(path)
    with _groups(path) as groups:
        for group in groups:
            where = f"{path.parent / DATA}: {group.name.strip('/')}"
            found, taken, reward, terminated = (_array(path, group, key)[()] for key in ARRAYS)
            arrays = {
                "obs": _flat(found),
                "action": _scaled(where, _flat(taken), action),
                "reward": reward,
                "terminated": terminated != 0,
            }
            yield where, checked_episode(where, arrays, obs.width, action.width)


MINARI = Format("Minari data set", _holds, _contents, _episodes)


def _metadata(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise files.naming(path, error) from error
    except ValueError:  # another program's
        return {}
    return content if isinstance(content, dict) else {}


def _spaces(path: Path) -> tuple[Space, Space]:
    """The spaces of observations and actions.

    Raises:
        DataError: the data are stored in another way, or a space is not a Box of floating numbers,
            or the actions have no bounds.
    """
    metadata = _metadata(path)
    stored = metadata.get("data_format")
    if stored != "hdf5":
        raise DataError(f"{path}: data_format must be hdf5, got {stored}")
    obs = _space(path, "observation_space", metadata)
    action = _space(path, "action_space", metadata)
    bounded = np.isfinite(action.low) & np.isfinite(action.high) & (action.low < action.high)
    if not bounded.all():
        i = int((~bounded).argmax())
        raise DataError(
            f"{path}: component {i} of action_space has the bounds [{action.low[i]:g}, "
            f"{action.high[i]:g}]: they must be finite, since they are scaled to [-1, 1]"
        )
    return obs, action


def _space(path: Path, key: str, metadata: dict[str, Any]) -> Space:
    try:
        said = json.loads(metadata[key])
        kind = said["type"]
        if kind == "Box" and np.dtype(said["dtype"]).kind == "f":
            shape = tuple(said["shape"])
            low, high = (
                np.broadcast_to(np.asarray(said[end], np.float64), shape).reshape(-1)
                for end in ("low", "high")
            )
            return Space(low.size, low, high)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} does not say what {key} is ({type(error).__name__})") from error
    what = f"{kind} of {said.get('dtype')}" if kind == "Box" else kind
    raise DataError(
        f"{path}: {key} must be a Box of floating numbers, got a {what}: write its episodes as "
        ".npz files of vectors"
    )


@contextmanager
def _groups(path: Path) -> Iterator[Iterator[Any]]:
    """The groups of HDF5 that hold an episode each, in order."""
    try:
        import h5py
    except ImportError as error:
        needed = f"{path} is of Minari, which needs h5py: pip install 'pwm-fast[minari]'"
        raise DataError(optional.reason(error, "h5py", needed)) from error
    data = path.parent / DATA
    try:
        file = h5py.File(data, "r")
    except FileNotFoundError as error:
        raise DataError(f"there is no file {data}, which {path} belongs to") from error
    except OSError as error:
        raise DataError(f"{data} is no readable HDF5 file: {error}") from error
    with file:
        # HDF5's own limit is 32 MiB as they are in the file, which take 160 MB or more in memory.
        limits = file.id.get_mdc_config()
        limits.set_initial_size = True
        limits.initial_size = limits.min_size = limits.max_size = CACHE
        file.id.set_mdc_config(limits)
        count = _metadata(path).get("total_episodes")
        names = [f"episode_{i}" for i in range(len(file))]
        if count != len(names) or not names or any(name not in file for name in names):
            raise DataError(
                f"{data} must hold the episodes episode_0 to episode_{{E-1}}, of which {path} says "
                f"that there are {count}; it holds {len(names)} entries"
            )
        yield (file[name] for name in names)


def _array(path: Path, group: Any, key: str) -> Any:
    """An array of an episode, which is stored in this very file: a manifest covers no other."""
    import h5py

    where = f"{path.parent / DATA}: {group.name.strip('/')}"
    array = group.get(key) if isinstance(group, h5py.Group) else None
    if not isinstance(array, h5py.Dataset):
        raise DataError(f"{where} lacks the array {key}")
    if array.file.filename != str(path.parent / DATA) or array.external or array.is_virtual:
        raise DataError(f"{where}: {key} is stored in another file")
    return array


def _flat(array: np.ndarray) -> np.ndarray:
    return array.reshape(len(array), -1) if array.ndim > 1 else array[:, None]


def _scaled(where: str, action: np.ndarray, space: Space) -> np.ndarray:
    """Actions ``[T, A]`` from the bounds of their space to [-1, 1]."""
    if action.shape[1:] != (space.width,):
        return action  # whoever checks the shapes says so
    scaled = 2.0 * (action.astype(np.float64) - space.low) / (space.high - space.low) - 1.0
    far = np.abs(scaled) > 1.0 + BEYOND
    if far.any():
        t, i = np.argwhere(far)[0]
        raise DataError(
            f"{where}: action[{t}, {i}] is {action[t, i]:.6g}, outside of its space's bounds "
            f"[{space.low[i]:g}, {space.high[i]:g}]"
        )
    return scaled
