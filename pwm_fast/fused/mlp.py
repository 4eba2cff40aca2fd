"""An MLP evaluated many times: the forward pass, and the buffers that a backward pass needs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pwm_fast.backends.base import Kernels
from pwm_fast.backends.fused_gemm import FusedForward, GemmCall
from pwm_fast.backends.specs import LayerParams, LayerSpec, decode_layers, split_params
from pwm_fast.fused import blocked_mlp, row_program
from pwm_fast.fused.gemm import Gemm, cast_together
from pwm_fast.fused.saved import saved_buffers, slots_of
from pwm_fast.fused.weight_cache import one_call
from pwm_fast.fused.wgrad import side_by_side, takes_16bit

_GROUPS = (1, 2, 4, 8, 16, 32, 64)  # of SimNorm, that lie whole in a tile


class Saved(NamedTuple):
    """What one evaluation of a layer keeps beside its output, None for what it does not.

    Attributes:
        hat: ``[R, n]``, the normalised pre-activation; of ``"act_norm"`` layers the pre-activation.
        mean: ``[R]``, of ``"act_norm"`` layers.
        rstd: ``[R]``.
    """

    hat: Tensor | None
    mean: Tensor | None
    rstd: Tensor | None


_NOTHING = Saved(None, None, None)


class FusedMLP:
    """``layers`` on R rows at a time, E evaluations whose intermediate results are kept.

    The first layer's GEMM is the caller's: :meth:`forward` takes its pre-activation (without
    bias). So inputs need no concatenation, and terms that repeat can be hoisted. Gradients are
    those of :class:`pwm_fast.fused.mlp_backward.MLPBackward`.

    Args:
        kernels: elementwise kernels.
        specs: what each layer does.
        params: the layers' tensors.
        evals: E.
        rows: R, rows of an evaluation (of all members together).
        save: keep what a backward pass needs.
        wgrad: keep what gradients of the parameters need; implies ``save``.
        saved: buffers of an earlier forward pass, to go backward on.
        masks: ``[M, R / M, n]`` of each layer that drops out (M members, or 1), first to last.
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
        masks: Sequence[Tensor] = (),
    ) -> None:
        self.kernels, self.specs, self.params = kernels, specs, params
        self.evals, self.rows = evals, rows
        self.save, self.wgrad = save, wgrad
        first = params[0].weight
        self.dtype = first.dtype
        self.compute_dtype = kernels.precision.dtype(first.dtype)
        self.members = first.shape[0] if first.dim() == 3 else 0
        self.rows_per_member = rows // self.members if self.members else 0
        self.gemms = [Gemm(kernels, p.weight, rows) for p in params]
        self.widths = [p.weight.shape[-2] for p in params]
        if saved is None:
            saved = saved_buffers(kernels, specs, params, evals, rows, save, wgrad)
        self.saved = list(saved)
        self.masks = dict(zip((i for i, s in enumerate(specs) if s.drop), masks, strict=True))
        self._slots = slots_of(specs, save, wgrad)
        self._fused: dict[int, FusedForward | None] = {}

    def buffer(self, layer: int, name: str) -> Tensor | None:
        """What is kept of a layer over all evaluations: ``hat``, ``rstd``, ``mean`` or ``y``."""
        slot = self._slots[layer].get(name)
        return None if slot is None else self.saved[slot]

    def saved_of(self, layer: int, e: int) -> Saved:
        """What evaluation ``e`` keeps of a layer beside its output."""
        slots, saved = self._slots[layer], self.saved
        if "hat" not in slots:
            return _NOTHING
        mean = saved[slots["mean"]][e] if "mean" in slots else None
        rstd = saved[slots["rstd"]][e] if "rstd" in slots else None
        return Saved(saved[slots["hat"]][e], mean, rstd)

    def output_of(self, layer: int, e: int) -> Tensor | None:
        """The output of a layer that evaluation ``e`` keeps, if it does."""
        slot = self._slots[layer].get("y")
        return None if slot is None else self.saved[slot][e]

    def fuses(self, i: int) -> bool:
        """Layer ``i`` is one whose norm and activation a GEMM may be fused with."""
        spec = self.specs[i]
        if spec.drop:  # which comes between them
            return False
        if spec.order == "act_norm":
            return spec.norm and spec.act in ("none", "mish")
        return not self.members and spec.norm

    def rows_of_members(self) -> list[slice]:
        """The rows of each member of an ensemble."""
        each = self.rows_per_member
        return [slice(e * each, (e + 1) * each) for e in range(self.members)]

    def gemm_shape(self, n: int, k: int) -> GemmCall:
        """Of a GEMM of ``[R, k]`` and ``[R, n]``."""
        device = self.params[0].weight.device
        return GemmCall(self.rows, n, k, self.compute_dtype, device, self.members)

    def _fused_gemm(self, i: int) -> FusedForward | None:
        """Layer ``i``'s GEMM, norm and activation in one, where the kernels have that."""
        if i not in self._fused:
            self._fused[i] = None
            gemms, spec, n = self.kernels.gemms, self.specs[i], self.widths[i]
            grouped = spec.act == "simnorm" and (spec.group not in _GROUPS or n % spec.group)
            if gemms is not None and i and self.fuses(i) and not grouped:
                shape = self.gemm_shape(n, self.widths[i - 1])
                self._fused[i] = gemms.forward(shape, spec.order)
        return self._fused[i]

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
        """Evaluation ``e``: the MLP's output ``[R, N]`` for the first layer's GEMM ``h``.

        Args:
            e: number of the evaluation, from 0.
            h: ``[R, n]``; overwritten if ``own``.
            add: see :meth:`Kernels.norm_act_fwd`; stands in place of the first layer's bias.
            tau: likewise.
            w_tau: likewise.
            own: ``h`` may be overwritten.
            head: without it the last layer, a plain one above others, is left to the caller: the
                result is what its GEMM takes.
            out: ``[R, N]`` for the result of a last layer with a norm; None where it may lie
                anywhere.
        """
        last = len(self.specs) - 1
        for i, spec in enumerate(self.specs):
            if i == last and not head:
                break
            fused = self._fused_gemm(i)
            target = out if i == last else None
            if fused is not None:
                h = self._gemm_norm_act(fused, i, e, h, target)
                continue
            if i:
                h = self.gemms[i](h, self.members, fp32=spec.plain or spec.drop)
                own, add, tau, w_tau = True, None, None, None
            if spec.drop:
                h = self._drop(i, h if own else h.clone())
                own = True
            if spec.plain:
                h = self._plain(i, e, h)
                continue
            kept = self.saved_of(i, e)
            y = self._output(i, e, target, h if own else None)
            self._norm_act(i, h, y, kept, add, tau, w_tau)
            h = y
        return h

    def _output(self, i: int, e: int, out: Tensor | None, own: Tensor | None) -> Tensor:
        """Where layer ``i`` writes: what is kept of it, ``out``, over ``own``, or anew."""
        kept = self.output_of(i, e)
        if kept is not None:
            return kept
        if out is not None:
            return out
        dtype = self.dtype if i == len(self.specs) - 1 else self.compute_dtype
        if own is not None and own.dtype == dtype:
            return own
        shape = (self.rows, self.widths[i])
        return torch.empty(shape, dtype=dtype, device=self.params[i].weight.device)

    def _norm_act(
        self,
        i: int,
        h: Tensor,
        y: Tensor,
        kept: Saved,
        add: Tensor | None,
        tau: Tensor | None,
        w_tau: Tensor | None,
    ) -> None:
        spec, p = self.specs[i], self.params[i]
        bias = p.bias if add is None and not spec.drop else None
        if spec.norm and spec.order == "norm_act" and self.members:
            # The kernel takes one layer's vectors.
            for member, rows in enumerate(self.rows_of_members()):
                self._norm_act_rows(i, h, y, kept, bias, rows, member)
            return
        if spec.norm and spec.order == "norm_act":
            assert p.gamma is not None and p.beta is not None
            self.kernels.norm_act_fwd(
                h,
                y,
                kept.hat,
                kept.rstd,
                gamma=p.gamma,
                beta=p.beta,
                act=spec.act,
                group=spec.group,
                eps=spec.eps,
                bias=bias,
                add=add,
                tau=tau,
                w_tau=w_tau,
                width=spec.width,
            )
            return
        self.kernels.act_norm_fwd(
            h,
            y,
            kept.hat,
            kept.mean,
            kept.rstd,
            bias=bias,
            gamma=p.gamma,
            beta=p.beta,
            act=spec.act,
            eps=spec.eps,
            rows_per_member=self.rows_per_member,
        )

    def _norm_act_rows(
        self,
        i: int,
        h: Tensor,
        y: Tensor,
        kept: Saved,
        bias: Tensor | None,
        rows: slice,
        member: int,
    ) -> None:
        """Norm and activation of one member of an ensemble."""
        spec, p = self.specs[i], self.params[i]
        assert p.gamma is not None and p.beta is not None
        self.kernels.norm_act_fwd(
            h[rows],
            y[rows],
            None if kept.hat is None else kept.hat[rows],
            None if kept.rstd is None else kept.rstd[rows],
            gamma=p.gamma[member],
            beta=p.beta[member],
            act=spec.act,
            group=spec.group,
            eps=spec.eps,
            bias=None if bias is None else bias[member],
            width=spec.width,
        )

    def _drop(self, i: int, h: Tensor) -> Tensor:
        """Add the bias and multiply with the mask, in place."""
        mask, bias = self.masks[i], self.params[i].bias
        rows = h.view(mask.shape)
        if bias is not None:
            rows.add_(bias.unsqueeze(1) if bias.dim() == 2 else bias)
        rows.mul_(mask)
        return h

    def _gemm_norm_act(
        self, fused: FusedForward, i: int, e: int, x: Tensor, out: Tensor | None
    ) -> Tensor:
        spec, p = self.specs[i], self.params[i]
        assert p.gamma is not None and p.beta is not None
        kept = self.saved_of(i, e)
        y = self._output(i, e, out, None)
        fused(
            self.gemms[i].cast(x, None, scaled=False)[0],
            self.gemms[i].cast_weight(),
            y,
            kept.hat,
            kept.rstd,
            gamma=p.gamma,
            beta=p.beta,
            bias=p.bias,
            act=spec.act,
            group=spec.group,
            eps=spec.eps,
            width=spec.width,
            mean=kept.mean,
        )
        return y

    def _plain(self, i: int, e: int, h: Tensor) -> Tensor:
        """A layer without norm and activation; it never has another addend than its bias."""
        bias = None if self.specs[i].drop else self.params[i].bias
        if bias is not None and self.members:
            h.view(self.members, -1, h.shape[-1]).add_(bias.unsqueeze(1))
        elif bias is not None:
            h.add_(bias)
        kept = self.output_of(i, e)
        return h if kept is None else kept.copy_(h)


