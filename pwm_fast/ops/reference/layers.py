"""NormedLinear layers, SimNorm and MLPs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from pwm_fast.backends.dtypes import autocasts, widen
from pwm_fast.backends.pointwise import mish
from pwm_fast.backends.transforms import transformed
from pwm_fast.ops.types import Activation, Layer, Order

# Evaluates a network on logically concatenated inputs.
RunNet = Callable[[Sequence[Tensor], Sequence[Layer], Order], Tensor]


def simnorm(x: Tensor, dim: int = 8) -> Tensor:
    return torch.softmax(x.unflatten(-1, (-1, dim)), dim=-1).flatten(-2)


def project_simplex(z: Tensor, dim: int) -> Tensor:
    groups = widen(z).unflatten(-1, (-1, dim)).clamp_min(0.0)
    return (groups / groups.sum(-1, keepdim=True).clamp_min(1e-6)).flatten(-2).to(z.dtype)


def activate(x: Tensor, act: Activation, simnorm_dim: int = 8) -> Tensor:
    if act == "mish":
        return mish(x)
    if act == "simnorm":
        return simnorm(x, simnorm_dim)
    return x


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Over the last axis.

    Where PyTorch's own is differentiated forward and then again, or twice under ``torch.func``, its
    derivatives take mean and deviation for constants, without a word (2.13; pytorch#198017).
    """
    if not transformed():
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    h = wide - wide.mean(-1, keepdim=True)
    h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        h = h * weight
    if bias is not None:
        h = h + bias
    return h if autocasts(x) else h.to(x.dtype)


def layer_norm_act(
    x: Tensor, weight: Tensor, bias: Tensor, act: Activation, simnorm_dim: int, eps: float
) -> Tensor:
    return activate(layer_norm(x, weight, bias, eps), act, simnorm_dim)


def linear_norm_act(x: Tensor, layer: Layer) -> Tensor:
    h = F.linear(x, layer.weight, layer.bias)
    if layer.ln_weight is not None:
        h = layer_norm(h, layer.ln_weight, layer.ln_bias, layer.eps)
    return activate(h, layer.act, layer.simnorm_dim)


def linear_act_norm(x: Tensor, layer: Layer) -> Tensor:
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


def mlp(inputs: Sequence[Tensor], layers: Sequence[Layer]) -> Tensor:
    x = inputs[0] if len(inputs) == 1 else torch.cat(tuple(inputs), dim=-1)
    for layer in layers:
        x = linear_norm_act(x, layer)
    return x


def act_norm_mlp(inputs: Sequence[Tensor], layers: Sequence[Layer]) -> Tensor:
    x = inputs[0] if len(inputs) == 1 else torch.cat(tuple(inputs), dim=-1)
    if layers[0].weight.dim() == 3:
        leading = x.shape[:-1]
        x = x.reshape(prod(leading), x.shape[-1])
        for layer in layers:
            x = linear_act_norm(x, layer)
        return x.reshape(x.shape[0], *leading, x.shape[-1])
    for layer in layers:
        x = linear_act_norm(x, layer)
    return x


def run_net(inputs: Sequence[Tensor], layers: Sequence[Layer], order: Order) -> Tensor:
    return mlp(inputs, layers) if order == "norm_act" else act_norm_mlp(inputs, layers)
