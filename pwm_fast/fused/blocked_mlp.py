"""MLPs as programs that run block of rows by block.

They keep what :class:`pwm_fast.fused.mlp.FusedMLP` keeps, and compute the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pwm_fast.backends.base import Kernels
from pwm_fast.backends.specs import LayerParams, LayerSpec
from pwm_fast.fused.row_program import (
    Builder,
    LayerSlots,
    Operand,
    Stack,
    Widths,
    at_member,
    indexed,
    layer_slots,
)
from pwm_fast.fused.saved import saved_buffers

PROGRAMS = 128  # kept: by specification and sizes, but for the batch

Specs = tuple[LayerSpec, ...]


class _Shape(NamedTuple):
    """Sizes of an MLP: widths of its inputs, of its layers, and the members of an ensemble or 0."""

    inputs: tuple[int, ...]
    widths: tuple[int, ...]
    members: int

    @property
    def planes(self) -> int:
        return max(self.members, 1)

    def layer(self, i: int) -> Widths:
        return Widths(self.widths[i], self.widths[i - 1] if i else sum(self.inputs))


def _shape(params: Sequence[LayerParams], inputs: Sequence[Tensor]) -> _Shape:
    first = params[0].weight
    return _Shape(
        tuple(x.shape[-1] for x in inputs),
        tuple(p.weight.shape[-2] for p in params),
        first.shape[0] if first.dim() == 3 else 0,
    )


def layer_tensors(params: Sequence[LayerParams], *, first: bool = True) -> list[Tensor]:
    """All tensors of layers in their order; ``first=False`` without the first weight and bias."""
    found: list[Tensor] = []
    for i, p in enumerate(params):
        if i or first:
            found.append(indexed(p.weight))
            if p.bias is not None:
                found.append(p.bias)
        if p.gamma is not None and p.beta is not None:
            found += [p.gamma, p.beta]
    return found


def _pieces(b: Builder, name: str, shape: _Shape) -> list[int]:
    """Declare the columns of the first weight that each input meets; each is given the whole."""
    slots, begin, whole = [], 0, sum(shape.inputs)
    for i, k in enumerate(shape.inputs):
        what = f"{name} of inputs[{i}]"
        slots.append(b.weight(what, shape.widths[0], k, shape.planes, begin=begin, whole=whole))
        begin += k
    return slots


def _layers(b: Builder, name: str, specs: Specs, shape: _Shape) -> list[LayerSlots]:
    """Declare layers, the first one without its weight."""
    return [
        layer_slots(b, f"{name} {i}", spec, shape.layer(i), shape.planes, weight=i > 0)
        for i, spec in enumerate(specs)
    ]


def _weights(params: Sequence[LayerParams], shape: _Shape) -> tuple[list[Tensor], list[Tensor]]:
    """The first weight, once for each input, and all other tensors."""
    first, *rest = layer_tensors(params)
    return [first] * len(shape.inputs), rest


@lru_cache(maxsize=PROGRAMS)
def _mlp_forward(make: Any, specs: Specs, shape: _Shape, save: bool, wgrad: bool) -> Any:
    b = Builder(make)
    inputs = [Operand(b.rows(f"inputs[{i}]", k)) for i, k in enumerate(shape.inputs)]
    pieces = _pieces(b, "weight", shape)
    layers = _layers(b, "layer", specs, shape)
    stack = Stack(b, specs, shape.widths, layers, shape.planes, save=save, wgrad=wgrad)
    y = b.rows("y", shape.widths[-1], shape.planes)
    for member in range(shape.planes):
        out = Operand(y, member)
        h = stack.first(member, out)
        start = at_member(layers[0], member).bias if specs[0].plain else None
        for x, piece in zip(inputs, pieces, strict=True):
            start = b.gemm(h, x, Operand(piece, member), start)
        stack.forward(member, h, out, member=member)
    return b.build()


def mlp_forward(
    kernels: Kernels,
    inputs: Sequence[Tensor],
    specs: Specs,
    params: Sequence[LayerParams],
    save: bool,
    wgrad: bool,
) -> tuple[Tensor, list[Tensor]]:
    """See :func:`pwm_fast.fused.mlp.mlp_forward`."""
    shape, rows = _shape(params, inputs), inputs[0].shape[0]
    saved = saved_buffers(kernels, specs, params, 1, rows * shape.planes, save, wgrad)
    y = inputs[0].new_empty(rows * shape.planes, shape.widths[-1])
    first, rest = _weights(params, shape)
    _mlp_forward(kernels.row_program, specs, shape, save, wgrad).run(
        [
            *(indexed(x) for x in inputs),
            *first,
            *rest,
            *saved,
            y,
        ],
        rows,
        torch.get_num_threads(),
    )
    return y, saved


@lru_cache(maxsize=PROGRAMS)
def _mlp_backward(
    make: Any, specs: Specs, shape: _Shape, wgrad: bool, needs: tuple[bool, ...]
) -> Any:
    b = Builder(make)
    dy = b.rows("dy", shape.widths[-1], shape.planes)
    inputs = [Operand(b.rows(f"inputs[{i}]", k)) for i, k in enumerate(shape.inputs)]
    pieces = _pieces(b, "weight", shape)
    layers = _layers(b, "layer", specs, shape)
    stack = Stack(b, specs, shape.widths, layers, shape.planes, save=True, wgrad=wgrad)
    dinputs = [
        Operand(b.rows(f"gradient of inputs[{i}]", k)) if need else None
        for i, (k, need) in enumerate(zip(shape.inputs, needs, strict=True))
    ]
    grads = dpieces = None
    if wgrad:
        dpieces = _pieces(b, "gradient of the weight", shape)
        grads = _layers(b, "gradients of layer", specs, shape)
    for member in range(shape.planes):
        dh = stack.backward(member, Operand(dy, member), grads, member=member)
        for i, dx in enumerate(dinputs):
            if dx is not None:  # of all members, one after another
                b.dgrad(dx, dh, Operand(pieces[i], member), dx if member else None)
            if dpieces is not None:
                b.weight_grad(Operand(dpieces[i], member), dh, inputs[i])
    return b.build()


def mlp_backward(
    kernels: Kernels,
    dy: Tensor,
    inputs: Sequence[Tensor],
    specs: Specs,
    params: Sequence[LayerParams],
    saved: Sequence[Tensor],
    needs: Sequence[bool],
    wgrad: bool,
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """See :func:`pwm_fast.fused.mlp_backward.mlp_backward`."""
    shape = _shape(params, inputs)
    dinputs = [
        torch.empty_like(x, memory_format=torch.contiguous_format) if need else None
        for x, need in zip(inputs, needs, strict=True)
    ]
    grads: list[Tensor | None] = [None for p in params for x in p if x is not None]
    if wgrad:
        tensors = [x for p in params for x in p if x is not None]
        grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors]
    first, rest = _weights(params, shape)
    _mlp_backward(kernels.row_program, specs, shape, wgrad, tuple(needs)).run(
        [
            dy.contiguous(),
            *(indexed(x) for x in inputs),
            *first,
            *rest,
            *saved,
            *(x for x in dinputs if x is not None),
            *(grads[:1] * len(inputs) if wgrad else ()),
            *(grads[1:] if wgrad else ()),
        ],
        inputs[0].shape[0],
        torch.get_num_threads(),
    )
    return dinputs, grads
