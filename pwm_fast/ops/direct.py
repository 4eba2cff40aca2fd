"""MLPs the short way: what was checked and chosen for one call holds for those that are like it.

A call is like another one if its structure and sizes are the same, and so is what the choice of a
backend depends on. Then nothing is left but to see that the tensors are plain ones, and to run what
is ready for these sizes, which checks sizes and dtypes itself. Whatever is not as it should be goes
the long way, which says what is wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from pwm_fast import scopes
from pwm_fast.backends import select
from pwm_fast.backends.select import Choice
from pwm_fast.backends.specs import encode_layers, split_params
from pwm_fast.backends.transforms import PLAIN, in_memory, transformed, watched
from pwm_fast.fused import gemm, row_program
from pwm_fast.fused.blocked_mlp import Ready
from pwm_fast.fused.layerwise_mlp import ReadyLayers
from pwm_fast.ops.operator import Operator, as_rows
from pwm_fast.ops.registration import check_alone, registered
from pwm_fast.ops.types import Layer, Order
from pwm_fast.ops.weights import centred, flat, specs_of

_LIMIT = 512  # kinds of calls
#: Tells what of the environment the choice of a backend depends on.
environment = gemm.stored_variables((select.VARIABLE, select.PRECISION_VARIABLE, gemm.VARIABLE))
_PLAIN, _is_neg = frozenset(PLAIN), Tensor.is_neg


class Known(NamedTuple):
    """A kind of calls.

    Attributes:
        ready: its native program, or its layers; None where such calls go the long way.
        operator: that ran it.
        spec: what the operator took beside tensors.
        where: the backend and the precision that it ran on.
    """

    ready: Ready | ReadyLayers | None = None
    operator: Operator | None = None
    spec: str = ""
    where: tuple[str, str] = ("", "")


_LONG = Known()
_KNOWN: dict[Any, Known] = {}


def situation(x: Tensor) -> Any:
    """What calls that are like each other have in common beside sizes and options.

    None where a call is like none: somebody watches or differentiates it, or ``x``, its first
    input, is not on the CPU.
    """
    if torch.compiler.is_compiling() or watched() or transformed():
        return None
    *settings, observers = scopes.all_in_force()
    if observers or not x.is_cpu or torch.is_autocast_enabled("cpu"):
        return None
    count, n = x.numel(), x.shape[-1]
    few = (count > row_program.FEW * n) + (count > row_program.FEW_WIDE * n)
    return few, environment(), *settings


def _key(inputs: Sequence[Tensor], layers: Sequence[Layer], order: Order) -> Any:
    """What calls that are like each other have in common; None where a call is like none."""
    around = situation(inputs[0])
    if around is None:
        return None
    return (
        order,
        around,
        tuple([x.shape[-1] for x in inputs]),
        kind_of(layers),
    )


def kind_of(layers: Sequence[Layer]) -> tuple[Any, ...]:
    """Of each layer the weight's shape, which vectors are there, and the options."""
    return tuple([(p[0].shape, *[x is None for x in p[1:4]], *p[4:]) for p in layers])


def find(inputs: Sequence[Tensor], layers: Sequence[Layer], order: Order) -> Known | None:
    """What is known of calls like this one; None where it is the first of its kind."""
    try:
        key = _key(inputs, layers, order)
        return _LONG if key is None else _KNOWN.get(key)
    except (AttributeError, IndexError, TypeError):  # no tensors, no layers, or odd options
        return _LONG


def remember(
    operator: Operator,
    choice: Choice,
    inputs: Sequence[Tensor],
    layers: Sequence[Layer],
    order: Order,
) -> Known:
    """Keep what this call and those like it need, where these are of fp32 on native kernels."""
    kernels = select.kernels(operator.family, choice.backend.name, choice.precision.name)
    rows = prod(inputs[0].shape[:-1])
    first = layers[0].weight
    if choice.is_reference or kernels.row_program is None or first.dtype != torch.float32:
        return _LONG
    if rows == 0 or (first.dim() == 3 and first.shape[0] == 1) or any(p.drops for p in layers):
        return _LONG
    key = _key(inputs, layers, order)
    if key is None:
        return _LONG
    widths = centred(choice, layers)[1] if order == "norm_act" else None
    specs = specs_of(layers, order, widths)
    known = _LONG  # which is worth keeping, too
    ready: Ready | ReadyLayers | None = None
    if row_program.runs(kernels, [p.weight for p in layers], specs, rows):
        sizes = [x.shape[-1] for x in inputs]
        ready = Ready(kernels, sizes, specs, split_params(specs, flat(layers)))
    elif choice.precision.compute is None and not any(spec.width for spec in specs):
        ready = ReadyLayers(kernels, encode_layers(specs), flat(layers))
    if ready is not None:
        where = choice.backend.name, choice.precision.name
        known = Known(ready, operator, encode_layers(specs), where)
    if len(_KNOWN) >= _LIMIT:
        _KNOWN.clear()
    _KNOWN[key] = known
    return known


