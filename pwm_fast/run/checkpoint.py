"""Checkpoint files: complete, written atomically, read without running code from them."""

from __future__ import annotations

import random
import warnings
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import torch

from pwm_fast import files
from pwm_fast.published import recognise
from pwm_fast.run import seal

FORMAT = "pwm_fast.checkpoint"
VERSION = 1
KEYS = {
    "config",  # of the run, as plain containers
    "epoch",  # epochs completed
    "bootstrapped",  # the world model had its first, longer training
    "wall_time",  # seconds of training
    "best",  # the best evaluation so far
    "latest_eval",  # the newest evaluation
    "progress",  # what the epoch after `epoch` has done already
    "agent",  # parameters, statistics, optimisers
    "obs",  # observations to act on next
    "held_action",  # the random action that is being held
    "env",  # state of the environment; None where it cannot be saved
    "rng",  # states of the random number generators
    "replay",  # None but in `latest`
}
# Also, if the checkpoint is new enough: "data", what the replay was filled with at the start;
# "precision", which replaced the configured one after an overflow, else None; "ended", numbers of
# training episodes in the completed epochs; "imported", what published checkpoint it was made of;
# "ranks", env and rng of each of several processes (then "env" is None, and "rng" the first one's).


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be read, used or written; the message names the file and why."""


def save(path: Path, content: dict[str, Any], *, keep_previous: bool = False) -> None:
    """Write a checkpoint so that ``path`` always is a whole one, the old or the new.

    Args:
        path: where; its directory exists.
        content: tensors and plain containers under :data:`KEYS`.
        keep_previous: keep the file that had the name as ``<stem>.previous<suffix>``.

    Raises:
        CheckpointError: the disk is full or not writable; what was there before is untouched.
    """
    try:
        with files.replacing(path, previous=previous_of(path) if keep_previous else None) as file:
            sealed = seal.SealedWriter(file)
            torch.save({"format": FORMAT, "version": VERSION, **content}, cast(BinaryIO, sealed))
            sealed.seal()
    # torch's zip writer turns a failed write into a RuntimeError.
    except (OSError, RuntimeError) as error:
        before = "the last one is unchanged" if path.exists() else "there was none before it"
        raise CheckpointError(
            f"could not write the checkpoint {path}: {_reason(error)}; {before}"
        ) from error


def named(name: str) -> Path:
    """The file that a user names, there or not.

    Raises:
        CheckpointError: it can be no file.
        OSError: it is of the home directory of no user.
    """
    path = files.user_path(name)
    if not path.name or path.is_dir():
        raise CheckpointError(
            f"checkpoint must be a file, such as runs/.../checkpoints/best.pt, got {name!r}"
        )
    return path


def load(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read a checkpoint, every byte of which is as it was written.

    What its parts hold is checked by :func:`pwm_fast.run.checkpoint_content.check`, and by who
    takes them up.

    Args:
        path: the file.
        device: where its tensors go.

    Raises:
        CheckpointError: the file is missing, cut short, damaged, or not a checkpoint of this
            program; the message names the newest one beside it that is sound.
    """
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint file {path}")
    try:
        return _read(path, device)
    except CheckpointError as error:
        raise CheckpointError(f"{error}{_sound_hint(path)}") from error


def _read(path: Path, device: torch.device | str) -> dict[str, Any]:
    try:
        seal.verify(path)  # torch's reader looks at no checksum of a tensor
        with warnings.catch_warnings():  # of foreign files; what matters of them is said below
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:
        _refuse_published(path)
        raise CheckpointError(
            f"{path} is no readable checkpoint ({path.stat().st_size} bytes; cut short, damaged or "
            f"of another program): {_reason(error)}"
        ) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        _refuse_published(path)
        found = (
            f"the keys {', '.join(map(str, list(content)[:6]))}"
            if isinstance(content, dict)
            else f"a {type(content).__name__}"
        )
        raise CheckpointError(f"{path} is not a pwm_fast checkpoint: it holds {found}")
    if content.get("version") != VERSION:
        raise CheckpointError(
            f"{path} has checkpoint version {content.get('version')}, this program reads {VERSION}"
        )
    missing = sorted(KEYS - content.keys())
    if missing:
        raise CheckpointError(f"{path} lacks {', '.join(missing)}")
    return content


def _refuse_published(path: Path) -> None:
    """Say what reads a checkpoint of a published code."""
    title = recognise(path)
    if title is not None:
        raise CheckpointError(
            f"{path} is a checkpoint of {title}, not of pwm_fast: "
            f"python -m pwm_fast.import_checkpoint {path} env=NAME out=DIR makes one of it"
        )


def epoch_of(path: Path) -> int | None:
    """Epochs behind a checkpoint, without reading its tensors; None where it cannot be read."""
    epoch = _mapped(path).get("epoch")
    return epoch if type(epoch) is int else None


def config_of(path: Path) -> dict[str, Any]:
    """A checkpoint's configuration, without reading its tensors; empty where it cannot be read."""
    config = _mapped(path).get("config")
    return config if isinstance(config, dict) else {}


def glance(path: Path) -> dict[str, Any]:
    """A checkpoint's content, whose tensors are read as they are used; empty if it is unreadable.

    For looks at shapes and the configuration: nothing is verified.
    """
    content = _mapped(path)
    return content if content.get("format") == FORMAT and content.keys() >= KEYS else {}


def _mapped(path: Path) -> dict[str, Any]:
    """What a file holds, its tensors mapped into memory; empty if that cannot be read."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:
        return {}
    return content if isinstance(content, dict) else {}


def previous_of(path: Path) -> Path:
    """Where :func:`save` keeps the checkpoint before ``path``."""
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def rng_state() -> dict[str, Any]:
    """States of torch's (CPU and CUDA), NumPy's and Python's global generators."""
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [
            name,
            torch.from_numpy(np.asarray(keys).astype(np.int64)),
            position,
            has_gauss,
            gauss,
        ],
        "python": list(random.getstate()),
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Continue with the generators' states of :func:`rng_state`.

    CUDA's are set as far as this machine has the devices.
    """
    torch.set_rng_state(state["torch"].cpu())
    if torch.cuda.is_available():
        for index, cuda in enumerate(state["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(cuda.cpu(), index)
    name, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((name, keys.cpu().numpy().astype(np.uint32), position, has_gauss, gauss))
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))


def _sound_hint(path: Path) -> str:
    """The checkpoint before ``path``, or else the newest one beside it, if one can be read."""
    before = previous_of(path)
    others = [
        path.with_name(f"{name}.pt") for name in ("latest", "latest.previous", "final", "best")
    ]
    others = [p for p in others if p not in (path, before) and p.is_file()]
    others.sort(key=lambda p: epoch_of(p) or 0, reverse=True)
    for other in ([before] if before.is_file() else []) + others:
        try:
            epoch = _read(other, "cpu")["epoch"]
        except CheckpointError:
            continue
        which = "the one before it" if other == before else "a sound one beside it"
        return f"; {which} is {other} (epoch {epoch}): resume={other} continues that"
    return f"; the one before it, {before}, is damaged, too" if before.is_file() else ""


def _reason(error: BaseException) -> str:
    """The system's reason where there is one behind torch's, else the message's first line."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.strerror:
            return seen.strerror
        seen = seen.__cause__ or seen.__context__
    text = str(error).strip()
    if text.startswith("Weights only load failed"):  # torch goes on to recommend an unsafe load
        return "it is no file of tensors and plain containers"
    return text.splitlines()[0] if text else type(error).__name__
