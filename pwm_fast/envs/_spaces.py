"""Checks of the spaces of other libraries: bounded actions, observations that are vectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

# An action of 0.01 would be a force of 10,000: whoever means such bounds can rescale them.
MAX_BOUND = 1e6
IMAGE_SIDE = 16  # rows and columns from which two dimensions are a picture, not a stack of vectors
MAX_STACKED = 4096  # numbers of an observation with two dimensions


def check_actions(
    env: str, low: np.ndarray, high: np.ndarray, names: Sequence[str] | None = None
) -> None:
    """Raise ValueError unless every entry of the action has bounds to stretch [-1, 1] to.

    Args:
        env: for the message.
        low: lowest actions, of any shape.
        high: highest actions, of the same shape.
        names: of what the entries drive, as :func:`actuators` gives them.
    """
    low, high = (np.asarray(b, dtype=np.float64).reshape(-1) for b in (low, high))
    if low.size == 0:
        raise ValueError(f"{env}: the action space has no entries")
    for i, (a, b) in enumerate(zip(low.tolist(), high.tolist(), strict=True)):
        name = names[i] if names is not None and i < len(names) else ""
        entry = f"{env}: entry {i} of the action" + (f" ({name})" if name else "")
        if a != a or b != b:
            raise ValueError(f"{entry} has the bounds [{a:g}, {b:g}]: they must be numbers")
        if not (abs(a) < MAX_BOUND and abs(b) < MAX_BOUND):
            raise ValueError(
                f"{entry} has the bounds [{a:g}, {b:g}]: the actions must be bounded, by less than "
                f"{MAX_BOUND:g} in size, since [-1, 1] is stretched to their bounds; wrap the "
                "environment so that it takes [-1, 1]"
            )
        if not a < b:
            raise ValueError(
                f"{entry} has the bounds [{a:g}, {b:g}]: the lower must be below the upper"
            )


def actuators(model: Any, shape: tuple[int, ...]) -> list[str] | None:
    """What the entries of an action drive, where they are MuJoCo's controls; else None.

    Args:
        model: a ``mujoco.MjModel``, or anything else.
        shape: of the action.
    """
    if not (hasattr(model, "actuator_trntype") and shape == (model.nu,)):
        return None
    import mujoco

    joint = int(mujoco.mjtTrn.mjTRN_JOINT)
    names = []
    for i in range(model.nu):
        name = f"actuator {model.actuator(i).name!r}"
        if not model.actuator(i).name and model.actuator_trntype[i] == joint:
            name = f"the actuator of joint {model.joint(model.actuator_trnid[i, 0]).name!r}"
        names.append(name)
    return names


def check_observations(env: str, space: Any) -> None:
    """Raise ValueError unless a Box of observations is of vectors, which may be stacked.

    Args:
        env: for the message.
        space: with ``shape`` and ``dtype``. One dimension is a vector, of any number type. Two are
            a stack of vectors, flattened, unless they look like a picture: bytes, both sides
            of at least :data:`IMAGE_SIDE`, or more than :data:`MAX_STACKED` numbers. More
            dimensions are images.
    """
    shape, dtype = tuple(space.shape), np.dtype(space.dtype)
    size = int(np.prod(shape))
    if size == 0:
        raise ValueError(f"{env}: the observation space has no entries, its shape is {shape}")
    if dtype.kind not in "fiub":
        raise ValueError(f"{env}: observations must be real numbers, the space has {dtype}")
    picture = len(shape) > 2 or (
        len(shape) == 2 and (dtype == np.uint8 or min(shape) >= IMAGE_SIDE or size > MAX_STACKED)
    )
    if picture:
        raise ValueError(
            f"{env}: the observation space {shape} of {dtype} is one of images, and the env "
            "model's encoder takes vectors: choose observations of the state; what is no image "
            "passes as a vector (gymnasium.wrappers.FlattenObservation)"
        )
