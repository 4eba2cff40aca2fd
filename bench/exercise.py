"""Small odd-sized work through every GPU kernel, to be run under compute-sanitizer.

python -m bench.exercise [--device cuda]

Checks no result: it prints what ran and what failed, and the sanitizer says whether an access was
wrong. Nothing more is tried where the CUDA context is lost.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import torch

from bench import agent, esnr, providers, rollouts
from bench.cases import Provider, Workload
from bench.session import say
from bench.sizes import alg_config
from pwm_fast.config import AlgConfig


def small(kind: str) -> AlgConfig:
    """A published configuration with widths that fit no tile; ``flow`` or ``mlp``."""
    alg = alg_config("5M_flow" if kind == "flow" else "5M")
    model = alg.world_model
    model.latent_dim, model.units = 16, [17, 17]
    model.encoder_units, model.reward_units = [12], [14, 14]
    alg.actor.units, alg.critic.units = [12, 10], [11, 9]
    alg.actor.batch_size, alg.model_learning.batch_size = 100, 20
    alg.model_learning.updates, alg.critic.passes = 2, 1
    return alg


def workloads(device: torch.device) -> dict[str, Callable[[], Workload]]:
    """What is run, by name."""
    return {
        f"rollout of {kind}, {mode}": lambda kind=kind, mode=mode: rollouts.build(
            small(kind), 37, mode, device, 3
        )
        for kind in ("flow", "mlp")
        for mode in ("forward", "backward")
    } | {
        "world model": lambda: agent.build_world_model(small("flow"), 19, device, 3),
        "critic": lambda: agent.build_critic(small("flow"), 13, device, 3),
        "ESNR": lambda: esnr.build((torch.Size((50, 7)), torch.Size((9,))), device),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Status 0 if at least one precision ran and none failed."""
    parser = argparse.ArgumentParser(prog="python -m bench.exercise", description=__doc__)
    parser.add_argument("--device", default="cuda", type=torch.device)
    device = parser.parse_args(argv).device
    outcomes = []
    for title, build in workloads(device).items():
        work = build()
        for name in providers.OURS:
            if name not in work.make:
                continue
            found = outcome(work.make[name], device)
            outcomes.append(found.partition(":")[0])
            print(f"{title}, {name}: {found}", flush=True)
            if outcomes[-1] == "Error":
                _wait(device)  # raises where the context is lost
    return 0 if "ran" in outcomes and "Error" not in outcomes else 1


def outcome(make: Callable[[], Provider], device: torch.device) -> str:
    """``ran``, or why not."""
    try:
        make().call()
        _wait(device)
    except providers.Absent as error:
        return f"absent: {error}"
    except Exception as error:
        return f"Error: {say(error)}"
    return "ran"


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    raise SystemExit(main())
