"""Layers and MLPs, ensembles too."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pwm_fast.backends.base import Call, Kernels
from pwm_fast.backends.select import Choice, declare, select
from pwm_fast.backends.specs import decode_layers, encode_layers, split_params
from pwm_fast.backends.transforms import PLAIN, compiled_or_mapped
from pwm_fast.fused.mlp import mlp_forward
from pwm_fast.fused.mlp_backward import mlp_backward
from pwm_fast.fused.saved import saved_buffers
from pwm_fast.ops import _checks, batching, direct
from pwm_fast.ops.coverage import layer_tensors, unsupported, without_width
from pwm_fast.ops.norm_act import activate, layer_norm
from pwm_fast.ops.operator import Operator, as_rows, require_grad
from pwm_fast.ops.types import ORDERS, Layer, Order
from pwm_fast.ops.weights import centred, flat, specs_of

# Evaluates a network on logically concatenated inputs.
RunNet = Callable[[Sequence[Tensor], Sequence[Layer], Order], Tensor]

declare("mlp", "gemm")


class _Mlp(Operator):
    name, family, outputs = "mlp", "gemm", ("y", "saved")
    grads, refused = ("inputs", "params"), ("masks",)
    flags = {"wgrad": ("params",)}  # noqa: RUF012
    rows, row_axes = {"inputs": 0, "masks": 1}, (0,)

    forward, backward = staticmethod(mlp_forward), staticmethod(mlp_backward)

    @classmethod
    def fake(cls, k: Kernels, a: Any) -> tuple[Tensor, list[Tensor]]:
        specs = decode_layers(a.spec)
        layers = split_params(specs, a.params)
        rows = a.inputs[0].shape[0] * cls.members(vars(a))
        saved = saved_buffers(k, specs, layers, 1, rows, a.save, a.wgrad)
        return a.inputs[0].new_empty(rows, layers[-1].weight.shape[-2]), saved

    @classmethod
    def members(cls, args: Mapping[str, Any]) -> int:
        weight = args["params"][0]
        return weight.shape[0] if weight.dim() == 3 else 1

    @classmethod
    def ensemble(
        cls, size: int, dims: Mapping[str, Any], args: Mapping[str, Any]
    ) -> Sequence[Any] | None:
        """Parameters mapped over and inputs shared: the members of an ensemble."""
        params, axes, inputs = args["params"], dims["params"], args["inputs"]
        mapped = batching.is_mapped
        if mapped(dims["inputs"]) or not mapped(axes) or inputs[0].shape[0] == 0:
            return None
        if size == 0 or params[0].dim() - (axes[0] is not None) == 3:
            return None
        stacked = batching.stacked(size, params, axes)
        stacked = [p.contiguous() if p.dim() == 2 else p for p in stacked]  # kernels index vectors
        masks = batching.stacked(size, args["masks"], dims["masks"])
        masks = [m.flatten(0, 1) for m in masks]  # from [E, 1, R, N]
        return [*{**args, "params": stacked, "masks": masks}.values()]


run_mlp = _Mlp()


def linear_norm_act(x: Tensor, layer: Layer, *, backend: str | None = None) -> Tensor:
    """NormedLinear: ``act(LayerNorm(x W^T + b))``, the layer of PWM's and TD-MPC2's world models.

    Args:
        x: ``[..., K]``, any floating dtype; for an ensemble ``[B, K]`` (shared) or ``[E, B, K]``
            (one per member).
        layer: parameters; without ``ln_weight`` it is Linear and activation. ``weight [N, K]``, or
            ``[E, N, K]`` with vectors ``[E, N]`` for an ensemble.
        backend: see :mod:`pwm_fast.backends`.

    Returns:
        ``[..., N]``, or ``[E, B, N]`` for an ensemble.

    Raises:
        TypeError: a tensor is not floating.
        ValueError: shapes or options of ``layer`` do not fit ``x``.
        BackendError: the backend that was asked for cannot run this.

    Source: Hansen et al. 2023 (arXiv 2310.16828); its Q functions have the dropout.
    """
    return _one_layer(x, layer, "norm_act", backend)


def linear_act_norm(x: Tensor, layer: Layer, *, backend: str | None = None) -> Tensor:
    """``LayerNorm(act(x W^T + b))``, the order of PWM's actor and critics; ensembles in one call.

    Args:
        x: ``[..., K]``; for an ensemble ``[B, K]`` (shared) or ``[E, B, K]`` (one per member).
        layer: ``weight [N, K]``, or ``[E, N, K]`` with vectors ``[E, N]`` for an ensemble.
        backend: see :mod:`pwm_fast.backends`.

    Returns:
        ``[..., N]``, or ``[E, B, N]`` for an ensemble.

    Raises:
        TypeError: a tensor is not floating.
        ValueError: shapes or options do not fit.
        BackendError: the backend that was asked for cannot run this.
    """
    return _one_layer(x, layer, "act_norm", backend)


def _one_layer(x: Tensor, layer: Layer, order: Order, backend: str | None) -> Tensor:
    _checks.vectors("x", x)
    _checks.floating("layer.weight", layer.weight)
    axes = layer.weight.dim()
    if axes not in (2, 3):
        raise ValueError(f"layer.weight must be [N, K] or [E, N, K], got {axes} axes")
    if axes == 3:
        members = layer.weight.shape[0]
        if x.dim() not in (2, 3) or (x.dim() == 3 and x.shape[0] != members):
            raise ValueError(
                f"x must be [B, K] or [{members}, B, K] for an ensemble of {members}, "
                f"got {tuple(x.shape)}"
            )
    per_member = axes == 3 and x.dim() == 3
    shared = axes == 3 and x.dim() == 2
    lead = (members, *x.shape[:-1]) if shared else x.shape[:-1]
    _checks.layer("layer", layer, x.shape[-1], x.device, ensemble=axes == 3, lead=lead)
    return _run((x,), (layer,), order, backend, per_member=per_member)


def mlp(
    inputs: Sequence[Tensor],
    layers: Sequence[Layer],
    *,
    order: Order = "norm_act",
    members: Sequence[int] | Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """A stack of layers over logically concatenated inputs.

    Args:
        inputs: tensors ``[..., K_i]`` with one leading shape; their widths add up to the first
            layer's input width, in this order.
        layers: parameters of each layer, first to last; of an ensemble weights ``[E, N, K]`` and
            vectors ``[E, N]``.
        order: ``"norm_act"`` for layers as :func:`linear_norm_act`, ``"act_norm"`` for layers as
            :func:`linear_act_norm`.
        members: numbers of the ensemble's members that are computed, in this order: integers, or
            int64 ``[M]`` on any device; a number may come more than once. None computes all. The
            gradients of members that are left out are 0. Numbers in a tensor on a GPU are not
            looked at: one that is too large is an error of the device.
        backend: see :mod:`pwm_fast.backends`.

    Returns:
        ``[..., N]`` of the last layer; ``[E, ..., N]`` of an ensemble, ``[M, ..., N]`` of M of its
        members.

    Raises:
        TypeError: a tensor is not floating, or ``members`` are no integers.
        ValueError: shapes, devices or options do not fit, or there is no such member.
        BackendError: the backend that was asked for cannot run this.
    """
    if len(inputs) == 0:
        raise ValueError("inputs must hold at least one tensor")
    plain = backend is None and members is None
    known = direct.find(inputs, layers, order) if plain else None
    if known is not None:
        y = direct.mlp(known, inputs, layers)
        if y is not None:
            return y
    _checks.vectors("inputs[0]", inputs[0])
    for i, x in enumerate(inputs[1:], start=1):
        _checks.same_rows(f"inputs[{i}]", x, "inputs[0]", inputs[0])
    _checks.one_of("order", order, ORDERS)
    first = layers[0].weight if len(layers) > 0 else None
    ensemble = isinstance(first, Tensor) and first.dim() == 3
    count = first.shape[0] if first is not None and ensemble else 0
    lead: tuple[int, ...] = tuple(inputs[0].shape[:-1])
    which: Sequence[int] | Tensor | None = None
    if members is not None:
        if not ensemble:
            raise ValueError("members is for an ensemble, whose weights are [E, N, K]")
        which = _numbers(members, count)
    if ensemble:
        lead = (count if which is None else len(which), *lead)
    width = sum(x.shape[-1] for x in inputs)
    _checks.layers("layers", layers, width, inputs[0].device, ensemble=ensemble, lead=lead)
    if which is not None:
        return _run_members(inputs, layers, which, order, backend)
    return _run(inputs, layers, order, backend, remember=plain and known is None)


def _run_members(
    inputs: Sequence[Tensor],
    layers: Sequence[Layer],
    which: Sequence[int] | Tensor,
    order: Order,
    backend: str | None,
) -> Tensor:
    falling = not isinstance(which, Tensor) and len(which) > 1 and _evenly(which[::-1])
    if not falling:
        return _run(inputs, [members_of(p, which) for p in layers], order, backend)
    # No stride goes backwards: the rising numbers, and the result turned round.
    chosen = [members_of(p, which[::-1]) for p in layers]
    chosen = [
        p._replace(dropout=p.dropout.flip(0)) if isinstance(p.dropout, Tensor) else p
        for p in chosen
    ]
    return _run(inputs, chosen, order, backend).flip(0)


def _evenly(numbers: Sequence[int]) -> bool:
    """Whether they rise by equal steps."""
    step = numbers[1] - numbers[0] if len(numbers) > 1 else 1
    return step > 0 and [*numbers] == [*range(numbers[0], numbers[-1] + 1, step)]


def _numbers(members: Sequence[int] | Tensor, count: int) -> Sequence[int] | Tensor:
    """Numbers of some of ``count`` members, as integers where that needs no wait for a device."""
    if not isinstance(members, Tensor):
        return _checks.members("members", members, count)
    if members.dtype != torch.int64 or members.dim() != 1:
        raise TypeError(f"members must be int64 [M], got {members.dtype} {list(members.shape)}")
    seen = members.is_cpu and type(members) in PLAIN and not compiled_or_mapped()
    if seen or len(members) == 0:
        return _checks.members("members", members.tolist(), count)
    return members


def members_of(layer: Layer, which: Sequence[int] | Tensor) -> Layer:
    """Some members of an ensemble's layer, without copies where a stride reaches them."""

    def chosen(x: Tensor) -> Tensor:
        if isinstance(which, Tensor):
            return x.index_select(0, which.to(x.device))
        if _evenly(which):
            return x[which[0] : which[-1] + 1 : which[1] - which[0] if len(which) > 1 else 1]
        return torch.stack([x[e] for e in which])  # of which a CUDA graph can be captured

    weight, *vectors = layer[:4]
    bias, gamma, beta = (None if x is None else chosen(x) for x in vectors)
    return layer._replace(weight=chosen(weight), bias=bias, ln_weight=gamma, ln_bias=beta)


