"""``python -m bench.launches``: kernels that an imagined rollout and the updates would launch.

``--write`` stores what it prints in ``bench/launches.json`` and puts it into docs/performance.md;
``tests/agent/test_fake_cuda.py`` counts again and compares.

Counted without a GPU, by running them on tensors without data (:mod:`bench.fake_cuda`). An operator
of PyTorch's counts once, so its numbers are lower bounds; a Triton kernel is one launch.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from bench import pages, plain
from bench.fake_cuda import DEVICE, FakeCuda
from bench.internals import select, weight_cache
from bench.sizes import ACTION, OBS
from pwm_fast.agent import PWM
from pwm_fast.config import (
    ActorConfig,
    AlgConfig,
    CriticConfig,
    ModelLearningConfig,
    WorldModelConfig,
)
from pwm_fast.replay import Windows

STEPS = ("rollout", "actor", "critics", "world model")
STORED = Path(__file__).with_name("launches.json")
NODE_US = 1.3  # of a graph's node on the device, assumed
# `tests`: a small agent, as the bound of the tests.
ALGS = ("tests", "pwm_5M_flow", "pwm_5M", "pwm_48M_flow")
WHOLE = ALGS[:2]  # counted with every provider, others with the first and the last

Launches = dict[str, Counter[str]]


def count(
    config: AlgConfig,
    backend: str = "auto",
    precision: str = "auto",
    *,
    can_terminate: bool = False,
    action_dims: dict[int, int] | None = None,
    cuda: FakeCuda | None = None,
) -> Launches:
    """Launches of each of :data:`STEPS`, by kernel.

    ``rollout`` is the imagined rollout that the actor's loss differentiates, forward; ``actor``,
    ``critics`` (all passes) and ``world model`` are whole updates with their optimiser steps, from
    the second update on.

    Args:
        config: of the agent.
        backend: of the operations.
        precision: of GEMMs.
        can_terminate: episodes may end.
        action_dims: components of the action that tasks read (:class:`pwm_fast.agent.PWM`).
        cuda: the device, by default ``FakeCuda()``; ``FakeCuda(compile=True)`` also compiles and
            launches all of it.

    Raises:
        HostSyncError: the host would wait for the device.
    """
    result: Launches = {}
    with cuda or FakeCuda() as cuda, select.backend(backend):
        with torch.device(DEVICE):
            agent = PWM(
                OBS,
                ACTION,
                config,
                can_terminate=can_terminate,
                device=DEVICE,
                graphs=False,
                precision=precision,
                action_dims=action_dims,
            )
        windows = fake_windows(config)
        obs = torch.randn(config.actor.batch_size, OBS, device=DEVICE)
        task = None
        if config.world_model.task_dim:
            task = torch.zeros(len(obs), dtype=torch.int64, device=DEVICE)
        rollout: list[Tensor | None] = []

        def actor() -> None:
            rollout[:] = agent._run("actor", agent._actor_update, obs, task).handed

        def imagine() -> None:
            with select.precision(agent.precision):
                agent._imagine(obs, task)

        steps: dict[str, Callable[[], object]] = {
            "rollout": imagine,
            "actor": actor,
            "critics": lambda: agent._run("critic", agent._critic_update, *rollout),
            "world model": lambda: agent._run("wm", agent._model_update, *windows),
        }
        for optimizer in agent.optimizers.values():  # makes Adam's state
            optimizer.apply(torch.zeros((), device=DEVICE), [None] * len(optimizer.params))
        for name, step in steps.items():
            cuda.launches = Counter()
            with weight_cache.capturing():  # as in CudaGraphs
                step()
            result[name] = Counter(cuda.launches)
    return result


def small() -> AlgConfig:
    """A small flow model over three steps."""
    return AlgConfig(
        world_model=WorldModelConfig(
            latent_dim=16, units=[14], encoder_units=[12], reward_units=[10], num_bins=11
        ),
        model_learning=ModelLearningConfig(batch_size=6),
        actor=ActorConfig(units=[12, 10], batch_size=6),
        critic=CriticConfig(units=[11, 9], passes=2, minibatches=2),
        horizon=3,
    )


def fake_windows(config: AlgConfig) -> Windows:
    """A batch of windows on the fake device: views of rows, as :meth:`Replay.sample` gives them."""
    h, b = config.horizon, config.model_learning.batch_size
    rows = torch.randn(h + 1, b, OBS + ACTION + 2, device=DEVICE)
    obs, action, reward, terminated = rows.split((OBS, ACTION, 1, 1), -1)
    task = torch.zeros(b, dtype=torch.int64, device=DEVICE)  # agents of one do not look at it
    return Windows(obs, action[:-1], reward[:-1, :, 0], terminated[:-1, :, 0], task)


def providers() -> list[tuple[str, str]]:
    """Backends and precisions that can run on a GPU: plain PyTorch, its fused algebra, kernels."""
    found = [("reference", "exact"), ("torch", "exact"), ("torch", "fast")]
    names = {backend.name for backend in select.OPERATIONS["imagine"].backends}
    return [*found, *([("triton", "exact"), ("triton", "fast")] if "triton" in names else [])]


def _config(alg: str) -> AlgConfig:
    return small() if alg == "tests" else plain.algorithm(alg)


def count_row(alg: str, provider: str) -> Launches:
    """:func:`count` of one row of the table."""
    return count(_config(alg), *provider.split(", "))


def rows() -> list[tuple[str, str]]:
    """Configuration and provider of every row."""
    every = [", ".join(provider) for provider in providers()]
    return [(a, p) for a in ALGS for p in (every if a in WHOLE else (every[0], every[-1]))]


def counted_with() -> str:
    """The torch whose operators the stored counts are of: that of constraints.txt."""
    pins = (Path(__file__).parents[1] / "constraints.txt").read_text()
    return next(line[7:].split()[0] for line in pins.splitlines() if line.startswith("torch=="))


def epoch(alg: str, counts: dict[str, int]) -> int:
    """Launches of an epoch's updates."""
    models = _config(alg).model_learning.updates * counts["world model"]
    return counts["actor"] + counts["critics"] + models


