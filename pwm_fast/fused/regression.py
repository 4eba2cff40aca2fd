"""Regression of an ensemble's values on targets: loss and gradients, without an autograd graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pwm_fast.backends.base import Kernels
from pwm_fast.backends.specs import LayerParams, LayerSpec
from pwm_fast.fused import row_program
from pwm_fast.fused.blocked_mlp import PROGRAMS, Specs
from pwm_fast.fused.row_program import (
    Builder,
    Operand,
    Stack,
    Widths,
    at_member,
    indexed,
    layer_slots,
)
from pwm_fast.fused.saved import slots_of
from pwm_fast.fused.wgrad import THIN


def covers(kernels: Kernels, specs: Sequence[LayerSpec], layers: Sequence[LayerParams]) -> bool:
    """Whether :class:`Regression` takes these layers: on a CPU, in the weights' own dtype."""
    weights = [p.weight for p in layers]
    if weights[0].device.type != "cpu" or kernels.precision.compute is not None:
        return False
    if any(spec.drop for spec in specs):
        return False
    *hidden, last = specs
    head = last.plain and last.bias and weights[-1].shape[-2] == 1
    return (
        bool(hidden)
        and head
        and all(
            spec.order == "act_norm" and spec.norm and spec.bias and spec.act in ("none", "mish")
            for spec in hidden
        )
    )


def regression(
    kernels: Kernels, specs: Specs, layers: Sequence[LayerParams], rows: int
) -> Callable[[Tensor, Tensor], tuple[Tensor, list[Tensor]]]:
    """The faster way for layers that :func:`covers` covers, and ``rows`` rows a call."""
    blocks = row_program.runs(kernels, [p.weight for p in layers], specs, rows)
    return (BlockedRegression if blocks else Regression)(kernels, specs, layers, rows)


class _Hidden(NamedTuple):
    """A layer's parameters and buffers, of a single member without the axis of members."""

    spec: LayerSpec
    weight: Tensor
    vectors: dict[str, Tensor]  # bias, gamma, beta
    y: Tensor  # its GEMM's result, then its output
    u: Tensor
    mean: Tensor
    rstd: Tensor
    dy: Tensor
    dweight: Tensor
    sums: dict[str, Tensor]  # dbias, dgamma, dbeta

    def forward(self, kernels: Kernels, rows_per_member: int) -> None:
        kernels.act_norm_fwd(
            self.y,
            self.y,
            self.u,
            self.mean,
            self.rstd,
            act=self.spec.act,
            eps=self.spec.eps,
            rows_per_member=rows_per_member,
            **self.vectors,
        )

    def backward(self, kernels: Kernels, rows_per_member: int) -> None:
        kernels.act_norm_bwd(
            self.dy,
            self.dy,
            self.u,
            self.mean,
            self.rstd,
            gamma=self.vectors["gamma"],
            act=self.spec.act,
            rows_per_member=rows_per_member,
            **self.sums,
        )


class Regression:
    """The mean squared error of E members' values, and its gradients, in buffers made once.

    It reads the parameters anew in every call, so that a step may be taken between two. Weight
    gradients are one GEMM each, as autograd's are; those of vectors, and of weights with a narrow
    side, are added up in float64.

    Args:
        kernels: elementwise kernels.
        specs: what each layer does (see :func:`covers`).
        layers: the members' parameters, weights ``[E, N, K]`` and vectors ``[E, N]``.
        rows: B, rows of a call.
    """

    def __init__(
        self,
        kernels: Kernels,
        specs: Sequence[LayerSpec],
        layers: Sequence[LayerParams],
        rows: int,
    ) -> None:
        self._kernels = kernels
        first = layers[0].weight
        self._members, self._rows = first.shape[0], rows
        self._single = self._members == 1  # a batched GEMM of one is slower than a plain one
        self._mm = torch.mm if self._single else torch.bmm
        self._rows_per_member = 0 if self._single else rows
        weights = [p.weight.detach() for p in layers]
        vectors = [_vectors(p) for p in layers]
        # Gradients: weights, and all vectors in one piece.
        sizes = [x.numel() for each in vectors for x in each.values()]
        self._sums = first.new_zeros(sum(sizes), dtype=torch.float64)
        self._rounded = first.new_empty(sum(sizes))
        sums, rounded = (iter(x.split(sizes)) for x in (self._sums, self._rounded))
        self._gradients: list[Tensor] = []
        self._hidden: list[_Hidden] = []
        for spec, weight, own in zip(specs, weights, vectors, strict=True):
            dweight = torch.empty_like(weight)
            self._gradients += [dweight, *(next(rounded).view(x.shape) for x in own.values())]
            dvectors = {f"d{name}": next(sums).view(x.shape) for name, x in own.items()}
            if spec.plain:
                self._head, self._bias = self._plain(weight), own["bias"]
                self._dhead, self._dbias = self._plain(dweight), dvectors["dbias"]
                continue
            wide = (self._members * rows, weight.shape[1])
            y, u, dy = (first.new_empty(wide) for _ in range(3))
            mean, rstd = (first.new_empty(wide[0]) for _ in range(2))
            self._hidden.append(
                _Hidden(
                    spec,
                    self._plain(weight),
                    {name: self._plain(x) for name, x in own.items()},
                    *(y, u, mean, rstd, dy),
                    self._plain(dweight),
                    {name: self._plain(x) for name, x in dvectors.items()},
                )
            )
        self._error = first.new_empty(self._members, rows)

    def _plain(self, x: Tensor) -> Tensor:
        """``[E, ...]``, of a single member ``[...]``."""
        return x.squeeze(0) if self._single else x

    def _each(self, x: Tensor) -> Tensor:
        """``[E B, n]`` as GEMMs take it."""
        return x if self._single else x.view(self._members, self._rows, x.shape[-1])

    @torch.no_grad()
    def __call__(self, x: Tensor, targets: Tensor) -> tuple[Tensor, list[Tensor]]:
        """``mean((values - targets)^2)`` over members and rows.

        Args:
            x: ``[B, K]``, what all members take.
            targets: ``[B]``.

        Returns:
            The loss, and the gradients in the order of the layers' tensors. They lie in buffers
            that the next call overwrites.
        """
        x = x if self._single else x.expand(self._members, *x.shape)
        inputs = [x, *(self._each(layer.y) for layer in self._hidden)]
        for layer, h in zip(self._hidden, inputs, strict=False):
            self._mm(h, layer.weight.transpose(-1, -2), out=self._each(layer.y))
            layer.forward(self._kernels, self._rows_per_member)
        values = self._plain(self._error.unsqueeze(-1))
        self._mm(inputs[-1], self._head.transpose(-1, -2), out=values)
        error = self._error.add_(self._bias).sub_(targets)
        loss = error.square().mean()
        error.mul_(2.0 / error.numel())  # from here on the gradient
        self._sums.zero_()
        torch.sum(error, -1, keepdim=True, dtype=torch.float64, out=self._dbias)
        dy, weight, dweight = values, self._head, self._dhead
        for layer, h in zip(reversed(self._hidden), reversed(inputs), strict=False):
            self._weight_grad(dy, h, dweight)
            self._mm(dy, weight, out=self._each(layer.dy))
            layer.backward(self._kernels, self._rows_per_member)
            dy, weight, dweight = self._each(layer.dy), layer.weight, layer.dweight
        self._weight_grad(dy, x, dweight)
        self._rounded.copy_(self._sums)
        return loss, self._gradients

    def _weight_grad(self, dy: Tensor, h: Tensor, out: Tensor) -> None:
        if min(out.shape[-2:]) < THIN:  # see fused.wgrad
            out.copy_(self._mm(dy.double().transpose(-1, -2), h.double()))
        else:
            self._mm(dy.transpose(-1, -2), h, out=out)