def _run(
    inputs: Sequence[Tensor],
    layers: Sequence[Layer],
    order: Order,
    backend: str | None,
    *,
    per_member: bool = False,
    remember: bool = False,
) -> Tensor:
    """An MLP; ``per_member``: the first axis of a layer's input are the ensemble's members.

    With ``remember`` it and calls that are like it may go the short way.
    """
    reason = unsupported(layers, order) or without_width(inputs, layers)
    masks = [p.dropout for p in layers if isinstance(p.dropout, Tensor)]
    if per_member:
        reason = "the members of the ensemble have inputs of their own"
    elif layers[0].weight.dim() == 3 and inputs[0].numel() == 0:
        reason = "the batch of the ensemble is empty"
    elif require_grad(masks):
        reason = "a dropout mask requires a gradient, which only the reference computes"
    choice = select("mlp", backend, Call([*inputs, *layer_tensors(layers), *masks], reason))
    if not choice.is_reference:
        if remember:
            # This call too: a checkpoint's second forward pass must keep what the first one kept.
            known = direct.remember(run_mlp, choice, inputs, layers, order)
            y = direct.mlp(known, inputs, layers)
            if y is not None:
                return y
        return fused_mlp(choice, inputs, layers, order)
    if per_member:
        return _layer(inputs[0], layers[0], order)
    return reference_mlp(inputs, layers, order)


