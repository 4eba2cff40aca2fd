"""Programs of steps that are done for one block of rows after another, and MLPs as such steps.

What lies between the steps of a block stays in a core's caches, weights are packed at most once a
call, and gradients of parameters are summed as the blocks go by. A program depends on sizes and
specification alone: it is made once, and run on the tensors of each call
(``csrc/cpu/row_program.h``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pwm_fast.backends.base import Kernels
from pwm_fast.backends.specs import LayerSpec
from pwm_fast.fused.gemm import native_widths
from pwm_fast.fused.saved import slots_of

_ROWS, _SHARED, _WEIGHT, _SCRATCH = range(4)
_ACTS = ("none", "mish", "simnorm")


class Operand(NamedTuple):
    """What a step refers to.

    Attributes:
        slot: number of a tensor or of scratch memory.
        plane: which part of it, along its first axis.
    """

    slot: int
    plane: int = 0


_ABSENT = Operand(-1)


class Builder:
    """Collects the slots and steps of a program.

    Tensors of a call are given in the order in which :meth:`rows`, :meth:`shared` and
    :meth:`weight` declared them.

    Args:
        make: makes the program, :attr:`Kernels.row_program`.
    """

    def __init__(self, make: Any) -> None:
        self._make = make
        self._slots: list[tuple[str, int, int, int, int, int, int, bool]] = []
        self._packs: dict[tuple[Operand, bool], int] = {}
        self._totals: dict[Operand, int] = {}
        self._steps: list[tuple[int, tuple[Operand, ...], tuple[int, ...], tuple[float, ...]]] = []
        self._scratch: dict[tuple[str, int], Operand] = {}

    # --- slots ----------------------------------------------------------------------------------

    def rows(self, name: str, cols: int, planes: int = 1, *, kept: bool = False) -> int:
        """A tensor ``[planes, R, cols]``; a block of its R rows is worked on.

        Those that are ``kept`` lie side by side in one tensor, which is given last.
        """
        return self._slot(name, _ROWS, planes, 1, cols, kept=kept)

    def shared(self, name: str, cols: int, planes: int = 1) -> int:
        """A tensor ``[planes, cols]`` that all rows have in common."""
        return self._slot(name, _SHARED, planes, 1, cols)

    def weight(
        self, name: str, n: int, k: int, planes: int = 1, *, begin: int = 0, whole: int = 0
    ) -> int:
        """A tensor ``[planes, n, k]``, or k columns from ``begin`` of one of ``whole`` columns."""
        return self._slot(name, _WEIGHT, planes, n, k, begin, whole)

    def scratch(self, name: str, cols: int) -> Operand:
        """Memory for a block's rows; the same for the same name and width."""
        found = self._scratch.get((name, cols))
        if found is None:
            found = Operand(self._slot(name, _SCRATCH, 1, 1, cols))
            self._scratch[name, cols] = found
        return found

    def _slot(
        self,
        name: str,
        kind: int,
        planes: int,
        n: int,
        cols: int,
        begin: int = 0,
        whole: int = 0,
        kept: bool = False,
    ) -> int:
        self._slots.append((name, kind, planes, n, cols, begin, whole or cols, kept))
        return len(self._slots) - 1

    def width(self, operand: Operand) -> int:
        """How many numbers a row of it has."""
        return self._slots[operand.slot][4]

    # --- steps ----------------------------------------------------------------------------------

    def _step(
        self,
        name: str,
        operands: Sequence[Operand | None],
        numbers: tuple[int, ...] = (),
        factors: tuple[float, ...] = (),
    ) -> None:
        present = tuple(_ABSENT if o is None else o for o in operands)
        self._steps.append((self._make.STEPS[name], present, numbers, factors))

    def _pack(self, weight: Operand, by_cols: bool) -> int:
        return self._packs.setdefault((weight, by_cols), len(self._packs))

    def _total(self, out: Operand | None) -> int:
        return -1 if out is None else self._totals.setdefault(out, len(self._totals))

    def gemm(
        self, out: Operand, x: Operand, weight: Operand, start: Operand | None = None
    ) -> Operand:
        """``out = start + x weight^T``; the result is ``out``."""
        self._step("gemm", (out, x, start), (self._pack(weight, False),))
        return out

    def dgrad(
        self, out: Operand, dy: Operand, weight: Operand, start: Operand | None = None
    ) -> Operand:
        """``out = start + dy weight``; the result is ``out``."""
        self._step("gemm", (out, dy, start), (self._pack(weight, True),))
        return out

    def weight_grad(self, into: Operand, dy: Operand, x: Operand) -> None:
        """``into = dy^T x`` over all rows, and over all such steps."""
        self._step("weight_grad", (dy, x), (self._total(into),))

    def column_sum(
        self, into: Operand, x: Operand, factor: float = 1.0, times: Operand | None = None
    ) -> None:
        """``into = factor x`` (element by element times ``times``), summed likewise."""
        self._step("column_sum", (x, times), (self._total(into),), (factor,))

    def combine(
        self,
        out: Operand,
        z: Operand | None,
        k1: Operand | None = None,
        c1: float = 0.0,
        k2: Operand | None = None,
        c2: float = 0.0,
    ) -> Operand:
        """``out = z + c1 k1 + c2 k2``; the result is ``out``, which may be one of them."""
        self._step("combine", (out, z, k1, k2), (), (c1, c2))
        return out

    def policy(self, action: Operand, mu: Operand, noise: Operand, std: Operand) -> None:
        """``action = tanh(mu + noise std)``."""
        self._step("policy", (action, mu, noise, std))

    def policy_backward(self, dmu: Operand, daction: Operand, action: Operand) -> Operand:
        """``dmu = daction (1 - action^2)``; the result is ``dmu``."""
        self._step("policy_bwd", (dmu, daction, action))
        return dmu

    def norm_act(
        self,
        spec: LayerSpec,
        x: Operand,
        y: Operand,
        layer: LayerSlots,
        kept: dict[str, Operand],
        add: Operand | None = None,
        tau: float = 0.0,
        w_tau: Operand | None = None,
    ) -> None:
        """A layer after its GEMM, as :meth:`Kernels.norm_act_fwd` or ``act_norm_fwd``."""
        act, hat, rstd = _ACTS.index(spec.act), kept.get("hat"), kept.get("rstd")
        bias = layer.bias if add is None else None
        if spec.norm and spec.order == "norm_act":
            self._step(
                "norm_act_fwd",
                (x, y, hat, rstd, layer.gamma, layer.beta, bias, add, w_tau),
                (act, spec.group),
                (spec.eps, tau),
            )
            return
        assert add is None and w_tau is None
        operands = (x, y, hat, kept.get("mean"), rstd, layer.gamma, layer.beta, bias)
        self._step("act_norm_fwd", operands, (act,), (spec.eps,))

    def norm_act_backward(
        self,
        spec: LayerSpec,
        dy: Operand,
        dx: Operand,
        layer: LayerSlots,
        kept: dict[str, Operand],
        grads: LayerSlots | None,
    ) -> None:
        """The same backward; ``grads`` says where the parameters' gradients go."""
        act = _ACTS.index(spec.act)
        totals = (-1, -1, -1)
        if grads is not None:
            totals = tuple(self._total(o) for o in (grads.gamma, grads.beta, grads.bias))  # type: ignore[assignment]
        if spec.norm and spec.order == "norm_act":
            y = kept["y"] if spec.act == "simnorm" else None
            self._step(
                "norm_act_bwd",
                (dy, dx, kept["hat"], kept["rstd"], layer.gamma, layer.beta, y),
                (act, spec.group, *totals),
            )
            return
        operands = (dy, dx, kept["hat"], kept.get("mean"), kept.get("rstd"), layer.gamma)
        self._step("act_norm_bwd", operands, (act, *totals))

    def build(self) -> Any:
        """The program."""
        packs = [(weight, by_cols) for weight, by_cols in self._packs]
        return self._make(self._slots, packs, list(self._totals), self._steps)


