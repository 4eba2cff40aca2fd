"""The built-in robots: each is a :class:`Task` in a module of its own here."""

from __future__ import annotations

import pkgutil
from importlib import import_module

from pwm_fast.envs.tasks.base import Task


def built_in() -> dict[str, type[Task]]:
    """The robots by name: every class of a module of this package that has a name.

    Raises:
        TypeError: two robots have one name.
    """
    found: dict[str, type[Task]] = {}
    for info in pkgutil.iter_modules(__path__, f"{__name__}."):
        for cls in vars(import_module(info.name)).values():
            # Not isinstance(cls, type): on Python 3.10 aliases such as dict[str, int] pass for
            # instances of the metaclass of what they stand for.
            if not (issubclass(type(cls), type) and issubclass(cls, Task) and "name" in vars(cls)):
                continue
            other = found.setdefault(cls.name, cls)
            if other is not cls:
                raise TypeError(
                    f"{other.__qualname__} and {cls.__qualname__} are both {cls.name!r}"
                )
    return found
