"""Functions of the user's that make environments, by their names in a configuration."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from pwm_fast.envs import _answers

ARGUMENTS = ("num_envs", "seed", "device")  # which a function must take by these names


def named(factory: str | None, kwargs: dict[str, Any]) -> Callable[..., Any]:
    """The function that ``module:function`` names.

    It must name the arguments of :data:`ARGUMENTS`: a configuration, perhaps of a foreign
    checkpoint, cannot have just any function called.

    Args:
        factory: its module, which is imported, and its name.
        kwargs: its other arguments.

    Raises:
        ValueError: no such function, or one that does not take these arguments.
        ImportError: the module cannot be imported.
    """
    module, _, name = factory.partition(":") if isinstance(factory, str) else ("", "", "")
    if not (module and name.isidentifier()):
        raise ValueError(f"env.factory must be module:function, got {factory!r}")
    try:
        make = getattr(importlib.import_module(module), name, None)
    except ImportError as error:
        raise ImportError(f"env.factory={factory}: {_answers.said(error)}") from error
    if not inspect.isfunction(make):
        raise ValueError(f"env.factory={factory}: {module} has no function {name}")
    parameters = inspect.signature(make).parameters
    lacking = [k for k in ARGUMENTS if k not in parameters]
    if lacking:
        raise ValueError(f"env.factory={factory} must take {', '.join(ARGUMENTS)}, lacks {lacking}")
    if not isinstance(kwargs, Mapping) or not set(kwargs).isdisjoint(ARGUMENTS):
        raise ValueError(f"env.kwargs must be the factory's own arguments, got {kwargs!r}")
    try:
        inspect.signature(make).bind(**dict.fromkeys(ARGUMENTS), **kwargs)
    except TypeError as error:
        raise ValueError(f"env.factory={factory}: {error}, got env.kwargs={kwargs}") from error
    return make
