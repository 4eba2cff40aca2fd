"""Rounding errors of every precision, in whole rollouts: ``python -m bench.errors``.

Random networks of the published sizes (weights of standard deviation ``2 / sqrt(inputs)`` before a
LayerNorm, as trained ones are more expansive than fresh ones), 16 macro steps, K Heun substeps, an
actor; errors are relative L2 norms against float64. Writes ``bench/results/errors_DEVICE.json``
and, with ``--docs``, the table in docs/ops.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import environment, results
from bench.internals import select, why_missing
from bench.pages import OPS, publish
from pwm_fast import ops

SIZES = {"5M": (512, 510), "48M": (768, 1788)}  # latent, hidden
ACTION, ACTOR, HORIZON, BATCH = 8, (400, 200, 100), 16, 32

Net = list[ops.Layer]
Made = Callable[[Tensor], Tensor]


def layer(
    g: torch.Generator, n: int, k: int, gain: float, made: Made, *, norm: bool = True
) -> ops.Layer:
    """A random layer, by default with a LayerNorm; ``made`` takes each tensor in float32."""
    weight = made(torch.randn(n, k, generator=g) * gain / k**0.5)
    bias = made(0.02 * torch.randn(n, generator=g))
    if not norm:
        return ops.Layer(weight, bias)
    gamma = made(1.0 + 0.1 * torch.randn(n, generator=g))
    beta = made(0.1 * torch.randn(n, generator=g))
    return ops.Layer(weight, bias, gamma, beta, "mish")


def velocity_net(
    g: torch.Generator, latent: int, hidden: int, gain: float, last: float, made: Made
) -> Net:
    """A random velocity field; ``last`` is the gain of its head."""
    return [
        layer(g, hidden, latent + ACTION + 1, gain, made),
        layer(g, hidden, hidden, gain, made),
        layer(g, latent, hidden, last, made, norm=False),
    ]


def draw(size: str, dtype: torch.dtype, device: torch.device) -> tuple[Net, Net, Tensor, Tensor]:
    """Velocity field, actor, start latents ``[B, D]`` and noise, the same for every dtype."""
    g = torch.Generator().manual_seed(0)
    latent, hidden = SIZES[size]

    def made(x: Tensor, grad: bool = False) -> Tensor:
        return x.to(device, dtype).requires_grad_(grad)

    field = velocity_net(g, latent, hidden, 2.0, 0.1, made)
    learnt = partial(made, grad=True)
    actor = [layer(g, n, k, 1.0, learnt) for k, n in pairwise((latent, *ACTOR))]
    actor.append(layer(g, ACTION, ACTOR[-1], 1.0, learnt, norm=False))
    z0 = ops.simnorm(torch.randn(BATCH, latent, generator=g))
    noise = torch.randn(HORIZON, BATCH, ACTION, generator=g)
    return field, actor, made(z0), made(noise)


def run(
    size: str, substeps: int, dtype: torch.dtype, device: torch.device, backend: str
) -> tuple[Tensor, Tensor]:
    """Last latents, and the gradient of the actor as one vector, in float64."""
    field, actor, z0, noise = draw(size, dtype, device)
    g = torch.Generator().manual_seed(1)
    direction = torch.randn(z0.shape[1], 1, generator=g).to(z0)
    reward = [ops.Layer(torch.randn(1, z0.shape[1] + ACTION, generator=g).to(z0))]
    rollout = ops.imagine(
        z0,
        ops.Policy(actor, torch.full((ACTION,), 0.4).to(z0)),
        ops.Flow(field, substeps),
        ops.Heads(reward),
        noise=noise,
        detach=False,
        backend=backend,
    )
    loss = (rollout.z[-1] @ direction).sum() + rollout.reward.sum()
    parameters = [t for p in actor for t in p[:4] if t is not None]
    grads = torch.autograd.grad(loss, parameters)
    return rollout.z[-1].detach().double(), torch.cat([x.flatten() for x in grads]).double()


def rows(device: torch.device) -> dict[str, tuple[str, Callable[[], AbstractContextManager[Any]]]]:
    """What is measured: a backend and the context that it runs in."""

    def precise(name: str) -> Callable[[], AbstractContextManager[Any]]:
        return lambda: select.precision(name)

    def autocast() -> AbstractContextManager[Any]:
        return torch.autocast(device.type, dtype=torch.bfloat16)

    found: dict[str, tuple[str, Callable[[], AbstractContextManager[Any]]]] = {
        "PyTorch fp32": ("reference", nullcontext),
        "PyTorch bf16 autocast": ("reference", autocast),
    }
    if device.type == "cuda":
        found |= {f"{p}": ("auto", precise(p)) for p in ("exact", "tf32", "fast", "bf16")}
        return found
    if why_missing() is None:
        found |= {p: ("native", precise(p)) for p in ("exact", "bf16")}
    found["fast, emulated"] = ("torch", precise("fast"))
    return found


def measure(device: torch.device, sizes: Sequence[str], substeps: Sequence[int]) -> dict[str, Any]:
    """Errors by size, K and row."""
    cases = []
    for size in sizes:
        for k in substeps:
            truth = run(size, k, torch.float64, device, "reference")
            errors = {}
            for name, (backend, context) in rows(device).items():
                with context():
                    found = run(size, k, torch.float32, device, backend)
                errors[name] = [
                    float((a - b).norm() / b.norm()) for a, b in zip(found, truth, strict=True)
                ]
            cases.append({"size": size, "substeps": k, "errors": errors})
    return environment.describe(device) | {"batch": BATCH, "horizon": HORIZON, "cases": cases}


def table(result: dict[str, Any]) -> str:
    """A Markdown table: rows are precisions, columns sizes."""
    cases = result["cases"]
    heads = [f"{c['size']}, K = {c['substeps']}" for c in cases]
    lines = [
        "| precision | " + " | ".join(f"{h}: latent | actor gradient" for h in heads) + " |",
        "|---" * (1 + 2 * len(heads)) + "|",
    ]
    for name in cases[0]["errors"]:
        cells = [f"{e:.1e}" for c in cases for e in c["errors"][name]]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, store, print."""
    parser = argparse.ArgumentParser(prog="python -m bench.errors", description=__doc__)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--substeps", nargs="+", type=int, default=[2])
    parser.add_argument("--out", type=Path, help="default: bench/results/errors_DEVICE.json")
    parser.add_argument("--docs", action="store_true", help="write the table into docs/ops.md")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("error: --device=cuda, but torch sees no CUDA GPU", file=sys.stderr)
        return 2
    result = measure(device, args.sizes, args.substeps)
    out = args.out or results.STORE / f"errors_{device.type}.json"
    results.write(out, result)
    publish(table(result), OPS if args.docs else None, "errors")
    return 0


if __name__ == "__main__":
    sys.exit(main())
