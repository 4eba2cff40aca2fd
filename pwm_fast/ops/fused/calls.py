"""From public arguments to the fused operators: flattening, packing of weights, and back.

Packing happens in differentiable PyTorch: the first weight is split by inputs, the fold's products
are formed, and autograd carries their gradients back to the parameters as the user keeps them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pwm_fast.ops import batching, library_native  # noqa: F401  register the operators
from pwm_fast.ops.fused.rollout import DynamicsSpec
from pwm_fast.ops.fused.specs import encode_dynamics, encode_layers
from pwm_fast.ops.fused.stack import LayerSpec
from pwm_fast.ops.library import needs_grad
from pwm_fast.ops.types import Layer


def layer_tensors(layers: Sequence[Layer]) -> list[Tensor]:
    """All tensors of some layers."""
    return [t for p in layers for t in p[:4] if t is not None]


def _flat(layers: Sequence[Layer]) -> list[Tensor]:
    """All tensors of some layers, vectors contiguous: the kernels index them."""
    tensors = []
    for p in layers:
        tensors.append(p.weight)
        tensors += [t.contiguous() for t in p[1:4] if t is not None]
    return tensors


def unsupported(layers: Sequence[Layer], order: str = "norm_act") -> str | None:
    """Why the fused algebra does not cover these layers; None if it does."""
    for i, layer in enumerate(layers):
        if layer.act == "simnorm" and (layer.ln_weight is None or order == "act_norm"):
            return f"layer {i} is SimNorm without a LayerNorm before it"
    return None


def unsupported_dynamics(net: Sequence[Layer]) -> str | None:
    """The same of a dynamics network, whose first product is split by its inputs."""
    if net[0].ln_weight is None:
        return "the first layer has no LayerNorm"
    return unsupported(net)


def specs_of(layers: Sequence[Layer], order: str = "norm_act") -> tuple[LayerSpec, ...]:
    """What the layers do."""
    return tuple(
        LayerSpec(
            order,
            p.act,
            p.bias is not None,
            p.ln_weight is not None,
            p.simnorm_dim,
            p.eps,
        )
        for p in layers
    )


def _rows(x: Tensor) -> Tensor:
    x = x.reshape(x.numel() // x.shape[-1], x.shape[-1])
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def mlp(
    backend: str, inputs: Sequence[Tensor], layers: Sequence[Layer], order: str = "norm_act"
) -> Tensor:
    """See :func:`pwm_fast.ops.mlp`; weights of an ensemble give ``[E, ..., N]``."""
    leading = inputs[0].shape[:-1]
    members = layers[0].weight.shape[0] if layers[0].weight.dim() == 3 else 0
    params = _flat(layers)
    if members == 1:  # a batched product of one is slower than a plain one
        params = [p.squeeze(0) for p in params]
    rows = [_rows(x) for x in inputs]
    wgrad, igrad = needs_grad(params, inputs)
    text = encode_layers(specs_of(layers, order))
    y, _ = torch.ops.pwm_fast.mlp(rows, params, text, backend, wgrad or igrad, wgrad)
    if members:
        return y.view(members, *leading, y.shape[-1])
    return y.view(*leading, y.shape[-1])


def layer_norm_act(
    x: Tensor, weight: Tensor, bias: Tensor, act: str, group: int, eps: float
) -> Tensor:
    """See :func:`pwm_fast.ops.layer_norm_act`."""
    (save,) = needs_grad((x, weight, bias))
    rows = _rows(x).contiguous()
    operator = torch.ops.pwm_fast.layer_norm_act
    y, _, _ = operator(rows, weight.contiguous(), bias.contiguous(), act, group, eps, save)
    return y.view(x.shape)


def simnorm(x: Tensor, group: int) -> Tensor:
    """See :func:`pwm_fast.ops.simnorm`."""
    return torch.ops.pwm_fast.simnorm(_rows(x).contiguous(), group).view(x.shape)


def two_hot_decode(logits: Tensor, vmin: float, vmax: float, transform: bool) -> Tensor:
    """See :func:`pwm_fast.ops.two_hot_decode`."""
    rows = _rows(logits).contiguous()
    value, _, _ = torch.ops.pwm_fast.two_hot_decode(rows, vmin, vmax, transform)
    return value.view(logits.shape[:-1])


def two_hot_cross_entropy(
    logits: Tensor, x: Tensor, vmin: float, vmax: float, transform: bool
) -> Tensor:
    """See :func:`pwm_fast.ops.two_hot_cross_entropy`."""
    operator = torch.ops.pwm_fast.two_hot_cross_entropy
    rows = _rows(logits).contiguous()
    loss, _ = operator(rows, x.reshape(-1).contiguous(), vmin, vmax, transform)
    return loss.view(x.shape)


class Packed(NamedTuple):
    """A dynamics network as the rollout operators take it."""

    spec: str
    w_z: Tensor
    w_a: Tensor
    w_tau: Tensor | None
    w_task: Tensor | None
    bias: Tensor | None
    params: list[Tensor]


def fold_pays(net: Sequence[Layer], latent: int) -> bool:
    """Fold replaces ``2 D U`` products an evaluation by ``U^2``: worth it where U is below 2 D."""
    return net[0].weight.shape[0] < 1.8 * latent


def can_fold(net: Sequence[Layer]) -> bool:
    """The head is linear and there is a hidden layer, so that its input can carry the state."""
    return len(net) > 1 and net[-1].ln_weight is None and net[-1].act == "none"


def pack(
    net: Sequence[Layer],
    method: str,
    substeps: int,
    latent: int,
    action: int,
    *,
    task: int = 0,
    task_first: bool = False,
    fold: bool | None = None,
) -> Packed:
    """Split the first weight by inputs and, where it pays, fold the head.

    Args:
        net: layers; the first takes ``[z, a, tau, task]`` of a flow, ``[z, task, a]`` of a map.
        method: ``"heun"``, ``"euler"`` or ``"map"``.
        substeps: K.
        latent: D.
        action: A.
        task: E.
        task_first: the task embedding stands before the action.
        fold: fold or not; None where it pays.
    """
    first, *others = net
    flow = method != "map"
    widths = [latent, task, action] if task_first else [latent, action, int(flow), task]
    parts = list(first.weight.split(widths, 1))
    if task_first:
        w_z, w_task, w_a = parts
        w_tau = None
    else:
        w_z, w_a, tau, w_task = parts
        w_tau = tau.squeeze(1) if flow else None
    if fold is None:
        # With weight gradients the fold's own products eat most of what it spares, and its rounding
        # nearly doubles the error of the last layer's gradient (docs/performance.md).
        (wgrad,) = needs_grad(layer_tensors(net))
        fold = flow and not wgrad and can_fold(net) and fold_pays(net, latent)
    norm = [first.ln_weight, first.ln_bias]
    params = [t.contiguous() for t in norm if t is not None]
    if not fold:
        params += _flat(others)
    else:
        head = others[-1]
        params += _flat(others[:-1])
        # In float64: rounding of W13 would enter every evaluation of the whole rollout.
        wide = w_z.double()
        params.append((wide @ head.weight.double()).to(w_z.dtype))
        if head.bias is not None:
            params.append((wide @ head.bias.double()).to(w_z.dtype))
        params.append(head.weight)
        if head.bias is not None:
            params.append(head.bias)
    spec = DynamicsSpec(specs_of(net), method, substeps, fold)
    return Packed(
        encode_dynamics(spec),
        w_z,
        w_a,
        None if w_tau is None else w_tau.contiguous(),
        w_task if task else None,
        first.bias,
        params,
    )


_LINEAR = encode_layers([LayerSpec("norm_act", "none", False, False, 8, 1e-5)])


def _linear(backend: str, x: Tensor, weight: Tensor) -> Tensor:
    """``x W^T`` of rows ``x``; through the operator, for its care with narrow weight gradients."""
    igrad, wgrad = needs_grad((x,), (weight,))
    y, _ = torch.ops.pwm_fast.mlp([x], [weight], _LINEAR, backend, igrad or wgrad, wgrad)
    return y


def _constant(backend: str, packed: Packed, task: Tensor | None) -> Tensor:
    """What the first product has beside latent, action and flow time, ``[1 or B, U]``."""
    base = packed.bias
    if task is not None and packed.w_task is not None:
        product = _linear(backend, _rows(task), packed.w_task)
        return product if base is None else product + base
    if base is None:
        base = packed.w_z.new_zeros(packed.w_z.shape[0])
    return base.unsqueeze(0)


def rollout(
    backend: str, packed: Packed, z0: Tensor, action: Tensor, task: Tensor | None
) -> Tensor:
    """Latents ``[H+1, B, D]`` from ``z0 [B, D]`` under actions ``[H, B, A]``; task ``[B, E]``."""
    base = _constant(backend, packed, task)
    c = (
        _linear(backend, _rows(action), packed.w_a).view(*action.shape[:2], packed.w_a.shape[0])
        + base
    )
    grad, wgrad = needs_grad(
        (z0, c), (packed.w_z, *packed.params, *(() if packed.w_tau is None else (packed.w_tau,)))
    )
    z, _ = torch.ops.pwm_fast.rollout(
        z0.contiguous(),
        c,
        packed.w_z,
        packed.w_tau,
        packed.params,
        packed.spec,
        backend,
        grad or wgrad,
        wgrad,
    )
    return z


def imagine(
    backend: str,
    packed: Packed,
    z0: Tensor,
    noise: Tensor,
    actor: Sequence[Layer],
    std: Tensor,
    task: Tensor | None,
    detach: bool,
) -> tuple[Tensor, Tensor]:
    """Latents ``[H+1, B, D]`` and actions ``[H, B, A]`` of a policy acting in the dynamics."""
    base = _constant(backend, packed, task)
    actor_params = _flat(actor)
    tau = () if packed.w_tau is None else (packed.w_tau,)
    grad, wgrad, agrad = needs_grad(
        (z0, base, packed.w_a, std), (packed.w_z, *packed.params, *tau), actor_params
    )
    z, action, _ = torch.ops.pwm_fast.imagine(
        z0.contiguous(),
        noise.contiguous(),
        base,
        packed.w_a,
        packed.w_z,
        packed.w_tau,
        packed.params,
        std,
        actor_params,
        packed.spec,
        encode_layers(specs_of(actor, "act_norm")),
        detach,
        backend,
        grad or wgrad or agrad,
        wgrad,
        agrad,
    )
    return z, action