class LayerSlots(NamedTuple):
    """A layer's tensors, or their gradients, as operands; None where it has none."""

    weight: Operand | None
    bias: Operand | None
    gamma: Operand | None
    beta: Operand | None


class Widths(NamedTuple):
    """Sizes of a layer: ``[n, k]``."""

    n: int
    k: int


def layer_slots(
    b: Builder,
    name: str,
    spec: LayerSpec,
    size: Widths,
    members: int,
    *,
    weight: bool = True,
    bias: bool = True,
) -> LayerSlots:
    """Declare a layer's tensors in the order of an op's flat list."""
    w = Operand(b.weight(f"{name} weight", size.n, size.k, members)) if weight else None
    vectors = [
        Operand(b.shared(f"{name} {what}", size.n, members)) if there else None
        for what, there in (
            ("bias", spec.bias and bias),
            ("gamma", spec.norm),
            ("beta", spec.norm),
        )
    ]
    return LayerSlots(w, *vectors)


def at_member(layer: LayerSlots, member: int) -> LayerSlots:
    """The part of an ensemble's layer."""
    return LayerSlots(*(None if o is None else Operand(o.slot, member) for o in layer))


class Stack:
    """An MLP's layers in a program: what they keep, forward and backward.

    The first layer's GEMM is the caller's, as that of :class:`pwm_fast.fused.mlp.FusedMLP`, whose
    buffers these are.

    Args:
        b: the program.
        specs: of the layers.
        widths: of the layers' outputs.
        layers: their tensors.
        planes: of what is kept: evaluations, or members.
        save: keep what a backward pass needs.
        wgrad: keep what gradients of the parameters need.
        name: tells scratch memory of several stacks apart.
        together: all that is kept lies in one tensor.
    """

    def __init__(
        self,
        b: Builder,
        specs: Sequence[LayerSpec],
        widths: Sequence[int],
        layers: Sequence[LayerSlots],
        planes: int,
        *,
        save: bool,
        wgrad: bool,
        name: str = "h",
        together: bool = False,
    ) -> None:
        self.b, self.specs, self.widths, self.layers = b, specs, widths, layers
        self._name = name
        self._kept: list[dict[str, int]] = []
        for spec, n, slots in zip(specs, widths, slots_of(specs, save, wgrad), strict=True):
            assert not spec.width
            self._kept.append(
                {
                    what: b.rows(
                        f"saved {what}", n if what in ("hat", "y") else 1, planes, kept=together
                    )
                    for what in slots
                }
            )

    def kept(self, i: int, plane: int) -> dict[str, Operand]:
        """What evaluation ``plane`` keeps of layer ``i``."""
        return {what: Operand(slot, plane) for what, slot in self._kept[i].items()}

    def hidden(self, i: int = 0) -> Operand:
        """Scratch memory for layer ``i``'s pre-activation."""
        return self.b.scratch(f"{self._name}{i}", self.widths[i])

    def first(self, plane: int, out: Operand | None = None) -> Operand:
        """Where the first GEMM, with its bias if that layer is plain, is to write."""
        if not self.specs[0].plain:
            return self.hidden()
        target = out if len(self.specs) == 1 else None
        return target or self.kept(0, plane).get("y") or self.hidden()

    def forward(
        self,
        plane: int,
        h: Operand,
        out: Operand | None = None,
        *,
        member: int = 0,
        add: Operand | None = None,
        tau: float = 0.0,
        w_tau: Operand | None = None,
    ) -> Operand:
        """From the first pre-activation ``h`` (with its bias if that layer is plain) to the output.

        The output lies in ``out``, or where it is kept, or in scratch memory.
        """
        b, last = self.b, len(self.specs) - 1
        for i, spec in enumerate(self.specs):
            layer, kept = at_member(self.layers[i], member), self.kept(i, plane)
            target = out if i == last else None
            if target is None:
                target = kept.get("y") or self.hidden(i)
            if i:
                assert layer.weight is not None
                start = layer.bias if spec.plain else None
                h = b.gemm(target if spec.plain else self.hidden(i), h, layer.weight, start)
            if not spec.plain:
                first = {} if i else {"add": add, "tau": tau, "w_tau": w_tau}
                b.norm_act(spec, h, target, layer, kept, **first)  # type: ignore[arg-type]
                if "y" in kept and target != kept["y"]:
                    b.combine(kept["y"], target)
                h = target
        return h

    def backward(
        self,
        plane: int,
        dy: Operand,
        grads: Sequence[LayerSlots] | None,
        *,
        member: int = 0,
    ) -> Operand:
        """Gradient towards the first pre-activation; the first weight's is the caller's."""
        b = self.b
        for i in range(len(self.specs) - 1, -1, -1):
            spec, layer = self.specs[i], at_member(self.layers[i], member)
            own = None if grads is None else at_member(grads[i], member)
            if spec.plain:
                if own is not None and own.bias is not None:
                    b.column_sum(own.bias, dy)
            else:
                dx = self.hidden(i)
                b.norm_act_backward(spec, dy, dx, layer, self.kept(i, plane), own)
                dy = dx
            if i:
                assert layer.weight is not None
                if own is not None:
                    assert own.weight is not None
                    b.weight_grad(own.weight, dy, self.kept(i - 1, plane)["y"])
                dy = b.dgrad(b.scratch(f"d{self._name}{i}", self.widths[i - 1]), dy, layer.weight)
        return dy


