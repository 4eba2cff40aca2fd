"""A run on Weights & Biases, beside the run directory's own files."""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from pwm_fast import config as configuration
from pwm_fast import files, optional
from pwm_fast.config import ConfigError, TrainConfig
from pwm_fast.run import metrics
from pwm_fast.run.rundir import RunDirectory


class WandbRun:
    """Starts, or continues, the wandb run of a run directory.

    wandb ignores whatever is logged at an earlier step than the last. So its steps only count, over
    all processes of the run: they are epochs until one goes back to a checkpoint and computes some
    again. Charts have ``env_steps`` as their axis.

    Args:
        config: of the run; its ``wandb.mode`` is not ``disabled``.
        directory: of the run, where wandb's own files go.

    Raises:
        ConfigError: wandb is not installed, not logged in, or cannot reach its server.
    """

    def __init__(self, config: TrainConfig, directory: RunDirectory) -> None:
        mode = config.wandb.mode
        run_dir = directory.path
        id_file, is_new = run_dir / "wandb_id", not (run_dir / "wandb_id").exists()
        try:
            # Not the import statement: what its types look like depends on what is installed.
            wandb: Any = import_module("wandb")
        except Exception as error:  # what a broken installation raises can be anything
            needed = f"wandb.mode={mode} needs wandb: pip install 'pwm-fast[wandb]'"
            raise ConfigError(optional.reason(error, "wandb", needed)) from error
        self._histogram, self._video = wandb.Histogram, wandb.Video
        self.gradients = config.wandb.gradients
        try:
            self._run: Any = wandb.init(
                project=config.wandb.project,
                entity=config.wandb.entity,
                name=run_name(config),
                id=_run_id(id_file),
                resume="allow",
                dir=str(run_dir),
                mode=mode,
                config=configuration.to_dict(config),
                settings=wandb.Settings(silent=True, console="off"),
            )
        except wandb.errors.Error as error:
            if is_new:
                id_file.unlink(missing_ok=True)  # a refused run leaves nothing behind
            reason = str(error).strip().splitlines()[0]
            raise ConfigError(
                f"wandb.mode={mode} cannot start: {reason}; wandb.mode=offline needs no login and "
                "no network"
            ) from error
        self._run.define_metric("*", step_metric="env_steps")
        self._counter = run_dir / "wandb_step"
        self._step = _last_step(self._counter, directory.metrics)

    def log(self, row: Mapping[str, Any]) -> None:
        """Log an epoch's row."""
        self._step = max(self._step + 1, row["epoch"])
        # Written before it is used, and no more durable than wandb's own files are.
        try:
            self._counter.write_text(f"{self._step}\n", "utf-8")
        except OSError as error:
            raise files.naming(self._counter, error) from error
        self._run.log({k: v for k, v in row.items() if v is not None}, step=self._step)

    def log_gradients(self, gradients: Mapping[str, np.ndarray]) -> None:
        """Log a histogram of every gradient, beside the row that was logged last."""
        self._run.log(
            {f"gradients/{name}": self._histogram(g) for name, g in gradients.items()},
            step=self._step,
        )

    def log_video(self, key: str, path: Path) -> None:
        """Log the film in a file, beside the row that was logged last."""
        self._run.log({key: self._video(str(path))}, step=self._step)

    def summarize(self, values: Mapping[str, Any]) -> None:
        """Put values into the run's summary."""
        self._run.summary.update(dict(values))

    def finish(self, *, ok: bool) -> None:
        """End the wandb run."""
        self._run.finish(exit_code=0 if ok else 1)


def run_name(config: TrainConfig) -> str:
    """Name of a run for people: ``wandb.name``, else environment, algorithm and seed."""
    return config.wandb.name or f"{config.env.name}-{config.alg.full_name}-seed{config.seed}"


def _last_step(counter: Path, log: Path) -> int:
    """The last step that was logged by any process of the run; -1 if there was none."""
    try:
        return int(counter.read_text("utf-8"))
    except (OSError, ValueError):  # none yet, or of a version whose steps were epochs
        rows = metrics.read(log)
        return rows[-1]["epoch"] if rows else -1


def _run_id(file: Path) -> str:
    """The id in ``file``, made where there is none: a resumed run continues its wandb run."""
    if not file.is_file():
        files.write_text(file, uuid.uuid4().hex[:8])
    found = file.read_text("utf-8", errors="replace").strip()
    if not re.fullmatch(r"[\w.-]{1,128}", found, re.ASCII):
        raise ConfigError(
            f"{file} is damaged: it must hold the id of a wandb run, got {found[:40]!r}; move it "
            "away to go on in a new wandb run"
        )
    return found
