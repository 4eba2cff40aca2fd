"""What the anchors of docs/results.md share: how a learner is followed, and what is kept of it."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from contextlib import closing
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, cast

import torch

from bench import environment
from pwm_fast import envs, seeding
from pwm_fast.files import write_text
from pwm_fast.run.evaluation import evaluate
from pwm_fast.seeding import Purpose

EPISODES = 12


class Learner(Protocol):
    """What is followed."""

    @property
    def env_steps(self) -> int:
        """Taken so far, of all envs together."""

    @property
    def settings(self) -> dict[str, Any]:
        """What is kept beside the curve."""

    def learn(self, steps: int) -> None:
        """Take at least that many steps more, and learn from them."""

    def act(
        self, obs: torch.Tensor, *, task: torch.Tensor | None = None, deterministic: bool = False
    ) -> torch.Tensor:
        """Actions ``[N, A]`` for observations ``[N, O]``; of one task."""

    def why_not_finite(self, obs: torch.Tensor, task: torch.Tensor | None = None) -> str | None:
        """What of the policy is not finite, if that is known."""


def follow(
    learner: Learner, options: argparse.Namespace, packages: Sequence[str], stem: str
) -> dict[str, Any]:
    """Train, evaluate every so many steps, and keep the curve in a file as it grows.

    Args:
        learner: not yet trained.
        options: those of :func:`parser`, which the learner was made with.
        packages: whose versions are kept.
        stem: of the folder, under that of the robot.
    """
    out = options.out / options.env / stem / f"seed_{options.seed}.json"
    judged = seeding.stream(0, Purpose.EVALUATE)
    curve: dict[str, list[float]] = {
        key: [] for key in ("env_steps", "seconds", "cpu_seconds", "eval_reward")
    }
    result = {
        "env": options.env,
        "seed": options.seed,
        "steps": options.steps,
        "every": options.every,
        **learner.settings,
        "versions": {package: version(package) for package in packages}
        | {"torch": str(torch.__version__)},
        "threads": torch.get_num_threads(),
        "machine": environment.machine(torch.device("cpu")),
        "commit": environment.commit(),
        "curve": curve,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    spent = cpu = 0.0
    with closing(envs.make(options.env, EPISODES, seed=judged)) as judging:
        while True:
            found = evaluate(cast(Any, learner), judging, judged)
            curve["env_steps"].append(learner.env_steps)
            curve["seconds"].append(round(spent, 1))
            curve["cpu_seconds"].append(round(cpu, 1))  # of all threads
            curve["eval_reward"].append(found.returns.mean().item())
            result["returns"] = found.returns.tolist()
            result["success"] = None if found.held is None else found.held.float().mean().item()
            write_text(out, json.dumps(result, indent=1) + "\n")
            print(
                f"env_steps {learner.env_steps}  reward {curve['eval_reward'][-1]:.1f}  "
                f"{spent:.0f} s, {cpu:.0f} s of CPU",
                flush=True,
            )
            if learner.env_steps >= options.steps:
                print(out)
                return result
            started, worked = time.perf_counter(), time.process_time()
            learner.learn(min(options.every, options.steps - learner.env_steps))
            spent += time.perf_counter() - started
            cpu += time.process_time() - worked


def parser(program: str, description: str | None) -> argparse.ArgumentParser:
    """A command's options, those that all have."""
    found = argparse.ArgumentParser(prog=program, description=description)
    found.formatter_class = argparse.RawDescriptionHelpFormatter
    found.add_argument("env", choices=sorted(envs.TASKS))
    found.add_argument("--steps", type=positive, default=1_000_000, help="of all envs together")
    found.add_argument("--seed", type=int, default=0)
    found.add_argument("--every", type=positive, default=50_000, help="steps between evaluations")
    found.add_argument("--threads", type=positive, default=1, help="of torch")
    found.add_argument("--out", type=Path, default=Path("runs/study"))
    return found


def positive(text: str) -> int:
    """A whole number above 0.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text}")
    return int(text)
