"""Which backend an operation runs on.

Backends of an operation are tried in order; each says why it cannot run, or None if it can:

- ``native``: C++ kernels on the CPU, float32.
- ``cuda``: CUDA C++ kernels of the native extension, where it was built with nvcc.
- ``triton``: Triton kernels, float32 on CUDA (and on the CPU in Triton's interpreter, for tests).
- ``torch``: the same algebra and hand-written backward passes in plain PyTorch, any device and
  floating dtype. Not chosen by itself: it is what the faster ones are tested against.
- ``reference``: plain PyTorch with autograd's own gradients. It runs everything, differentiates
  twice, and is the truth.

``auto`` takes the first that can run. The choice is made by, in this order: the ``backend``
argument of a call, the innermost :func:`backend` context, the environment variable
``PWM_FAST_BACKEND``, ``auto``.

Not every operation has every backend: ``OPERATIONS`` lists those that it has an implementation of
its own for, and no name stands for another's code. An argument that names one that is not there is
refused. A context or the environment speaks to whole programs, so under ``native`` and ``torch``
operations without it run on the ``reference``, and are reported as that.

What differentiates forward (a dual level, ``torch.func.jvp``, ``linearize``) or otherwise
transforms a call in a way that operators cannot follow, and tensors of unknown classes, leave the
reference alone: ``auto`` takes it, who asks for another is told.

How operations with matrix products round their operands is the innermost :func:`precision`
context's, the environment variable ``PWM_FAST_PRECISION``'s, or ``auto``, which is ``exact`` on a
CPU and ``fast`` for ``triton``:

- ``exact``: float32 (the tensors' dtype);
- ``tf32``: float32 products with operands rounded to tf32, on CUDA;
- ``bf16``: operands in bf16;
- ``fast``: operands in fp16, adjoints with a power-of-two factor a row.

State, LayerNorm, integration, losses, weights and accumulators stay float32 in all of them
(docs/ops.md has the measured errors).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from pwm_fast import scopes
from pwm_fast.backends.dtypes import autocasts

NAMES = ("auto", "native", "cuda", "triton", "torch", "reference")
VARIABLE = "PWM_FAST_BACKEND"
PRECISIONS = ("auto", "exact", "tf32", "bf16", "fast")
PRECISION_VARIABLE = "PWM_FAST_PRECISION"


# Attribute of a fake tensor: the class of the tensor that it stands for.
STANDS_FOR = "_pwm_fast_stands_for"


class BackendError(RuntimeError):
    """A backend was asked for that cannot run the operation; the message says why."""


class Call(NamedTuple):
    """What backends look at.

    Attributes:
        tensors: all tensors of the call.
        unsupported: why the fused algebra does not cover these options, or None.
        precision: asked for, of :data:`PRECISIONS`; ``auto`` for operations without products.
    """

    tensors: Sequence[Tensor]
    unsupported: str | None = None
    precision: str = "auto"


class Backend(NamedTuple):
    """One way to run an operation.

    Attributes:
        name: one of :data:`NAMES` but ``auto``.
        automatic: ``auto`` may take it.
        why_not: why it cannot run a call, or None if it can.
        precision: what ``auto`` means to it.
    """

    name: str
    automatic: bool
    why_not: Callable[[Call], str | None]
    precision: str = "exact"


class Choice(NamedTuple):
    """A backend and its verdict on a call: ``reason`` says why it cannot run, or is None."""

    name: str
    reason: str | None


def _reference(call: Call) -> str | None:
    if call.precision not in ("auto", "exact"):
        return f"precision {call.precision!r} is asked for; it computes in the tensors' own dtype"
    return None


def _fused(call: Call) -> str | None:
    """What every fused backend needs."""
    if call.unsupported is not None:
        return call.unsupported
    first = call.tensors[0]
    dtype = first.dtype
    if call.precision not in ("auto", "exact") and dtype != torch.float32:
        return f"precision {call.precision!r} needs float32 tensors, they are {dtype}"
    for x in call.tensors:
        if x.dtype != dtype:
            return f"the tensors' dtypes differ: {dtype} and {x.dtype}"
        if type(x) not in _PLAIN and (reason := _subclass(x)) is not None:
            return reason
    if autocasts(first):
        return "autocast is on, which only the reference follows"
    return _forward_mode(call.tensors) or _transform()


_PLAIN = (Tensor, torch.nn.Parameter)


def _subclass(x: Tensor) -> str | None:
    """Why operators cannot take a tensor because of its class; None if they can."""
    if torch.compiler.is_dynamo_compiling():  # which traces through subclasses, or refuses them
        return None
    kind = getattr(x, STANDS_FOR, type(x))
    if _known(kind):
        return None
    return f"a tensor is a {kind.__name__}, which only the reference follows"


@lru_cache(maxsize=256)
def _known(kind: type) -> bool:
    """Whether a subclass of Tensor holds its values as Tensor does, or is one of a tracer's own."""
    if kind is Tensor or kind.__module__.startswith("torch._subclasses."):
        return True
    own = kind.__torch_function__ is not torch._C._disabled_torch_function_impl  # type: ignore[attr-defined]
    dispatches = kind.__torch_dispatch__ is not Tensor.__torch_dispatch__  # type: ignore[attr-defined]
    return not own and not dispatches


