"""``python -m pwm_fast.evaluate checkpoint=PATH episodes=12``: evaluate a trained policy.

Prints a table and writes the same as JSON. Exit status: 0, or 2 and one line on stderr that says
what is wrong.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pwm_fast import cli, files, seeding
from pwm_fast.config import THREADS, ConfigError, are_threads
from pwm_fast.run import build, checkpoint, metrics
from pwm_fast.run.acting import policy_of
from pwm_fast.run.evaluation import evaluate
from pwm_fast.seeding import Purpose

MISSING = "???"  # OmegaConf's mark of a value that has to be given


@dataclass
class EvaluateConfig:
    """One evaluation.

    Attributes:
        checkpoint: file of a training run; its configuration makes the environment and the agent.
        episodes: number of episodes, each in a world of its own.
        seed: of the start states, the same for every checkpoint and in no training run.
        device: ``auto`` (CUDA where there is one), ``cpu``, ``cuda`` or ``cuda:N``.
        threads: torch's CPU threads; null leaves its own choice (or SLURM_CPUS_PER_TASK's).
        json: where the JSON goes; null is ``<checkpoint>.evaluation.json`` beside the checkpoint,
            ``-`` is stdout (then the table goes to stderr).
    """

    checkpoint: str = MISSING
    episodes: int = 12
    seed: int = 0
    device: str = "auto"
    threads: int | None = None
    json: str | None = None

    def __post_init__(self) -> None:
        for ok, key, expected in (
            (self.episodes > 0, "episodes", "positive"),
            (seeding.in_range(self.seed), "seed", "in [0, 2^63)"),
            (are_threads(self.threads), "threads", THREADS),
        ):
            if not ok:
                raise ConfigError(f"{key} must be {expected}, got {getattr(self, key)!r}")


def evaluate_checkpoint(config: EvaluateConfig) -> dict[str, Any]:
    """Run the episodes; return what the JSON file holds.

    Raises:
        ConfigError: the configuration cannot be used.
        CheckpointError: the checkpoint cannot be read or does not fit this program.
    """
    path = checkpoint.named(config.checkpoint)
    device = build.select_device(config.device)
    run, content = build.load_run(path)
    build.set_threads(config.threads, run.alg, device)
    engine = build.physics(run, device)
    seed = seeding.stream(config.seed, Purpose.EVALUATE)
    with closing(build.make_env(run, config.episodes, seed, device)) as env:
        agent = build.restore_agent(path, run, content, env, device)
        with policy_of(path):
            result = evaluate(agent, env, seed)
    return {
        "checkpoint": str(path),
        "env": run.env.name,
        "alg": run.alg.name,
        "training_seed": run.seed,
        "epoch": content["epoch"],
        "env_steps": content["epoch"] * run.alg.steps_per_epoch * run.worlds,
        "seed": config.seed,
        "physics": None if engine is None else engine.name,
        **result.summary(),
    }


def table(result: dict[str, Any]) -> str:
    """The result for people."""
    returns, lengths = result["returns"], result["lengths"]
    lines = [
        f"checkpoint  {result['checkpoint']}",
        f"trained     {result['env']}, {result['alg']}, seed {result['training_seed']}: "
        f"{result['epoch']} epochs, {result['env_steps']:,} environment steps",
        f"evaluated   {result['episodes']} episodes, deterministic policy, seed {result['seed']}"
        + (f", physics {result['physics']}" if result["physics"] else ""),
        "",
        f"{'':16}{'mean':>12}{'std':>12}{'min':>12}{'max':>12}",
    ]
    for label, key, values in (
        ("return", "reward", returns),
        ("episode length", "episode_length", lengths),
    ):
        numbers = (result[f"{key}_mean"], result[f"{key}_std"], min(values), max(values))
        lines.append(f"{label:16}" + "".join(f"{n:12.1f}" for n in numbers))
    if result["success"] is not None:
        lines.append(f"{'goal held':16}{result['success']:12.0%}")
    if result["diverged"]:
        lines.append(diverged_line(result))
    return "\n".join(lines)


def diverged_line(result: dict[str, Any]) -> str:
    """What people should know of episodes that diverged, of an evaluation's summary."""
    count, episodes = result["diverged"], result["episodes"]
    return f"diverged: {count} of {episodes} episodes (their returns stop there)"


def run(cfg: Any) -> int:
    """Evaluate as Hydra's configuration says."""
    from omegaconf import OmegaConf

    if OmegaConf.is_missing(cfg, "checkpoint"):
        raise ConfigError("checkpoint=PATH is needed: a file such as runs/.../checkpoints/best.pt")
    config = OmegaConf.to_object(cfg)
    assert isinstance(config, EvaluateConfig)
    target = None if config.json == "-" else _target(config)
    result = evaluate_checkpoint(config)
    text = json.dumps(metrics.finite(result), indent=2)
    if target is None:
        print(table(result), file=sys.stderr)
        print(text)
    else:
        print(table(result))
        files.write_text(target, text + "\n")
        print(f"\nwritten to {target}")
    return 0


def _target(config: EvaluateConfig) -> Path:
    """Where the JSON goes, looked at before the work starts."""
    checkpoint_path = checkpoint.named(config.checkpoint)
    path = files.user_path(config.json or checkpoint_path.with_suffix(".evaluation.json"))
    if config.json and not path.parent.is_dir():
        raise ConfigError(f"json={config.json}: there is no directory {path.parent}")
    if path.is_dir() or (path.parent.is_dir() and not os.access(path.parent, os.W_OK)):
        raise ConfigError(f"json={path} cannot be written; give another json=PATH, or json=-")
    return path


def main() -> None:
    """Compose the configuration with Hydra and evaluate."""
    cli.main(run, "evaluate", EvaluateConfig, config_name="evaluate")


if __name__ == "__main__":
    main()
