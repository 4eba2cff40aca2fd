"""The choice of a backend and a precision for a call."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

from pwm_fast import scopes
from pwm_fast.backends import precision as precisions
from pwm_fast.backends.base import FAMILIES, Backend, BackendError, Call
from pwm_fast.backends.cuda import Cuda
from pwm_fast.backends.native import Native
from pwm_fast.backends.precision import Precision
from pwm_fast.backends.reference import Reference
from pwm_fast.backends.torch import Torch
from pwm_fast.backends.triton_support import Triton

__all__ = ["BackendError", "Call"]

#: In the order of preference. A new backend is a module and an entry here.
BACKENDS: dict[str, Backend] = {
    b.name: b for b in (Native(), Cuda(), Triton(), Torch(), Reference())
}

NAMES = ("auto", *BACKENDS)
PRECISIONS = precisions.NAMES
VARIABLE = "PWM_FAST_BACKEND"
PRECISION_VARIABLE = "PWM_FAST_PRECISION"


class Operation(NamedTuple):
    """What may be run on several backends.

    Attributes:
        name: of the public operation.
        family: of :data:`pwm_fast.backends.base.FAMILIES`.
    """

    name: str
    family: str

    @property
    def backends(self) -> tuple[Backend, ...]:
        """Those that have kernels for it, in the order of preference; the reference is the last."""
        return tuple(b for b in BACKENDS.values() if self.family in b.families)

    def has(self, name: str) -> bool:
        """Whether it has a backend of that name."""
        return any(b.name == name for b in self.backends)


#: What has been declared, by name.
OPERATIONS: dict[str, Operation] = {}


def declare(name: str, family: str) -> Operation:
    """Make an operation known to the choice, to ``explain`` and to ``python -m pwm_fast.info``."""
    if family not in FAMILIES:
        raise ValueError(f"family must be one of {', '.join(FAMILIES)}, got {family!r}")
    OPERATIONS[name] = Operation(name, family)
    return OPERATIONS[name]


class Choice(NamedTuple):
    """What runs a call."""

    backend: Backend
    precision: Precision

    @property
    def name(self) -> str:
        """The backend's."""
        return self.backend.name

    @property
    def is_reference(self) -> bool:
        """It is the operation's plain PyTorch."""
        return self.backend.is_reference

    @property
    def for_tensor_cores(self) -> bool:
        """GEMMs take 16-bit operands on tensor cores."""
        return self.backend.tensor_cores and self.precision.compute is not None


class Verdict(NamedTuple):
    """What a backend says of a call: ``reason`` says why it cannot run, or is None."""

    backend: Backend
    reason: str | None


@lru_cache(maxsize=64)
def kernels(family: str, backend: str, precision: str) -> Any:
    """The kernels of a backend, by what an operator carries in its schema."""
    return BACKENDS[backend].kernels(family, precisions.BY_NAME[precision])


def _check_name(source: str, name: str, names: Sequence[str] = NAMES) -> str:
    if name not in names:
        raise ValueError(f"{source} must be one of {', '.join(names)}, got {name!r}")
    return name


@contextmanager
def precision(name: str) -> Iterator[None]:
    """Within the context, GEMMs round their operands as ``name`` says.

    One of ``auto``, ``exact``, ``tf32``, ``bf16`` and ``fast``: see :mod:`pwm_fast.backends`. It
    holds for the thread or asyncio task that enters it; a thread that is started inside begins with
    the default (see :mod:`pwm_fast.scopes`).

    Raises:
        ValueError: there is no such precision.
    """
    with scopes.entered("precision", _check_name("precision", name, precisions.NAMES)):
        yield


