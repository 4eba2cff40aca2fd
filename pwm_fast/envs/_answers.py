"""Reading what one env of another library answers, and saying what is wrong with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import numpy as np

from pwm_fast import memory
from pwm_fast.envs.protocol import EnvironmentFault

Where = Callable[[], str]


def blame(what: str, error: Exception) -> NoReturn:
    """Raise a library's own error as a user should read it: what failed and why, in one line.

    An error that says enough by itself is raised as it is: ours, of the memory, or of the system.

    Args:
        what: of the environment failed.
        error: becomes the cause.
    """
    if isinstance(error, EnvironmentFault | OSError) or memory.is_out_of_memory(error):
        raise error
    raise EnvironmentFault(f"{what}: {said(error)}") from error


def said(error: Exception) -> str:
    """The type and message of an error, in one line of bounded length."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text if len(text) <= 300 else text[:297] + '...'}"


def number(value: Any, what: str, where: Where) -> float:
    """A reward as one number; an array or tensor of one entry counts as one.

    Args:
        value: what the env gave.
        what: it is.
        where: says which env and step, for the message.

    Raises:
        EnvironmentFault: it is not one real number.
    """
    if isinstance(value, float):  # most are, NumPy's float64 too
        return float(value)
    array = _array(value)
    if array is None or array.size != 1 or array.dtype.kind not in "fiub":
        raise EnvironmentFault(f"{where()}: the {what} must be one number, got {shown(value)}")
    return float(array.reshape(())[()])


def flag(value: Any, what: str, where: Where) -> bool:
    """A flag as a bool; 0 and 1 count as flags, also in an array or tensor of one entry.

    Raises:
        EnvironmentFault: it is no flag.
    """
    if isinstance(value, bool | np.bool_):
        return bool(value)
    array = _array(value)
    if array is not None and array.size == 1 and array.dtype.kind in "fiub":
        single = array.reshape(())[()]
        if single in (0, 1):
            return bool(single)
    raise EnvironmentFault(f"{where()}: {what} must be True or False, got {shown(value)}")


def observation(
    value: Any, shape: tuple[int, ...], dtype: np.dtype[Any], where: Where
) -> np.ndarray:
    """A copy of an observation, in its space's dtype; the env may go on using its own.

    Raises:
        EnvironmentFault: another shape, no real numbers, or numbers that an integer space lacks.
    """
    if type(value) is np.ndarray and value.dtype == dtype and value.shape == shape:
        return value.copy()
    array = _array(value)
    if array is None or array.dtype.kind not in "fiub" or array.shape != shape:
        raise EnvironmentFault(
            f"{where()}: the observation must be numbers of shape {shape}, got {shown(value)}"
        )
    with np.errstate(over="ignore", invalid="ignore"):
        copied = array.astype(dtype)
    if dtype.kind != "f" and not np.array_equal(copied, array):
        raise EnvironmentFault(
            f"{where()}: the observation holds values that are none of the space's {dtype}, got "
            f"{shown(value)}"
        )
    return copied


def shown(value: Any) -> str:
    """What came, in a few words."""
    if isinstance(value, bool | int | float | complex | np.generic) or value is None:
        return repr(value)
    array = _array(value)
    if array is None or array.dtype.kind not in "fciub":
        text = repr(value)
        return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
    few = f" {array.tolist()}" if array.size <= 4 else ""
    return f"{type(value).__name__} of shape {array.shape} and dtype {array.dtype}{few}"


def first_unsound(values: np.ndarray, good: np.ndarray) -> str:
    """The first entry of a vector that is not good: ``"entry 3 is nan"``."""
    index = int(np.flatnonzero(~good)[0])
    return f"entry {index} is {values[index]:g}"


def _array(value: Any) -> np.ndarray | None:
    """As an array; None where that cannot be."""
    try:
        return np.asarray(value)
    except (ValueError, TypeError, RuntimeError):  # ragged; a tensor on a GPU or with a gradient
        return None
