"""A run's event files for TensorBoard, beside the run directory's own files."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from pwm_fast import config as configuration
from pwm_fast import files, optional
from pwm_fast.config import ConfigError, TrainConfig
from pwm_fast.run import charts, metrics
from pwm_fast.run.rundir import RunDirectory

NEEDED = "tensorboard.enabled=true needs TensorBoard: pip install 'pwm-fast[tensorboard]'"
BINS = 64  # of a histogram, as wandb's


class TensorboardRun:
    """Writes event files to ``run_dir/tensorboard``, one for each process that works on the run.

    ``env_steps`` are the steps of all charts, as on wandb; those of a run of ``pwm_fast.pretrain``
    are its updates. The first row of a process hides what TensorBoard has of this step and later
    ones: a run that went back computes them again.

    Args:
        config: of the run; its ``tensorboard.enabled`` is true.
        directory: of the run. Nothing is written before the first row.

    Raises:
        ConfigError: TensorBoard is not installed.
    """

    def __init__(self, config: TrainConfig, directory: RunDirectory) -> None:
        try:
            import_module("torch.utils.tensorboard")
        except Exception as error:  # what a broken installation raises can be anything
            raise ConfigError(optional.reason(error, "tensorboard", NEEDED)) from error
        self.gradients = config.tensorboard.gradients
        self._config = config
        self._metrics = directory.metrics
        self._folder = directory.path / "tensorboard"
        self._file: EventFile | None = None
        self._step = 0

    def log(self, row: metrics.Row) -> None:
        """Log an epoch's row."""
        self._step = _step(row)
        with self._writing(again_from=self._step) as file:
            for name, value in row.items():
                if metrics.is_number(value):
                    file.scalar(_tag(name), value, self._step)

    def log_gradients(self, gradients: Mapping[str, np.ndarray]) -> None:
        """Log a histogram of every gradient, beside the row that was logged last."""
        with self._writing() as file:
            for name, values in gradients.items():
                file.histogram(f"gradients/{name}", values, self._step)

    def log_video(self, key: str, path: Path) -> None:
        """Nothing: TensorBoard shows no MP4."""

    def summarize(self, values: Mapping[str, Any]) -> None:
        """Log values of the whole run so far, at the step of the row that was logged last."""
        if self._file is None:  # that row is of another process
            self._step = max(map(_step, metrics.read(self._metrics)), default=0)
        with self._writing() as file:
            for name, value in values.items():
                if metrics.is_number(value):
                    file.scalar(f"summary/{name}", value, self._step)

    def finish(self, *, ok: bool) -> None:
        """End the event file."""
        with suppress(OSError):  # everything was written, or its failure is on its way already
            if self._file is not None:
                self._file.close()

    @contextmanager
    def _writing(self, again_from: int | None = None) -> Iterator[EventFile]:
        """The event file; what it was given is out of this process on exit.

        Args:
            again_from: see :class:`EventFile`, for one that this begins.
        """
        try:
            if self._file is None:
                self._file = EventFile(self._folder, again_from)
                self._file.text("config", _markdown(self._config), self._step)
            yield self._file
            self._file.flush()
        except OSError as error:
            raise files.naming(self._folder, error) from error


class EventFile:
    """An event file, written as torch's ``SummaryWriter`` writes it but for three things.

    It is written in this thread, so that a full disk is an error where it happens; the name of the
    file orders those of one second, and does not hold the host's.

    Args:
        folder: made where it does not exist.
        again_from: what earlier files have of this step and later ones is hidden.

    Raises:
        OSError: (every method, too) it cannot be written.
    """

    def __init__(self, folder: Path, again_from: int | None = None) -> None:
        # Not the import statement: what its types look like depends on what is installed.
        self._summary: Any = import_module("torch.utils.tensorboard.summary")
        self._proto: Any = import_module("tensorboard.compat.proto.event_pb2")
        folder.mkdir(exist_ok=True)
        ours = [p.suffix[1:] for p in folder.glob("events.out.tfevents.*")]
        number = 1 + max((int(suffix) for suffix in ours if suffix.isdecimal()), default=0)
        self._file = (folder / f"events.out.tfevents.{number:06d}").open("xb")
        self._records: Any = import_module("tensorboard.summary.writer.record_writer").RecordWriter(
            self._file
        )
        self._write(file_version="brain.Event:2")
        if again_from is not None:
            start = self._proto.SessionLog(status=self._proto.SessionLog.START)
            self._write(step=again_from, session_log=start)

    def scalar(self, tag: str, value: float, step: int) -> None:
        """Add a number."""
        self._write(step=step, summary=self._summary.scalar(tag, value))

    def histogram(self, tag: str, values: np.ndarray, step: int) -> None:
        """Add a histogram of finite numbers."""
        self._write(step=step, summary=self._summary.histogram(tag, values, BINS))

    def text(self, tag: str, text: str, step: int) -> None:
        """Add a text in Markdown."""
        self._write(step=step, summary=self._summary.text(tag, text))

    def flush(self) -> None:
        """Hand to the system what was added."""
        self._file.flush()

    def close(self) -> None:
        """End the file."""
        self._file.close()

    def _write(self, **fields: Any) -> None:
        event = self._proto.Event(wall_time=time.time(), **fields)
        self._records.write(event.SerializeToString())


def _step(row: metrics.Row) -> int:
    return int(row[charts.along([row])[0]])


def _tag(name: str) -> str:
    """Where TensorBoard shows a metric: among the losses, or under its first word."""
    group = "loss" if name.endswith("_loss") else name.partition("/")[0].partition("_")[0]
    return f"{group}/{name}"


def _markdown(config: TrainConfig) -> str:
    """The configuration as YAML, in a block of code."""
    from omegaconf import OmegaConf

    text = OmegaConf.to_yaml(configuration.to_dict(config))
    return "".join(f"    {line}\n" for line in text.splitlines())
