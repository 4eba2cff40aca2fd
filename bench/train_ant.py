"""Train the Ant for some minutes and keep the learning curve; needs neither Hydra nor OmegaConf.

python -m bench.train_ant --minutes 10                        # pwm_5M_flow on the GPU
python -m bench.train_ant --minutes 1 --device cpu --alg pwm_tiny_flow --out /tmp/ant.json

Environments run on whatever engine is there: mujoco-warp on the GPU, or MuJoCo's threads. Writes
FILE.json (curve, epochs a second, machine, versions, commit) and FILE.png; the run itself, with its
checkpoint, stays in --run-dir.

Exit status: 0 trained to the end of the time, 1 training failed, 2 one line says what is missing.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from bench import environment, plain, results
from bench.environment import ROOT
from bench.results import Spread
from pwm_fast import config
from pwm_fast.config import ConfigError, TrainConfig
from pwm_fast.run import build, metrics
from pwm_fast.run.installation import usable_cpus
from pwm_fast.run.interrupt import Interrupt, Interrupted

EPOCHS = 15_000  # of a whole run, which the learning rates decay over
CURVE = ("epoch", "env_steps", "wall_time", "eval_reward", "eval_reward_std", "eval_episode_length")


class TimeLimit(Interrupt):
    """Stops a run after so many seconds, as a signal would.

    Args:
        seconds: from the first look on.
    """

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self._seconds = seconds
        self._end: float | None = None

    def check(self) -> None:
        """Raise :class:`Interrupted` if the time is over or a signal has come."""
        super().check()
        if self._end is None:
            self._end = time.monotonic() + self._seconds
        if time.monotonic() >= self._end:
            raise Interrupted


def configuration(options: argparse.Namespace, run_dir: Path) -> TrainConfig:
    """The run's configuration, as ``env=ant alg=...`` would compose it.

    Raises:
        ConfigError: a value cannot be used.
    """
    given = plain.load("env", "ant")
    own = {f.name for f in dataclasses.fields(config.EnvConfig)}
    env = {key: value for key, value in given.items() if key in own}
    env["options"] = {key: value for key, value in given.items() if key not in own}
    env["threads"] = options.threads or min(8, usable_cpus())
    return TrainConfig(
        env=config.EnvConfig(**env),
        alg=plain.algorithm(options.alg),
        seed=options.seed,
        epochs=options.epochs,
        num_envs=options.worlds,
        device=options.device,
        run_dir=str(run_dir),
        checkpoint=config.CheckpointConfig(every=0),
        eval=config.EvalConfig(every=options.eval_every),
        esnr=config.EsnrConfig(every=0),
    )


def train(run: TrainConfig, minutes: float) -> dict[str, Any]:
    """Train for so many minutes; what the result file says of it.

    Raises:
        ConfigError: the configuration cannot be used here, or no physics engine is installed.
    """
    from pwm_fast.run.logger import RunLogger
    from pwm_fast.run.rundir import RunDirectory
    from pwm_fast.run.trainer import Trainer

    device = build.select_device(run.device)
    build.seed_everything(run.seed)
    with closing(build.make_env(run, run.env_count, run.seed, device)) as env:
        agent = build.make_agent(run, env, device)
        replay = build.make_replay(run, env, device)
        with RunDirectory(Path(run.run_dir)) as directory, TimeLimit(60.0 * minutes) as stop:
            text = json.dumps(config.to_dict(run), indent=1)
            (directory.path / "config.json").write_text(text + "\n", "utf-8")
            trainer = Trainer(
                run,
                directory,
                env,
                agent,
                replay,
                lambda n: build.make_env(run, n, run.seed, device),
            )
            logger = RunLogger(run, directory)
            logger.say(
                f"ant x {run.env_count} on {engine_of(run, device)}, {run.alg.name} on {device}, "
                f"{minutes:g} minutes"
            )
            summary = trainer.run(logger, stop)
        rows = metrics.read(directory.metrics)
    per_epoch = run.alg.steps_per_epoch * run.env_count
    return {
        "alg": run.alg.name,
        "worlds": run.env_count,
        "seed": run.seed,
        "engine": engine_of(run, device),
        "status": summary["status"],
        "minutes": minutes,
        "epochs": summary["epochs"],
        "of_epochs": run.epochs,
        "env_steps": summary["env_steps"],
        "best": summary["best"],
        **speed(rows, per_epoch),
        "curve": curve(rows),
    }


def engine_of(run: TrainConfig, device: torch.device) -> str:
    """The physics engine in words."""
    engine = build.physics(run, device)
    return "" if engine is None else engine.describe(run.env.threads).removeprefix("physics: ")


def speed(rows: Sequence[metrics.Row], per_epoch: int) -> dict[str, float | None]:
    """Epochs a second, without evaluations (the median of learning epochs) and with all there is.

    Args:
        rows: of ``metrics.jsonl``.
        per_epoch: environment steps an epoch.
    """
    learning = [r for r in rows if r.get("actor_loss") is not None]
    rates = [r["steps_per_second"] / per_epoch for r in learning[1:]]  # the first bootstraps
    spent = learning[-1]["wall_time"] - learning[0]["wall_time"] if len(learning) > 1 else 0.0
    return {
        "epochs_per_second": float(f"{Spread.of(rates).p50:.4g}") if rates else None,
        "epochs_per_second_with_evaluations": (
            float(f"{(len(learning) - 1) / spent:.4g}") if spent > 0 else None
        ),
    }


def curve(rows: Sequence[metrics.Row]) -> list[dict[str, float]]:
    """The evaluations."""
    return [
        {k: round(float(row[k]), 3) for k in CURVE if row.get(k) is not None}
        for row in rows
        if row.get("eval_reward") is not None
    ]


def draw(result: dict[str, Any], path: Path) -> None:
    """The learning curve over minutes.

    Raises:
        ImportError: matplotlib is missing.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.8, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    points = result["run"]["curve"]
    minutes = [p["wall_time"] / 60.0 for p in points]
    mean = [p["eval_reward"] for p in points]
    std = [p["eval_reward_std"] for p in points]
    below, above = ([m + s * d for m, d in zip(mean, std, strict=True)] for s in (-1, 1))
    axes.fill_between(minutes, below, above, alpha=0.15, linewidth=0)
    axes.plot(minutes, mean, marker="o", markersize=3)
    axes.set_xlabel("minutes")
    axes.set_ylabel("return of evaluation episodes, mean ± std")
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    run, machine = result["run"], result["machine"]
    figure.suptitle(
        f"Ant, {run['alg']}, {run['epochs']} epochs, seed {run['seed']}; "
        f"{machine['gpu'] or machine['cpu']}",
        fontsize="small",
    )
    figure.savefig(path, format="png", dpi=120)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(
        prog="python -m bench.train_ant",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    found.add_argument("--minutes", type=float, required=True, metavar="N")
    found.add_argument("--device", default="cuda")
    found.add_argument("--alg", default="pwm_5M_flow")
    found.add_argument("--seed", type=int, default=0)
    found.add_argument(
        "--epochs", type=int, default=EPOCHS, help="of a whole run, for learning rates"
    )
    found.add_argument("--worlds", type=int, help="robots (128)")
    found.add_argument("--threads", type=int, help="physics threads of MuJoCo (at most 8)")
    found.add_argument("--eval-every", type=int, default=250, metavar="EPOCHS")
    found.add_argument("--out", type=Path, metavar="FILE.json")
    found.add_argument("--run-dir", type=Path, help="a new folder in build/gpu")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """See the module."""
    options = parser().parse_args(argv)
    try:
        if not 0.0 < options.minutes < float("inf"):
            raise ConfigError(f"--minutes must be positive, got {options.minutes}")
        device = build.select_device(options.device)
        folder = options.run_dir
        if folder is None:
            (ROOT / "build" / "gpu").mkdir(parents=True, exist_ok=True)
            folder = Path(tempfile.mkdtemp(prefix="ant-", dir=ROOT / "build" / "gpu"))
        run = configuration(options, folder)
        result = {
            "schema": results.SCHEMA,
            **environment.describe(device),
            "run": train(run, options.minutes),
        }
    except (ConfigError, ImportError) as error:
        print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    path = options.out or results.STORE / f"ant_{environment.slug(device)}.json"
    results.write(path, result)
    try:
        draw(result, path.with_suffix(".png"))
    except ImportError as error:
        print(f"no figure was drawn: {error}")
    found = result["run"]
    last = found["curve"][-1] if found["curve"] else {}
    print(
        f"{found['epochs']} epochs in {options.minutes:g} minutes, "
        f"{found['epochs_per_second']} epochs/s without evaluations; last evaluation "
        f"{last.get('eval_reward')}; {path}"
    )
    return 0 if found["status"] in ("finished", "interrupted") else 1


if __name__ == "__main__":
    raise SystemExit(main())
