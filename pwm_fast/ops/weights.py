"""Weights as the fused passes take them: centred, padded, split by inputs, folded.

Packing happens in differentiable PyTorch, and autograd carries the gradients of what is packed back
to the parameters as the user keeps them. Of weights that need no gradient the packed copies are
kept until they change (:mod:`pwm_fast.fused.weight_cache`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pwm_fast.backends.base import Kernels
from pwm_fast.backends.select import Choice
from pwm_fast.backends.specs import (
    DynamicsSpec,
    LayerSpec,
    decode_layers,
    encode_dynamics,
    encode_layers,
)
from pwm_fast.backends.transforms import watched
from pwm_fast.fused import algebra, centre, weight_cache
from pwm_fast.fused.folded import folded
from pwm_fast.fused.gemm import fp32_mode
from pwm_fast.ops.coverage import can_fold, layer_tensors
from pwm_fast.ops.operator import Operator, require_grad
from pwm_fast.ops.types import FusedStep, Layer


class _Centre(Operator):
    """Layers centred and padded, and 16-bit copies of their weights: see ``fused/centre.py``."""

    name, family, outputs, results = "centred", "gemm", ("packed", "copies"), 2
    grads, eager = ("tensors",), False

    forward, backward = staticmethod(centre.pack), staticmethod(centre.pack_grads)

    @classmethod
    def fake(cls, k: Kernels, a: Any) -> tuple[list[Tensor], list[Tensor]]:
        return centre.empty(k, decode_layers(a.spec), a.tensors, a.pad)

    @classmethod
    def fake_backward(cls, k: Kernels, a: Any) -> list[Tensor]:
        pairs = zip(a.dpacked, a.tensors, strict=True)
        return [x.new_empty((0,) if g is None else x.shape) for g, x in pairs]


_centre = _Centre()


def flat(layers: Sequence[Layer]) -> list[Tensor]:
    """All tensors of some layers, vectors contiguous: the kernels index them."""
    tensors = []
    for p in layers:
        tensors.append(p.weight)
        tensors += [t.contiguous() for t in p[1:4] if t is not None]
    return tensors


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
            p.drops,
        )
        for p, width in zip(layers, widths or [0] * len(layers), strict=True)
    )


def _switches(choice: Choice) -> tuple[bool, bool]:
    """Whether to centre and whether to pad.

    For tensor cores' 16-bit operands, whose rows must be aligned; on a CPU the copies cost more
    than they spare.
    """
    switches = algebra.in_force()
    pays = choice.for_tensor_cores
    pad = (pays and switches.centre is not False) if switches.pad is None else switches.pad
    centre = (pays or pad) if switches.centre is None else switches.centre
    return centre, pad


def centred(choice: Choice, layers: Sequence[Layer]) -> tuple[list[Layer], list[int]]:
    """Layers whose weights are centred and padded where that is switched on, and their widths.

    A width is that of the user's layer where its copy is centred, else 0. Only a LayerNorm takes
    the mean away again, so only layers with one are centred; SimNorm's groups leave no room for
    padding. A dropout mask gives rows a mean again, and an ensemble's layers are left as they are.
    """
    centre, pad = _switches(choice)
    apart = layers[0].weight.dim() == 3 or any(p.drops for p in layers)
    if apart or not centre or not any(p.ln_weight is not None for p in layers):
        return list(layers), [0] * len(layers)
    tensors = tuple(layer_tensors(layers))
    spec = encode_layers(specs_of(layers))

    def make(*tensors: Tensor) -> tuple[Tensor, ...]:
        packed, copies = _centre(list(tensors), spec, pad, choice=choice)
        weights = (x for x in packed if x.dim() == 2)
        for weight, copy in zip(weights, copies, strict=bool(copies)):
            weight_cache.attach(weight, copy)
        return (*packed, *copies)

    wgrad = require_grad(tensors)
    kind = ("centred", spec, pad, choice.name, choice.precision)
    # Who watches operators, to write them down, must see what a pack is made of.
    anew = wgrad or watched()
    made = make(*tensors) if anew else weight_cache.kept(kind, tensors, make)
    rest = list(made)
    result, widths = [], []
    for p in layers:
        weight = rest.pop(0)
        bias = None if p.bias is None else rest.pop(0)
        norm = p.ln_weight is not None
        gamma, beta = (rest.pop(0), rest.pop(0)) if norm else (None, None)
        result.append(p._replace(weight=weight, bias=bias, ln_weight=gamma, ln_bias=beta))
        widths.append(p.weight.shape[0] if norm else 0)
    return result, widths


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
    """Fold replaces ``2 D U`` multiply-adds a row by ``U^2``: worth it where U is below 2 D."""
    return hidden < 1.8 * latent


def trained_fold_pays(hidden: int, latent: int, evaluations: int) -> bool:
    """The same where its weight is trained: the fold's own three GEMMs, in float64, cost as much.

    ``evaluations`` are of the network: rows times macro steps times stages. Measured on row
    programs from 128 features on (docs/performance.md).
    """
    if min(hidden, latent) < 128 or not fold_pays(hidden, latent):
        return False
    return evaluations * (2 * latent - hidden) >= 6 * hidden * latent


def _folded_16bit(compute: torch.dtype, w_z: Tensor, *head: Tensor) -> tuple[Tensor, ...]:
    """The same in fp32, where GEMMs round ``W1z W3`` to ``compute``."""
    with fp32_mode(False, w_z):
        folded = [w_z @ x for x in head]
    weight_cache.attach(folded[0], folded[0].detach().to(compute))
    return tuple(folded)


def _folds(
    choice: Choice,
    net: Sequence[Layer],
    latent: int,
    evaluations: int,
    wgrad: bool,
    step: FusedStep,
) -> bool:
    """Whether to fold: as it is asked for, else where it pays."""
    asked = algebra.in_force().fold if step.fold is None else step.fold
    if asked is None or (asked and not can_fold(net)):
        hidden = step.net[0].weight.shape[0]
        if not wgrad or choice.for_tensor_cores:
            pays = fold_pays(hidden, latent)
        else:  # measured on row programs
            exact = choice.name == "native" and choice.precision.compute is None
            pays = exact and trained_fold_pays(hidden, latent, evaluations)
        asked = pays and can_fold(net)
    return asked


def _snapshot(layers: Sequence[Layer], wgrad: bool) -> list[Layer]:
    """Copies of layers, that a backward pass finds as the fold's weights were made of them.

    Else weights that somebody writes to after the forward pass would meet a fold of older ones.
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
    choice: Choice,
    step: FusedStep,
    latent: int,
    action: int,
    task: Tensor | None = None,
    *,
    rows: int = 0,
) -> Packed:
    """Split the first weight by inputs and, where it pays, fold the head.

    Args:
        choice: what it is for.
        step: the macro step.
        latent: D.
        action: A.
        task: ``[..., E]`` or None.
        rows: of all macro steps.
    """
    what = DynamicsSpec((), step.method, step.substeps, False)
    embedding = 0 if task is None else task.shape[-1]
    wgrad = require_grad(layer_tensors(step.net))
    net, rms = centred(choice, step.net)
    evaluations = rows * len(what.stages)
    fold = what.method != "map" and _folds(choice, net, latent, evaluations, wgrad, step)
    if fold and not any(rms):  # what is centred is a copy
        net = _snapshot(net, wgrad)
    first, *others = net
    if step.task_first:
        w_z, w_task, w_a = first.weight.split([latent, embedding, action], 1)
        w_tau = None
    else:
        w_z, w_a, tau, w_task = first.weight.split([latent, action, int(what.timed), embedding], 1)
        w_tau = tau.squeeze(1) if what.timed else None
    norm = [first.ln_weight, first.ln_bias]
    params = [t.contiguous() for t in norm if t is not None]
    if not fold:
        params += flat(others)
    else:
        head = others[-1]
        params += flat(others[:-1])
        factors = (w_z, head.weight, *(() if head.bias is None else (head.bias,)))
        make: Callable[..., tuple[Tensor, ...]] = folded
        compute = choice.precision.compute
        if choice.for_tensor_cores and compute is not None:
            make = partial(_folded_16bit, compute)
        anew = wgrad or watched()
        params += make(*factors) if anew else weight_cache.kept(("fold", compute), factors, make)
        params.append(head.weight)
        if head.bias is not None:
            params.append(head.bias.contiguous())
    spec = DynamicsSpec(specs_of(net, widths=rms), step.method, step.substeps, fold)
    return Packed(
        encode_dynamics(spec),
        w_z,
        w_a,
        None if w_tau is None else w_tau.contiguous(),
        w_task if embedding else None,
        first.bias,
        params,
    )
