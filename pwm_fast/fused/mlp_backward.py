"""The backward pass of an MLP that was evaluated many times."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pwm_fast.backends.base import Kernels
from pwm_fast.backends.fused_gemm import FusedBackward
from pwm_fast.backends.specs import LayerSpec, decode_layers, split_params
from pwm_fast.fused import blocked_mlp, row_program
from pwm_fast.fused.gemm import Gemm
from pwm_fast.fused.mlp import FusedMLP, columns_of, one_evaluation
from pwm_fast.fused.weight_cache import one_call
from pwm_fast.fused.wgrad import (
    grad_to_16bit,
    sum_rows,
    takes_16bit,
    weight_grad,
    weight_grad_16bit,
)


class LayerGrads(NamedTuple):
    """Gradients of one layer's parameters, None where it has no such parameter."""

    weight: Tensor | None
    bias: Tensor | None
    gamma: Tensor | None
    beta: Tensor | None


class MLPBackward:
    """Gradients of the evaluations of a :class:`FusedMLP`, from the last layer to the first.

    :meth:`backward` returns the gradient towards the first layer's pre-activation; its GEMM is the
    caller's. A 16-bit gradient has row scales where the precision says so (fp16).

    Args:
        mlp: whose forward pass filled its buffers.
        keep_first: keep the first layer's gradients of all evaluations, for the caller.
    """

    def __init__(self, mlp: FusedMLP, *, keep_first: bool) -> None:
        self.mlp, self.kernels = mlp, mlp.kernels
        self._scaled = mlp.kernels.precision.scaled
        layers = range(len(mlp.specs))
        self._dh: list[Tensor | None] = [None for _ in layers]
        self._scale: list[Tensor | None] = [None for _ in layers]
        self._largest: dict[int, Tensor] | None = None
        self._sums: list[dict[str, Tensor]] = [{} for _ in layers]
        self._parts: list[Tensor | None] = [None for _ in layers]
        self._fused: dict[int, FusedBackward | None] = {}
        self._make_buffers(keep_first)
        if mlp.wgrad:
            self._make_sums()

    def _make_buffers(self, keep_first: bool) -> None:
        mlp, like = self.mlp, self.mlp.params[0].weight
        scaled = []
        for i in range(len(mlp.specs)):
            if mlp.wgrad or (i == 0 and keep_first):
                rounded = self._rounds(i)
                dtype = mlp.compute_dtype if rounded else mlp.dtype
                shape = (mlp.evals, mlp.rows, mlp.widths[i])
                self._dh[i] = like.new_empty(shape, dtype=dtype)
                if rounded and self._scaled:
                    scaled.append(i)
        self._scales = like.new_empty(len(scaled), mlp.evals, mlp.rows)  # all of them
        for i, scale in zip(scaled, self._scales, strict=True):
            self._scale[i] = scale

    def _rounds(self, i: int) -> bool:
        """Layer ``i``'s gradient is in the compute dtype.

        The first one's and plain layers' are the state's where a CPU emulates 16 bits, as weight
        gradients are fp32 there.
        """
        inner = i > 0 and not self.mlp.specs[i].plain
        return inner or takes_16bit(self.kernels, self.mlp.params[0].weight)

    def _make_sums(self) -> None:
        """Zeros for the gradients of all vectors, in one piece: of a layer gamma, beta and bias."""
        mlp = self.mlp
        sizes = [
            p.weight[..., 0].numel() * (3 if spec.norm else 1)
            for spec, p in zip(mlp.specs, mlp.params, strict=True)
        ]
        self._all_sums = mlp.params[0].weight.new_zeros(sum(sizes), dtype=torch.float64)
        for i, part in enumerate(self._all_sums.split(sizes)):
            self._sums[i] = self._named(i, part)

    def _named(self, i: int, part: Tensor) -> dict[str, Tensor]:
        """Layer ``i``'s vectors, those that it has, in its part of all sums."""
        p = self.mlp.params[i]
        each = part.view(-1, *p.weight.shape[:-1])
        if not self.mlp.specs[i].norm:
            return {} if p.bias is None else {"bias": each[0]}
        named = {"gamma": each[0], "beta": each[1], "bias": each[2]}
        return named if p.bias is not None else {k: named[k] for k in ("gamma", "beta")}

    def _fused_gemm(self, i: int, gemm: Gemm) -> FusedBackward | None:
        """The dgrad of layer ``i`` and the norm below it in one, where the kernels have that.

        ``gemm`` is that layer's, or of one above the MLP, whose ``i`` is the number of layers.
        """
        if i not in self._fused:
            self._fused[i] = None
            gemms, mlp = self.kernels.gemms, self.mlp
            plain = i > 0 and mlp.specs[i - 1].act in ("none", "mish")
            if gemms is not None and plain and mlp.fuses(i - 1):
                shape = mlp.gemm_shape(mlp.widths[i - 1], gemm.weight.shape[-2])
                self._fused[i] = gemms.backward(shape, mlp.specs[i - 1].order)
        return self._fused[i]

    def backward(self, e: int, dy: Tensor) -> tuple[Tensor, Tensor | None]:
        """Gradient towards the first pre-activation of evaluation ``e``, and its row scales.

        ``dy`` has the state's dtype and is overwritten unless the last layer is plain. The result
        is in the compute dtype, without row scales where that is the state's.
        """
        return self._layers(e, dy, None, False)

    def backward_below(
        self,
        e: int,
        gemm: Gemm,
        dq: tuple[Tensor, Tensor | None],
        add: Tensor,
        add_factor: float,
    ) -> tuple[Tensor, Tensor | None]:
        """:meth:`backward` of ``dq W + add_factor add``; ``W`` is of a layer above the MLP.

        Args:
            e: number of the evaluation.
            gemm: that layer's GEMM, the same one in all calls.
            dq: ``[R, N]``, its gradient, and row scales or None.
            add: ``[R, n]``.
            add_factor: what ``add`` is multiplied by.
        """
        specs = self.mlp.specs
        # Kernels of the other order take no addend.
        fused = self._fused_gemm(len(specs), gemm) if specs[-1].order == "norm_act" else None
        if fused is None:
            dm, _ = gemm.scaled_dgrad(dq[0], 0, dq[1], fp32=True)
            self.kernels.axpby(dm, add, None, dm, add_factor, 0.0)
            return self.backward(e, dm)
        dy, scale = self._dgrad_norm_act(fused, gemm, len(specs), e, *dq, add, add_factor)
        return self._layers(e, dy, scale, True)

    def _layers(
        self, e: int, dy: Tensor, scale: Tensor | None, done: bool
    ) -> tuple[Tensor, Tensor | None]:
        """From the last layer's output, or its pre-activation if that is ``done``."""
        mlp = self.mlp
        for i in range(len(mlp.specs) - 1, -1, -1):
            if not done:
                spec = mlp.specs[i]
                run = self._plain if spec.plain and not spec.drop else self._norm_act
                dy, scale = run(i, e, dy, scale)
            fused = self._fused_gemm(i, mlp.gemms[i])
            done = fused is not None
            if fused is not None:
                dy, scale = self._dgrad_norm_act(fused, mlp.gemms[i], i, e, dy, scale)
            elif i:
                fp32 = mlp.specs[i - 1].plain
                dy, scale = mlp.gemms[i].scaled_dgrad(dy, mlp.members, scale, fp32=fp32)
        return dy, scale

    def _plain(
        self, i: int, e: int, dy: Tensor, scale: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Through a layer without norm and activation: ``dy`` is kept, rounded where it is to be.

        It is fp32 and has no row scales.
        """
        if self._rounds(i):
            out, scale = self._output(i, e, None)
            self.kernels.cast(dy, out, scale)
            return out, scale
        kept = self._dh[i]
        if kept is not None and self.mlp.evals == 1:
            self._dh[i] = dy.unsqueeze(0)
        elif kept is not None:
            kept[e].copy_(dy)
        return dy, None

    def _norm_act(
        self, i: int, e: int, dy: Tensor, scale: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        if self.mlp.specs[i].drop:
            return self._dropped(i, e, dy, scale)
        out, out_scale = self._output(i, e, dy)
        self._norm_act_into(i, e, dy, scale, out, out_scale, self._sums[i].get("bias"))
        return out, out_scale

    def _dropped(
        self, i: int, e: int, dy: Tensor, scale: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Through a layer's norm, activation and dropout mask, rounded after the mask."""
        mlp = self.mlp
        mask, spec = mlp.masks[i], mlp.specs[i]
        out, out_scale = self._output(i, e, dy)
        dx = out if out.dtype == mlp.dtype else out.new_empty(out.shape, dtype=mlp.dtype)
        if spec.plain:
            dx.copy_(dy)  # fp32, without row scales
        else:
            self._norm_act_into(i, e, dy, scale, dx, None, None)
        dx.view(mask.shape).mul_(mask)
        if "bias" in self._sums[i] and not spec.plain:  # a plain layer's is summed at the end
            rows = dx.view(mask.shape) if mlp.members else dx
            sum_rows(rows, self._sums[i]["bias"])
        if dx is not out:
            self.kernels.cast(dx, out, out_scale)
        return out, out_scale

    def _norm_act_into(
        self,
        i: int,
        e: int,
        dy: Tensor,
        scale: Tensor | None,
        out: Tensor,
        out_scale: Tensor | None,
        dbias: Tensor | None,
    ) -> None:
        """The gradient of layer ``i``'s norm and activation."""
        spec, p, sums = self.mlp.specs[i], self.mlp.params[i], self._sums[i]
        kept = self.mlp.saved_of(i, e)
        assert kept.hat is not None
        if spec.norm and spec.order == "norm_act" and self.mlp.members:
            for member, rows in enumerate(self.mlp.rows_of_members()):
                self._norm_act_rows(i, e, dy, scale, out, out_scale, dbias, rows, member)
        elif spec.norm and spec.order == "norm_act":
            assert p.gamma is not None and p.beta is not None and kept.rstd is not None
            self.kernels.norm_act_bwd(
                dy,
                out,
                kept.hat,
                kept.rstd,
                gamma=p.gamma,
                beta=p.beta,
                y=self.mlp.output_of(i, e) if spec.act == "simnorm" else None,
                act=spec.act,
                group=spec.group,
                dgamma=sums.get("gamma"),
                dbeta=sums.get("beta"),
                dbias=dbias,
                width=spec.width,
                dy_scale=scale,
                dx_scale=out_scale,
            )
        else:
            self.kernels.act_norm_bwd(
                dy,
                out,
                kept.hat,
                kept.mean,
                kept.rstd,
                gamma=p.gamma,
                act=spec.act,
                rows_per_member=self.mlp.rows_per_member,
                dgamma=sums.get("gamma"),
                dbeta=sums.get("beta"),
                dbias=dbias,
                dy_scale=scale,
                dx_scale=out_scale,
            )

    def _norm_act_rows(
        self,
        i: int,
        e: int,
        dy: Tensor,
        scale: Tensor | None,
        out: Tensor,
        out_scale: Tensor | None,
        dbias: Tensor | None,
        rows: slice,
        member: int,
    ) -> None:
        """The gradient of one member's norm and activation."""
        spec, p, sums = self.mlp.specs[i], self.mlp.params[i], self._sums[i]
        kept, y = self.mlp.saved_of(i, e), self.mlp.output_of(i, e)
        assert p.gamma is not None and p.beta is not None
        assert kept.hat is not None and kept.rstd is not None

        def of(x: Tensor | None, index: int | slice) -> Tensor | None:
            return None if x is None else x[index]

        self.kernels.norm_act_bwd(
            dy[rows],
            out[rows],
            kept.hat[rows],
            kept.rstd[rows],
            gamma=p.gamma[member],
            beta=p.beta[member],
            y=of(y, rows) if spec.act == "simnorm" else None,
            act=spec.act,
            group=spec.group,
            dgamma=of(sums.get("gamma"), member),
            dbeta=of(sums.get("beta"), member),
            dbias=of(dbias, member),
            width=spec.width,
            dy_scale=of(scale, rows),
            dx_scale=of(out_scale, rows),
        )

    def _dgrad_norm_act(
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
        """The gradient of layer ``i - 1`` and its row scales, from those of layer ``i``."""
        spec, p = self.mlp.specs[i - 1], self.mlp.params[i - 1]
        kept = self.mlp.saved_of(i - 1, e)
        assert p.gamma is not None and p.beta is not None
        assert kept.hat is not None and kept.rstd is not None
        dy, scale = gemm.cast(dy, scale, scaled=self._scaled)
        # Its rows are of another width than dy's, and all of dy is read until the end.
        dx, dx_scale = self._output(i - 1, e, None)
        sums = self._block_sums(i - 1, fused.blocks)
        fused(
            dy,
            gemm.cast_weight(),
            dx,
            kept.hat,
            kept.rstd,
            gamma=p.gamma,
            beta=p.beta,
            act=spec.act,
            width=spec.width,
            dy_scale=scale,
            dx_scale=dx_scale,
            sums=None if sums is None else sums[e],
            mean=kept.mean,
            add=add,
            add_factor=add_factor,
        )
        return dx, dx_scale

    def _block_sums(self, i: int, blocks: int) -> Tensor | None:
        """Room for what row blocks of all evaluations add to the gradients of layer ``i``."""
        if self.mlp.wgrad and self._parts[i] is None:
            members = (self.mlp.members,) if self.mlp.members else ()
            shape = (self.mlp.evals, 3, *members, blocks, self.mlp.widths[i])
            like = self.mlp.params[i].weight
            self._parts[i] = like.new_empty(shape, dtype=torch.float32)
        return self._parts[i]

    def _output(self, i: int, e: int, dy: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Where layer ``i`` writes its gradient, and the row scales; over ``dy`` if it can.

        It is in the compute dtype, or in the state's (:meth:`_rounds`).
        """
        kept, scales = self._dh[i], self._scale[i]
        if kept is not None:
            return kept[e], None if scales is None else scales[e]
        mlp, like, rounded = self.mlp, self.mlp.params[i].weight, self._rounds(i)
        dtype = mlp.compute_dtype if rounded else mlp.dtype
        if dy is not None and dy.dtype == dtype:
            out = dy
        else:
            out = like.new_empty((mlp.rows, mlp.widths[i]), dtype=dtype)
        scaled = rounded and self._scaled
        return out, like.new_empty(mlp.rows, dtype=mlp.dtype) if scaled else None

    # --- gradients of the parameters --------------------------------------------------------------

    def first_gradients(self) -> tuple[Tensor, Tensor | None]:
        """Gradients towards every evaluation's first pre-activation, ``[E, R, n]``; row scales."""
        first = self._dh[0]
        assert first is not None
        return first, self._scale[0]

    def param_grads(self, first_input: Tensor | None) -> list[LayerGrads]:
        """Gradients of the parameters over all evaluations, one GEMM a weight.

        Args:
            first_input: ``[E, R, K]`` that the first layer's GEMM took; None leaves that weight's
                gradient to the caller.
        """
        grads = []
        for i, sums in enumerate(self._totals()):
            dh = self._dh[i]
            x = self.mlp.buffer(i - 1, "y") if i else first_input
            assert dh is not None
            weight = None if x is None else self._weight_grad(i, dh, x)
            grads.append(LayerGrads(weight, sums.get("bias"), sums.get("gamma"), sums.get("beta")))
        return grads

    def _totals(self) -> list[dict[str, Tensor]]:
        """Gradients of each layer's gamma, beta and bias, those that it has."""
        dtype = self.mlp.dtype
        sizes = []
        for i, spec in enumerate(self.mlp.specs):
            shape = self.mlp.params[i].weight.shape[:-1]
            sizes.append(shape.numel() * (3 if spec.norm else 1))
            parts, dh = self._parts[i], self._dh[i]
            if parts is not None:  # row blocks of all evaluations, in the order of the kernel
                start = sum(sizes[:-1])
                out = self._all_sums[start : start + sizes[-1]].view(3, *shape)
                torch.sum(parts, (0, -2), dtype=torch.float64, out=out)
            elif spec.plain and self._sums[i]:
                assert dh is not None
                self._bias_grad(i, dh, self._sums[i]["bias"])
        if not self.kernels.cast_at_once:
            # Results of an operator of their own: a compiler takes no two of one storage.
            return [
                {name: x.to(dtype, copy=True) for name, x in sums.items()} for sums in self._sums
            ]
        whole = self._all_sums.to(dtype)
        return [self._named(i, part) for i, part in enumerate(whole.split(sizes))]

    def largest_scale(self, i: int) -> Tensor | None:
        """The largest row scale of layer ``i``, after all evaluations; None without any.

        Those of all layers are found in one launch.
        """
        if self._largest is None:
            scaled = [j for j, scale in enumerate(self._scale) if scale is not None]
            each = self._scales.amax((1, 2)).unbind() if self._scales.numel() else ()
            self._largest = dict(zip(scaled, each, strict=bool(each)))
        return self._largest.get(i)

    def _weight_grad(self, i: int, dh: Tensor, x: Tensor) -> Tensor:
        k, scale, largest = self.kernels, self._scale[i], self.largest_scale(i)
        members = self.mlp.members
        if not members:
            scale = None if scale is None else scale.flatten()
            dh, x = dh.flatten(0, 1), x.flatten(0, 1)
            return weight_grad(k, dh, x, scale, largest, several=self.mlp.evals > 1)
        # An ensemble is evaluated once; its first input may be shared by the members.
        dh = dh.view(members, -1, dh.shape[-1])
        x = x.reshape(-1, dh.shape[1], x.shape[-1]).expand(members, -1, -1)
        scale = None if scale is None else scale.view(members, -1)
        return weight_grad(k, dh, x, scale, largest)

    def _bias_grad(self, i: int, dh: Tensor, out: Tensor) -> None:
        scale = self._scale[i]
        if scale is not None:
            dh = dh * scale.unsqueeze(-1)
        if self.mlp.members:
            sum_rows(dh.view(self.mlp.members, -1, dh.shape[-1]), out)
        else:
            sum_rows(dh.flatten(0, 1), out)


def flatten_grads(
    specs: Sequence[LayerSpec], grads: Sequence[LayerGrads], *, first: bool = True
) -> list[Tensor | None]:
    """Gradients in the order of an op's flat parameter list.

    ``first=False`` leaves out the first layer's weight and bias, which are not in a rollout's list.
    """
    flat: list[Tensor | None] = []
    for i, (spec, grad) in enumerate(zip(specs, grads, strict=True)):
        if i or first:
            flat.append(grad.weight)
            if spec.bias:
                flat.append(grad.bias)
        if spec.norm:
            flat += [grad.gamma, grad.beta]
    return flat


# --- the operator -------------------------------------------------------------------------------


@one_call
def mlp_backward(
    kernels: Kernels,
    dy: Tensor,
    inputs: list[Tensor],
    params: list[Tensor],
    masks: list[Tensor],
    saved: list[Tensor],
    needs: list[bool],
    spec: str,
    wgrad: bool,
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Gradients towards the inputs that ``needs`` names, and the parameters' if ``wgrad``."""
    specs = decode_layers(spec)
    layers, rows = split_params(specs, params), inputs[0].shape[0]
    if row_program.runs(kernels, [p.weight for p in layers], specs, rows):
        return blocked_mlp.mlp_backward(kernels, dy, inputs, specs, layers, saved, needs, wgrad)
    mlp = one_evaluation(
        kernels, specs, layers, rows, save=True, wgrad=wgrad, saved=saved, masks=masks
    )
    backward = MLPBackward(mlp, keep_first=False)
    # A layer with a norm or a mask writes its gradient over what comes in.
    kept = specs[-1].plain and not specs[-1].drop
    dy = dy.contiguous() if kept else dy.clone(memory_format=torch.contiguous_format)
    dh, scale = backward.backward(0, dy)
    if takes_16bit(kernels, dh):
        dh, scale = grad_to_16bit(kernels, dh, scale)
    dinputs = _input_grads(mlp, dh, scale, inputs, needs)
    if not wgrad:
        return dinputs, [None] * len(params)
    grads = backward.param_grads(None)
    grads[0] = grads[0]._replace(weight=_first_weight_grad(backward, dh, inputs, scale))
    return dinputs, flatten_grads(specs, grads)


def _input_grads(
    mlp: FusedMLP,
    dh: Tensor,
    scale: Tensor | None,
    inputs: Sequence[Tensor],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients towards the inputs that ``needs`` names, summed over the members."""
    dinputs: list[Tensor | None] = []
    members = mlp.members
    parts = columns_of(mlp.params[0].weight, inputs)
    for part, x, need in zip(parts, inputs, needs, strict=True):
        if not need:
            dinputs.append(None)
            continue
        dx, _ = Gemm(mlp.kernels, part).scaled_dgrad(dh, members, scale, fp32=True)
        dinputs.append(dx.view(members, *x.shape).sum(0) if members else dx)
    return dinputs


def _first_weight_grad(
    backward: MLPBackward, dh: Tensor, inputs: Sequence[Tensor], scale: Tensor | None
) -> Tensor:
    """The gradient of the first weight, from that of its layer and the inputs."""
    kernels, weight, members = backward.kernels, backward.mlp.params[0].weight, backward.mlp.members
    if members:
        dh = dh.view(members, -1, dh.shape[-1])
        scale = None if scale is None else scale.view(members, -1)
        inputs = [x.expand(members, -1, -1) for x in inputs]
    if takes_16bit(kernels, dh):
        return weight_grad_16bit(kernels, dh, inputs, scale, backward.largest_scale(0))
    if len(inputs) == 1:
        return weight_grad(kernels, dh, inputs[0], several=False)
    found = torch.empty_like(weight)
    for columns, x in zip(columns_of(found, inputs), inputs, strict=True):
        columns.copy_(weight_grad(kernels, dh, x, several=False))
    return found
