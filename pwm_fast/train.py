"""``python -m pwm_fast.train env=ant alg=pwm_5M_flow epochs=100 seed=42``: train an agent.

Exit status: 0 finished, 1 Hydra could not compose the configuration, 2 a usable message says what is
wrong, 128 + signal number after SIGINT or SIGTERM (a checkpoint and the plots are written).
"""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pwm_fast import checkpoint
from pwm_fast import config as configuration
from pwm_fast.agent import PWM
from pwm_fast.checkpoint import CheckpointError
from pwm_fast.config import ConfigError, TrainConfig
from pwm_fast.envs import VectorEnv, make
from pwm_fast.interrupt import Interrupt
from pwm_fast.logger import RunLogger
from pwm_fast.replay import Replay
from pwm_fast.rundir import RunDirectory
from pwm_fast.trainer import Trainer, TrainingDiverged

# What a user can mend: shown as one line, without a traceback.
USER_ERRORS = (ConfigError, CheckpointError, TrainingDiverged, ImportError, OSError, ValueError)


def select_device(name: str) -> torch.device:
    """The device that ``device=`` names.

    Raises:
        ConfigError: CUDA was asked for and torch sees no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise ConfigError(
                f"device={name}, but torch {torch.__version__} sees {count} CUDA devices; "
                "use device=cpu or device=auto"
            )
    return device


def set_threads(threads: int | None) -> None:
    """Set torch's CPU threads: as given, else what Slurm allots, else torch's own choice."""
    if threads is None:
        allotted = os.environ.get("SLURM_CPUS_PER_TASK", "")
        threads = int(allotted) if allotted.isdigit() and int(allotted) > 0 else None
    if threads is not None:
        torch.set_num_threads(threads)


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and torch's global generators."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def make_env(config: TrainConfig, num_envs: int, seed: int) -> VectorEnv:
    """The environment of a run, with ``num_envs`` worlds."""
    return make(
        config.env.name,
        num_envs,
        seed=seed,
        max_episode_steps=config.env.max_episode_steps,
        threads=config.env.threads,
        **config.env.options,
    )


def make_agent(config: TrainConfig, env: VectorEnv, device: torch.device) -> PWM:
    """The agent of a run, for the observations and actions of ``env``."""
    return PWM(
        env.single_observation_space.shape[0],
        env.single_action_space.shape[0],
        config.alg,
        can_terminate=env.can_terminate,
        device=device,
    )


def train(config: TrainConfig) -> tuple[dict[str, Any], int]:
    """Run one training run to its end, or on from where it was left.

    Returns:
        What ``run_dir/summary.json`` holds, and the process's exit status.

    Raises:
        ConfigError: the configuration cannot be used.
        CheckpointError: a checkpoint cannot be read, does not fit, or cannot be written.
        TrainingDiverged: too many updates in a row were not finite.
    """
    device = select_device(config.device)
    set_threads(config.threads)
    seed_everything(config.seed)
    env = make_env(config, config.worlds, config.seed)
    agent = make_agent(config, env, device)
    replay = Replay(
        config.alg.replay_capacity,
        config.worlds,
        env.single_observation_space.shape[0],
        env.single_action_space.shape[0],
        config.alg.horizon,
        device,
    )
    with RunDirectory(Path(config.run_dir)) as directory, Interrupt() as stop:
        source = directory.checkpoint_to_resume(config.resume)
        content = None if source is None else checkpoint.load(source, device="cpu")
        finished = directory.finished_summary(config) if config.resume == "auto" else None
        if finished is not None:
            print(
                f"{config.run_dir} holds this run, finished after {finished['epochs']} epochs: "
                "nothing to do. More epochs=, another seed= or another run_dir= starts work."
            )
            print_summary(finished)
            return finished, 0
        # Everything that can fail for the user's sake fails before the logger opens its files.
        logger = RunLogger(config, None if content is None else content["epoch"])
        trainer = Trainer(
            config, env, agent, replay, logger, lambda n: make_env(config, n, config.seed)
        )
        if content is not None and source is not None:
            trainer.restore(content, source, strict=config.resume == "auto")
            logger.say(f"continuing {source} at epoch {trainer.epoch}")
            del content
        directory.write_config(config)
        logger.say(describe(config, trainer, device))
        summary = trainer.run(stop)
        print_summary(summary)
        return summary, stop.exit_status if stop else 0


def describe(config: TrainConfig, trainer: Trainer, device: torch.device) -> str:
    """One paragraph on what is about to run."""
    counts = trainer.agent.world_model.num_parameters()
    shown = ", ".join(f"{name} {n:,}" for name, n in counts.items())
    return (
        f"{config.env.name} x {config.worlds}, {config.alg.name} on {device} "
        f"({torch.get_num_threads()} CPU threads), seed {config.seed}, {config.epochs} epochs\n"
        f"world-model parameters: {shown}\n"
        f"run directory: {config.run_dir}"
    )


def print_summary(summary: dict[str, Any]) -> None:
    """The result for people."""
    print(
        f"{summary['status']}: {summary['epochs']} epochs, {summary['env_steps']:,} environment "
        f"steps, {summary['wall_time']:.0f} s"
    )
    result = summary.get("evaluation")
    if result:
        success = result["success"]
        print(
            f"final evaluation over {result['episodes']} episodes: reward "
            f"{result['reward_mean']:.1f} +- {result['reward_std']:.1f}, episode length "
            f"{result['episode_length_mean']:.0f}"
            + ("" if success is None else f", goal held to the end in {success:.0%}")
        )


def run(cfg: Any) -> int:
    """Train as Hydra's configuration says; print a usable message for what a user can mend."""
    try:
        return train(configuration.from_hydra(cfg))[1]
    except USER_ERRORS as error:
        if os.environ.get("PWM_FAST_TRACEBACK"):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2


def main() -> None:
    """Compose the configuration with Hydra and train."""
    try:
        import hydra
        from hydra.core.config_store import ConfigStore
    except ImportError:
        print("error: training needs more packages: pip install 'pwm-fast[train]'", file=sys.stderr)
        raise SystemExit(2) from None

    ConfigStore.instance().store(name="train_schema", node=configuration.hydra_schema())
    statuses: list[int] = []

    @hydra.main(version_base="1.3", config_path="configs", config_name="config")
    def job(cfg: Any) -> int:
        statuses.append(run(cfg))
        return statuses[-1]

    job()
    raise SystemExit(max(statuses, default=0))


if __name__ == "__main__":
    main()
