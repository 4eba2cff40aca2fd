"""Layers packed for tensor cores: centred, padded, with 16-bit copies; and their gradients.

Kernels whose ``centre`` is not None (:func:`pwm_fast.kernels.centre.centre`) pack a layer in one
launch; else PyTorch does it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pwm_fast.backends.base import Kernels
from pwm_fast.backends.specs import LayerSpec, decode_layers
from pwm_fast.fused.algebra import PAD_TO
from pwm_fast.fused.gemm import ALIGNED

Parts = list[Tensor | None]  # a layer's weight, bias, gamma and beta


def padding(spec: LayerSpec, n: int, pad: bool) -> int:
    """Zeros behind the ``n`` outputs of a layer; SimNorm's groups leave no room for any."""
    return -n % PAD_TO if pad and spec.norm and spec.act != "simnorm" else 0


def split(specs: Sequence[LayerSpec], flat: Sequence[Tensor | None]) -> list[Parts]:
    """Tensors in the operators' order, as one entry a layer."""
    rest, layers = iter(flat), []
    for spec in specs:
        has = (True, spec.bias, spec.norm, spec.norm)
        layers.append([next(rest) if x else None for x in has])
    return layers


def empty(
    kernels: Kernels, specs: Sequence[LayerSpec], tensors: Sequence[Tensor], pad: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """What :func:`pack` fills: packed tensors, and 16-bit copies of the weights.

    There are copies where the kernels pack; they lie in memory as the weights do, whose rows then
    are aligned.
    """
    packed, copies = [], []
    before = 0  # zeros that the layer below has behind its outputs
    for spec, layer in zip(specs, split(specs, tensors), strict=True):
        weight, *vectors = layer
        assert weight is not None
        n, k = weight.shape
        rows, columns = n + padding(spec, n, pad), k + before
        compute = None if kernels.centre is None else kernels.precision.compute
        stride = columns if compute is None else -(-columns // ALIGNED) * ALIGNED
        packed.append(weight.new_empty(rows, stride)[:, :columns])
        packed += [x.new_empty(rows) for x in vectors if x is not None]
        if compute is not None:
            copies.append(weight.new_empty(rows, stride, dtype=compute)[:, :columns])
        before = rows - n
    return packed, copies


def pack(
    kernels: Kernels, tensors: list[Tensor], spec: str, pad: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """Layers whose weights and biases have no mean over outputs, where a LayerNorm follows."""
    specs = decode_layers(spec)
    packed, copies = empty(kernels, specs, tensors, pad)
    layers, outs = split(specs, tensors), split(specs, packed)
    for i, (each, layer, out) in enumerate(zip(specs, layers, outs, strict=True)):
        _copy(kernels, layer, out, each.norm, copies[i] if copies else None)
    return packed, copies


def pack_grads(
    kernels: Kernels, dpacked: list[Tensor | None], tensors: list[Tensor], spec: str
) -> list[Tensor | None]:
    """Gradients towards ``tensors`` for those towards what :func:`pack` made of them, or None."""
    specs = decode_layers(spec)
    found: Parts = []
    layers = zip(specs, split(specs, dpacked), split(specs, tensors), strict=True)
    for each, layer, like in layers:
        out = [
            None if g is None or x is None else torch.empty_like(x, memory_format=_CONTIGUOUS)
            for g, x in zip(layer, like, strict=True)
        ]
        _copy(kernels, layer, out, each.norm, None)
        found += [o for o, x in zip(out, like, strict=True) if x is not None]
    return found


_CONTIGUOUS = torch.contiguous_format


def _copy(kernels: Kernels, layer: Parts, out: Parts, centred: bool, copy: Tensor | None) -> None:
    """``out``: the layer without means where ``centred``, zeros where it has nothing."""
    if all(x is None for x in out):
        return
    centre = kernels.centre
    if centre is not None:
        layer = [x if x is None or x.stride(-1) == 1 else x.contiguous() for x in layer]
        centre(layer, out, centred=centred, cast=copy)
        return
    for i, (x, y) in enumerate(zip(layer, out, strict=True)):
        if x is None or y is None:
            continue
        inner = tuple(slice(min(a, b)) for a, b in zip(x.shape, y.shape, strict=True))
        x = x[inner]
        if centred and i < 2:
            # In float64: the mean that rounding leaves is not subtracted any more.
            x = (x.double() - x.double().mean(0)).to(y.dtype)
        if x.shape != y.shape:
            y.zero_()
        y[inner].copy_(x)
