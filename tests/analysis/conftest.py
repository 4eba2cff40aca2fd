"""Run directories written by hand, with curves that are known."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pwm_fast import config as configuration
from pwm_fast.config import TrainConfig

try:
    import hydra  # noqa: F401
    import matplotlib  # noqa: F401
    import yaml
except ImportError:
    collect_ignore_glob = ["test_*.py"]  # the commands need pwm-fast[train]

STEPS = 100  # environment steps an epoch
EVERY = 5  # epochs between evaluations


def config_of(alg: str, seed: int, env: dict[str, Any], **changes: Any) -> TrainConfig:
    """A run's configuration; ``changes`` have ``__`` for the dots of a key."""
    values: dict[str, Any] = {"env": env, "seed": seed, "epochs": 40, "run_dir": f"r/{alg}/{seed}"}
    values["alg"] = {"name": alg, "world_model": {"kind": "flow" if "flow" in alg else "mlp"}}
    for key, value in changes.items():
        *parents, last = key.split("__")
        place = values
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
    return configuration.from_dict(values)


def write_run(
    path: Path,
    alg: str = "pwm_tiny_flow",
    seed: int = 0,
    *,
    returns: Callable[[float], float] = lambda steps: steps / 10.0,
    epochs: int = 40,
    status: str | None = "finished",
    final: float = 100.0,
    env: dict[str, Any] | None = None,
    seconds: float = 2.0,
    success: float | None = 0.5,
    tasks: dict[str, float] | None = None,
    **changes: Any,
) -> Path:
    """Write a run directory.

    Args:
        path: the directory.
        alg: name of the configuration.
        seed: of the run.
        returns: of an evaluation, from the environment steps.
        epochs: logged.
        status: of ``summary.json``; None writes none, as of a run that is going on.
        final: return of the final evaluation.
        env: the environment's keys.
        seconds: an epoch takes.
        success: of every evaluation; None for a task without a goal.
        tasks: how many times the mean return each of several tasks has.
        **changes: of the configuration.
    """
    path.mkdir(parents=True)
    config = config_of(alg, seed, env or {"name": "cartpole", "start": "hanging"}, **changes)
    dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)  # of hundreds of files: C's is faster
    (path / "config.yaml").write_text(yaml.dump(configuration.to_dict(config), Dumper=dumper))
    rows = []
    for epoch in range(epochs + 1):
        row: dict[str, Any] = {"epoch": epoch, "env_steps": epoch * STEPS}
        row["wall_time"] = epoch * seconds
        if epoch % EVERY == 0:
            row.update(eval_reward=returns(epoch * STEPS), eval_reward_std=1.0)
            row.update({} if success is None else {"eval_success": success})
            for name, times in (tasks or {}).items():
                row[f"eval_reward/{name}"] = times * returns(epoch * STEPS)
        if epoch:
            row["steps_per_second"] = STEPS / seconds
        if epoch > 4:
            noise = 1.0 + 0.1 * ((epoch * 7 + seed) % 5)
            row.update(wm_loss=1.0 / epoch, wm_grad_norm=3.0 * noise, actor_grad_norm=0.1 * noise)
            row.update(critic_grad_norm=10.0 / epoch, skipped_updates=0)
            if epoch % 10 == 0:
                row["esnr_db"] = 5.0 - epoch / 10.0 + seed
        rows.append(row)
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if status is not None:
        summary: dict[str, Any] = {
            "status": status,
            "epochs": epochs,
            "wall_time": rows[-1]["wall_time"],
        }
        if status == "finished":
            summary["evaluation"] = {
                "reward_mean": final,
                "reward_std": 2.0,
                "episode_length_mean": 240.0,
                "success": success,
                "tasks": {k: {"reward_mean": v * final} for k, v in (tasks or {}).items()},
            }
        (path / "summary.json").write_text(json.dumps(summary))
    return path


@pytest.fixture(scope="session")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A baseline and a flow, four seeds each, and all that can be wrong; not to be written.

    The flow's runs end at 100, 110, 120, 130 and the baseline's at 40, 50, 60, 70; seed 3 of the
    flow is still going on.
    """
    top = tmp_path_factory.mktemp("study")
    for seed in range(4):
        unfinished = {"epochs": 22, "status": None} if seed == 3 else {}
        write_run(
            top / f"runs/flow/seed_{seed}",
            "pwm_tiny_flow",
            seed,
            returns=lambda steps, seed=seed: steps / 40.0 + 10.0 * seed,
            final=100.0 + 10.0 * seed,
            seconds=2.0 + seed,
            **unfinished,
        )
        write_run(
            top / f"runs/base/seed_{seed}",
            "pwm_tiny",
            seed,
            returns=lambda steps, seed=seed: steps / 100.0 + 10.0 * seed,
            final=40.0 + 10.0 * seed,
        )
    torn = top / "runs/flow/seed_3/metrics.jsonl"
    torn.write_text(torn.read_text() + '{"epoch": 23, "env_st')
    (top / "runs/no_config").mkdir()
    (top / "runs/no_config/metrics.jsonl").write_text('{"epoch": 0, "env_steps": 0}\n')
    write_run(top / "runs/empty", seed=7)
    (top / "runs/empty/metrics.jsonl").write_text("")
    return top