def mlp(known: Known, inputs: Sequence[Tensor], layers: Sequence[Layer]) -> Tensor | None:
    """See :func:`pwm_fast.ops.mlp`, of a known kind; None where the call has to go the long way."""
    if known.ready is None:
        return None
    return run(known, inputs, [x for p in layers for x in p[:4] if x is not None])


def run(known: Known, inputs: Sequence[Tensor], params: Sequence[Tensor]) -> Tensor | None:
    """The same of the layers' tensors, in their order, without those that are None."""
    ready, tensors = known.ready, (*inputs, *params)
    if ready is None or not _PLAIN.issuperset(map(type, tensors)) or any(map(_is_neg, tensors)):
        return None
    shape = inputs[0].shape
    leading, members = shape[:-1], ready.members
    rows = shape[0] if len(shape) == 2 else prod(leading)
    if rows == 0 or (len(inputs) > 1 and any(x.shape[:-1] != leading for x in inputs[1:])):
        return None
    xs = [x if x.dim() == 2 and x.stride(1) == 1 else as_rows(x) for x in inputs]
    try:
        if torch.is_grad_enabled() and any([x.requires_grad for x in tensors]):
            y = _apply(known, len(xs), rows, *xs, *params)
        else:
            y = ready.forward(xs, [*params], rows, False, False)[0]
    # What does not fit; what has no memory, as tensors of old transforms; and tensors of inference
    # mode, which autograd refuses to keep.
    except (ValueError, RuntimeError):
        return None
    if members:
        return y.view(members, *leading, y.shape[-1])
    return y if len(shape) == 2 else y.view(*leading, y.shape[-1])


class pwm_fast_mlp(torch.autograd.Function):
    """The operator's gradient, without the operator."""

    @staticmethod
    def forward(ctx: Any, known: Known, inputs: int, rows: int, *tensors: Tensor) -> Tensor:
        """``[R, N]`` of inputs ``[R, K_i]`` and parameters."""
        ctx.known, ctx.inputs = known, inputs
        ctx.wgrad = wgrad = True in ctx.needs_input_grad[3 + inputs :]
        xs, params = [*tensors[:inputs]], [*tensors[inputs:]]
        y, kept = known.ready.forward(xs, params, rows, True, wgrad)  # type: ignore[union-attr]
        ctx.save_for_backward(*tensors, *kept)
        ctx.set_materialize_grads(False)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> Any:
        """Gradients of all arguments."""
        needs = ctx.needs_input_grad
        if dy is None:
            return (None,) * len(needs)
        known, first, wgrad = ctx.known, 3 + ctx.inputs, ctx.wgrad
        tensors, inputs, count = ctx.saved_tensors, ctx.inputs, len(needs) - 3
        xs, params, kept = [*tensors[:inputs]], [*tensors[inputs:count]], [*tensors[count:]]
        towards = needs[3:first]
        # Where the gradient is itself to be differentiated, the operator refuses.
        seen = torch.is_grad_enabled() or watched() or forward_ad._current_level >= 0
        if seen or not in_memory(dy):
            check_alone(known.operator.name, dy)
            run = registered(f"{known.operator.name}_backward")
            saved = known.ready.saved(kept, xs[0].shape[0], wgrad)
            given = (saved, list(towards), known.spec, wgrad, *known.where)
            found = run(dy, xs, params, [], *given)
            found = [[None if tuple(g.shape) == (0,) else g for g in each] for each in found]
        else:
            found = known.ready.backward(dy, xs, params, kept, towards, wgrad)
        # Autograd drops those that nobody asked for.
        return (None, None, None, *found[0], *found[1])


# What Function.apply ends in: without looking for default arguments and ended transforms.
_apply: Any = super(torch.autograd.Function, pwm_fast_mlp).apply
