"""What the fused passes do not cover: such calls run on the reference."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pwm_fast.ops.types import Layer


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


def unsupported(layers: Sequence[Layer], order: str = "norm_act") -> str | None:
    """Why the fused algebra does not cover these layers; None if it does."""
    for i, layer in enumerate(layers):
        if layer.act == "simnorm" and (layer.ln_weight is None or order == "act_norm"):
            return f"layer {i} is SimNorm without a LayerNorm before it"
    return None


def unsupported_dynamics(net: Sequence[Layer]) -> str | None:
    """The same of a dynamics network, whose first GEMM is split by its inputs."""
    if net[0].ln_weight is None:
        return "the first layer has no LayerNorm"
    if any(p.drops for p in net):
        return "a layer drops out"
    return unsupported(net)


def can_fold(net: Sequence[Layer]) -> bool:
    """The head is linear and there is a hidden layer, so that its input can carry the state."""
    return len(net) > 1 and net[-1].ln_weight is None and net[-1].act == "none"


def layer_tensors(layers: Sequence[Layer]) -> list[Tensor]:
    """All tensors of some layers."""
    return [t for p in layers for t in p[:4] if t is not None]