def requested_precision() -> str:
    """The precision in force: the context's, the environment's, or ``auto``."""
    inner = scopes.innermost("precision")
    if inner is not None:
        return inner
    found = os.environ.get(PRECISION_VARIABLE) or "auto"
    return _check_name(PRECISION_VARIABLE, found, precisions.NAMES)


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Within the context, operations run on backend ``name`` unless a call says otherwise.

    Under ``native`` and ``torch`` operations that have no such backend run on the ``reference``. It
    holds for the thread or asyncio task that enters it; a thread that is started inside begins with
    the default (see :mod:`pwm_fast.scopes`).

    Raises:
        ValueError: there is no such backend.
    """
    with scopes.entered("backend", _check_name("backend", name)):
        yield


def requested(argument: str | None = None) -> str:
    """The backend in force: the argument, the context's, the environment's, or ``auto``."""
    if argument is not None:
        return _check_name("backend", argument)
    inner = scopes.innermost("backend")
    if inner is not None:
        return inner
    return _check_name(VARIABLE, os.environ.get(VARIABLE) or "auto")


def verdicts(operation: str, call: Call) -> list[Verdict]:
    """What each backend of the operation says of a call, in the order of preference."""
    found = OPERATIONS[operation]
    call = _with_precision(found, call)
    return [Verdict(b, b.why_not(found.family, call)) for b in found.backends]


def _with_precision(operation: Operation, call: Call) -> Call:
    """GEMMs alone have a precision."""
    if operation.family != "gemm":
        return call
    return call._replace(precision=requested_precision())


def check_has(operation: str, argument: str | None) -> None:
    """Raise :class:`BackendError` if the operation has no backend of the argument's name.

    Raises:
        BackendError: it has none.
        ValueError: nothing has.
    """
    if argument is None or requested(argument) == "auto":
        return
    if not OPERATIONS[operation].has(argument):
        raise BackendError(_has_not(OPERATIONS[operation], argument))


def _has_not(operation: Operation, name: str) -> str:
    names = ", ".join(b.name for b in operation.backends)
    return (
        f"{operation.name} has no backend {name!r}; it has {names}, "
        "and auto, the first that can run"
    )


def for_part(operation: str, argument: str | None) -> str | None:
    """What a part of a larger operation is to be told, which was called with ``argument``.

    The larger operation has that backend; a part without it runs on the reference.
    """
    if argument is None or argument == "auto" or not BACKENDS[argument].runs_all:
        return argument
    return argument if OPERATIONS[operation].has(argument) else "reference"


def select(operation: str, argument: str | None, call: Call) -> Choice:
    """The backend and the precision that a call runs on.

    Args:
        operation: a declared one.
        argument: the call's own wish, or None.
        call: its tensors and options.

    Raises:
        BackendError: the one that was asked for is not there or cannot run it, or none has the
            precision.
        ValueError: there is no backend, or no precision, of that name.
    """
    found = OPERATIONS[operation]
    asked = requested(argument)
    name = asked if argument is not None else for_part(operation, asked)
    call = _with_precision(found, call)
    chosen, refusal = None, _has_not(found, asked)
    for candidate in found.backends:
        if name == "auto":
            reason = (
                candidate.why_not(found.family, call) if candidate.automatic else "only if asked"
            )
            if reason is None:
                chosen = candidate
                break
            refusal = f"no backend can run {operation}; {candidate.name}: {reason}"
        elif candidate.name == name:
            reason = candidate.why_not(found.family, call)
            if reason is None:
                chosen = candidate
            else:
                refusal = f"backend {name!r} cannot run {operation}: {reason}"
            break
    for (observer,) in scopes.in_force("observers"):
        observer(operation, asked, None if chosen is None else chosen.name, call)
    if chosen is None:
        raise BackendError(refusal)
    return Choice(chosen, precision_of(chosen, found, call))


def serving(operation: Operation, call: Call) -> Backend:
    """The backend of what nobody asks for by itself: the one in force, where it can, or reference.

    Args:
        operation: what runs; it need not be declared.
        call: its tensors.
    """
    asked = requested()
    for candidate in operation.backends[:-1]:
        wanted = candidate.automatic if asked == "auto" else candidate.name == asked
        if wanted and candidate.why_not(operation.family, call) is None:
            return candidate
    return operation.backends[-1]


def precision_of(backend: Backend, operation: Operation, call: Call) -> Precision:
    """What a backend computes a call's GEMMs in."""
    own = backend.precisions.get(operation.family, "exact")
    return precisions.BY_NAME[own if call.precision == "auto" else call.precision]


Observer = Callable[[str, str, "str | None", Call], None]


@contextmanager
def observed(observer: Observer) -> Iterator[None]:
    """Within the context, tell of every choice: operation, backend in force, backend taken, call.

    What is taken is None where a :class:`BackendError` follows. Choices of this thread or asyncio
    task alone.
    """
    with scopes.entered("observers", observer):
        yield
