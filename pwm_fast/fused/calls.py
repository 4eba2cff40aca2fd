"""From public arguments to the fused operators: flattening, packing of weights, and back.

Packing happens in differentiable PyTorch: weights are centred and padded, the first one is split by
inputs, the fold's products are formed, and autograd carries their gradients back to the parameters
as the user keeps them. Of weights that need no gradient the packs are kept until they change.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pwm_fast.backends.precision import BY_NAME
from pwm_fast.backends.specs import DynamicsSpec, LayerSpec, encode_dynamics, encode_layers
from pwm_fast.fused import algebra, weight_cache
from pwm_fast.fused.gemm import fp32_mode
from pwm_fast.ops import (  # noqa: F401  register the operators
    batching,
    library_returns,
    library_rows,
)
from pwm_fast.ops.library import needs_grad, run_mlp, watched
from pwm_fast.ops.types import Layer

#: Backends with kernels for the row-wise operations; the others leave those to the reference.
ROW_KERNELS = frozenset({"native", "triton"})


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


def without_width(inputs: Sequence[Tensor], layers: Sequence[Layer] = ()) -> str | None:
    """Why kernels cannot take these where an axis of features is empty; None where none is."""
    for x in inputs:
        if x.shape[-1] == 0:
            return f"a tensor {tuple(x.shape)} has no features, which only the reference takes"
    for i, layer in enumerate(layers):
        if 0 in layer.weight.shape:
            shape = tuple(layer.weight.shape)
            return f"layer {i} has a weight {shape} of no size, which only the reference takes"
    return None


def _savable(save: bool, *tensors: Tensor | None) -> Any:
    """The tensors; with ``save``, copies of those that autograd refuses to keep."""
    if not save or weight_cache.hidden():
        return tensors
    return tuple(x.clone() if x is not None and x.is_inference() else x for x in tensors)


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


def specs_of(
    layers: Sequence[Layer], order: str = "norm_act", widths: Sequence[int] | None = None
) -> tuple[LayerSpec, ...]:
    """What the layers do; ``widths`` are those of :func:`centred`."""
    return tuple(
        LayerSpec(
            order,
            p.act,
            p.bias is not None,
            p.ln_weight is not None,
            p.simnorm_dim,
            p.eps,
            width,
        )
        for p, width in zip(layers, widths or [0] * len(layers), strict=True)
    )


def _narrow(backend: str) -> bool:
    """Products take 16-bit operands on tensor cores."""
    name, _, mode = backend.partition("+")
    return name == "triton" and mode in ("bf16", "fast")


def _switches(backend: str) -> tuple[bool, bool]:
    """Whether to centre and whether to pad.

    For tensor cores' 16-bit operands, whose rows must be aligned; on a CPU the copies cost more
    than they spare.
    """
    switches = algebra.in_force()
    pays = _narrow(backend)
    pad = (pays and switches.centre is not False) if switches.pad is None else switches.pad
    centre = (pays or pad) if switches.centre is None else switches.centre
    return centre, pad


def centred(backend: str, layers: Sequence[Layer]) -> tuple[list[Layer], list[int]]:
    """Layers whose weights are centred and padded where that is switched on, and their widths.

    A width is that of the user's layer where its copy is centred, else 0. Only a LayerNorm takes
    the mean away again, so only layers with one are centred; SimNorm's groups leave no room for
    padding.
    """
    centre, pad = _switches(backend)
    if not centre or not any(p.ln_weight is not None for p in layers):
        return list(layers), [0] * len(layers)
    tensors = tuple(layer_tensors(layers))
    spec = encode_layers(specs_of(layers))

    def make(*flat: Tensor) -> tuple[Tensor, ...]:
        packed, copies = torch.ops.pwm_fast.centred(list(flat), spec, pad, backend)
        weights = (x for x in packed if x.dim() == 2)
        for weight, copy in zip(weights, copies, strict=bool(copies)):
            weight_cache.attach(weight, copy)
        return (*packed, *copies)

    (wgrad,) = needs_grad(tensors)
    kind = ("centred", spec, pad, backend)
    # Who watches operators, to write them down, must see what a pack is made of.
    anew = wgrad or watched()
    made = make(*_savable(wgrad, *tensors)) if anew else weight_cache.kept(kind, tensors, make)
    flat = list(made)
    result, widths = [], []
    for p in layers:
        weight = flat.pop(0)
        bias = None if p.bias is None else flat.pop(0)
        norm = p.ln_weight is not None
        gamma, beta = (flat.pop(0), flat.pop(0)) if norm else (None, None)
        result.append(p._replace(weight=weight, bias=bias, ln_weight=gamma, ln_bias=beta))
        widths.append(p.weight.shape[0] if norm else 0)
    return result, widths


def _rows(x: Tensor) -> Tensor:
    x = x.reshape(x.numel() // x.shape[-1], x.shape[-1])
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def mlp(
    backend: str, inputs: Sequence[Tensor], layers: Sequence[Layer], order: str = "norm_act"
) -> Tensor:
    """See :func:`pwm_fast.ops.mlp`; weights of an ensemble give ``[E, ..., N]``."""
    leading = inputs[0].shape[:-1]
    widths: Sequence[int] | None = None
    outputs = layers[-1].weight.shape[-2]
    if order == "norm_act":
        layers, widths = centred(backend, layers)
    members = layers[0].weight.shape[0] if layers[0].weight.dim() == 3 else 0
    params = _flat(layers)
    if members == 1:  # a batched product of one is slower than a plain one
        params = [p.squeeze(0) for p in params]
    rows = [_rows(x) for x in inputs]
    wgrad, igrad = needs_grad(params, inputs)
    save = wgrad or igrad
    rows, params = list(_savable(save, *rows)), list(_savable(save, *params))
    text = encode_layers(specs_of(layers, order, widths))
    y = run_mlp(rows, params, text, backend, save, wgrad)
    y = y[:, :outputs]  # a padded last layer
    if members:
        return y.view(members, *leading, y.shape[-1])
    return y.view(*leading, y.shape[-1])


def layer_norm_act(
    backend: str, x: Tensor, weight: Tensor, bias: Tensor, act: str, group: int, eps: float
) -> Tensor:
    """See :func:`pwm_fast.ops.layer_norm_act`."""
    (save,) = needs_grad((x, weight, bias))
    operator = torch.ops.pwm_fast.layer_norm_act
    tensors = _savable(save, _rows(x).contiguous(), weight.contiguous(), bias.contiguous())
    y, _, _ = operator(*tensors, act, group, eps, backend, save)
    return y.view(x.shape)


def simnorm(backend: str, x: Tensor, group: int) -> Tensor:
    """See :func:`pwm_fast.ops.simnorm`."""
    return torch.ops.pwm_fast.simnorm(_rows(x).contiguous(), group, backend).view(x.shape)


def two_hot_decode(
    backend: str, logits: Tensor, vmin: float, vmax: float, transform: bool
) -> Tensor:
    """See :func:`pwm_fast.ops.two_hot_decode`."""
    rows = _rows(logits).contiguous()
    value, _, _ = torch.ops.pwm_fast.two_hot_decode(rows, vmin, vmax, transform, backend)
    return value.view(logits.shape[:-1])


def two_hot_cross_entropy(
    backend: str, logits: Tensor, x: Tensor, vmin: float, vmax: float, transform: bool
) -> Tensor:
    """See :func:`pwm_fast.ops.two_hot_cross_entropy`."""
    operator = torch.ops.pwm_fast.two_hot_cross_entropy
    (save,) = needs_grad((logits, x))
    tensors = _savable(save, _rows(logits).contiguous(), x.reshape(-1).contiguous())
    loss, _ = operator(*tensors, vmin, vmax, transform, backend)
    return loss.view(x.shape)


def td_lambda(
    rewards: Tensor, values: Tensor, continues: Tensor | None, gamma: float, lam: float
) -> Tensor:
    """See :func:`pwm_fast.ops.td_lambda`; with ``lam = 1`` the last values ``[1, ...]`` will do."""
    rows = [
        None if x is None else x.reshape(x.shape[0], -1).contiguous()
        for x in (rewards, values, continues)
    ]
    (save,) = needs_grad([x for x in rows if x is not None])
    return torch.ops.pwm_fast.td_lambda(*_savable(save, *rows), gamma, lam).view(rewards.shape)


class Packed(NamedTuple):
    """A dynamics network as the rollout operators take it."""

    spec: str
    w_z: Tensor
    w_a: Tensor
    w_tau: Tensor | None
    w_task: Tensor | None
    bias: Tensor | None
    params: list[Tensor]


def fold_pays(hidden: int, latent: int) -> bool:
    """Fold replaces ``2 D U`` products an evaluation by ``U^2``: worth it where U is below 2 D."""
    return hidden < 1.8 * latent


def _fold_products(w_z: Tensor, *head: Tensor) -> tuple[Tensor, ...]:
    """``W1z W3`` and ``W1z b3``, in float64: their rounding would enter every evaluation."""
    wide = w_z.double()
    return tuple((wide @ x.double()).to(w_z.dtype) for x in head)


def _narrow_fold_products(operand: torch.dtype, w_z: Tensor, *head: Tensor) -> tuple[Tensor, ...]:
    """The same in float32, where products round ``W1z W3`` to ``operand``."""
    with fp32_mode(False, w_z):
        products = [w_z @ x for x in head]
    weight_cache.attach(products[0], products[0].detach().to(operand))
    return tuple(products)


def can_fold(net: Sequence[Layer]) -> bool:
    """The head is linear and there is a hidden layer, so that its input can carry the state."""
    return len(net) > 1 and net[-1].ln_weight is None and net[-1].act == "none"


def _folds(backend: str, net: Sequence[Layer], pays: bool, wgrad: bool, asked: bool | None) -> bool:
    """Whether to fold: as it is asked for, else where it ``pays`` by the widths."""
    if asked is None:
        asked = algebra.in_force().fold
    if asked is None or (asked and not can_fold(net)):
        # With weight gradients the fold's own products eat most of what it spares on a CPU, and its
        # rounding nearly doubles the float32 error of the last layer's gradient; that of 16-bit
        # operands hides it, and what is folded runs in one launch (docs/performance.md).
        asked = (_narrow(backend) or not wgrad) and pays and can_fold(net)
    return asked


def _snapshot(layers: Sequence[Layer], wgrad: bool) -> list[Layer]:
    """Copies of layers, that a backward pass finds as the fold's products were made of them.

    Else weights that somebody writes to after the forward pass would meet products of older ones.
    """
    if watched() and not wgrad:  # who writes operators down must see the weights themselves
        return list(layers)
    flat = iter(weight_cache.snapshot(tuple(layer_tensors(layers)), wgrad))
    copies = []
    for p in layers:
        weight, bias, gamma, beta = (None if x is None else next(flat) for x in p[:4])
        assert weight is not None
        copies.append(p._replace(weight=weight, bias=bias, ln_weight=gamma, ln_bias=beta))
    return copies


def pack(
    backend: str,
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
        backend: what it is for.
        net: layers; the first takes ``[z, a, tau, task]`` of a flow, ``[z, task, a]`` of a map.
        method: ``"heun"``, ``"euler"`` or ``"map"``.
        substeps: K.
        latent: D.
        action: A.
        task: E.
        task_first: the task embedding stands before the action.
        fold: fold or not; None where it pays.
    """
    flow = method != "map"
    (wgrad,) = needs_grad(layer_tensors(net))
    hidden = net[0].weight.shape[0]
    net, rms = centred(backend, net)
    fold = flow and _folds(backend, net, fold_pays(hidden, latent), wgrad, fold)
    if fold and not any(rms):  # what is centred is a copy
        net = _snapshot(net, wgrad)
    first, *others = net
    widths = [latent, task, action] if task_first else [latent, action, int(flow), task]
    parts = list(first.weight.split(widths, 1))
    if task_first:
        w_z, w_task, w_a = parts
        w_tau = None
    else:
        w_z, w_a, tau, w_task = parts
        w_tau = tau.squeeze(1) if flow else None
    norm = [first.ln_weight, first.ln_bias]
    params = [t.contiguous() for t in norm if t is not None]
    if not fold:
        params += _flat(others)
    else:
        head = others[-1]
        params += _flat(others[:-1])
        products = (w_z, head.weight, *(() if head.bias is None else (head.bias,)))
        make: Callable[..., tuple[Tensor, ...]] = _fold_products
        operand = BY_NAME[backend.partition("+")[2] or "exact"].operand
        if _narrow(backend) and operand is not None:
            make = partial(_narrow_fold_products, operand)
        anew = wgrad or watched()
        params += make(*products) if anew else weight_cache.kept(("fold", operand), products, make)
        params.append(head.weight)
        if head.bias is not None:
            params.append(head.bias.contiguous())
    spec = DynamicsSpec(specs_of(net, widths=rms), method, substeps, fold)
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
    x, weight = _savable(igrad or wgrad, x, weight)
    return run_mlp([x], [weight], _LINEAR, backend, igrad or wgrad, wgrad)


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
    tensors = (z0.contiguous(), c, packed.w_z, packed.w_tau, *packed.params)
    z0, c, w_z, w_tau, *params = _savable(grad or wgrad, *tensors)
    z, _ = torch.ops.pwm_fast.rollout(
        z0,
        c,
        w_z,
        w_tau,
        params,
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
    save = grad or wgrad or agrad
    tensors = (z0.contiguous(), noise.contiguous(), base, packed.w_a, packed.w_z, packed.w_tau, std)
    z0, noise, base, w_a, w_z, w_tau, std = _savable(save, *tensors)
    z, action, _ = torch.ops.pwm_fast.imagine(
        z0,
        noise,
        base,
        w_a,
        w_z,
        w_tau,
        list(_savable(save, *packed.params)),
        std,
        list(_savable(save, *actor_params)),
        packed.spec,
        encode_layers(specs_of(actor, "act_norm")),
        detach,
        backend,
        save,
        wgrad,
        agrad,
    )
    return z, action