def _forward_mode(tensors: Sequence[Tensor]) -> str | None:
    """Why operators would lose a tangent; None where there is none to lose."""
    if forward_ad._current_level < 0:
        return None
    # Where make_fx traces (torch.func.linearize), operators cannot look at tangents of constants.
    if (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None
        or any(forward_ad.unpack_dual(x).tangent is not None for x in tensors)
    ):
        return "it is differentiated in forward mode, which only the reference follows"
    return None


def transformed(tensors: Sequence[Tensor]) -> bool:
    """Whether one of the tensors has a tangent, or a ``torch.func`` transform is in force."""
    return torch._C._are_functorch_transforms_active() or _forward_mode(tensors) is not None


def _transform() -> str | None:
    """Why operators cannot follow the transforms in force; None if they can."""
    # A trace holds for inputs that require gradients, too, where these do not.
    if torch._C._get_tracing_state() is not None:
        return "it is traced by torch.jit, which only the reference follows"
    if not torch._C._are_functorch_transforms_active():
        return None
    if torch.compiler.is_compiling():
        return "a torch.func transform is being compiled, which only the reference follows"
    from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters

    keys = {interpreter.key().name for interpreter in retrieve_all_functorch_interpreters()}
    # Under vmap the operators' own rules see what requires a gradient; functionalize hides it.
    others = keys - {"Vmap"}
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
    if call.precision not in ("auto", "exact", "bf16"):
        return f"precision {call.precision!r} is asked for; it has exact and bf16"
    from pwm_fast.backends.native import why_missing

    return why_missing() or _fused(call)


def _torch(call: Call) -> str | None:
    if call.precision == "tf32" and call.tensors[0].device.type != "cuda":
        return f"precision 'tf32' is CUDA's; the tensors are on {call.tensors[0].device}"
    return _fused(call)


def _reduction(call: Call) -> str | None:
    """What a reduction over tensors on a GPU needs."""
    first = call.tensors[0]
    for x in call.tensors:
        if x.device != first.device:
            return f"the tensors are on different devices: {first.device} and {x.device}"
    from pwm_fast.backends.cuda import DTYPES

    if first.dtype not in DTYPES:
        return f"the tensors are {first.dtype}; it takes float32, float16 and bfloat16"
    return _fused(call)


def _cuda(call: Call) -> str | None:
    device = call.tensors[0].device
    if device.type != "cuda":
        return f"the tensors are on {device}; it runs on CUDA GPUs"
    from pwm_fast.backends.cuda import why_not

    return _reduction(call) or why_not(device.index or 0)


def _triton_missing(call: Call) -> str | None:
    from pwm_fast.backends import triton_support

    return triton_support.why_not(str(call.tensors[0].device))


def _triton_reduction(call: Call) -> str | None:
    return _triton_missing(call) or _reduction(call)


def _triton(call: Call) -> str | None:
    reason = _triton_missing(call)
    if reason is None and call.tensors[0].dtype != torch.float32:
        reason = f"the tensors are {call.tensors[0].dtype}; it computes in float32"
    return reason or _torch(call)


def _triton_returns(call: Call) -> str | None:
    if torch._C._are_functorch_transforms_active():  # its operator has no rule for vmap
        return "it is inside a torch.func transform, which only the reference follows"
    return _triton(call)


_FUSED = (
    Backend("native", True, _native),
    Backend("triton", True, _triton, precision="fast"),
    Backend("torch", False, _torch),
    Backend("reference", True, _reference),
)

_NATIVE, _REFERENCE = _FUSED[0], _FUSED[-1]
_ROWS = (_NATIVE, Backend("triton", True, _triton), _REFERENCE)
_RETURNS = (Backend("triton", True, _triton_returns), _REFERENCE)
_REDUCTIONS = (Backend("cuda", True, _cuda), Backend("triton", True, _triton_reduction))

