"""Training a world model alone, on data: ``python -m pwm_fast.pretrain``."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any, ClassVar

import torch

from pwm_fast import config as configuration
from pwm_fast import files
from pwm_fast.config import ConfigError, TrainConfig
from pwm_fast.data import DataSet, describe
from pwm_fast.replay import Replay, Windows
from pwm_fast.run import metrics
from pwm_fast.run.open_loop import open_loop
from pwm_fast.run.progress import EpochProgress
from pwm_fast.run.start import train
from pwm_fast.run.trainer import Trainer

TASK_DIM = 96  # of the embeddings, where nothing else is asked for: PWM's
WINDOWS = 512  # of held-out episodes, that the model is measured on


def pretrain(config: TrainConfig) -> tuple[dict[str, Any], int]:
    """Train a world model on a data set, or go on where it was left.

    The checkpoint is one of a whole agent, whose policy and critics have learned nothing:
    ``python -m pwm_fast.train init=PATH task=NAME`` trains those of one task in it.

    Returns:
        As :func:`pwm_fast.run.start.train`.

    Raises:
        ConfigError: the configuration or the data cannot be used; nothing was written.
        CheckpointError: a checkpoint cannot be read, does not fit, or cannot be written.
        TrainingDiverged: too many updates in a row were not finite.
        OSError: a file cannot be read or written.
    """
    return train(prepared(config), Pretrainer)


def prepared(config: TrainConfig) -> TrainConfig:
    """The configuration with the widths and tasks of its data.

    A model of several tasks gets embeddings of :data:`TASK_DIM` unless others are asked for.

    Raises:
        ConfigError: there are no data, or they do not fit the configuration.
        OSError: a file cannot be read.
    """
    if config.data.path is None:
        raise ConfigError("data.path=DIR is needed: what the world model learns from")
    if config.env.name != configuration.OFFLINE:
        raise ConfigError(
            f"env must be left alone to pretrain, whose data say what there is, got "
            f"env={config.env.name}"
        )
    given = None if config.data.manifest is None else files.user_path(config.data.manifest)
    data = describe(files.user_path(config.data.path), given)
    options: dict[str, Any] = {
        "obs_dim": data.obs_dim,
        "action_dim": data.action_dim,
        "can_terminate": bool(config.env.options.get("can_terminate", False)),
        # A row for each transition, and one for the last observation.
        "rows": data.whole.transitions + data.whole.episodes,
    }
    model = config.alg.world_model
    numbers = sorted(data.tasks)
    if len(numbers) > 1:
        options |= {"tasks": _names(data, numbers), "numbers": numbers}
        wanted = max(len(data.names), numbers[-1] + 1)
        model = replace(
            model,
            num_tasks=wanted if model.num_tasks == 1 else model.num_tasks,
            task_dim=model.task_dim or TASK_DIM,
        )
    env = replace(config.env, num_envs=1, max_episode_steps=data.whole.longest, options=options)
    return replace(config, env=env, num_envs=None, alg=replace(config.alg, world_model=model))


def _names(data: DataSet, numbers: list[int]) -> list[str]:
    return [data.names[n] if data.names else str(n) for n in numbers]


class Pretrainer(Trainer):
    """Runs epochs of world-model updates, and measures the model on held-out episodes.

    The arguments are those of :class:`~pwm_fast.run.trainer.Trainer`.
    """

    KEEPS_REPLAY: ClassVar[bool] = False  # it is in the data set

    _windows: Windows | None = None
    _last: metrics.Row | None = None

    def _begin(self) -> None:
        self._windows = self._held_out()
        if self._windows is None:
            self._logger.say(
                f"no episode is held out: data.holdout={self.config.data.holdout} of the data are "
                "none with a window, so the model is not measured"
            )

    def _held_out(self) -> Windows | None:
        """The windows that the model is measured on; None where there are none."""
        episodes, config = self.state.held_out, self.config
        replay, model = self.state.replay, config.alg.world_model
        rows = sum(len(e.obs) for e in episodes)
        if rows < config.alg.horizon + 2:
            return None
        held = Replay(
            rows,
            1,
            replay.obs_dim,
            replay.action_dim,
            config.alg.horizon,
            replay.device,
            num_tasks=model.num_tasks,
        )
        held.add_episodes(episodes)
        if held.num_windows() == 0:
            return None
        return held.sample(WINDOWS, torch.Generator(replay.device).manual_seed(0))

    def _epoch(self) -> None:
        started = time.monotonic()
        agent, learning = self.state.agent, self.config.alg.model_learning
        rates = agent.set_progress(self.state.epoch / self.config.epochs)
        check = self._stop.check
        with agent.keeping():
            for i in self.state.progress.remaining("model_updates", learning.updates, check):
                self._update_model(i)
        self.state.bootstrapped = True
        elapsed = max(time.monotonic() - started, 1e-9)
        epoch = self.state.epoch + 1
        due = self._evaluation_due() or epoch == self.config.epochs
        measured = self._measured(epoch) if due else {}
        row: metrics.Row = {"epoch": epoch, "env_steps": 0, **measured}
        row.update(metrics.to_numbers(self.state.progress.means()))
        row.update(self._skips())
        row["lr_wm"] = rates["lr_wm"]
        row["updates_per_second"] = learning.updates / elapsed
        row["updates"] = epoch * learning.updates
        self.state.epoch = epoch
        self.state.progress = EpochProgress()
        self._tick()
        self._logger.write({**row, "wall_time": self.state.wall_time})
        self._guard()

    def _measured(self, epoch: int) -> metrics.Row:
        """The model's losses and open-loop errors on what it has not learned from."""
        if self._windows is None:
            return {}
        agent, (obs, action, reward, _, task) = self.state.agent, self._windows
        found = {f"holdout_{k}": v for k, v in agent.world_model_losses(self._windows).items()}
        found.pop("holdout_latent_std")
        # Of the step after the last, which is not looked at, there is no action and reward.
        action, reward = (torch.cat((x, x[-1:])) for x in (action, reward))
        whole = torch.ones_like(reward[0], dtype=torch.bool)
        open_loops = open_loop(agent, obs, action, reward, whole, task)
        found |= {k.replace("eval_", "holdout_"): v for k, v in open_loops.items()}
        row = metrics.to_numbers(found)
        shown = ", ".join(f"{k.removeprefix('holdout_')} {v:.4g}" for k, v in row.items())
        self._logger.say(f"epoch {epoch}, held-out episodes: {shown}")
        self._last = row
        return row

    def _final_evaluation(self) -> None:
        self.save("final")

    def _beside(self) -> dict[str, Any]:
        updates = self.state.epoch * self.config.alg.model_learning.updates
        return {"env_steps": 0, "updates": updates, "holdout": self._last or {}}
