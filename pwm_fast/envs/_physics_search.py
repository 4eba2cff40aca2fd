"""Finding the MuJoCo states that an env of another library steps, wherever it keeps them."""

from __future__ import annotations

import functools
import itertools
import sys
import types
import weakref
from collections import deque
from collections.abc import Iterator
from typing import Any

DEPTH = 5  # attributes, entries or cells between an env and its state
OBJECTS = 500  # that are looked at
ENTRIES = 64  # of a container
# Of these packages nothing is looked into: they hold no state, or are large.
_CLOSED = (
    *("numpy", "torch", "mujoco", "glfw", "OpenGL", "gymnasium.spaces"),
    *("logging", "threading", "multiprocessing"),
)
_PLAIN = (str, bytes, int, float, complex, bool, type(None), type, types.ModuleType)


def find(env: Any) -> list[Any]:
    """The ``mujoco.MjData`` that can be reached from an env, the nearest first.

    Looks at attributes, entries of containers, and what functions were made with; breadth first, a
    bounded number of them. No property and no method is called.

    Args:
        env: an environment; its wrapped ones are attributes of it.
    """
    mujoco: Any = sys.modules.get("mujoco")
    if mujoco is None:
        return []
    found: list[Any] = []
    seen = {id(env)}
    left = deque([(env, 0)])
    while left and len(seen) <= OBJECTS:
        thing, depth = left.popleft()
        if issubclass(type(thing), mujoco.MjData):
            found.append(thing)
        elif depth < DEPTH:
            wrapped = _attributes(thing).get("env")  # is as near as its wrapper
            for part in _parts(thing):
                if id(part) not in seen and not issubclass(type(part), _PLAIN):
                    seen.add(id(part))
                    left.append((part, depth if part is wrapped else depth + 1))
    return found


def _parts(thing: Any) -> Iterator[Any]:
    kind = type(thing)
    if f"{kind.__module__}.".startswith(tuple(f"{name}." for name in _CLOSED)):
        return
    if issubclass(kind, dict):
        yield from itertools.islice(dict.values(thing), ENTRIES)
    for base in (list, tuple, set, frozenset, deque):
        if issubclass(kind, base):
            yield from itertools.islice(base.__iter__(thing), ENTRIES)
    if kind is weakref.ReferenceType:
        yield thing()
    elif kind is types.MethodType:
        yield from (thing.__self__, thing.__func__)
    elif kind is functools.partial:
        yield from (thing.func, *thing.args, *thing.keywords.values())
    elif kind is types.FunctionType:
        yield from _cells(thing)
    yield from _attributes(thing).values()
    for owner in kind.__mro__:
        if "__slots__" not in vars(owner):
            continue
        for slot in vars(owner).values():
            if type(slot) is types.MemberDescriptorType:
                try:
                    yield slot.__get__(thing)
                except AttributeError:  # not set
                    continue


def _attributes(thing: Any) -> dict[str, Any]:
    try:
        own = object.__getattribute__(thing, "__dict__")
    except AttributeError:
        return {}
    return dict(own) if isinstance(own, dict) else {}


def _cells(function: Any) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not set yet
            continue
    yield from function.__defaults__ or ()
