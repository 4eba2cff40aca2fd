"""Checkpoint files: complete, written atomically, read without running code from them."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

FORMAT = "pwm_fast.checkpoint"
VERSION = 1


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be read, used or written; the message names the file and why."""


def save(path: Path, content: dict[str, Any], *, keep_previous: bool = False) -> None:
    """Write a checkpoint so that ``path`` always is a whole one, the old or the new.

    The content goes to a temporary file in the same directory, is flushed to the disk, and then
    takes the name ``path`` in one step.

    Args:
        path: where; its directory exists.
        content: tensors and plain containers.
        keep_previous: keep the file that had the name as ``<stem>.previous<suffix>``.

    Raises:
        CheckpointError: the disk is full or not writable; what was there before is untouched.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            torch.save({"format": FORMAT, "version": VERSION, **content}, file)
            file.flush()
            os.fsync(file.fileno())
        if keep_previous and path.exists():
            previous = previous_of(path)
            previous.unlink(missing_ok=True)
            try:
                os.link(path, previous)
            except OSError:  # a file system without hard links
                os.replace(path, previous)
        os.replace(temporary, path)
        _sync_directory(path.parent)
    # torch's zip writer turns a failed write into a RuntimeError.
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        raise CheckpointError(
            f"could not write the checkpoint {path}: {_reason(error)}; "
            "the last checkpoint is unchanged"
        ) from error


def load(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read a checkpoint.

    Args:
        path: the file.
        device: where its tensors go.

    Raises:
        CheckpointError: the file is missing, cut short, or not a checkpoint of this program.
    """
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint {path}")
    try:
        content = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:
        raise CheckpointError(
            f"{path} is no readable checkpoint ({path.stat().st_size} bytes; cut short, damaged or "
            f"of another program): {_first_line(error)}{_previous_hint(path)}"
        ) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = sorted(content)[:6] if isinstance(content, dict) else type(content).__name__
        raise CheckpointError(
            f"{path} is not a pwm_fast checkpoint: it holds {found}{_previous_hint(path)}"
        )
    if content.get("version") != VERSION:
        raise CheckpointError(
            f"{path} has checkpoint version {content.get('version')}, this program reads {VERSION}"
        )
    return content


def previous_of(path: Path) -> Path:
    """Where :func:`save` keeps the checkpoint before ``path``."""
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def rng_state() -> dict[str, Any]:
    """States of torch's (CPU and CUDA), NumPy's and Python's global generators."""
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, gauss],
        "python": list(random.getstate()),
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Continue with the generators' states of :func:`rng_state`."""
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])
    name, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((name, keys.cpu().numpy().astype(np.uint32), position, has_gauss, gauss))
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))


def _sync_directory(directory: Path) -> None:
    """Make the new name itself durable."""
    if os.name == "posix":
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _previous_hint(path: Path) -> str:
    previous = previous_of(path)
    return f"; the one before it is {previous}" if previous.is_file() else ""


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def _reason(error: BaseException) -> str:
    """The system's reason where there is one behind torch's."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.strerror:
            return seen.strerror
        seen = seen.__cause__ or seen.__context__
    return _first_line(error)