def table(results: dict[str, dict[str, dict[str, int]]]) -> str:
    """Markdown."""
    lines = [
        "| configuration | backend, precision | " + " | ".join(STEPS) + " | an epoch's updates |",
        "|---|---|" + "---:|" * (len(STEPS) + 1),
    ]
    for alg, rows in results.items():
        if alg == "tests" and len(results) > 1:
            continue
        for provider, counts in rows.items():
            numbers = (*(counts[s] for s in STEPS), epoch(alg, counts))
            cells = " | ".join(f"{n:,}" for n in numbers)
            lines.append(f"| `{alg}` | {provider} | {cells} |")
    return "\n".join(lines)


def load() -> dict[str, dict[str, dict[str, int]]]:
    """The stored counts."""
    return json.loads(STORED.read_text())


def section(results: dict[str, dict[str, dict[str, int]]]) -> str:
    """What stands in ``docs/performance.md``."""
    return f"{table(results)}\n\n{summary(results)}"


def summary(results: dict[str, dict[str, dict[str, int]]]) -> str:
    """What an epoch's updates take of a graph's nodes alone, in a sentence."""
    total = epoch("pwm_5M_flow", results["pwm_5M_flow"]["triton, fast"])
    return (
        f"As nodes of a graph alone, the {total:,} of an epoch of `pwm_5M_flow` in `fast` would "
        f"take {total * NODE_US / 1e3:.1f} ms at the assumed {NODE_US} us."
    )


def write(results: dict[str, dict[str, dict[str, int]]]) -> None:
    """Store the counts and put their table into ``docs/performance.md``."""
    STORED.write_text(json.dumps(results, indent=2) + "\n")
    pages.write(pages.PERFORMANCE, "launches", section(results))


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table; ``--write`` stores it, ``--kernels`` lists what is launched most."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--alg", nargs="*", default=ALGS, choices=ALGS)
    parser.add_argument("--kernels", type=int, default=0, metavar="N", help="list the N most often")
    parser.add_argument("--write", action="store_true", help="store, also in docs/performance.md")
    options = parser.parse_args(arguments)
    if options.write and set(options.alg) != set(ALGS):
        parser.error("--write stores every configuration: leave --alg out")
    if options.write and torch.__version__.split("+")[0] != counted_with():
        parser.error(f"--write stores what torch {counted_with()} does, not {torch.__version__}")
    results: dict[str, dict[str, dict[str, int]]] = {}
    for alg, provider in rows():
        if alg not in options.alg:
            continue
        launches = count_row(alg, provider)
        results.setdefault(alg, {})[provider] = {s: launches[s].total() for s in STEPS}
        for step in STEPS if options.kernels else ():
            most = ", ".join(f"{k} {n}" for k, n in launches[step].most_common(options.kernels))
            print(f"{alg}, {provider}, {step}: {most}")
    print(table(results))
    if options.write:
        write(results)


if __name__ == "__main__":
    main()