def fused_mlp(
    choice: Choice, inputs: Sequence[Tensor], layers: Sequence[Layer], order: str = "norm_act"
) -> Tensor:
    """The MLP on a chosen backend; weights of an ensemble give ``[E, ..., N]``."""
    leading = inputs[0].shape[:-1]
    widths: Sequence[int] | None = None
    outputs = layers[-1].weight.shape[-2]
    if order == "norm_act":
        layers, widths = centred(choice, layers)
    members = layers[0].weight.shape[0] if layers[0].weight.dim() == 3 else 0
    params = flat(layers)
    if members == 1:  # a batched GEMM of one is slower than a plain one
        params = [p.squeeze(0) for p in params]
    text = encode_layers(specs_of(layers, order, widths))
    masks = _masks(inputs[0], layers, members or 1)
    y = run_mlp([as_rows(x) for x in inputs], params, masks, text, choice=choice)
    y = y[:, :outputs]  # a padded last layer
    if members:
        return y.view(members, *leading, y.shape[-1])
    return y.view(*leading, y.shape[-1])


def _masks(x: Tensor, layers: Sequence[Layer], members: int) -> list[Tensor]:
    """Masks ``[M, R, N]`` of the layers that drop out, drawn as PyTorch draws its own."""
    masks = []
    rows = prod(x.shape[:-1])
    for p in layers:
        if not p.drops:
            continue
        shape = members, rows, p.weight.shape[-2]
        mask = p.dropout
        if not isinstance(mask, Tensor):
            mask = _drawn(p.weight, shape, mask)
        masks.append(mask.reshape(shape))
    return masks


