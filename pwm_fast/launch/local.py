"""``launch=local``: the runs of a sweep in parallel processes on this machine."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus

from pwm_fast.config import ConfigError
from pwm_fast.launch import JobFailed, options, plan, resources, sweep


class LocalSweep:
    """Hydra launcher: each run of a sweep in a process of its own, on a GPU of its own."""

    def setup(self, *, hydra_context: Any, task_function: Any, config: Any) -> None:
        """Take what Hydra gives a launcher."""
        self.hydra_context = hydra_context
        self.config = config

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Make the runs, and wait for them.

        Raises:
            ConfigError: a run's configuration cannot be used; nothing was started.
            JobFailed: a run did not finish; which, why and where its log is was printed.
        """
        with before_the_start(self.config, initial_job_idx):
            given = options.read(options.LocalOptions, self.config.launch)
            loader = self.hydra_context.config_loader
            runs, on_gpu = plan.plan(loader, self.config, job_overrides, initial_job_idx)
            gpus: list[str] = []
            if on_gpu:
                gpus = [str(gpu) for gpu in given.gpus] if given.gpus else resources.visible_gpus()
            count = given.jobs or len(gpus) or resources.cpus()
            together = runs[0].parallel
            if together and (count < 2 or 0 < len(gpus) < count):
                raise ConfigError(
                    f"parallel=data wants several processes, each with a GPU of its own or all "
                    f"without: launch.jobs={count} places have {len(gpus)} GPUs"
                )
        shares = resources.slots(count if together else min(count, len(runs)), gpus)
        if given.dry_run:
            order = f"in {count} processes, one after another"
            order = order if together else f"{len(shares)} at a time"
            print(f"{len(runs)} runs, {order}; nothing is started:")
            print_runs(runs)
            forget(self.config)
            return returns(runs)
        sweep.write(Path(str(self.config.hydra.sweep.dir)), runs, {})
        outcome = sweep.execute(runs, shares)
        text = sweep.failures(runs, outcome.statuses)
        if text:
            print(text, file=sys.stderr)
        status = sweep.exit_status(outcome.statuses, outcome.signals if text else ())
        if status:
            raise JobFailed(status)
        return returns(runs)


@contextmanager
def before_the_start(config: Any, first: int) -> Iterator[None]:
    """What can still be refused: then the sweep leaves nothing behind."""
    try:
        yield
    except ConfigError:
        if first == 0:
            forget(config)
        raise


def print_runs(runs: Sequence[sweep.Run]) -> None:
    """A line for each run."""
    for run in runs:
        print(f"  run {run.index} ({run.label}): {run.run_dir}")


def forget(config: Any) -> None:
    """Remove what Hydra's sweeper wrote for a sweep that is not started."""
    directory = Path(str(config.hydra.sweep.dir))
    with suppress(OSError):
        (directory / "multirun.yaml").unlink()
        os.removedirs(directory)  # and those above it that are empty


def returns(runs: Sequence[sweep.Run]) -> list[JobReturn]:
    """What Hydra's sweeper wants of a launcher."""
    return [JobReturn(status=JobStatus.COMPLETED) for _ in runs]
