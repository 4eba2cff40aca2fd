"""What counts as a diverged world, and MuJoCo's own signs of one."""

from __future__ import annotations

from typing import Any

import numpy as np

DIVERGED = "pwm_fast_diverged"  # in the info of a Gymnasium world's step
MAX_COORDINATE = 1e6  # a position or velocity of MuJoCo beyond this is of a diverged world
MAX_VALUE = 1e10  # an observation or reward beyond this is; MuJoCo calls a state bad there


def sound(values: np.ndarray) -> np.ndarray:
    """Where numbers are finite and below :data:`MAX_VALUE` in size; of ``values``' shape."""
    return np.abs(values) < MAX_VALUE  # NaN compares false


def bad_states() -> list[int]:
    """MuJoCo's warnings of a position, velocity, acceleration or control that is bad."""
    import mujoco

    kinds = mujoco.mjtWarning
    bad = (kinds.mjWARN_BADQPOS, kinds.mjWARN_BADQVEL, kinds.mjWARN_BADQACC, kinds.mjWARN_BADCTRL)
    return sorted(int(kind) for kind in bad)


class PhysicsWatch:
    """Sees whether MuJoCo found a world's state bad between :meth:`begin` and :meth:`end`.

    MuJoCo answers a bad state with a warning and, unless the model forbids it, with a reset within
    the step, which also clears the warnings that were counted before. A control that is not finite
    gives a warning and turns all actuators off.

    Args:
        timed: a time that goes back is of a bad state, too.
    """

    def __init__(self, timed: bool = True) -> None:
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

    def end(self) -> bool:
        """Whether the state was bad since :meth:`begin`, or is beyond :data:`MAX_COORDINATE`."""
        data = self._data
        bad = any(self._number.tolist()[self._bad]) or (self._timed and data.time < self._time)
        self._number += self._before
        return bad or not all(_below(x, MAX_COORDINATE) for x in (data.qpos, data.qvel))


def _below(values: np.ndarray, bound: float) -> bool:
    """Whether all are smaller in size; False where one is NaN."""
    with np.errstate(over="ignore"):
        square = values.dot(values)
    # The norm first, which bounds them all: this runs in every step of every world.
    return bool(square < bound * bound or np.abs(values).max() < bound)
