"""``python -m pwm_fast.data export out=DIR checkpoint=PATH``: record episodes as a data set."""

from __future__ import annotations

import os
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pwm_fast import config as configuration
from pwm_fast import files, seeding
from pwm_fast.config import MISSING, Checked, ConfigError, TrainConfig
from pwm_fast.config.checks import checked, positive, positive_or_null, seed_range, thread_count
from pwm_fast.data.episodes import write_episode
from pwm_fast.data.manifest import register
from pwm_fast.data.task_names import write_names
from pwm_fast.envs import tasks_of
from pwm_fast.run import build, checkpoint
from pwm_fast.run.acting import policy_of
from pwm_fast.run.collection import MixedPolicy, check_policy, first_episodes
from pwm_fast.seeding import Purpose

NUM_ENVS = 64  # at once


@dataclass
class ExportConfig(Checked):
    """One export.

    Attributes:
        out: folder to write, new or empty.
        checkpoint: file of a training run, whose environment and policy are used.
        env: an environment in place of a checkpoint.
        episodes: number of episodes, each in a file of its own.
        policy: ``stochastic``, ``deterministic`` or ``random``; null is ``stochastic``, or
            ``random`` without a checkpoint.
        random_share: share of the episodes with random actions whatever the policy.
        random_hold: steps that a random action is held for on average; null is the checkpoint's
            ``alg.random_hold``, or 1.
        seed: of start states and actions.
        device: ``auto`` (CUDA where there is one), ``cpu``, ``cuda`` or ``cuda:N``.
        threads: torch's CPU threads; null leaves its own choice (or SLURM_CPUS_PER_TASK's).
    """

    out: str = MISSING
    checkpoint: str | None = None
    env: dict[str, Any] = field(default_factory=dict)
    episodes: int = checked(64, positive())
    policy: str | None = None
    random_share: float = 0.0
    random_hold: int | None = checked(None, positive_or_null())
    seed: int = checked(0, seed_range)
    device: str = "auto"
    threads: int | None = checked(None, thread_count)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_policy(self.policy or "random", self.random_share)


def export(config: ExportConfig) -> tuple[Path, int, str]:
    """Record the episodes and register them.

    Returns:
        The folder, the number of transitions, and the SHA-256 of the manifest.

    Raises:
        ConfigError: the configuration cannot be used; nothing was written.
        CheckpointError: the checkpoint cannot be read or does not fit this program.
        OSError: a file cannot be written; it names the file.
    """
    if bool(config.env) == (config.checkpoint is not None):
        raise ConfigError(
            "export needs either checkpoint=PATH, or env=NAME for random actions in a new "
            f"environment; got {'both' if config.env else 'neither'}"
        )
    out = new_folder(config.out)
    build.set_threads(config.threads)
    build.seed_everything(config.seed, Purpose.EXPORT_AGENT)
    device = build.select_device(config.device)
    run, content = _source(config)
    hold = config.random_hold or (run.alg.random_hold if content is not None else 1)
    policy = config.policy or ("random" if content is None else "stochastic")
    num_envs = min(config.episodes, NUM_ENVS)
    seed = seeding.stream(config.seed, Purpose.EXPORT)
    with closing(build.make_env(run, num_envs, seed, device)) as env:
        agent, tasks = None, tasks_of(env)
        if content is not None:
            path = checkpoint.named(str(config.checkpoint))
            agent = build.restore_agent(path, run, content, env, device)
        act = MixedPolicy(
            agent,
            num_envs,
            build.dims(env)[1],
            policy=policy,
            random_share=config.random_share,
            random_hold=hold,
            tasks=tasks,
        )
        out.mkdir(parents=True, exist_ok=True)
        if tasks is not None:
            write_names(out, dict(zip(tasks.numbers, tasks.names, strict=True)))
        width, transitions = len(str(config.episodes - 1)), 0
        for first in range(0, config.episodes, num_envs):
            starts = seeding.stream(config.seed, Purpose.EXPORT, first)
            with policy_of(config.checkpoint):
                batch = first_episodes(env, act, starts)[: config.episodes - first]
            for i, episode in enumerate(batch, start=first):
                write_episode(out / f"episode_{i:0{width}}.npz", episode)
                transitions += len(episode.action)
    return out, transitions, register(out)[0].sha256


def _source(config: ExportConfig) -> tuple[TrainConfig, dict[str, Any] | None]:
    """The configuration that makes the environment, and the checkpoint if there is one."""
    if config.checkpoint is None:
        return configuration.from_dict({"env": config.env, "seed": config.seed}), None
    return build.load_run(checkpoint.named(config.checkpoint))


def new_folder(name: str) -> Path:
    """The folder ``out=name``, which is not made yet.

    Raises:
        ConfigError: it is there and not empty, or cannot be made.
    """
    out = files.user_path(name)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ConfigError(f"out={out} must be a new or an empty folder: it is there already")
    parent = next(p for p in (out, *out.absolute().parents) if p.exists())
    if not (parent.is_dir() and os.access(parent, os.W_OK)):
        raise ConfigError(f"out={out} cannot be made: {parent} is not writable")
    return out


def run(cfg: Any) -> int:
    """Export as Hydra's configuration says."""
    need = "out=DIR is needed: a new folder for the episodes"
    config = configuration.typed(cfg, ExportConfig, need)
    out, transitions, sha256 = export(config)
    print(
        f"{config.episodes} episodes, {transitions:,} transitions in {out}\n"
        f"registered: manifest sha256 {sha256}\n"
        f"train on them: python -m pwm_fast.train data.path={out} ..."
    )
    return 0
