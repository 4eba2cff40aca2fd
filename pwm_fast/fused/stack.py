"""A run of layers evaluated many times, with a hand-written backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pwm_fast.backends.base import Kernels
from pwm_fast.backends.fused_gemm import FusedBackward, FusedForward, products_of
from pwm_fast.backends.specs import LayerParams, LayerSpec
from pwm_fast.fused.gemm import Gemm, takes_narrow, weight_grad

_GROUPS = (1, 2, 4, 8, 16, 32, 64)  # of SimNorm, that lie whole in a tile


class LayerGrads(NamedTuple):
    """Gradients of one layer's parameters, None where it has no such parameter."""

    weight: Tensor | None
    bias: Tensor | None
    gamma: Tensor | None
    beta: Tensor | None


class Stack:
    """``layers`` on R rows at a time, E evaluations whose intermediate results are kept.

    The first layer's product is the caller's: :meth:`forward` takes its pre-activation (without
    bias), :meth:`backward` returns the gradient towards it. So inputs need no concatenation and
    terms that repeat can be hoisted.

    Args:
        kernels: element kernels.
        specs: what each layer does.
        params: the layers' tensors.
        evals: E.
        rows: R, rows of an evaluation (of all members together).
        save: keep what a backward pass needs.
        wgrad: keep what gradients of the parameters need; implies ``save``.
        saved: buffers of an earlier forward pass, to go backward on.
    """

    def __init__(
        self,
        kernels: Kernels,
        specs: Sequence[LayerSpec],
        params: Sequence[LayerParams],
        evals: int,
        rows: int,
        *,
        save: bool,
        wgrad: bool,
        saved: Sequence[Tensor] | None = None,
    ) -> None:
        self.kernels, self.specs, self.params = kernels, specs, params
        self._state = params[0].weight.dtype
        self._operand = kernels.precision.dtype(self._state)
        self.evals, self.rows = evals, rows
        self.save, self.wgrad = save, wgrad
        self.members = params[0].weight.shape[0] if params[0].weight.dim() == 3 else 0
        self.rows_per_member = rows // self.members if self.members else 0
        self.gemms = [Gemm(kernels, p.weight, rows) for p in params]
        self.widths = [p.weight.shape[-2] for p in params]
        if saved is None:
            saved = [
                params[0].weight.new_empty(shape, dtype=dtype)
                for shape, dtype in saved_buffers(
                    specs, self.widths, evals, rows, save, wgrad, self._operand, self._state
                )
            ]
        self.saved = list(saved)
        self._slots = _slots(specs, save, wgrad)
        self._dh: list[Tensor | None] = [None] * len(specs)
        self._scale: list[Tensor | None] = [None] * len(specs)
        self._scales = params[0].weight.new_empty(0)  # all of them
        self._largest: dict[int, Tensor] | None = None
        self._sums: list[dict[str, Tensor]] = [{} for _ in specs]
        self._parts: list[Tensor | None] = [None] * len(specs)
        self._all_sums = params[0].weight.new_empty(0)
        self._fused_forward: dict[int, FusedForward | None] = {}
        self._fused_backward: dict[int, FusedBackward | None] = {}

    def _forward_of(self, i: int) -> FusedForward | None:
        """What does layer ``i``'s product, norm and activation in one, if anything does."""
        if i not in self._fused_forward:
            self._fused_forward[i] = None
            products, spec, n = products_of(self.kernels), self.specs[i], self.widths[i]
            grouped = spec.act == "simnorm" and (spec.group not in _GROUPS or n % spec.group)
            if products is not None and i and self._fuses(i) and not grouped:
                self._fused_forward[i] = products.forward(
                    self.rows,
                    n,
                    self.widths[i - 1],
                    self._operand,
                    self.params[i].weight.device,
                    order=spec.order,
                    members=self.members,
                )
        return self._fused_forward[i]

    def _backward_of(self, i: int, gemm: Gemm | None = None) -> FusedBackward | None:
        """What goes from layer ``i``'s adjoint through its weight and the norm below it in one.

        ``gemm`` is the product of a layer above the stack, whose ``i`` is the number of layers.
        """
        if i not in self._fused_backward:
            self._fused_backward[i] = None
            products = products_of(self.kernels)
            plain = i > 0 and self.specs[i - 1].act in ("none", "mish")
            if products is not None and plain and self._fuses(i - 1):
                weight = (self.gemms[i] if gemm is None else gemm).weight
                self._fused_backward[i] = products.backward(
                    self.rows,
                    self.widths[i - 1],
                    weight.shape[-2],
                    self._operand,
                    weight.device,
                    order=self.specs[i - 1].order,
                    members=self.members,
                )
        return self._fused_backward[i]

    def _fuses(self, i: int) -> bool:
        spec = self.specs[i]
        if spec.order == "act_norm":
            return spec.norm and spec.act in ("none", "mish")
        return not self.members and spec.norm

    def buffer_of(self, layer: int, name: str, e: int) -> Tensor | None:
        """Evaluation ``e``'s part of :meth:`buffer`."""
        slot = self._slots[layer].get(name)
        return None if slot is None else self.saved[slot][e]

    def buffer(self, layer: int, name: str) -> Tensor | None:
        """What is kept of a layer over all evaluations: ``hat``, ``rstd``, ``mean`` or ``y``."""
        slot = self._slots[layer].get(name)
        return None if slot is None else self.saved[slot]

    def forward(
        self,
        e: int,
        h: Tensor,
        *,
        add: Tensor | None = None,
        tau: Tensor | None = None,
        w_tau: Tensor | None = None,
        own: bool = True,
        head: bool = True,
        out: Tensor | None = None,
    ) -> Tensor:
        """Evaluation ``e``: the stack's output ``[R, N]`` for the first layer's product ``h``.

        Args:
            e: number of the evaluation, from 0.
            h: ``[R, n]``; overwritten if ``own``.
            add: see :meth:`Kernels.norm_act_fwd`; stands in place of the first layer's bias.
            tau: likewise.
            w_tau: likewise.
            own: ``h`` may be overwritten.
            head: without it the last layer, a plain one above others, is left to the caller: the
                result is what its product takes.
            out: ``[R, N]`` for the result of a last layer with a norm; None where it may lie
                anywhere.
        """
        k = self.kernels
        last = len(self.specs) - 1
        for i, (spec, p) in enumerate(zip(self.specs, self.params, strict=True)):
            if i == last and not head:
                break
            fused = self._forward_of(i)
            if fused is not None:
                h = self._run_forward(fused, i, e, h, out if i == last else None)
                continue
            if i:
                h = self.gemms[i](h, self.members, wide=spec.plain)
            bias = p.bias
            if i == 0 and add is not None:
                bias = None
            if spec.plain:
                # Only the first layer can have an addend here, and it is never plain.
                if bias is not None:
                    h = self._add_bias(h, bias)
                kept = self.buffer_of(i, "y", e)
                if kept is not None:
                    h = kept.copy_(h)
                continue
            y = self.buffer_of(i, "y", e)
            if y is None and i == last:
                y = out
            if y is None:
                dtype = self._state if i == last else self._operand
                if (i or own) and h.dtype == dtype:
                    y = h
                else:
                    y = torch.empty(h.shape, dtype=dtype, device=h.device)
            if spec.norm and spec.order == "norm_act":
                assert p.gamma is not None and p.beta is not None
                k.norm_act_fwd(
                    h,
                    y,
                    self.buffer_of(i, "hat", e),
                    self.buffer_of(i, "rstd", e),
                    gamma=p.gamma,
                    beta=p.beta,
                    act=spec.act,
                    group=spec.group,
                    eps=spec.eps,
                    bias=bias,
                    add=add if i == 0 else None,
                    tau=tau if i == 0 else None,
                    w_tau=w_tau if i == 0 else None,
                    width=spec.width,
                )
            else:
                k.act_norm_fwd(
                    h,
                    y,
                    self.buffer_of(i, "hat", e),
                    self.buffer_of(i, "mean", e),
                    self.buffer_of(i, "rstd", e),
                    bias=bias,
                    gamma=p.gamma,
                    beta=p.beta,
                    act=spec.act,
                    eps=spec.eps,
                    rows_per_member=self.rows_per_member,
                )
            h = y
        return h

    def _run_forward(
        self, fused: FusedForward, i: int, e: int, x: Tensor, out: Tensor | None
    ) -> Tensor:
        spec, p = self.specs[i], self.params[i]
        assert p.gamma is not None and p.beta is not None
        y = self.buffer_of(i, "y", e)
        if y is None:
            y = out
        if y is None:
            dtype = self._state if i == len(self.specs) - 1 else self._operand
            y = torch.empty((self.rows, self.widths[i]), dtype=dtype, device=x.device)
        fused(
            self.gemms[i].operand(x, None, scaled=False)[0],
            self.gemms[i].operand_weight(),
            y,
            self.buffer_of(i, "hat", e),
            self.buffer_of(i, "rstd", e),
            gamma=p.gamma,
            beta=p.beta,
            bias=p.bias,
            act=spec.act,
            group=spec.group,
            eps=spec.eps,
            width=spec.width,
            mean=self.buffer_of(i, "mean", e),
        )
        return y

    def _add_bias(self, h: Tensor, bias: Tensor) -> Tensor:
        if self.members:
            h.view(self.members, -1, h.shape[-1]).add_(bias.unsqueeze(1))
            return h
        return h.add_(bias)

    # --- backward -------------------------------------------------------------------------------

    def start_backward(self, keep_first: bool) -> None:
        """Make the buffers of the backward pass.

        Args:
            keep_first: keep the first layer's gradients of all evaluations, for the caller.
        """
        like = self.params[0].weight
        scaled = []
        for i in range(len(self.specs)):
            if self.wgrad or (i == 0 and keep_first):
                narrow = self._keeps_narrow(i)
                self._dh[i] = like.new_empty(
                    (self.evals, self.rows, self.widths[i]),
                    dtype=self._operand if narrow else self._state,
                )
                if narrow and self.kernels.precision.scaled:
                    scaled.append(i)
        self._scales = like.new_empty(len(scaled), self.evals, self.rows)
        for i, scale in zip(scaled, self._scales, strict=True):
            self._scale[i] = scale
        self._largest = None
        if self.wgrad:
            self._make_sums()

    def _keeps_narrow(self, i: int) -> bool:
        """Layer ``i``'s adjoint is what products take.

        The first one's and plain layers' are the state's where a CPU emulates 16 bits, as weight
        gradients are float32 there.
        """
        inner = i > 0 and not self.specs[i].plain
        return inner or takes_narrow(self.kernels, self.params[0].weight)

    def _make_sums(self) -> None:
        """Zeros for the gradients of all vectors, in one piece: of a layer gamma, beta and bias."""
        like = self.params[0].weight
        sizes = [
            p.weight[..., 0].numel() * (3 if spec.norm else 1)
            for spec, p in zip(self.specs, self.params, strict=True)
        ]
        self._all_sums = like.new_zeros(sum(sizes), dtype=torch.float64)
        for i, part in enumerate(self._all_sums.split(sizes)):
            self._sums[i] = self._named(i, part)

    def _named(self, i: int, part: Tensor) -> dict[str, Tensor]:
        """Layer ``i``'s vectors, those that it has, in its part of all sums."""
        p = self.params[i]
        each = part.view(-1, *p.weight.shape[:-1])
        if not self.specs[i].norm:
            return {} if p.bias is None else {"bias": each[0]}
        named = {"gamma": each[0], "beta": each[1], "bias": each[2]}
        return named if p.bias is not None else {k: named[k] for k in ("gamma", "beta")}

    def backward(self, e: int, dy: Tensor) -> tuple[Tensor, Tensor | None]:
        """Gradient towards the first product of evaluation ``e``, and the factors of its rows.

        ``dy`` has the state's dtype and is overwritten unless the last layer is plain. The result
        is what products take, without factors where that is the state's dtype.
        """
        return self._backward(e, dy, None, False)

    def backward_below(
        self,
        e: int,
        gemm: Gemm,
        dq: tuple[Tensor, Tensor | None],
        add: Tensor,
        add_factor: float,
    ) -> tuple[Tensor, Tensor | None]:
        """:meth:`backward` of ``dq W + add_factor add``; ``W`` is of a layer above the stack.

        Args:
            e: number of the evaluation.
            gemm: that layer's product, the same one in all calls.
            dq: ``[R, N]``, its adjoint, and the factors of its rows or None.
            add: ``[R, n]``.
            add_factor: what ``add`` is multiplied by.
        """
        i = len(self.specs)
        # Kernels of the other order take no addend.
        fused = self._backward_of(i, gemm) if self.specs[-1].order == "norm_act" else None
        if fused is None:
            dm, _ = gemm.scaled_dgrad(dq[0], 0, dq[1], wide=True)
            self.kernels.axpby(dm, add, None, dm, add_factor, 0.0)
            return self.backward(e, dm)
        dy, scale = self._run_backward(fused, gemm, i, e, *dq, add, add_factor)
        return self._backward(e, dy, scale, True)

    def _backward(
        self, e: int, dy: Tensor, scale: Tensor | None, done: bool
    ) -> tuple[Tensor, Tensor | None]:
        """From the last layer's output, or its pre-activation if that is ``done``."""
        k = self.kernels
        for i in range(len(self.specs) - 1, -1, -1):
            spec, p, sums = self.specs[i], self.params[i], self._sums[i]
            if done:
                following = scale
            elif spec.plain and self._keeps_narrow(i):
                out, following = self._adjoint(i, e, None)
                k.to_operand(dy, out, following)
                dy = out
            elif spec.plain:
                kept = self._dh[i]
                if kept is not None and self.evals == 1:
                    self._dh[i] = dy.unsqueeze(0)
                elif kept is not None:
                    kept[e].copy_(dy)
                following = None
            else:
                out, following = self._adjoint(i, e, dy)
                hat = self.buffer_of(i, "hat", e)
                rstd = self.buffer_of(i, "rstd", e)
                assert hat is not None
                if spec.norm and spec.order == "norm_act":
                    assert p.gamma is not None and p.beta is not None and rstd is not None
                    k.norm_act_bwd(
                        dy,
                        out,
                        hat,
                        rstd,
                        gamma=p.gamma,
                        beta=p.beta,
                        y=self.buffer_of(i, "y", e) if spec.act == "simnorm" else None,
                        act=spec.act,
                        group=spec.group,
                        dgamma=sums.get("gamma"),
                        dbeta=sums.get("beta"),
                        dbias=sums.get("bias"),
                        width=spec.width,
                        dy_scale=scale,
                        dx_scale=following,
                    )
                else:
                    k.act_norm_bwd(
                        dy,
                        out,
                        hat,
                        self.buffer_of(i, "mean", e),
                        rstd,
                        gamma=p.gamma,
                        act=spec.act,
                        rows_per_member=self.rows_per_member,
                        dgamma=sums.get("gamma"),
                        dbeta=sums.get("beta"),
                        dbias=sums.get("bias"),
                        dy_scale=scale,
                        dx_scale=following,
                    )
                dy = out
            scale = following
            fused = self._backward_of(i)
            done = fused is not None
            if fused is not None:
                dy, scale = self._run_backward(fused, self.gemms[i], i, e, dy, scale)
            elif i:
                below = self.specs[i - 1]
                dy, scale = self.gemms[i].scaled_dgrad(dy, self.members, scale, wide=below.plain)
        return dy, scale

    def _run_backward(
        self,
        fused: FusedBackward,
        gemm: Gemm,
        i: int,
        e: int,
        dy: Tensor,
        scale: Tensor | None,
        add: Tensor | None = None,
        add_factor: float = 1.0,
    ) -> tuple[Tensor, Tensor | None]:
        """The adjoint of layer ``i - 1`` and the factors of its rows, from that of layer ``i``."""
        spec, p = self.specs[i - 1], self.params[i - 1]
        hat, rstd = self.buffer_of(i - 1, "hat", e), self.buffer_of(i - 1, "rstd", e)
        assert p.gamma is not None and p.beta is not None
        assert hat is not None and rstd is not None
        dy, scale = gemm.operand(dy, scale, scaled=self.kernels.precision.scaled)
        # Its rows are of another width than dy's, and all of dy is read until the end.
        dx, dx_scale = self._adjoint(i - 1, e, None)
        sums = self._parts[i - 1]
        if self.wgrad and sums is None:
            members = (self.members,) if self.members else ()
            shape = (self.evals, 3, *members, fused.blocks, hat.shape[-1])
            sums = hat.new_empty(shape, dtype=torch.float32)
            self._parts[i - 1] = sums
        fused(
            dy,
            gemm.operand_weight(),
            dx,
            hat,
            rstd,
            gamma=p.gamma,
            beta=p.beta,
            act=spec.act,
            width=spec.width,
            dy_scale=scale,
            dx_scale=dx_scale,
            sums=None if sums is None else sums[e],
            mean=self.buffer_of(i - 1, "mean", e),
            add=add,
            add_factor=add_factor,
        )
        return dx, dx_scale

    def _adjoint(self, i: int, e: int, dy: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Where layer ``i`` writes its adjoint, and the factors of its rows; over ``dy`` if it can.

        They are operands, or in the state's dtype (:meth:`_keeps_narrow`).
        """
        narrow = self._keeps_narrow(i)
        dtype = self._operand if narrow else self._state
        kept, scales = self._dh[i], self._scale[i]
        if kept is not None:
            return kept[e], None if scales is None else scales[e]
        like = self.params[i].weight
        if dy is not None and dy.dtype == dtype:
            out = dy
        else:
            out = like.new_empty((self.rows, self.widths[i]), dtype=dtype)
        scaled = narrow and self.kernels.precision.scaled
        return out, like.new_empty(self.rows, dtype=self._state) if scaled else None

    def first_gradients(self) -> tuple[Tensor, Tensor | None]:
        """Gradients towards the first product of every evaluation, ``[E, R, n]``, and factors."""
        first = self._dh[0]
        assert first is not None
        return first, self._scale[0]

    def param_grads(self, first_input: Tensor | None) -> list[LayerGrads]:
        """Gradients of the parameters over all evaluations, one product a weight.

        Args:
            first_input: ``[E, R, K]`` that the first layer's product was made of; None leaves that
                weight's gradient to the caller.
        """
        grads = []
        totals = self._totals()
        for i in range(len(self.specs)):
            dh, sums = self._dh[i], totals[i]
            assert dh is not None
            if i:
                x: Tensor | None = self.saved[self._slots[i - 1]["y"]]
            else:
                x = first_input
            weight = None if x is None else self._weight_grad(i, dh, x)
            grads.append(LayerGrads(weight, sums.get("bias"), sums.get("gamma"), sums.get("beta")))
        return grads

    def _totals(self) -> list[dict[str, Tensor]]:
        """Gradients of each layer's gamma, beta and bias, those that it has."""
        dtype = self.params[0].weight.dtype
        sizes = []
        for i, spec in enumerate(self.specs):
            shape = self.params[i].weight.shape[:-1]
            sizes.append(shape.numel() * (3 if spec.norm else 1))
            parts, dh = self._parts[i], self._dh[i]
            if parts is not None:  # row blocks of all evaluations, in the order of the kernel
                start = sum(sizes[:-1])
                out = self._all_sums[start : start + sizes[-1]].view(3, *shape)
                torch.sum(parts, (0, -2), dtype=torch.float64, out=out)
            elif spec.plain and self._sums[i]:
                assert dh is not None
                self._bias_grad(i, dh, self._sums[i]["bias"])
        if self.kernels.name != "triton":
            # Results of an operator of their own: a compiler takes no two of one storage.
            return [
                {name: x.to(dtype, copy=True) for name, x in sums.items()} for sums in self._sums
            ]
        whole = self._all_sums.to(dtype)
        return [self._named(i, part) for i, part in enumerate(whole.split(sizes))]

    def largest_factor(self, i: int) -> Tensor | None:
        """The largest factor of layer ``i``'s adjoints, after all evaluations; None without any.

        Those of all layers are found in one launch.
        """
        if self._largest is None:
            scaled = [j for j, scale in enumerate(self._scale) if scale is not None]
            each = self._scales.amax((1, 2)).unbind() if self._scales.numel() else ()
            self._largest = dict(zip(scaled, each, strict=bool(each)))
        return self._largest.get(i)

    def _weight_grad(self, i: int, dh: Tensor, x: Tensor) -> Tensor:
        k, scale, largest = self.kernels, self._scale[i], self.largest_factor(i)
        if not self.members:
            scale = None if scale is None else scale.flatten()
            return weight_grad(k, dh.flatten(0, 1), x.flatten(0, 1), scale, largest)
        # An ensemble is evaluated once; its first input may be shared by the members.
        dh = dh.view(self.members, -1, dh.shape[-1])
        x = x.reshape(-1, dh.shape[1], x.shape[-1]).expand(self.members, -1, -1)
        scale = None if scale is None else scale.view(self.members, -1)
        return weight_grad(k, dh, x, scale, largest)

    def _bias_grad(self, i: int, dh: Tensor, out: Tensor) -> None:
        scale = self._scale[i]
        if scale is not None:
            dh = dh * scale.unsqueeze(-1)
        if self.members:
            dh = dh.view(self.members, -1, dh.shape[-1])
            torch.sum(dh, 1, dtype=torch.float64, out=out)
        else:
            torch.sum(dh.flatten(0, 1), 0, dtype=torch.float64, out=out)


def _slots(specs: Sequence[LayerSpec], save: bool, wgrad: bool) -> list[dict[str, int]]:
    """Where each layer's buffers lie in ``saved``."""
    slots: list[dict[str, int]] = []
    n = 0
    for i, spec in enumerate(specs):
        names = []
        if save and not spec.plain:
            names.append("hat")  # of act_norm layers: u
            if spec.norm:
                names += ["rstd"] if spec.order == "norm_act" else ["mean", "rstd"]
        inner = i < len(specs) - 1
        if save and ((wgrad and inner) or spec.act == "simnorm"):
            names.append("y")
        slots.append({name: n + j for j, name in enumerate(names)})
        n += len(names)
    return slots


def saved_buffers(
    specs: Sequence[LayerSpec],
    widths: Sequence[int],
    evals: int,
    rows: int,
    save: bool,
    wgrad: bool,
    operand: torch.dtype,
    state: torch.dtype,
) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and dtypes of the buffers that :class:`Stack` keeps, in order.

    What a product takes or the backward pass normalises by is kept in the operands' dtype; the
    statistics, and the last layer's output, in the state's.
    """
    buffers: list[tuple[tuple[int, ...], torch.dtype]] = []
    for i, (slots, width) in enumerate(zip(_slots(specs, save, wgrad), widths, strict=True)):
        for name in slots:
            wide = name in ("hat", "y")
            narrow = name == "hat" or (name == "y" and i < len(specs) - 1)
            shape = (evals, rows, width) if wide else (evals, rows)
            buffers.append((shape, operand if narrow else state))
    return buffers
