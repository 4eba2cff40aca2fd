"""MLPs the short way: what was checked and chosen for one call holds for those that are like it.

A call is like another one if its structure and sizes are the same, and so is what the choice of a
backend depends on. Then nothing is left but to see that the tensors are plain ones, and to run the
native program of these sizes, which checks sizes and dtypes itself. Whatever is not as it should be
goes the long way, which says what is wrong.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from pwm_fast import scopes
from pwm_fast.backends import select
from pwm_fast.backends.dtypes import autocasts
from pwm_fast.backends.select import Choice
from pwm_fast.backends.specs import encode_layers, split_params
from pwm_fast.backends.transforms import PLAIN, in_memory, transformed, watched
from pwm_fast.fused import gemm, row_program
from pwm_fast.fused.blocked_mlp import Ready
from pwm_fast.ops.operator import Operator, as_rows
from pwm_fast.ops.registration import check_alone, registered
from pwm_fast.ops.types import Layer, Order
from pwm_fast.ops.weights import centred, flat, specs_of

_LIMIT = 512  # kinds of calls
_VARIABLES = (select.VARIABLE, select.PRECISION_VARIABLE, gemm.VARIABLE)
# os.environ decodes what it is asked for, which would take a tenth of a small call.
_ENVIRONMENT: Any = getattr(os.environ, "_data", None)
_KEYS = tuple(os.fsencode(name) for name in _VARIABLES)


class _Known(NamedTuple):
    """A kind of calls that ran: the operator, what it took beside tensors, and its program."""

    operator: Operator
    spec: str
    where: tuple[str, str]
    ready: Ready


_KNOWN: dict[Any, _Known] = {}


def environment() -> tuple[Any, ...]:
    """What of the environment the choice of a backend depends on."""
    if isinstance(_ENVIRONMENT, dict):
        return tuple(map(_ENVIRONMENT.get, _KEYS))
    return tuple(map(os.environ.get, _VARIABLES))


def _key(inputs: Sequence[Tensor], layers: Sequence[Layer], order: Order, rows: int) -> Any:
    """What calls that are like each other have in common; None where a call is like none."""
    if torch.compiler.is_compiling() or watched() or transformed() or scopes.in_force("observers"):
        return None
    if not inputs[0].is_cpu or autocasts(inputs[0]):
        return None
    return (
        order,
        rows > row_program.FEW,
        environment(),
        scopes.in_force("backend"),
        scopes.in_force("precision"),
        scopes.in_force("algebra"),
        tuple([x.shape[-1] for x in inputs]),
        # A shape, which vectors are there, and the options.
        tuple([(p[0].shape, *[x is None for x in p[1:4]], *p[4:]) for p in layers]),
    )


def remember(
    operator: Operator,
    choice: Choice,
    inputs: Sequence[Tensor],
    layers: Sequence[Layer],
    order: Order,
) -> None:
    """Keep what calls like this one need, where these are native programs."""
    if torch.compiler.is_compiling():
        return
    kernels = select.kernels(operator.family, choice.backend.name, choice.precision.name)
    rows = prod(inputs[0].shape[:-1])
    first = layers[0].weight
    if choice.is_reference or kernels.row_program is None or rows == 0:
        return
    if (first.dim() == 3 and first.shape[0] == 1) or any(p.drops for p in layers):
        return
    widths = centred(choice, layers)[1] if order == "norm_act" else None
    specs = specs_of(layers, order, widths)
    if not row_program.runs(kernels, [p.weight for p in layers], specs, rows):
        return
    key = _key(inputs, layers, order, rows)
    if key is None:
        return
    if len(_KNOWN) >= _LIMIT:
        _KNOWN.clear()
    where = choice.backend.name, choice.precision.name
    ready = Ready(kernels, [x.shape[-1] for x in inputs], specs, split_params(specs, flat(layers)))
    _KNOWN[key] = _Known(operator, encode_layers(specs), where, ready)


def mlp(inputs: Sequence[Tensor], layers: Sequence[Layer], order: Order) -> Tensor | None:
    """See :func:`pwm_fast.ops.mlp`; None where the call has to go the long way."""
    try:
        leading = inputs[0].shape[:-1]
        rows = prod(leading)
        key = _key(inputs, layers, order, rows)
        known = None if key is None else _KNOWN.get(key)
    except (AttributeError, IndexError, TypeError):  # no tensors, no layers, or odd options
        return None
    if known is None:
        return None
    params = [x for p in layers for x in p[:4] if x is not None]
    kept, batched = torch.is_grad_enabled(), torch._C._functorch.is_legacy_batchedtensor
    differentiated = False
    for x in (*inputs, *params):
        if type(x) not in PLAIN or x.is_neg() or batched(x):
            return None
        if kept and x.requires_grad:
            differentiated = True
    if rows == 0 or any(x.shape[:-1] != leading for x in inputs[1:]):
        return None
    xs = [as_rows(x) for x in inputs]
    try:
        if not differentiated:
            y = known.ready.forward(xs, params, rows, False, False)[0]
        elif any(x.is_inference() for x in (*xs, *params)):
            return None  # autograd refuses to keep them
        else:
            y = pwm_fast_mlp.apply(known, len(xs), rows, *xs, *params)
    except ValueError:
        return None
    members = known.ready.shape.members
    if members:
        return y.view(members, *leading, y.shape[-1])
    return y if len(leading) == 1 else y.view(*leading, y.shape[-1])


class pwm_fast_mlp(torch.autograd.Function):
    """The operator's gradient, without the operator."""

    @staticmethod
    def forward(ctx: Any, known: _Known, inputs: int, rows: int, *tensors: Tensor) -> Tensor:
        """``[R, N]`` of inputs ``[R, K_i]`` and parameters."""
        flat, params = list(tensors[:inputs]), list(tensors[inputs:])
        ctx.known, ctx.inputs = known, inputs
        ctx.wgrad = any(ctx.needs_input_grad[3 + inputs :])
        y, kept = known.ready.forward(flat, params, rows, True, ctx.wgrad)
        ctx.save_for_backward(*tensors, kept)
        ctx.set_materialize_grads(False)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> Any:
        """Gradients of all arguments."""
        needs = ctx.needs_input_grad
        if dy is None:
            return (None,) * len(needs)
        known, inputs = ctx.known, ctx.inputs
        *tensors, kept = ctx.saved_tensors
        flat, params = tensors[:inputs], tensors[inputs:]
        towards = tuple(needs[3 : 3 + inputs])
        # Where the gradient is itself to be differentiated, the operator refuses.
        seen = torch.is_grad_enabled() or watched() or forward_ad._current_level >= 0
        if seen or not in_memory(dy):
            check_alone(known.operator.name, dy)
            run = registered(f"{known.operator.name}_backward")
            saved = known.ready.saved(kept, flat[0].shape[0], ctx.wgrad)
            given = (saved, list(towards), known.spec, ctx.wgrad, *known.where)
            found = run(dy, flat, params, [], *given)
            found = [[None if tuple(g.shape) == (0,) else g for g in each] for each in found]
        else:
            found = known.ready.backward(dy, flat, params, kept, towards, ctx.wgrad)
        grads = (*found[0], *found[1])
        return (
            None,
            None,
            None,
            *(g if n else None for g, n in zip(grads, needs[3:], strict=True)),
        )
