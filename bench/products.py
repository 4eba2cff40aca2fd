"""``python -m bench.products``: which fused GEMMs and persistent rollouts agents ask for.

Recorded without a GPU, on tensors without data (:mod:`bench.fake_cuda`), from whole updates of the
shipped agents; ``--write`` stores them in ``bench/products.json`` for :mod:`bench.tune`.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

from bench.internals import planning
from pwm_fast.config import AlgConfig

GemmPlan, GemmShape = planning.GemmPlan, planning.GemmShape

STORE = Path(__file__).with_name("products.json")
#: Agents, and states that their actors start from; None: as configured. The most wanted first.
AGENTS: tuple[tuple[str, int | None], ...] = (
    ("5M_flow", None),
    ("48M_flow", None),
    ("5M_flow", 512),
    ("48M_flow", 512),
    ("317M_flow", None),
)


class Rollout(NamedTuple):
    """Sizes of a rollout that may run on the persistent kernels.

    Attributes:
        batch: B.
        padded: Up.
    """

    batch: int
    padded: int


class Asked(NamedTuple):
    """What an agent asks for, with 16-bit operands, most often first."""

    products: list[GemmShape]
    rollouts: list[Rollout]


def record(config: AlgConfig) -> Asked:
    """What the updates of an agent ask for."""
    from bench.internals import rollout_kernels as rollout
    from bench.internals import triton_gemm
    from bench.launches import count

    products: Counter[GemmShape] = Counter()
    rollouts: Counter[Rollout] = Counter()
    layout = rollout.choose_layout

    def spied(product: GemmShape, device: torch.device) -> GemmPlan | None:
        products[product._replace(input_precision="tf32")] += 1
        return planning.device_plan(product, device)

    def spied_rollout(batch: int, padded: int, *args: Any) -> Any:
        rollouts[Rollout(batch, padded)] += 1
        return layout(batch, padded, *args)

    with (
        mock.patch.object(triton_gemm, "device_plan", spied),
        mock.patch.object(rollout, "choose_layout", spied_rollout),
    ):
        count(config, "triton", "fast")

    def ordered(found: Counter[Any]) -> list[Any]:
        return sorted(found, key=lambda size: (-found[size], size))

    return Asked(ordered(products), ordered(rollouts))


def shipped(name: str, batch: int | None) -> AlgConfig:
    """A shipped agent; fewer substeps and passes, which ask for the same GEMMs."""
    from bench.sizes import alg_config

    config = alg_config(name, substeps=1)
    changed = replace(config, critic=replace(config.critic, passes=1))
    if batch is None:
        return changed
    return replace(changed, actor=replace(changed.actor, batch_size=batch))


def load(path: Path = STORE) -> dict[str, Asked]:
    """What is stored, by agent.

    Raises:
        ValueError: a shape is none.
    """
    found = {}
    for name, asked in json.loads(path.read_text("utf-8")).items():
        products = [GemmShape(*fields) for fields in asked["products"]]
        for product in products:
            product.check()
        found[name] = Asked(products, [Rollout(*sizes) for sizes in asked["rollouts"]])
    return found


def wanted(stored: dict[str, Asked]) -> tuple[list[GemmShape], list[Rollout]]:
    """Everything that is stored, once: of the products of one key the one asked for first."""
    products: dict[tuple[str, str], GemmShape] = {}
    rollouts: dict[Rollout, None] = {}
    for asked in stored.values():
        for product in asked.products:
            products.setdefault((product.kernel, product.key), product)
        rollouts.update(dict.fromkeys(asked.rollouts))
    return list(products.values()), list(rollouts)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print what is asked for; ``--write`` stores it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"store it in {STORE.name}")
    options = parser.parse_args(arguments)
    lines = []
    for name, batch in AGENTS:
        asked = record(shipped(name, batch))
        label = name if batch is None else f"{name}, batch {batch}"
        print(f"{label}: {len(asked.products)} products, {len(asked.rollouts)} rollouts")
        rows = ",\n   ".join(json.dumps(list(p[:-1])) for p in asked.products)
        rollouts = json.dumps([list(r) for r in asked.rollouts])
        lines.append(
            f' {json.dumps(label)}: {{\n  "products": [\n   {rows}],\n  "rollouts": {rollouts}}}'
        )
    if options.write:
        STORE.write_text("{\n" + ",\n".join(lines) + "\n}\n", "utf-8")


if __name__ == "__main__":
    main()
