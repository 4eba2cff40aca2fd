"""The signal-to-noise ratio of gradient samples."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench import providers, published
from bench.cases import QUICK, Case, Provider, Workload, assemble
from bench.gate import Outputs
from bench.measure import graphed
from bench.sizes import ACTION, OBS, alg_config
from pwm_fast import ops
from pwm_fast.models import make_world_model

SAMPLES = 16
TITLE = "ESNR of {} gradient samples"


def cases(device: torch.device) -> list[Case]:
    return [
        Case(
            f"esnr-{model}",
            {"work": TITLE.format(SAMPLES), "model": model, "batch": SAMPLES},
            partial(build, parameters(model)),
            ("published", "reference", "fast", "floor"),
            frozenset({"figures"}),
            QUICK if model == "5M" else frozenset(),
            memory=(1e9 if model == "5M" else 6e9),
        )
        for model in ("5M", "48M")
    ]


def parameters(model: str) -> tuple[torch.Size, ...]:
    """Of the world model's parameters: 1.5 M elements of ``5M``, 18.7 M of ``48M``, 150 M of
    ``317M``."""
    with torch.device("meta"):
        world_model = make_world_model(OBS, ACTION, alg_config(model).world_model)
    return tuple(p.shape for p in world_model.parameters())


def build(
    shapes: tuple[torch.Size, ...], device: torch.device, seed: int = 0, samples: int = SAMPLES
) -> Workload:
    """Samples of about as much noise as signal; the published code takes them flat."""
    sizes = [shape.numel() for shape in shapes]
    g = torch.Generator(device).manual_seed(seed)
    mean = torch.randn(sum(sizes), generator=g, device=device)
    flat = [mean + torch.randn(mean.shape, generator=g, device=device) for _ in range(samples)]
    lists = [
        [part.view(shape) for part, shape in zip(x.split(sizes), shapes, strict=True)] for x in flat
    ]

    def outputs(signal: Tensor, noise: Tensor) -> Outputs:
        return {"signal": signal, "noise": noise}

    def plain(name: str, compiled: Callable[[Any], Any]) -> Provider:
        def call() -> Outputs:
            return outputs(*published.esnr(flat))

        return Provider(call, call)

    def ours(name: str) -> Provider:
        def call() -> Outputs:
            with providers.backend(name, device, "esnr"):
                result = ops.esnr(lists)
            return outputs(result.signal, result.noise)

        return Provider(call, call)

    def truth() -> Outputs:
        signal = torch.zeros((), dtype=torch.float64, device=device)
        noise = torch.zeros_like(signal)
        for parts in zip(*(x.split(1 << 20) for x in flat), strict=True):
            stacked = torch.stack([p.double() for p in parts])
            center = stacked.mean(0)
            signal += center.square().sum()
            noise += (stacked - center).square().sum() / samples
        return outputs(signal, noise)

    def bottom(dtype: torch.dtype) -> Callable[[], object]:
        def read() -> None:
            """Every gradient read once, as fast as PyTorch reads memory."""
            for x in flat:
                x.sum()

        return graphed(read) if device.type == "cuda" else read

    make = assemble(device, plain, ours, bottom, operation="esnr")
    return Workload(make, truth, partial(build, shapes, device, seed + 1, samples), device=device)
