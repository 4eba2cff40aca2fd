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
from pwm_fast.fused.mlp import mlp_forward
from pwm_fast.fused.mlp_backward import mlp_backward
from pwm_fast.fused.saved import saved_buffers
from pwm_fast.ops import _checks, batching
from pwm_fast.ops.coverage import layer_tensors, unsupported, without_width
from pwm_fast.ops.norm_act import activate, layer_norm
from pwm_fast.ops.operator import Operator, as_rows
from pwm_fast.ops.types import ORDERS, Layer, Order
from pwm_fast.ops.weights import centred, flat, specs_of

# Evaluates a network on logically concatenated inputs.
RunNet = Callable[[Sequence[Tensor], Sequence[Layer], Order], Tensor]

declare("mlp", "gemm")


class _Mlp(Operator):
    name, family, outputs = "mlp", "gemm", ("y", "saved")
    grads = ("inputs", "params")
    flags = {"wgrad": ("params",)}  # noqa: RUF012
    rows, row_axes = {"inputs": 0}, (0,)

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
        orders = {layer.order for layer in decode_layers(args["spec"])}
        mapped = batching.is_mapped
        if mapped(dims["inputs"]) or not mapped(axes) or orders != {"act_norm"}:
            return None
        if params[0].dim() - (axes[0] is not None) == 3 or inputs[0].shape[0] == 0:
            return None
        stacked = [
            p.expand(size, *p.shape) if d is None else p.movedim(d, 0)
            for p, d in zip(params, axes, strict=True)
        ]
        stacked = [p.contiguous() if p.dim() == 2 else p for p in stacked]  # kernels index vectors
        return [*{**args, "params": stacked}.values()]


run_mlp = _Mlp()


def linear_norm_act(x: Tensor, layer: Layer, *, backend: str | None = None) -> Tensor:
    """NormedLinear: ``act(LayerNorm(x W^T + b))``, the layer of PWM's and TD-MPC2's world models.

    Args:
        x: ``[..., K]``, any floating dtype.
        layer: parameters; without ``ln_weight`` it is Linear and activation.
        backend: see :mod:`pwm_fast.backends`.

    Returns:
        ``[..., N]``.

    Raises:
        TypeError: a tensor is not floating.
        ValueError: shapes or options of ``layer`` do not fit ``x``.
        BackendError: the backend that was asked for cannot run this.
    """
    _checks.vectors("x", x)
    _checks.layer("layer", layer, x.shape[-1], x.device)
    return _run((x,), (layer,), "norm_act", backend)


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
    _checks.layer("layer", layer, x.shape[-1], x.device, ensemble=axes == 3)
    return _run((x,), (layer,), "act_norm", backend, per_member=axes == 3 and x.dim() == 3)


def mlp(
    inputs: Sequence[Tensor],
    layers: Sequence[Layer],
    *,
    order: Order = "norm_act",
    backend: str | None = None,
) -> Tensor:
    """A stack of layers over logically concatenated inputs.

    Args:
        inputs: tensors ``[..., K_i]`` with one leading shape; their widths add up to the first
            layer's input width, in this order.
        layers: parameters of each layer, first to last; of an ensemble (``order="act_norm"``)
            weights ``[E, N, K]`` and vectors ``[E, N]``.
        order: ``"norm_act"`` for layers as :func:`linear_norm_act`, ``"act_norm"`` for layers as
            :func:`linear_act_norm`.
        backend: see :mod:`pwm_fast.backends`.

    Returns:
        ``[..., N]`` of the last layer; ``[E, ..., N]`` of an ensemble.

    Raises:
        TypeError: a tensor is not floating.
        ValueError: shapes, devices or options do not fit.
        BackendError: the backend that was asked for cannot run this.
    """
    if len(inputs) == 0:
        raise ValueError("inputs must hold at least one tensor")
    _checks.vectors("inputs[0]", inputs[0])
    for i, x in enumerate(inputs[1:], start=1):
        _checks.same_rows(f"inputs[{i}]", x, "inputs[0]", inputs[0])
    _checks.one_of("order", order, ORDERS)
    ensemble = order == "act_norm" and len(layers) > 0 and layers[0].weight.dim() == 3
    width = sum(x.shape[-1] for x in inputs)
    _checks.layers("layers", layers, width, inputs[0].device, ensemble=ensemble)
    return _run(inputs, layers, order, backend)


def _run(
    inputs: Sequence[Tensor],
    layers: Sequence[Layer],
    order: Order,
    backend: str | None,
    *,
    per_member: bool = False,
) -> Tensor:
    """An MLP; ``per_member``: the first axis of a layer's input are the ensemble's members."""
    reason = unsupported(layers, order) or without_width(inputs, layers)
    if per_member:
        reason = "the members of the ensemble have inputs of their own"
    elif layers[0].weight.dim() == 3 and inputs[0].numel() == 0:
        reason = "the batch of the ensemble is empty"
    choice = select("mlp", backend, Call([*inputs, *layer_tensors(layers)], reason))
    if not choice.is_reference:
        return fused_mlp(choice, inputs, layers, order)
    if per_member:
        return _linear_act_norm(inputs[0], layers[0])
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
    y = run_mlp([as_rows(x) for x in inputs], params, text, choice=choice)
    y = y[:, :outputs]  # a padded last layer
    if members:
        return y.view(members, *leading, y.shape[-1])
    return y.view(*leading, y.shape[-1])


def reference_mlp(inputs: Sequence[Tensor], layers: Sequence[Layer], order: Order) -> Tensor:
    """The reference of :func:`mlp`."""
    x = inputs[0] if len(inputs) == 1 else torch.cat(tuple(inputs), dim=-1)
    if order == "norm_act":
        for layer in layers:
            x = _linear_norm_act(x, layer)
        return x
    leading = x.shape[:-1]
    ensemble = layers[0].weight.dim() == 3
    if ensemble:
        x = x.reshape(prod(leading), x.shape[-1])
    for layer in layers:
        x = _linear_act_norm(x, layer)
    return x.reshape(x.shape[0], *leading, x.shape[-1]) if ensemble else x


def _linear_norm_act(x: Tensor, layer: Layer) -> Tensor:
    h = F.linear(x, layer.weight, layer.bias)
    if layer.ln_weight is not None:
        h = layer_norm(h, layer.ln_weight, layer.ln_bias, layer.eps)
    return activate(h, layer.act, layer.simnorm_dim)


def _linear_act_norm(x: Tensor, layer: Layer) -> Tensor:
    """Linear, activation, LayerNorm; ``[E, N, K]`` weights (an ensemble) give ``[E, B, N]``."""
    if layer.weight.dim() == 2:
        h = activate(F.linear(x, layer.weight, layer.bias), layer.act, layer.simnorm_dim)
        if layer.ln_weight is None:
            return h
        return layer_norm(h, layer.ln_weight, layer.ln_bias, layer.eps)
    members = layer.weight.shape[0]
    if x.dim() == 2:
        x = x.expand(members, *x.shape)
    weight = layer.weight.transpose(1, 2)
    if layer.bias is None:
        h = torch.bmm(x, weight)
    else:
        h = torch.baddbmm(layer.bias.unsqueeze(1), x, weight)
    h = activate(h, layer.act, layer.simnorm_dim)
    if layer.ln_weight is None or layer.ln_bias is None:
        return h
    h = layer_norm(h, None, None, layer.eps)
    return torch.addcmul(layer.ln_bias.unsqueeze(1), h, layer.ln_weight.unsqueeze(1))
