"""Specifications as strings: what an operator's schema can carry."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from pwm_fast.fused.rollout import DynamicsSpec
from pwm_fast.fused.stack import LayerSpec


def encode_layers(specs: Sequence[LayerSpec]) -> str:
    """Layers as text; :func:`decode_layers` reads it."""
    return "|".join(
        f"{s.order},{s.act},{int(s.bias)},{int(s.norm)},{s.group},{s.eps!r},{s.width}"
        for s in specs
    )


@lru_cache(maxsize=256)
def decode_layers(text: str) -> tuple[LayerSpec, ...]:
    """Layers of :func:`encode_layers`' text."""
    specs = []
    for part in text.split("|"):
        order, act, bias, norm, group, eps, width = part.split(",")
        specs.append(
            LayerSpec(order, act, bias == "1", norm == "1", int(group), float(eps), int(width))
        )
    return tuple(specs)


def encode_dynamics(spec: DynamicsSpec) -> str:
    """A macro step as text; :func:`decode_dynamics` reads it."""
    return f"{spec.method};{spec.substeps};{int(spec.fold)};{encode_layers(spec.layers)}"


@lru_cache(maxsize=256)
def decode_dynamics(text: str) -> DynamicsSpec:
    """The macro step of :func:`encode_dynamics`' text."""
    method, substeps, fold, layers = text.split(";")
    return DynamicsSpec(decode_layers(layers), method, int(substeps), fold == "1")
