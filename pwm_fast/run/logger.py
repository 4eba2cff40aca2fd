"""Where a run's metrics go: the run directory, the terminal, and Weights & Biases when asked."""

from __future__ import annotations

import errno
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from torch import Tensor

from pwm_fast.config import TrainConfig
from pwm_fast.run.interrupt import silence
from pwm_fast.run.metrics import MetricsFile, Row
from pwm_fast.run.rundir import RunDirectory
from pwm_fast.run.wandb import WandbRun

SILENCE = 30.0  # seconds without a line, outside a terminal
BAR = {"reward": "reward", "wm_loss": "wm", "actor_loss": "actor", "value_loss": "value"}


class RunLogger:
    """Writes rows to ``metrics.jsonl``, a progress bar and wandb.

    The bar shows on a terminal only; elsewhere a line is printed for every evaluation, and about
    every half a minute between them.

    Args:
        config: of the run.
        directory: of the run.
        last_epoch: see :class:`~pwm_fast.run.metrics.MetricsFile`.
        prepare: called when nothing can be refused any more, before the metrics file is changed.

    Raises:
        ConfigError: wandb was asked for and cannot start; the metrics file is as it was.
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
        disabled = config.wandb.mode == "disabled"
        self._wandb = None if disabled else WandbRun(config, directory)
        prepare()
        self._file = MetricsFile(directory.metrics, last_epoch)
        self.interactive = sys.stderr.isatty()
        self._said = time.monotonic()  # when a line was printed last
        self._ttys = [stream.fileno() for stream in (sys.stdout, sys.stderr) if stream.isatty()]
        self._bar = _progress_bar(config.epochs, last_epoch or 0, self.interactive)

    def write(self, row: Row) -> None:
        """Log one epoch."""
        self._file.write(row)
        if self._wandb is not None:
            self._wandb.log(row)
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

    def log_gradients(self, gradients: Mapping[str, Tensor]) -> None:
        """Log histograms of gradients to wandb, beside the row that was written last."""
        if self._wandb is not None:
            self._wandb.log_gradients(gradients)

    def summarize(self, values: Mapping[str, Any]) -> None:
        """Put values into wandb's summary."""
        if self._wandb is not None:
            self._wandb.summarize(values)

    def sync(self) -> None:
        """Make what was logged so far durable."""
        self._file.sync()

    def close(self, *, ok: bool) -> None:
        """End the bar, the file and the wandb run."""
        with self._to_terminal():
            self._bar.close()
        with suppress(OSError):  # everything was written, or its failure is on its way already
            self._file.close()
        if self._wandb is not None:
            self._wandb.finish(ok=ok)


class Unheard(RunLogger):
    """Of a rank but the first, which logs for all."""

    interactive = False

    def __init__(self) -> None:
        pass

    def write(self, row: Row) -> None:
        """Nothing."""

    def status(self, text: str) -> None:
        """Nothing."""

    def say(self, text: str) -> None:
        """Nothing."""

    def log_gradients(self, gradients: Mapping[str, Tensor]) -> None:
        """Nothing."""

    def summarize(self, values: Mapping[str, Any]) -> None:
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
