"""Plain types that the operations take and return."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

from torch import Tensor

Activation = Literal["none", "mish", "simnorm"]
Method = Literal["heun", "euler"]
VelocityFn = Callable[[Tensor, float], Tensor]

ACTIVATIONS: tuple[Activation, ...] = ("none", "mish", "simnorm")
METHODS: tuple[Method, ...] = ("heun", "euler")


class Layer(NamedTuple):
    """Parameters of one layer: Linear, then (if ``ln_weight`` is given) LayerNorm, then ``act``.

    Attributes:
        weight: ``[N, K]``.
        bias: ``[N]`` or None.
        ln_weight: LayerNorm scale ``[N]``; None for a layer without LayerNorm.
        ln_bias: LayerNorm shift ``[N]``; given exactly when ``ln_weight`` is.
        act: ``"none"``, ``"mish"`` or ``"simnorm"``.
        simnorm_dim: group width of SimNorm; divides N.
        eps: LayerNorm's epsilon.
    """

    weight: Tensor
    bias: Tensor | None = None
    ln_weight: Tensor | None = None
    ln_bias: Tensor | None = None
    act: Activation = "none"
    simnorm_dim: int = 8
    eps: float = 1e-5


class ESNR(NamedTuple):
    """Expected signal-to-noise ratio of a gradient estimator (all tensors float64).

    Attributes:
        signal: squared norm of the mean gradient, scalar (of the debiased one where asked for).
        noise: mean squared distance of the samples from their mean, scalar.
        ratio: ``signal / max(noise, eps)``, scalar.
        db: ``10 log10(ratio)``, scalar.
        tensor_ratio: the same ratio per parameter tensor, ``[number of tensors]``.
    """

    signal: Tensor
    noise: Tensor
    ratio: Tensor
    db: Tensor
    tensor_ratio: Tensor
