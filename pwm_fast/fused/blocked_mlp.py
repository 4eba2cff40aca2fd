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
from pwm_fast.fused.saved import saved_buffers, slots_of

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


def _declared(
    b: Builder, specs: Specs, shape: _Shape, save: bool, wgrad: bool, together: bool
) -> tuple[list[Operand], list[int], Stack]:
    """Declare inputs, parameters and what is kept: inputs, the first weight's pieces, layers."""
    inputs = [Operand(b.rows(f"inputs[{i}]", k)) for i, k in enumerate(shape.inputs)]
    pieces = _pieces(b, "weight", shape)
    sizes = shape.widths, _layers(b, "layer", specs, shape), shape.planes
    stack = Stack(b, specs, *sizes, save=save, wgrad=wgrad, together=together)
    return inputs, pieces, stack


@lru_cache(maxsize=PROGRAMS)
def _mlp_forward(
    make: Any, specs: Specs, shape: _Shape, save: bool, wgrad: bool, together: bool = False
) -> Any:
    b = Builder(make)
    inputs, pieces, stack = _declared(b, specs, shape, save, wgrad, together)
    y = b.rows("y", shape.widths[-1], shape.planes)
    for member in range(shape.planes):
        out = Operand(y, member)
        h = stack.first(member, out)
        start = at_member(stack.layers[0], member).bias if specs[0].plain else None
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
    first, *rest = layer_tensors(params)
    _mlp_forward(kernels.row_program, specs, shape, save, wgrad).run(
        [*(indexed(x) for x in inputs), *[first] * len(inputs), *rest, *saved, y],
        rows,
        torch.get_num_threads(),
    )
    return y, saved


@lru_cache(maxsize=PROGRAMS)
def _mlp_backward(
    make: Any,
    specs: Specs,
    shape: _Shape,
    wgrad: bool,
    needs: tuple[bool, ...],
    together: bool = False,
) -> Any:
    b = Builder(make)
    dy = b.rows("dy", shape.widths[-1], shape.planes)
    inputs, pieces, stack = _declared(b, specs, shape, True, wgrad, together)
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
    contiguous = torch.contiguous_format
    grads: list[Tensor | None] = [
        torch.empty_like(x, memory_format=contiguous) if wgrad else None
        for p in params
        for x in p
        if x is not None
    ]
    first, *rest = layer_tensors(params)
    _mlp_backward(kernels.row_program, specs, shape, wgrad, tuple(needs)).run(
        [
            dy.contiguous(),
            *(indexed(x) for x in inputs),
            *[first] * len(inputs),
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


class Ready:
    """An MLP whose sizes and specification are known: calls look up nothing.

    Args:
        kernels: that run it.
        inputs: widths of the inputs.
        specs: what each layer does.
        params: tensors of these sizes.
    """

    def __init__(
        self,
        kernels: Kernels,
        inputs: Sequence[int],
        specs: Specs,
        params: Sequence[LayerParams],
    ) -> None:
        first = params[0].weight
        widths = tuple(p.weight.shape[-2] for p in params)
        self.shape = _Shape(tuple(inputs), widths, first.shape[0] if first.dim() == 3 else 0)
        self.members = self.shape.members
        self.specs = specs
        self._make = kernels.row_program
        # Looked up sooner than by all that tells programs apart.
        self._programs: dict[Any, Any] = {}
        self._repeats = len(inputs) - 1
        # Widths of what is kept, by whether parameters get gradients.
        self._kept = {
            wgrad: [
                n if what in ("hat", "y") else 1
                for n, slots in zip(widths, slots_of(specs, True, wgrad), strict=True)
                for what in slots
            ]
            for wgrad in (False, True)
        }
        self._per_row = {wgrad: sum(kept) for wgrad, kept in self._kept.items()}

    def forward(
        self, inputs: list[Tensor], params: list[Tensor], rows: int, save: bool, wgrad: bool
    ) -> tuple[Tensor, list[Tensor]]:
        """As :func:`mlp_forward`, of rows ``[rows, K_i]``; all that is kept is one tensor.

        Raises:
            ValueError: a tensor is not as the sizes say, on the CPU, and of float32; nothing was
                written.
        """
        count, like = rows * self.shape.planes, inputs[0].new_empty
        y = like((count, self.shape.widths[-1]))
        program = self._programs.get((save, wgrad))
        if program is None:
            program = _mlp_forward(self._make, self.specs, self.shape, save, wgrad, True)
            self._programs[save, wgrad] = program
        tensors = [*inputs, *(params[:1] * self._repeats), *params, y]
        kept: list[Tensor] = []
        if save and self._per_row[wgrad]:
            kept = [like(count * self._per_row[wgrad])]
            tensors += kept
        program.run(tensors, rows, torch.get_num_threads())
        return y, kept

    def saved(self, kept: list[Tensor], rows: int, wgrad: bool) -> list[Tensor]:
        """What was kept, as :func:`mlp_forward` returns it."""
        count, found, start = rows * self.shape.planes, [], 0
        for n, rounded in zip(self._kept[wgrad], self._vectors(wgrad), strict=True):
            part = kept[0][start : start + count * n]
            found.append(part.view(1, count) if rounded else part.view(1, count, n))
            start += count * n
        return found

    def _vectors(self, wgrad: bool) -> list[bool]:
        """Which of what is kept is one number a row."""
        slots = slots_of(self.specs, True, wgrad)
        return [what not in ("hat", "y") for each in slots for what in each]

    def backward(
        self,
        dy: Tensor,
        inputs: list[Tensor],
        params: list[Tensor],
        kept: list[Tensor],
        needs: tuple[bool, ...],
        wgrad: bool,
    ) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """As :func:`mlp_backward`."""
        # Rows of what a program takes follow one another with stride 1, so these are dense.
        wanted = [torch.empty_like(x) for x, need in zip(inputs, needs, strict=True) if need]
        grads = [torch.empty_like(p) for p in params] if wgrad else []
        first, own = params[:1] * self._repeats, grads[:1] * self._repeats
        program = self._programs.get((needs, wgrad))
        if program is None:
            program = _mlp_backward(self._make, self.specs, self.shape, wgrad, needs, True)
            self._programs[needs, wgrad] = program
        tensors = [dy.contiguous(), *inputs, *first, *params, *wanted, *own, *grads, *kept]
        program.run(tensors, inputs[0].shape[0], torch.get_num_threads())
        each = iter(wanted)
        dinputs = [next(each) if need else None for need in needs]
        return dinputs, list(grads) or [None] * len(params)
