"""What an operation computes, apart from its tensors; as text it is what an operator takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from torch import Tensor


@dataclass(frozen=True)
class LayerSpec:
    """What a layer does, without its parameters.

    Attributes:
        order: ``"norm_act"`` (Linear, LayerNorm, act) or ``"act_norm"`` (Linear, act, LayerNorm).
        act: ``"none"``, ``"mish"`` or ``"simnorm"``.
        bias: there is a bias.
        norm: there is a LayerNorm.
        group: SimNorm's group width.
        eps: LayerNorm's.
        width: of rows that are centred and padded (see :mod:`pwm_fast.backends.base`), else 0.
        drop: a dropout mask multiplies the Linear's output.
    """

    order: str
    act: str
    bias: bool
    norm: bool
    group: int
    eps: float
    width: int = 0
    drop: bool = False

    @property
    def fields(self) -> int:
        """Tensors that the layer has."""
        return 1 + self.bias + 2 * self.norm

    @property
    def plain(self) -> bool:
        """Nothing follows the Linear."""
        return not self.norm and self.act == "none"


@dataclass(frozen=True)
class DynamicsSpec:
    """What a macro step does.

    Attributes:
        layers: of the network; with ``fold`` its last layer is the folded head.
        method: ``"heun"`` or ``"euler"`` integrate a velocity; with ``"residual"`` the network's
            output is added to the latent, with ``"map"`` it is the next latent.
        substeps: K.
        fold: carry ``p = W1z z`` through the substeps.
    """

    layers: tuple[LayerSpec, ...]
    method: str
    substeps: int
    fold: bool

    @property
    def timed(self) -> bool:
        """The network takes a flow time."""
        return self.method in ("heun", "euler")

    @property
    def per_substep(self) -> int:
        """Evaluations of an integrator's step."""
        return 2 if self.method == "heun" else 1

    @property
    def stages(self) -> tuple[float, ...]:
        """Flow times of a macro step's evaluations."""
        k = self.substeps
        if not self.timed:
            return (0.0,)
        if self.method == "euler":
            return tuple(i / k for i in range(k))
        return tuple(t / k for i in range(k) for t in (i, i + 1))


class LayerParams(NamedTuple):
    """Tensors of one layer; weights ``[N, K]``, or ``[E, N, K]`` of an ensemble."""

    weight: Tensor
    bias: Tensor | None
    gamma: Tensor | None
    beta: Tensor | None


def split_params(specs: Sequence[LayerSpec], flat: Sequence[Tensor]) -> list[LayerParams]:
    """The flat parameter list of an op as one entry a layer."""
    layers, i = [], 0
    for spec in specs:
        weight = flat[i]
        i += 1
        bias = gamma = beta = None
        if spec.bias:
            bias = flat[i]
            i += 1
        if spec.norm:
            gamma, beta = flat[i], flat[i + 1]
            i += 2
        layers.append(LayerParams(weight, bias, gamma, beta))
    return layers


def encode_layers(specs: Sequence[LayerSpec]) -> str:
    """Layers as text; :func:`decode_layers` reads it."""
    return "|".join(
        f"{s.order},{s.act},{int(s.bias)},{int(s.norm)},{s.group},{s.eps!r},{s.width},{int(s.drop)}"
        for s in specs
    )


@lru_cache(maxsize=256)
def decode_layers(text: str) -> tuple[LayerSpec, ...]:
    """Layers of :func:`encode_layers`' text."""
    specs = []
    for part in text.split("|"):
        order, act, bias, norm, group, eps, width, drop = part.split(",")
        rest = int(group), float(eps), int(width), drop == "1"
        specs.append(LayerSpec(order, act, bias == "1", norm == "1", *rest))
    return tuple(specs)


def encode_dynamics(spec: DynamicsSpec) -> str:
    """A macro step as text; :func:`decode_dynamics` reads it."""
    return f"{spec.method};{spec.substeps};{int(spec.fold)};{encode_layers(spec.layers)}"


@lru_cache(maxsize=256)
def decode_dynamics(text: str) -> DynamicsSpec:
    """The macro step of :func:`encode_dynamics`' text."""
    method, substeps, fold, layers = text.split(";")
    return DynamicsSpec(decode_layers(layers), method, int(substeps), fold == "1")
