"""The training loop: collect, learn, evaluate, log, save."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pwm_fast import checkpoint, metrics
from pwm_fast import config as configuration
from pwm_fast.agent import PWM
from pwm_fast.checkpoint import CheckpointError
from pwm_fast.config import ConfigError, TrainConfig
from pwm_fast.envs import VectorEnv
from pwm_fast.envs.protocol import StateNotSupported
from pwm_fast.evaluation import Evaluation, evaluate
from pwm_fast.interrupt import Interrupt
from pwm_fast.logger import RunLogger, run_name
from pwm_fast.plotting import plot_run
from pwm_fast.replay import Replay

EVAL_SEED = 1_000_003  # added to the run's seed: evaluation starts are the same in every evaluation

# What may differ between a checkpoint and the run that continues it.
FREE_KEYS = (
    "epochs",
    "device",
    "threads",
    "run_dir",
    "resume",
    "checkpoint",
    "eval",
    "wandb",
    "env.threads",
)


class TrainingDiverged(RuntimeError):
    """Too many updates in a row were not finite."""


class Trainer:
    """Runs the epochs of one run.

    Args:
        config: of the run.
        env: worlds to collect in.
        agent: learns.
        replay: what it learns from.
        make_eval_env: makes an environment of so many worlds for an evaluation.
        logger: where metrics go.
    """

    def __init__(
        self,
        config: TrainConfig,
        env: VectorEnv,
        agent: PWM,
        replay: Replay,
        logger: RunLogger,
        make_eval_env: Any,
    ) -> None:
        self.config = config
        self.env = env
        self.agent = agent
        self.replay = replay
        self.logger = logger
        self.make_eval_env = make_eval_env
        self.run_dir = Path(config.run_dir)
        self.checkpoints = self.run_dir / "checkpoints"
        self.checkpoints.mkdir(parents=True, exist_ok=True)

        self.epoch = 0  # epochs completed
        self.bootstrapped = False
        self.wall_time = 0.0
        self.best: dict[str, Any] = {}
        self.latest_eval: dict[str, float] = {}
        self.partial = _Partial()
        self._obs, _ = env.reset()
        self._eval_env: VectorEnv | None = None
        self._clock = time.monotonic()
        if config.wandb.gradients and config.wandb.mode != "disabled":
            for optimizer in agent.optimizers.values():
                optimizer.keep_gradients = True

    @property
    def env_steps(self) -> int:
        """Environment steps taken, over all worlds."""
        return self.epoch * self.config.alg.steps_per_epoch * self.config.worlds

    def run(self, stop: Interrupt) -> dict[str, Any]:
        """Train to ``config.epochs``, or until ``stop`` triggers; return what ``summary.json`` holds.

        Raises:
            TrainingDiverged: after ``alg.max_skipped_updates`` non-finite updates in a row; a
                checkpoint was written.
            CheckpointError: a checkpoint could not be written; the last one is untouched.
        """
        self._clock = time.monotonic()
        status = "failed"
        try:
            status = self._run(stop)
        except TrainingDiverged:
            status = "diverged"
            raise
        finally:
            self.logger.close(status)
        return self._finish(status)

    def _run(self, stop: Interrupt) -> str:
        if self.epoch == 0 and not self.partial.collected:
            self._log({"epoch": 0, "env_steps": 0, **self._evaluate(self.config.eval.episodes)})
        every = self.config.checkpoint.every
        while self.epoch < self.config.epochs:
            finished = self._epoch(stop)
            if finished and every and self.epoch % every == 0 and self.epoch < self.config.epochs:
                self.save("latest")
            if stop:
                self.save("latest")
                return "interrupted"
        self.save("latest")
        return "finished"

    # --- one epoch ------------------------------------------------------------------------------

    def _epoch(self, stop: Interrupt) -> bool:
        """Run the next epoch, or what is left of it; False if ``stop`` triggered on the way.

        An interruption leaves ``self.partial``, from which the epoch goes on after a resume.
        """
        config, partial = self.config.alg, self.partial
        started = time.monotonic()
        rates = self.agent.set_progress(self.epoch / max(self.config.epochs, 1))
        if not partial.collected:
            self._collect()
            partial.collected = True
        if self._ready():
            model_updates = (
                config.model_learning.updates if self.bootstrapped else self.bootstrap_updates()
            )
            for i in self._remaining("model_updates", model_updates, stop):
                if not self.bootstrapped and i % 10 == 0:
                    self.logger.status(f"bootstrap {i}/{model_updates}")
                windows = self.replay.sample(config.model_learning.batch_size)
                partial.add(self.agent.update_world_model(windows))
            for _ in self._remaining("policy_updates", config.actor.updates, stop):
                obs = self.replay.sample_obs(config.actor.batch_size)
                partial.add(self.agent.update_policy(obs))
            if stop:
                return False
            if not self.bootstrapped:
                self.bootstrapped = True
                self.logger.status("")
        self.epoch += 1
        row = self._row(rates)
        self.partial = _Partial()
        elapsed = max(time.monotonic() - started, 1e-9)
        row["steps_per_second"] = config.steps_per_epoch * self.config.worlds / elapsed
        self._log(row)
        self._guard()
        return True

    def _collect(self) -> None:
        config = self.config.alg
        random = self.epoch < config.random_epochs
        shape = (self.config.worlds, self.agent.action_dim)
        for _ in range(config.steps_per_epoch):
            obs = self._obs
            if random:
                action = torch.rand(shape, device=self.agent.device) * 2.0 - 1.0
            else:
                action = self.agent.act(obs)
            self._obs, reward, terminated, truncated, info = self.env.step(
                action.to(self.env.device)
            )
            self.replay.add(
                obs, action, reward, terminated, terminated | truncated, info["final_obs"]
            )
            self.agent.observe(obs, reward)
            self.partial.episodes(info["episode"])

    def _ready(self) -> bool:
        """Replay holds what updates need; looks (and waits for the device) only until it does."""
        if self.epoch + 1 < self.config.alg.random_epochs:
            return False
        return self.bootstrapped or self.replay.num_windows() > 0

    def bootstrap_updates(self) -> int:
        """World-model updates before the first policy update.

        One episode's length by default, but no more than the whole run's updates: a short trial run
        should not consist of its bootstrap.
        """
        config = self.config.alg.model_learning
        if config.bootstrap_updates is not None:
            return config.bootstrap_updates
        return min(self.env.max_episode_steps, config.updates * self.config.epochs)

    def _remaining(self, counter: str, total: int, stop: Interrupt) -> Iterator[int]:
        """Numbers of the updates still to do in this epoch; ends early where ``stop`` triggers."""
        while self.partial.counters[counter] < total and not stop:
            yield self.partial.counters[counter]
            self.partial.counters[counter] += 1

    def _row(self, rates: dict[str, float]) -> metrics.Row:
        esnr = self.config.esnr
        measured: dict[str, Tensor] = {}
        if self.bootstrapped and esnr.every and self.epoch % esnr.every == 0:
            obs = self.replay.sample_obs(self.config.alg.actor.batch_size)
            measured = self.agent.actor_esnr(obs, esnr.samples)
        row: metrics.Row = {"epoch": self.epoch, "env_steps": self.env_steps}
        row.update(metrics.to_numbers({**self.partial.means(), **measured}))
        row.update(metrics.to_numbers(self.agent.skipped_updates()))
        row.update(rates)
        row["replay_size"] = len(self.replay)
        every = self.config.eval.every
        if every and self.epoch % every == 0 and self.epoch < self.config.epochs:
            row.update(self._evaluate(self.config.eval.episodes))
        return row

    def _guard(self) -> None:
        in_a_row = self.logger.file.last.get("skipped_in_a_row", 0)
        if in_a_row >= self.config.alg.max_skipped_updates:
            self.save("latest")
            raise TrainingDiverged(
                f"{in_a_row} updates in a row had a non-finite loss or gradient and were skipped "
                f"(alg.max_skipped_updates={self.config.alg.max_skipped_updates}), epoch "
                f"{self.epoch}; the state is in {self.checkpoints / 'latest.pt'}"
            )

    # --- evaluation and logging -----------------------------------------------------------------

    def _evaluate(self, episodes: int) -> dict[str, float]:
        if self._eval_env is None or self._eval_env.num_envs != episodes:
            self._eval_env = self.make_eval_env(episodes)
        result = evaluate(self.agent, self._eval_env, self.config.seed + EVAL_SEED)
        return self._record(result)

    def _record(self, result: Evaluation) -> dict[str, float]:
        row = result.row()
        self.latest_eval = {
            "reward": row["eval_reward"],
            "episode_length": row["eval_episode_length"],
        }
        if not self.best or row["eval_reward"] > self.best["reward"]:
            self.best = {
                "reward": row["eval_reward"],
                "epoch": self.epoch,
                "env_steps": self.env_steps,
            }
            self.save("best")
            self.logger.best({f"best_{k}": v for k, v in self.best.items()})
        if self.config.wandb.gradients:
            self.logger.histograms(self.epoch, self.agent.gradients())
        return row

    def _log(self, row: metrics.Row) -> None:
        now = time.monotonic()
        self.wall_time += now - self._clock
        self._clock = now
        # The latest evaluation stands in every row, so that `reward` always is of real episodes.
        self.logger.write({**row, **self.latest_eval, "wall_time": self.wall_time})

    def _finish(self, status: str) -> dict[str, Any]:
        summary: dict[str, Any] = {
            "status": status,
            "env": self.config.env.name,
            "alg": self.config.alg.name,
            "seed": self.config.seed,
            "epochs": self.epoch,
            "env_steps": self.env_steps,
            "best": self.best,
            "parameters": self.agent.world_model.num_parameters(),
        }
        if status == "finished":
            result = evaluate(
                self.agent,
                self.make_eval_env(self.config.eval.final_episodes),
                self.config.seed + 2 * EVAL_SEED,
            )
            summary["evaluation"] = result.summary()
            self.save("final")
        self.wall_time += time.monotonic() - self._clock
        summary["wall_time"] = self.wall_time
        write_json(self.run_dir / "summary.json", summary)
        plot_run(self.run_dir, run_name(self.config))
        return summary

    # --- checkpoints ----------------------------------------------------------------------------

    def save(self, name: str) -> None:
        """Write ``checkpoints/<name>.pt``; ``latest`` also holds the replay and keeps its forerunner."""
        latest = name == "latest"
        content: dict[str, Any] = {
            "config": configuration.to_dict(self.config),
            "epoch": self.epoch,
            "bootstrapped": self.bootstrapped,
            "wall_time": self.wall_time,
            "best": self.best,
            "latest_eval": self.latest_eval,
            "partial": self.partial.state_dict(),
            "agent": self.agent.state_dict(),
            "obs": self._obs,
            "rng": checkpoint.rng_state(),
            "replay": self.replay.state_dict() if latest else None,
        }
        try:
            content["env"] = self.env.get_state()
        except StateNotSupported:
            content["env"] = None
        if latest:
            self.logger.sync()
        checkpoint.save(self.checkpoints / f"{name}.pt", content, keep_previous=latest)

    def restore(self, content: dict[str, Any], path: Path, *, strict: bool) -> None:
        """Continue from a checkpoint's content.

        Args:
            content: of :func:`pwm_fast.checkpoint.load`.
            path: where it came from, for messages.
            strict: refuse a checkpoint of a differently configured run.

        Raises:
            CheckpointError: it is of another architecture or environment.
            ConfigError: it is of another configuration, and ``strict``.
        """
        if strict:
            refuse_other_config(content["config"], self.config, path)
        try:
            self.agent.load_state_dict(content["agent"])
            if content["replay"] is not None:
                self.replay.load_state_dict(content["replay"])
            if content["env"] is None:
                self._obs, _ = self.env.reset()
            else:
                self.env.set_state(content["env"])
                self._obs = content["obs"].to(self.env.device)
        except (ValueError, KeyError, RuntimeError) as error:
            raise CheckpointError(f"{path} does not fit this run: {error}") from error
        self.epoch = content["epoch"]
        # Without its replay a run collects until there are windows again.
        self.bootstrapped = content["bootstrapped"] and content["replay"] is not None
        self.wall_time = content["wall_time"]
        self.best = content["best"]
        self.latest_eval = content["latest_eval"]
        self.partial.load_state_dict(content["partial"])
        checkpoint.set_rng_state(content["rng"])


class _Partial:
    """What an epoch has done so far: its updates and the sums of their metrics."""

    def __init__(self) -> None:
        self.collected = False
        self.counters = {"model_updates": 0, "policy_updates": 0}
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, Tensor] = {}

    def add(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            self._add(name, value, torch.ones((), device=value.device))

    def episodes(self, info: dict[str, Tensor]) -> None:
        """Take up the training episodes that ended in a step."""
        mask = info["mask"]
        count = mask.sum().float()
        for name, key in (("train_reward", "return"), ("train_episode_length", "length")):
            self._add(name, torch.where(mask, info[key], 0).sum().float(), count)

    def means(self) -> dict[str, Tensor]:
        """Mean of every metric; NaN (logged as null) where nothing was counted."""
        return {name: self.sums[name] / self.counts[name] for name in self.sums}

    def _add(self, name: str, value: Tensor, count: Tensor) -> None:
        if name in self.sums:
            self.sums[name] = self.sums[name] + value
            self.counts[name] = self.counts[name] + count
        else:
            self.sums[name], self.counts[name] = value, count

    def state_dict(self) -> dict[str, Any]:
        return {
            "collected": self.collected,
            "counters": dict(self.counters),
            "sums": dict(self.sums),
            "counts": dict(self.counts),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.collected = state["collected"]
        self.counters = dict(state["counters"])
        self.sums, self.counts = dict(state["sums"]), dict(state["counts"])


def refuse_other_config(saved: dict[str, Any], config: TrainConfig, path: Path) -> None:
    """Raise ConfigError, naming every key, if a run's configuration is not the checkpoint's."""
    before, now = _flat(saved), _flat(configuration.to_dict(config))
    different = [
        f"{key} was {before.get(key)!r}, is {now.get(key)!r}"
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key)
        and not any(key == free or key.startswith(f"{free}.") for free in FREE_KEYS)
    ]
    if different:
        raise ConfigError(
            f"{path} is of a run with another configuration: {'; '.join(different)}. Give this run "
            "another run_dir, or name the checkpoint (resume=PATH) to continue it with new settings"
        )


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file in one step."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n", "utf-8")
    os.replace(temporary, path)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return flat