def _vectors(p: LayerParams) -> dict[str, Tensor]:
    """A layer's vectors, by what kernels call them, in the order of its tensors."""
    named = {"bias": p.bias, "gamma": p.gamma, "beta": p.beta}
    return {name: x.detach() for name, x in named.items() if x is not None}


@lru_cache(maxsize=PROGRAMS)
def _program(make: Any, specs: Specs, sizes: tuple[Widths, ...], members: int, rows: int) -> Any:
    """Of inputs, targets, parameters, the loss, gradients, and what is kept in between."""
    b = Builder(make)
    x, targets = Operand(b.rows("x", sizes[0].k)), Operand(b.rows("targets", 1))

    def layers(name: str) -> list[row_program.LayerSlots]:
        return [
            layer_slots(b, f"{name} {i}", spec, size, members)
            for i, (spec, size) in enumerate(zip(specs, sizes, strict=True))
        ]

    own = layers("layer")
    loss = Operand(b.shared("loss", 1))
    grads = layers("gradients of layer")
    widths = [size.n for size in sizes]
    stack = Stack(b, specs, widths, own, members, save=True, wgrad=True, together=True)
    value, error = b.scratch("value", 1), b.scratch("error", 1)
    each = 1.0 / (members * rows)
    for member in range(members):
        weight, dweight = (at_member(p[0], member).weight for p in (own, grads))
        assert weight is not None and dweight is not None
        h = b.gemm(stack.first(member, value), x, weight)
        b.combine(error, stack.forward(member, h, value, member=member), targets, -1.0)
        b.column_sum(loss, error, each, error)
        b.combine(error, None, error, 2.0 * each)
        dh = stack.backward(member, error, grads, member=member)
        b.weight_grad(dweight, dh, x)
    return b.build()


class BlockedRegression:
    """:class:`Regression` as a program: one call for values, loss and gradients.

    Args:
        kernels: that have row programs.
        specs: what each layer does (see :func:`covers`).
        layers: the members' parameters, weights ``[E, N, K]`` and vectors ``[E, N]``.
        rows: B, rows of a call.
    """

    def __init__(
        self, kernels: Kernels, specs: Specs, layers: Sequence[LayerParams], rows: int
    ) -> None:
        first = layers[0].weight
        members = first.shape[0]
        sizes = tuple(Widths(*p.weight.shape[-2:]) for p in layers)
        self._run = _program(kernels.row_program, specs, sizes, members, rows).run
        self._rows = rows
        self._params = [x.detach() for p in layers for x in p if x is not None]
        self._gradients = [torch.empty_like(x) for x in self._params]
        kept = sum(
            size.n if what in ("hat", "y") else 1
            for size, slots in zip(sizes, slots_of(specs, True, True), strict=True)
            for what in slots
        )
        self._kept = first.new_empty(kept * members * rows)

    @torch.no_grad()
    def __call__(self, x: Tensor, targets: Tensor) -> tuple[Tensor, list[Tensor]]:
        """See :meth:`Regression.__call__`."""
        loss = x.new_empty(())
        given = [indexed(x), targets.contiguous(), *self._params, loss, *self._gradients]
        self._run([*given, self._kept], self._rows, torch.get_num_threads())
        return loss, self._gradients
