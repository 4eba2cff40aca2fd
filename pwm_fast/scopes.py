"""What ``with`` blocks put in force: for the thread or asyncio task that entered them, alone.

A setting is the entries of the blocks that are open, outermost first, in a ``ContextVar``. So
nothing leaks into other threads and tasks; a new thread starts without any (``asyncio.to_thread``
and tasks take those of their parent). Leaving a block takes its own entry out, so blocks may end in
any order. As all of Python's contexts, one in a generator stays in force while it is suspended; if
another thread or task closes the generator, it is over where it began, too.

Autograd's threads on CUDA see none either: what a backward pass needs is kept by its forward pass.
What a backward pass recomputes (``torch.utils.checkpoint``) enters its blocks itself, inside the
function that is recomputed.

Dynamo cannot trace a ``ContextVar``, but takes a module's attribute as it is and guards it by
taking it again at every call, in the thread and task that call. So while it traces, settings are
read as attributes of this module. Blocks that are themselves compiled end where the compiled
function ends, at the latest; their entries are in lists, which Dynamo follows.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

Entry = tuple[Any]  # a tuple of its own for each block, so that it is told from equal ones

_NAMES = ("backend", "precision", "algebra", "observers")
_VARIABLES: dict[str, ContextVar[tuple[Entry, ...]]] = {
    name: ContextVar(f"pwm_fast.{name}", default=()) for name in _NAMES
}
_TRACED: dict[str, list[Entry]] = {name: [] for name in _NAMES}
_HOME: ContextVar[None] = ContextVar("pwm_fast.home")  # its tokens tell contexts apart
_ENDED: dict[int, Entry] = {}  # in another context than where they began; kept: ids stay theirs
_THIS = sys.modules[__name__]


def __getattr__(name: str) -> Any:
    if name in _VARIABLES:
        return _open(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@contextmanager
def entered(name: str, value: Any) -> Iterator[None]:
    """Within the context, ``value`` is the innermost of a setting."""
    entry = (value,)
    if torch.compiler.is_dynamo_compiling():
        _TRACED[name].append(entry)
        try:
            yield
        finally:
            _TRACED[name].pop()
        return
    variable, home = _VARIABLES[name], _HOME.set(None)
    variable.set((*variable.get(), entry))
    try:
        yield
    finally:
        try:
            _HOME.reset(home)
        except ValueError:  # this is another context
            _ENDED[id(entry)] = entry
        variable.set(tuple(e for e in variable.get() if e is not entry))


def in_force(name: str) -> tuple[Entry, ...]:
    """All entries of a setting, outermost first."""
    if torch.compiler.is_dynamo_compiling():
        return (*getattr(_THIS, name), *_TRACED[name])
    return _open(name)


def all_in_force() -> list[tuple[Entry, ...]]:
    """All entries of each setting, ``observers`` last; not where Dynamo traces."""
    if _ENDED:
        return [_open(name) for name in _NAMES]
    return [variable.get() for variable in _VARIABLES.values()]


def _open(name: str) -> tuple[Entry, ...]:
    entries = _VARIABLES[name].get()
    return tuple(e for e in entries if id(e) not in _ENDED) if _ENDED else entries


def innermost(name: str, default: Any = None) -> Any:
    """The value in force of a setting."""
    entries = in_force(name)
    return entries[-1][0] if entries else default