#: Up to how many rows layers run block by block that are wider than :func:`native_widths`: of any
#: width, and of at most :data:`WIDE` features.
FEW, FEW_WIDE, WIDE = 16, 48, 1024
#: Numbers in the weights of an ensemble whose members may take turns in every block of rows.
MEMBERS = 2**20


def why_not(kernels: Kernels, specs: Sequence[LayerSpec], widest: int, rows: int) -> str | None:
    """Why layers no wider than ``widest`` do not run block by block; None if they do."""
    if kernels.row_program is None:
        return f"backend {kernels.name} has no such kernel"
    if kernels.precision.compute is not None:
        return f"its GEMMs are exact, precision is {kernels.precision.name}"
    limit = native_widths()
    if widest > limit and (rows > (FEW_WIDE if widest <= WIDE else FEW) or not limit):
        return f"{widest} features are more than {limit:g}, up to which it is faster"
    if any(spec.width for spec in specs):
        return "weights are centred"
    if any(spec.drop for spec in specs):
        return "a layer has a dropout mask"
    return None


def runs(
    kernels: Kernels, weights: Sequence[Tensor], specs: Sequence[LayerSpec], rows: int
) -> bool:
    """Whether layers of these weights run block by block on ``rows`` rows."""
    if kernels.row_program is None or weights[0].dtype != torch.float32:
        return False
    widest = max([max(w.shape[-2:]) for w in weights])
    if why_not(kernels, specs, widest, rows) is not None:
        return False
    # With their packs and sums of gradients large ensembles leave every cache.
    members = weights[0].dim() == 3 and rows > FEW and native_widths() < math.inf
    if members and sum(w.numel() for w in weights) > MEMBERS:
        return False
    return all(w.numel() for w in weights)


def indexed(x: Tensor) -> Tensor:
    """``x`` with rows equally far apart and a last stride of 1, as a program reads it."""
    if x.stride(-1) != 1 and x.shape[-1] != 1:
        return x.contiguous()
    if x.dim() == 3 and x.shape[0] > 1 and x.stride(0) != x.shape[1] * x.stride(1):
        return x.contiguous()
    return x
