"""Files of ``torch.save`` that hold tensors by name: a dict, or a TensorDict of any version.

Only tensors and plain containers are ever built. A TensorDict is read without its package: a file
names classes of tensordict, and :data:`STAND_INS` takes their places, which keep what the file says
of an object and do nothing with it.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pwm_fast.data.errors import DataError


class Named(NamedTuple):
    """The content of a file.

    Attributes:
        values: by name; those that matter should be tensors, which the reader checks.
        is_tensordict: a TensorDict was saved, not a dict.
    """

    values: dict[str, Any]
    is_tensordict: bool


class TensorDictState:
    """Takes the place of an object of tensordict, and keeps its state unread."""

    __slots__ = ("state",)

    state: Any

    def __setstate__(self, state: Any) -> None:
        self.state = state


def _made(cls: object, state: object) -> TensorDictState:
    """Takes the place of the function that makes a TensorDict from its class and state."""
    made = TensorDictState()
    made.state = state
    return made


# What the releases of tensordict write; the names were read off files of 0.0.3 to 0.15.3.
STAND_INS: list[Any] = [
    (TensorDictState, "tensordict.tensordict.TensorDict"),  # to 0.2
    (TensorDictState, "tensordict._td.TensorDict"),  # from 0.3 on
    (dict, "tensordict.utils._StringOnlyDict"),  # 0.2 to 0.4
    (_made, "tensordict._reductions._make_td"),  # from 0.5 on
    (tuple, "tensordict.utils._LockedSchema"),  # 0.15, of one that is locked
]


def load(path: Path) -> Named:
    """Open a file; its tensors are mapped into memory, so that only what is used is read.

    Files in the format that torch wrote before 1.6 cannot be mapped, and are read as a whole.

    Raises:
        DataError: the file is not readable, or holds something else; the message names it.
    """
    try:
        with these_alone(STAND_INS):
            content = torch.load(
                path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
            )
    except FileNotFoundError as error:
        raise DataError(f"there is no file {path}") from error
    except Exception as error:  # what a damaged file raises depends on where it is damaged
        raise DataError(_unreadable(path, str(error))) from error
    if isinstance(content, TensorDictState):
        state = content.state if isinstance(content.state, dict) else {}
        values = state.get("_tensordict")
        if not isinstance(values, dict):
            raise DataError(f"{path} is damaged: its TensorDict has no tensors")
        return Named(values, True)
    if not isinstance(content, dict):
        raise DataError(f"{path} must hold a dict of tensors, got a {type(content).__name__}")
    return Named(content, False)


def _unreadable(path: Path, said: str) -> str:
    """Why a file cannot be read, from what torch says of it."""
    if "unable to mmap" in said:
        return (
            f"{path} cannot be mapped into memory: {said.splitlines()[0]}; Linux refuses a file "
            "that is larger than memory and swap together"
        )
    needed = re.search(r"GLOBAL ([\w.]+)", said)
    if needed and needed[1].startswith(("tensordict.", "torchrl.")):
        return (
            f"{path} is no readable .pt file: tensordict wrote it in a form that only its own code "
            f"reads ({needed[1]}). If you trust the file, convert it where tensordict is "
            f"installed: td = torch.load({path.name!r}, "
            "weights_only=False); torch.save({k: td[k].clone() for k in td.keys()}, 'plain.pt')"
        )
    reason = f" (it needs {needed[1]})" if needed else ""
    return f"{path} is no readable .pt file: it is no file of tensors{reason}"


@contextmanager
def these_alone(allowed: list[Any]) -> Iterator[None]:
    """Let ``torch.load(weights_only=True)`` build these beside tensors, and nothing else.

    What a program has allowed elsewhere, as tensordict does with its own classes, does not count.
    """
    before = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(allowed)
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)