# --- the operator -------------------------------------------------------------------------------


@one_call
def mlp_forward(
    kernels: Kernels,
    inputs: list[Tensor],
    params: list[Tensor],
    masks: list[Tensor],
    spec: str,
    save: bool,
    wgrad: bool,
) -> tuple[Tensor, list[Tensor]]:
    """``[R, K_i]`` each, to ``[R, N]`` (``[E R, N]`` of an ensemble) and what backward needs.

    ``masks [M, R, n]`` are those of the layers that drop out, of M members or 1.
    """
    specs = decode_layers(spec)
    layers, rows = split_params(specs, params), inputs[0].shape[0]
    if row_program.runs(kernels, [p.weight for p in layers], specs, rows):
        return blocked_mlp.mlp_forward(kernels, inputs, specs, layers, save, wgrad)
    mlp = one_evaluation(kernels, specs, layers, rows, save=save, wgrad=wgrad, masks=masks)
    if kernels.precision.compute is not None:
        first = [layers[0].weight]
        if not _takes_one(kernels, first[0], inputs):
            first = columns_of(first[0], inputs)
        cast_together(kernels, [*first, *(p.weight for p in layers[1:])])
    y = mlp.forward(0, _first_gemm(kernels, layers[0].weight, inputs))
    if mlp.saved and y.untyped_storage()._cdata == mlp.saved[-1].untyped_storage()._cdata:
        y = y.clone()  # an operator's outputs must not share memory
    return y, mlp.saved


