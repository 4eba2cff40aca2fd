"""Which backend an operation runs on.

Backends of an operation are tried in order; each says why it cannot run, or None if it can:

- ``native``: C++ kernels on the CPU, float32.
- ``torch``: the same algebra and hand-written backward passes in plain PyTorch, any device and
  floating dtype. Not chosen by itself: it is what the faster ones are tested against.
- ``reference``: plain PyTorch with autograd's own gradients. It runs everything, differentiates
  twice, and is the truth.

``auto`` takes the first that can run. The choice is made by, in this order: the ``backend``
argument of a call, the innermost :func:`backend` context, the environment variable
``PWM_FAST_BACKEND``, ``auto``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

NAMES = ("auto", "native", "torch", "reference")
VARIABLE = "PWM_FAST_BACKEND"


class BackendError(RuntimeError):
    """A backend was asked for that cannot run the operation; the message says why."""


class Call(NamedTuple):
    """What backends look at.

    Attributes:
        tensors: all tensors of the call.
        unsupported: why the fused algebra does not cover these options, or None.
    """

    tensors: Sequence[Tensor]
    unsupported: str | None = None


class Backend(NamedTuple):
    """One way to run an operation.

    Attributes:
        name: one of :data:`NAMES` but ``auto``.
        automatic: ``auto`` may take it.
        why_not: why it cannot run a call, or None if it can.
    """

    name: str
    automatic: bool
    why_not: Callable[[Call], str | None]


class Choice(NamedTuple):
    """A backend and its verdict on a call: ``reason`` says why it cannot run, or is None."""

    name: str
    reason: str | None


def _reference(call: Call) -> str | None:
    return None


def _fused(call: Call) -> str | None:
    """What every fused backend needs."""
    if call.unsupported is not None:
        return call.unsupported
    first = call.tensors[0]
    for x in call.tensors:
        if x.dtype != first.dtype:
            return f"the tensors' dtypes differ: {first.dtype} and {x.dtype}"
    if torch.is_autocast_enabled(first.device.type):
        return "autocast is on, which only the reference follows"
    return _transform()


def _transform() -> str | None:
    """Why operators cannot follow the ``torch.func`` transforms in force; None if they can."""
    if not torch._C._are_functorch_transforms_active():
        return None
    if torch.compiler.is_compiling():
        return "a torch.func transform is being compiled, which only the reference follows"
    from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters

    keys = {interpreter.key().name for interpreter in retrieve_all_functorch_interpreters()}
    others = keys - {"Vmap", "Functionalize"}
    if others:
        names = " and ".join(sorted(others)).lower()
        return f"it is inside a torch.func transform ({names}), which only the reference follows"
    return None


def _native(call: Call) -> str | None:
    first = call.tensors[0]
    if first.device.type != "cpu":
        return f"the tensors are on {first.device}; it runs on the CPU"
    if first.dtype != torch.float32:
        return f"the tensors are {first.dtype}; it computes in float32"
    from pwm_fast.ops.fused.native import why_missing

    return why_missing() or _fused(call)


_FUSED = (
    Backend("native", True, _native),
    Backend("torch", False, _fused),
    Backend("reference", True, _reference),
)

# Without an algebra of their own: plain PyTorch is all there is beside the native kernel.
_NATIVE = (_FUSED[0], Backend("torch", False, _reference), _FUSED[2])

OPERATIONS: dict[str, tuple[Backend, ...]] = {
    "mlp": _FUSED,
    "flow_step": _FUSED,
    "latent_rollout": _FUSED,
    "imagine": _FUSED,
    "layer_norm_act": _NATIVE,
    "simnorm": _NATIVE,
    "two_hot_decode": _NATIVE,
    "two_hot_cross_entropy": _NATIVE,
    "esnr": _NATIVE,
}

_context: list[str] = []


def _check_name(source: str, name: str) -> str:
    if name not in NAMES:
        raise ValueError(f"{source} must be one of {', '.join(NAMES)}, got {name!r}")
    return name


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Within the context, operations run on backend ``name`` unless a call says otherwise.

    Raises:
        ValueError: there is no such backend.
    """
    _context.append(_check_name("backend", name))
    try:
        yield
    finally:
        _context.pop()


def requested(argument: str | None = None) -> str:
    """The backend in force: the argument, the context's, the environment's, or ``auto``."""
    if argument is not None:
        return _check_name("backend", argument)
    if _context:
        return _context[-1]
    return _check_name(VARIABLE, os.environ.get(VARIABLE) or "auto")


def verdicts(operation: str, call: Call) -> list[Choice]:
    """What each backend of the operation says of a call, in the order of preference."""
    return [Choice(b.name, b.why_not(call)) for b in OPERATIONS[operation]]


def select(operation: str, argument: str | None, call: Call) -> str:
    """The backend that runs the call.

    Raises:
        BackendError: the one that was asked for cannot run it.
        ValueError: there is no backend of that name.
    """
    name = requested(argument)
    chosen, refusal = None, f"{operation} has no backend {name!r}"
    for candidate in OPERATIONS[operation]:
        if name == "auto":
            if candidate.automatic and candidate.why_not(call) is None:
                chosen = candidate.name
                break
        elif candidate.name == name:
            reason = candidate.why_not(call)
            if reason is None:
                chosen = name
            else:
                refusal = f"backend {name!r} cannot run {operation}: {reason}"
            break
    for observer in _observers:
        observer(operation, name, chosen, call)
    if chosen is None:
        raise BackendError(refusal)
    return chosen


Observer = Callable[[str, str, "str | None", Call], None]
_observers: list[Observer] = []


@contextmanager
def observed(observer: Observer) -> Iterator[None]:
    """Within the context, tell of every choice: operation, backend in force, backend taken, call.

    What is taken is None where a :class:`BackendError` follows.
    """
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)