OPERATIONS: dict[str, tuple[Backend, ...]] = {
    "mlp": _FUSED,
    "flow_step": _FUSED,
    "latent_rollout": _FUSED,
    "imagine": _FUSED,
    "layer_norm_act": _ROWS,
    "simnorm": _ROWS,
    "two_hot_decode": _ROWS,
    "two_hot_cross_entropy": _ROWS,
    "td_lambda": _RETURNS,
    "esnr": (_NATIVE, *_REDUCTIONS, _REFERENCE),
    "esnr_update": (*_REDUCTIONS, _REFERENCE),
}

# Contexts for whole programs: operations without such a backend run on the reference there.
WHOLE = ("native", "torch")

# Operations with matrix products.
PRODUCTS = frozenset({"mlp", "flow_step", "latent_rollout", "imagine"})


def _check_name(source: str, name: str, names: Sequence[str] = NAMES) -> str:
    if name not in names:
        raise ValueError(f"{source} must be one of {', '.join(names)}, got {name!r}")
    return name


@contextmanager
def precision(name: str) -> Iterator[None]:
    """Within the context, products round their operands as ``name`` of :data:`PRECISIONS` says.

    It holds for the thread or asyncio task that enters it; a thread that is started inside begins
    with the default (see :mod:`pwm_fast.scopes`).

    Raises:
        ValueError: there is no such precision.
    """
    with scopes.entered("precision", _check_name("precision", name, PRECISIONS)):
        yield


def requested_precision() -> str:
    """The precision in force: the context's, the environment's, or ``auto``."""
    inner = scopes.innermost("precision")
    if inner is not None:
        return inner
    found = os.environ.get(PRECISION_VARIABLE) or "auto"
    return _check_name(PRECISION_VARIABLE, found, PRECISIONS)


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


def verdicts(operation: str, call: Call) -> list[Choice]:
    """What each backend of the operation says of a call, in the order of preference."""
    call = _with_precision(operation, call)
    return [Choice(b.name, b.why_not(call)) for b in OPERATIONS[operation]]


def _with_precision(operation: str, call: Call) -> Call:
    return call._replace(precision=requested_precision()) if operation in PRODUCTS else call


def check_has(operation: str, argument: str | None) -> None:
    """Raise :class:`BackendError` if the operation has no backend of the argument's name.

    Raises:
        BackendError: it has none.
        ValueError: nothing has.
    """
    if argument is None or requested(argument) == "auto":
        return
    names = [b.name for b in OPERATIONS[operation]]
    if argument not in names:
        raise BackendError(_has_not(operation, argument))


def _has_not(operation: str, name: str) -> str:
    names = ", ".join(b.name for b in OPERATIONS[operation])
    return f"{operation} has no backend {name!r}; it has {names}, and auto, the first that can run"


def for_part(operation: str, argument: str | None) -> str | None:
    """What a part of a larger operation is to be told, which was called with ``argument``.

    The larger operation has that backend; a part without it runs on the reference.
    """
    if argument in WHOLE and all(b.name != argument for b in OPERATIONS[operation]):
        return "reference"
    return argument


def select(operation: str, argument: str | None, call: Call) -> str:
    """The backend that runs the call; behind a ``+`` its precision, unless that is ``exact``.

    Raises:
        BackendError: the one that was asked for is not there or cannot run it, or none has the
            precision.
        ValueError: there is no backend, or no precision, of that name.
    """
    asked = requested(argument)
    name = asked if argument is not None else for_part(operation, asked)
    call = _with_precision(operation, call)
    chosen, refusal = None, ""
    mode = call.precision
    for candidate in OPERATIONS[operation]:
        if name == "auto":
            reason = candidate.why_not(call) if candidate.automatic else "it is not automatic"
            if reason is None:
                chosen = candidate.name
                mode = candidate.precision if mode == "auto" else mode
                break
            refusal = f"no backend can run {operation}; {candidate.name}: {reason}"
        elif candidate.name == name:
            reason = candidate.why_not(call)
            if reason is None:
                chosen = name
                mode = candidate.precision if mode == "auto" else mode
            else:
                refusal = f"backend {name!r} cannot run {operation}: {reason}"
            break
    for (observer,) in scopes.in_force("observers"):
        observer(operation, asked, chosen, call)
    if chosen is None:
        raise BackendError(refusal or _has_not(operation, asked))
    return chosen if mode == "exact" else f"{chosen}+{mode}"


Observer = Callable[[str, str, "str | None", Call], None]


@contextmanager
def observed(observer: Observer) -> Iterator[None]:
    """Within the context, tell of every choice: operation, backend in force, backend taken, call.

    What is taken is None where a :class:`BackendError` follows. Choices of this thread or asyncio
    task alone.
    """
    with scopes.entered("observers", observer):
        yield