def _drawn(weight: Tensor, shape: tuple[int, ...], rate: float) -> Tensor:
    """What ``F.dropout`` makes of ones, of the same random numbers."""
    if not weight.is_cpu or not 0.0 < rate < 1.0 or torch.compiler.is_compiling():
        return F.dropout(weight.new_ones(shape), rate)
    # In fewer passes. Inside torch.vmap nothing is to be mapped over that randomness="same" draws.
    like = torch.empty(shape, dtype=weight.dtype, device=weight.device)
    return torch.bernoulli(like, 1.0 - rate).div_(1.0 - rate)


def reference_mlp(inputs: Sequence[Tensor], layers: Sequence[Layer], order: Order) -> Tensor:
    """The reference of :func:`mlp`."""
    x = inputs[0] if len(inputs) == 1 else torch.cat(tuple(inputs), dim=-1)
    leading = x.shape[:-1]
    ensemble = layers[0].weight.dim() == 3
    if ensemble:
        x = x.reshape(prod(leading), x.shape[-1])
    for layer in layers:
        x = _layer(x, layer, order)
    return x.reshape(x.shape[0], *leading, x.shape[-1]) if ensemble else x


def _layer(x: Tensor, layer: Layer, order: Order) -> Tensor:
    """One layer; ``[E, N, K]`` weights (an ensemble) give ``[E, B, N]``."""
    h = _linear(x, layer)
    if isinstance(layer.dropout, Tensor):
        h = h * layer.dropout.reshape(h.shape)
    elif layer.drops:
        h = F.dropout(h, layer.dropout)
    if order == "norm_act":
        return activate(_norm(h, layer), layer.act, layer.simnorm_dim)
    return _norm(activate(h, layer.act, layer.simnorm_dim), layer)


def _linear(x: Tensor, layer: Layer) -> Tensor:
    if layer.weight.dim() == 2:
        return F.linear(x, layer.weight, layer.bias)
    members = layer.weight.shape[0]
    if x.dim() == 2:
        x = x.expand(members, *x.shape)
    weight = layer.weight.transpose(1, 2)
    if layer.bias is None:
        return torch.bmm(x, weight)
    return torch.baddbmm(layer.bias.unsqueeze(1), x, weight)


def _norm(h: Tensor, layer: Layer) -> Tensor:
    if layer.ln_weight is None or layer.ln_bias is None:
        return h
    if layer.weight.dim() == 2:
        return layer_norm(h, layer.ln_weight, layer.ln_bias, layer.eps)
    h = layer_norm(h, None, None, layer.eps)
    return torch.addcmul(layer.ln_bias.unsqueeze(1), h, layer.ln_weight.unsqueeze(1))
