"""Where a run's metrics go: its directory, the terminal, and TensorBoard and wandb when asked."""

from __future__ import annotations

import errno
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from pwm_fast.config import TrainConfig
from pwm_fast.run.interrupt import silence
from pwm_fast.run.metrics import MetricsFile, Row
from pwm_fast.run.rundir import RunDirectory
from pwm_fast.run.tensorboard import TensorboardRun
from pwm_fast.run.wandb import WandbRun

SILENCE = 30.0  # seconds without a line, outside a terminal
BAR = {"reward": "reward", "wm_loss": "wm", "actor_loss": "actor", "value_loss": "value"}


class Sink(Protocol):
    """Where metrics go besides the run's own files.

    Attributes:
        gradients: it takes histograms of gradients.
    """

    gradients: bool

    def log(self, row: Row) -> None:
        """Log an epoch's row."""
        ...

    def log_gradients(self, gradients: Mapping[str, np.ndarray]) -> None:
        """Log a histogram of every gradient, all finite, beside the row that was logged last."""
        ...

    def log_video(self, key: str, path: Path) -> None:
        """Log the film in a file, beside the row that was logged last."""
        ...

    def summarize(self, values: Mapping[str, Any]) -> None:
        """Log values of the whole run so far."""
        ...

    def finish(self, *, ok: bool) -> None:
        """End; ``ok`` if the run came to its end."""
        ...


class RunLogger:
    """Writes rows to ``metrics.jsonl``, a progress bar, TensorBoard and wandb.

    The bar shows on a terminal only; elsewhere a line is printed for every evaluation, and about
    every half a minute between them.

    Args:
        config: of the run.
        directory: of the run.
        last_epoch: see :class:`~pwm_fast.run.metrics.MetricsFile`.
        prepare: called when nothing can be refused any more, before the metrics file is changed.

    Raises:
        ConfigError: TensorBoard or wandb was asked for and cannot start; the metrics file is as it
            was.
        OSError: the metrics file cannot be written.
    """

    def __init__(
        self,
        config: TrainConfig,
        directory: RunDirectory,
        last_epoch: int | None = None,
        prepare: Callable[[], None] = lambda: None,
    ) -> None:
        self.config = config
        self._sinks = _sinks(config, directory)
        prepare()
        self._file = MetricsFile(directory.metrics, last_epoch)
        self.interactive = sys.stderr.isatty()
        self._said = time.monotonic()  # when a line was printed last
        self._ttys = [stream.fileno() for stream in (sys.stdout, sys.stderr) if stream.isatty()]
        self._bar = _progress_bar(config.epochs, last_epoch or 0, self.interactive)

    def write(self, row: Row) -> None:
        """Log one epoch."""
        self._file.write(row)
        for sink in self._sinks:
            sink.log(row)
        if self.interactive:
            shown = {label: f"{row[k]:.3g}" for k, label in BAR.items() if row.get(k) is not None}
            with self._to_terminal():
                self._bar.set_postfix(shown, refresh=False)
                self._bar.update(row["epoch"] - self._bar.n)
        elif "eval_reward" in row:
            self.say(_line(row, self.config.epochs))
        else:
            self.status(_short_line(row, self.config.epochs))

    def status(self, text: str) -> None:
        """Show on the bar what goes on within an epoch.

        Outside a terminal it is printed, if nothing was for a while.
        """
        with self._to_terminal():
            self._bar.set_description_str(text)
        now = time.monotonic()
        if text and not self.interactive and now - self._said >= SILENCE:
            self.say(text)

    def say(self, text: str) -> None:
        """Print a line without breaking the bar."""
        self._said = time.monotonic()
        with self._to_terminal():
            self._bar.write(text, file=sys.stdout)
            sys.stdout.flush()

    @contextmanager
    def _to_terminal(self) -> Iterator[None]:
        """Inside, output that nobody can read any more goes nowhere: that is no reason to stop."""
        try:
            yield
        except OSError as error:
            # Of a closed terminal: SIGHUP is on its way, and what is shown now comes too soon.
            lost = self._ttys if error.errno == errno.EIO else []
            if isinstance(error, BrokenPipeError):
                lost = [sys.stdout.fileno()]
            if not lost:
                raise
            silence(lost)

    @property
    def takes_gradients(self) -> bool:
        """Whether histograms of gradients go anywhere."""
        return any(sink.gradients for sink in self._sinks)

    def log_gradients(self, gradients: Mapping[str, Tensor]) -> None:
        """Log histograms of the finite gradients, beside the row that was written last."""
        arrays = {
            name: g.detach().float().cpu().numpy()
            for name, g in gradients.items()
            if bool(torch.isfinite(g).all())
        }
        for sink in self._sinks:
            if sink.gradients:
                sink.log_gradients(arrays)

    def log_video(self, key: str, path: Path) -> None:
        """Log the film in a file, beside the row that was written last."""
        for sink in self._sinks:
            sink.log_video(key, path)

    def summarize(self, values: Mapping[str, Any]) -> None:
        """Log values of the whole run so far."""
        for sink in self._sinks:
            sink.summarize(values)

    def sync(self) -> None:
        """Make what was logged so far durable."""
        self._file.sync()

    def close(self, *, ok: bool) -> None:
        """End the bar, the file and what else was logged to."""
        with self._to_terminal():
            self._bar.close()
        with suppress(OSError):  # everything was written, or its failure is on its way already
            self._file.close()
        for sink in self._sinks:
            sink.finish(ok=ok)


def _sinks(config: TrainConfig, directory: RunDirectory) -> list[Sink]:
    """What the configuration asks for; TensorBoard first, which is refused before it writes."""
    found: list[Sink] = []
    if config.tensorboard.enabled:
        found.append(TensorboardRun(config, directory))
    if config.wandb.mode != "disabled":
        found.append(WandbRun(config, directory))
    return found


class Unheard(RunLogger):
    """Of a rank but the first, which logs for all."""

    interactive = False

    def __init__(self) -> None:
        self._sinks = []

    def write(self, row: Row) -> None:
        """Nothing."""

    def status(self, text: str) -> None:
        """Nothing."""

    def say(self, text: str) -> None:
        """Nothing."""

    def sync(self) -> None:
        """Nothing."""

    def close(self, *, ok: bool) -> None:
        """Nothing."""


def _progress_bar(epochs: int, done: int, interactive: bool) -> Any:
    from tqdm import tqdm

    return tqdm(
        total=epochs, initial=done, unit="epoch", disable=not interactive, dynamic_ncols=True
    )


def _short_line(row: Row, epochs: int) -> str:
    return f"epoch {row['epoch']}/{epochs}  env_steps {row['env_steps']}  {row['wall_time']:.0f} s"


def _line(row: Row, epochs: int) -> str:
    success, diverged = row.get("eval_success"), row.get("eval_diverged")
    return (
        f"epoch {row['epoch']}/{epochs}  env_steps {row['env_steps']}  "
        f"reward {row['eval_reward']:.1f} +- {row['eval_reward_std']:.1f}"
        + (f"  success {success:.0%}" if success is not None else "")
        + (f"  diverged {diverged}" if diverged else "")
        + f"  {row['wall_time']:.0f} s"
    )
