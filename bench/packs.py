"""What it costs to compare packs with their weights: ``python -m bench.packs``.

On a CPU an operation compares a checksum of the weights before it takes packed copies of them
(pwm_fast/fused/weight_cache.py). Calls with and without the comparison take turns in one process.
Writes ``bench/results/packs_cpu.json`` and, with ``--docs``, the table in docs/ops.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bench import environment, results
from bench.errors import ACTION, velocity_net
from bench.internals import fingerprint, select, weight_cache
from bench.measure import CpuClock, Effort, race
from bench.pages import OPS, publish
from pwm_fast import ops
from pwm_fast.ops import Layer

RESULT = results.STORE / "packs_cpu.json"
SIZES = ((64, 96), (510, 512))  # latent and hidden width, of the tiny and of the 5M model
PRECISIONS = ("exact", "bf16")
BATCHES = (1, 64, 128, 512)
STEPS, SUBSTEPS = 16, 2

Fingerprint = Callable[[Sequence[Tensor]], Any]


def field(latent: int, hidden: int) -> list[Layer]:
    """A frozen velocity field, whose head is so small that 16 macro steps stay small."""
    return velocity_net(torch.Generator(), latent, hidden, 1.0, 0.1, lambda x: x)


def calls(latent: int, hidden: int, batch: int) -> dict[str, Callable[[], object]]:
    """Forward and, where it says so, backward passes on latents ``[batch, latent]``."""
    net = field(latent, hidden)
    z = torch.rand(batch, latent, requires_grad=True)
    a = torch.rand(STEPS, batch, ACTION) * 2 - 1

    def step() -> Tensor:
        return ops.flow_step(z, a[0], net, SUBSTEPS)

    def rollout() -> Tensor:
        return ops.latent_rollout(z, a, ops.Flow(net, substeps=SUBSTEPS))

    def forward(call: Callable[[], Tensor]) -> Callable[[], object]:
        return torch.no_grad()(call)

    def backward(call: Callable[[], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(call().sum(), z)

    return {
        "`flow_step`, forward": forward(step),
        "`flow_step`, both": backward(step),
        f"{STEPS} macro steps, forward": forward(rollout),
        f"{STEPS} macro steps, both": backward(rollout),
    }


def asking(answer: Fingerprint, call: Callable[[], object]) -> Callable[[], object]:
    """The call, to which this says whether weights are what they were."""

    def run() -> object:
        vars(weight_cache)["fingerprint"] = answer
        try:
            return call()
        finally:
            vars(weight_cache)["fingerprint"] = fingerprint

    return run


def believing() -> Fingerprint:
    """The fingerprint of the first time, so that its packs are those of the calls which compare."""
    known: dict[tuple[int, ...], object] = {}

    def recall(tensors: Sequence[Tensor]) -> object:
        key = tuple(x.data_ptr() for x in tensors)
        if key not in known:
            known[key] = fingerprint(tensors)
        return known[key]

    return recall


def measure(effort: Effort) -> list[dict[str, Any]]:
    """Milliseconds of each call, and how much longer it takes than without comparing.

    The ratio is the median over rounds, each of which has both.
    """
    rows: list[dict[str, Any]] = []
    for (latent, hidden), chosen, batch in itertools.product(SIZES, PRECISIONS, BATCHES):
        with select.precision(chosen):
            for name, call in calls(latent, hidden, batch).items():
                ops.invalidate()
                both = {"with": asking(fingerprint, call), "without": asking(believing(), call)}
                times = race(both, CpuClock(), effort)
                ratios = [a / b for a, b in zip(*times.values(), strict=True)]
                rows.append(
                    {
                        "latent": latent,
                        "hidden": hidden,
                        "precision": chosen,
                        "batch": batch,
                        "call": name,
                        "ms": 1e3 * statistics.median(times["with"]),
                        "ratio": statistics.median(ratios),
                        "ratios": ratios,
                    }
                )
                print(*list(rows[-1].values())[:-1], flush=True)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """A row a size, precision and call; a column a batch; per cent of the call, in both passes."""
    lines = [
        f"| D, U | precision | call | {' | '.join(f'batch {b}' for b in BATCHES)} |",
        f"|---|---|---|{'---|' * len(BATCHES)}",
    ]
    found = {
        (r["latent"], r["hidden"], r["precision"], r["call"], r["batch"]): r["ratio"] for r in rows
    }
    for latent, hidden, chosen, call in dict.fromkeys(key[:4] for key in found):
        ratios = [found[latent, hidden, chosen, call, batch] for batch in BATCHES]
        cells = [f"{100 * (ratio - 1):+.0f} %" for ratio in ratios]
        lines.append(f"| {latent}, {hidden} | {chosen} | {call} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure and store, or write the stored result into the documentation."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=4.0, help="a call (default: 4)")
    parser.add_argument("--docs", action="store_true", help="write the stored result's table")
    options = parser.parse_args()
    if options.docs:
        stored = json.loads(RESULT.read_text("utf-8"))
    else:
        torch.manual_seed(0)
        torch.set_num_threads(1)
        rows = measure(Effort(seconds=options.seconds, min_rounds=11))
        facts = environment.describe(torch.device("cpu"))
        stored = results.write(RESULT, {**facts, "rows": rows})
    machine = stored["machine"]
    head = (
        f"({machine['cpu']}, {machine['isa']}, one thread; {stored['date'][:10]}, commit "
        f"{stored['commit']['id']}):"
    )
    publish(f"{head}\n\n{table(stored['rows'])}", OPS if options.docs else None, "packs")


if __name__ == "__main__":
    main()
