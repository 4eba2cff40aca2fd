"""What the arms of the study cost: a world-model update and an epoch at 5M sizes, side by side.

python -m bench.frontier                 # into bench/results/frontier_<date>.json
python -m bench.frontier --rounds 5

Every arm's overrides are applied to ``pwm_5M`` or ``pwm_5M_flow``. In each round the published
MLP baseline (:mod:`bench.published`) and every arm run one world-model update on 256 windows and
one policy update on 128 rollouts, one after another. An epoch is 8 of the former and one of the
latter; acting and physics, the same for all, are left out.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench import environment, published
from bench.arms import CARTPOLE, LEARN, WM, Arm
from bench.results import STORE
from bench.sizes import OBS, alg_config, make_agent, make_windows
from pwm_fast.config import AlgConfig

PATTERN = "frontier_*.json"


def at_5M(arm: Arm) -> AlgConfig:
    """The 5M configuration with what tells the arm from others."""
    kind, *overrides = arm.overrides
    alg = alg_config("5M_flow" if kind.endswith("flow") else "5M")
    for override in overrides:
        key, _, text = override.partition("=")
        section = {WM: "world_model", LEARN: "model_learning"}[key.rpartition(".")[0]]
        value = text if text[0].isalpha() and text != "null" else json.loads(text)
        part = dataclasses.replace(getattr(alg, section), **{key.rpartition(".")[2]: value})
        alg = dataclasses.replace(alg, **{section: part})
    return alg


def seconds(call: Callable[[], object]) -> float:
    """Of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(arms: Sequence[Arm], rounds: int) -> dict[str, Any]:
    """Seconds of updates, each round's, of the published baseline and the arms."""
    device = torch.device("cpu")
    learners: dict[str, Any] = {
        "published": published.Learner(make_agent(alg_config("5M"), device))
    }
    learners |= {arm.name: make_agent(at_5M(arm), device) for arm in arms}
    alg = alg_config("5M")
    windows = make_windows(alg.model_learning.batch_size, device)
    obs = torch.randn(alg.actor.batch_size, OBS)
    found: dict[str, dict[str, list[float]]] = {
        name: {"world_model": [], "policy": []} for name in learners
    }
    for i in range(rounds + 1):
        for name, learner in learners.items():
            if name != "published" and i % 4 == 1:
                learner.measure_start_spread(windows)
            times = (
                seconds(lambda learner=learner: learner.update_world_model(windows)),
                seconds(lambda learner=learner: learner.update_policy(obs)),
            )
            if i:  # the first makes programs and caches
                for key, value in zip(("world_model", "policy"), times, strict=True):
                    found[name][key].append(value)
    return {
        **environment.describe(device),
        "updates": alg.model_learning.updates,
        "seconds": found,
    }


def ratios(result: dict[str, Any], name: str) -> tuple[float, float]:
    """How many times as fast as the published baseline an arm's update and epoch are."""

    def median(of: str, part: str) -> float:
        return statistics.median(result["seconds"][of][part])

    def epoch(of: str) -> float:
        return float(result["updates"] * median(of, "world_model") + median(of, "policy"))

    update = median("published", "world_model") / median(name, "world_model")
    return update, epoch("published") / epoch(name)


def stored() -> dict[str, Any] | None:
    """The newest stored result."""
    found = [json.loads(path.read_text("utf-8")) for path in STORE.glob(PATTERN)]
    return max(found, key=lambda r: str(r["date"]), default=None)


def main(argv: Sequence[str] | None = None) -> int:
    """Status 0."""
    parser = argparse.ArgumentParser(prog="python -m bench.frontier", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--arms", nargs="+", default=[arm.name for arm in CARTPOLE])
    parser.add_argument("--out", type=Path, help="default: bench/results/frontier_<date>.json")
    options = parser.parse_args(argv)
    arms = [arm for arm in CARTPOLE if arm.name in options.arms]
    result = measure(arms, options.rounds)
    out = options.out or STORE / f"frontier_{str(result['date'])[:10]}.json"
    out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    for arm in arms:
        update, epoch = ratios(result, arm.name)
        print(f"{arm.label}: update {update:.2f}x, epoch {epoch:.2f}x as fast as the published")
    print(f"wrote {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
