"""Rounding errors of trained flow dynamics, folded and not: ``python -m bench.errors_trained``.

Rollouts under known actions, as in the world model's update, and every gradient: of the dynamics'
parameters, the start and the actions. Relative L2 errors against float64, each divided by that of
PyTorch's own in the same dtype (its autocast, in 16 bits). On a CPU: in float32 the native kernels,
in 16 bits the fused algebra in PyTorch, where operands of the weight gradients, which are float32
there, are rounded as on a GPU. ``--docs`` writes the table into docs/performance.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from bench.errors import ACTION, BATCH, velocity_net
from bench.internals import folded, imagine, layered, mlp_backward, select, wgrad
from bench.pages import PERFORMANCE, publish
from pwm_fast import ops

SIZES = {"small": (64, 62, 4), "5M": (512, 510, 16)}  # latent, hidden, macro steps
GAINS = {"contracting": 1.0, "expansive": 2.0}  # of weights before a LayerNorm
SUBSTEPS = 2
HALVES = {"fast": torch.float16, "bf16": torch.bfloat16}
PRECISIONS = ("exact", *HALVES)


def run(
    size: str, gain: float, seed: int, dtype: torch.dtype, backend: str, fold: bool
) -> dict[str, Tensor]:
    """Latents and all gradients, in float64; the same draw in every dtype."""
    g = torch.Generator().manual_seed(seed)
    latent, hidden, horizon = SIZES[size]

    def made(x: Tensor) -> Tensor:
        return x.to(dtype).requires_grad_()

    net = velocity_net(g, latent, hidden, gain, 0.5 / gain**2, made)
    z0 = made(ops.simnorm(torch.randn(BATCH, latent, generator=g)))
    action = made(torch.rand(horizon, BATCH, ACTION, generator=g) * 2 - 1)
    z = ops.latent_rollout(z0, action, ops.Flow(net, SUBSTEPS, fold=fold), backend=backend)
    cotangent = torch.randn(z.shape, generator=g).to(z)
    leaves = {"start": z0, "actions": action}
    names = ("weight", "bias", "gamma", "beta")
    for i, p in enumerate(net):
        leaves |= {f"{n} {i}": x for n, x in zip(names, p[:4], strict=True) if x is not None}
    found = torch.autograd.grad(z, list(leaves.values()), cotangent)
    grads = dict(zip(leaves, found, strict=True))
    parts = grads.pop("weight 0").split([latent, ACTION, 1], 1)
    grads |= zip(("weight 0 of z", "weight 0 of a", "weight 0 of tau"), parts, strict=True)
    return {"latents": z.detach().double(), **{k: v.double() for k, v in grads.items()}}


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Weight gradients of operands that are rounded, with the factors that a GPU gives them."""

    def rounding(*args: Any, several: bool = True) -> Tensor:
        return wgrad.weight_grad_16bit(*args)

    with ExitStack() as patches:
        for module in (folded, imagine, layered, mlp_backward):
            rounded = mock.patch.object(module, "weight_grad", rounding)
            patches.enter_context(rounded)
        yield


def measure(size: str, precision: str, seeds: int) -> dict[str, dict[str, float]]:
    """The mean error of each result over draws, against PyTorch's, unfolded and folded."""
    half, backend = precision in HALVES, "torch" if precision in HALVES else "native"
    own: dict[str, float] = {}
    errors: dict[str, dict[str, float]] = {"not folded": {}, "folded": {}}
    for gain in GAINS.values():
        for seed in range(seeds):
            truth = run(size, gain, seed, torch.float64, "reference", False)
            with torch.autocast("cpu", dtype=HALVES.get(precision), enabled=half):
                _add(own, run(size, gain, seed, torch.float32, "reference", False), truth)
            for name, found in errors.items():
                with ExitStack() as settings:
                    if half:
                        settings.enter_context(as_on_a_gpu())
                        settings.enter_context(ops.algebra(pad=True))
                    settings.enter_context(select.precision(precision))
                    fold = name == "folded"
                    _add(found, run(size, gain, seed, torch.float32, backend, fold), truth)
    return {n: {k: e / own[k] for k, e in found.items()} for n, found in errors.items()}


def _add(errors: dict[str, float], found: dict[str, Tensor], truth: dict[str, Tensor]) -> None:
    for name, x in truth.items():
        error = float((found[name] - x).norm() / x.norm())
        errors[name] = errors.get(name, 0.0) + error


def table(results: dict[tuple[str, str], dict[str, dict[str, float]]]) -> str:
    """Markdown: the largest ratio of a case, whose it is, and the mean one."""
    heads = ("net, operands", "not folded: worst", "mean", "folded: worst", "mean")
    lines = [f"| {' | '.join(heads)} |", "|---" * 5 + "|"]
    for (size, precision), errors in results.items():
        cells = []
        for found in errors.values():
            worst = max(found, key=lambda name: found[name])
            cells += [f"{found[worst]:.2f}x ({worst})", f"{sum(found.values()) / len(found):.2f}x"]
        lines.append(f"| {size}, {precision} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print."""
    parser = argparse.ArgumentParser(prog="python -m bench.errors_trained", description=__doc__)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--seeds", type=int, default=2, help="draws a net")
    parser.add_argument("--docs", action="store_true", help="write into docs/performance.md")
    args = parser.parse_args(argv)
    results = {(s, p): measure(s, p, args.seeds) for s in args.sizes for p in PRECISIONS}
    text = table(results)
    publish(text, PERFORMANCE if args.docs else None, "trained")
    return 0


if __name__ == "__main__":
    sys.exit(main())
