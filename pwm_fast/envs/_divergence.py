"""What counts as a diverged env, and MuJoCo's own signs of one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

DIVERGED = "pwm_fast_diverged"  # why, in the info of a Gymnasium env's step
MAX_COORDINATE = 1e6  # a position or velocity of MuJoCo beyond this is of a diverged env
MAX_VALUE = 1e10  # an observation or reward beyond this is; MuJoCo calls a state bad there


def sound(values: np.ndarray) -> np.ndarray:
    """Where numbers are finite and below :data:`MAX_VALUE` in size; of ``values``' shape."""
    return np.abs(values) < MAX_VALUE  # NaN compares false


BEYOND = f"a position or velocity is not finite, or not below {MAX_COORDINATE:g}"


def bad_states() -> dict[int, str]:
    """MuJoCo's warnings of a position, velocity, acceleration or control that is bad: their names.

    In the order of their numbers.
    """
    import mujoco

    kinds = mujoco.mjtWarning
    bad = (kinds.mjWARN_BADQPOS, kinds.mjWARN_BADQVEL, kinds.mjWARN_BADQACC, kinds.mjWARN_BADCTRL)
    return {int(kind): kind.name for kind in sorted(bad, key=int)}


def warned_of(kinds: Iterable[str]) -> str:
    """Why an env diverged, by the names of MuJoCo's warnings."""
    return f"MuJoCo gave {' and '.join(kinds)}"


class PhysicsWatch:
    """Sees whether MuJoCo found an env's state bad between :meth:`begin` and :meth:`end`.

    MuJoCo answers a bad state with a warning and, unless the model forbids it, with a reset within
    the step, which also clears the warnings that were counted before. A control that is not finite
    gives a warning and turns all actuators off.

    Args:
        timed: a time that goes back is of a bad state, too.
    """

    def __init__(self, timed: bool = True) -> None:
        self._names = list(bad_states().values())
        self._timed = timed
        self._bad = slice(min(bad_states()), max(bad_states()) + 1)  # they are neighbours
        self._data: Any = None

    def begin(self, data: Any) -> None:
        """Note the state of a ``mujoco.MjData`` before a step."""
        if data is not self._data:
            self._data, self._number = data, data.warning.number  # a view
        self._time = data.time
        # From zero: a reset within the step leaves a count of one, whatever it was before.
        self._before = self._number.copy()
        self._number[:] = 0

    def end(self) -> str | None:
        """Why the state diverged since :meth:`begin`, or None.

        It was bad, or is beyond :data:`MAX_COORDINATE`.
        """
        data = self._data
        counts = self._number.tolist()[self._bad]
        self._number += self._before
        if any(counts):
            return warned_of(name for name, n in zip(self._names, counts, strict=True) if n)
        if self._timed and data.time < self._time:
            return "its time went back"
        if all(_below(x, MAX_COORDINATE) for x in (data.qpos, data.qvel)):
            return None
        return BEYOND


def _below(values: np.ndarray, bound: float) -> bool:
    """Whether all are smaller in size; False where one is NaN."""
    with np.errstate(over="ignore"):
        square = values.dot(values)
    # The norm first, which bounds them all: this runs in every step of every env.
    return bool(square < bound * bound or np.abs(values).max() < bound)