def one_evaluation(
    kernels: Kernels,
    specs: Sequence[LayerSpec],
    layers: list[LayerParams],
    rows: int,
    *,
    save: bool,
    wgrad: bool,
    saved: Sequence[Tensor] | None = None,
    masks: Sequence[Tensor] = (),
) -> FusedMLP:
    """For one evaluation of ``rows`` rows, which all members of an ensemble take."""
    members = layers[0].weight.shape[0] if layers[0].weight.dim() == 3 else 1
    return FusedMLP(
        kernels,
        specs,
        layers,
        1,
        rows * members,
        save=save,
        wgrad=wgrad,
        saved=saved,
        masks=masks,
    )


def columns_of(weight: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
    """The columns of the first weight that each input meets."""
    if len(inputs) == 1:
        return [weight]
    return list(weight.split([x.shape[-1] for x in inputs], -1))


def _takes_one(kernels: Kernels, weight: Tensor, inputs: Sequence[Tensor]) -> bool:
    """The first GEMM takes all inputs side by side as one, and its weight whole."""
    return len(inputs) > 1 and weight.dim() == 2 and takes_16bit(kernels, weight)


def _first_gemm(kernels: Kernels, weight: Tensor, inputs: Sequence[Tensor]) -> Tensor:
    members = weight.shape[0] if weight.dim() == 3 else 0
    compute = kernels.precision.compute
    if compute is not None and _takes_one(kernels, weight, inputs):
        x, parts = side_by_side(inputs, compute)
        for each, out in zip(inputs, parts, strict=True):
            kernels.cast(each, out, None)
        return Gemm(kernels, weight)(x)
    h: Tensor | None = None
    for x, part in zip(inputs, columns_of(weight, inputs), strict=True):
        if h is None:
            h = Gemm(kernels, part).shared(x, members)
        elif compute is None and not h.is_cuda:
            if members:
                shared = x.expand(members, -1, -1)
                h.view(members, -1, h.shape[-1]).baddbmm_(shared, part.transpose(1, 2))
            else:
                h.addmm_(x, part.t())
        else:
            h += Gemm(kernels, part).shared(x, members)
    if h is None:
        raise ValueError("an MLP needs an input")
    return h
