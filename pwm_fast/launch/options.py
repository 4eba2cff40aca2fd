"""The keys of ``configs/launch/*.yaml``, with their checks."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from pwm_fast.config import structured
from pwm_fast.config.checks import Checked, ConfigError, at_least, checked, or_null, require


def gpu_list(key: str, value: list[Any]) -> None:
    """Some GPUs."""
    require(bool(value), key, value, "null or a list such as [0,1]")


def one_gpu_or_none(key: str, value: int) -> None:
    """A number of GPUs that a run uses."""
    several = "for several GPUs set launch.runs_per_job, with parallel=data for one run on them"
    require(value in (0, 1), key, value, f"1 or 0 (a process uses one GPU or none; {several})")


@dataclass
class LocalOptions(Checked):
    """Runs of a sweep in parallel processes on this machine.

    Attributes:
        jobs: runs at a time, or with ``parallel=data`` the processes of one run; null is one a
            GPU, or without GPUs as many as there are CPUs.
        gpus: GPUs to use, as CUDA_VISIBLE_DEVICES names them; null is all visible ones.
        dry_run: print what would be run, and run nothing.
    """

    PREFIX: ClassVar[str] = "launch."

    jobs: int | None = checked(None, or_null(at_least(1)))
    gpus: list[Any] | None = checked(None, or_null(gpu_list))
    dry_run: bool = False


@dataclass
class SlurmOptions(Checked):
    """Runs of a sweep as jobs of a Slurm cluster. Null keys are not passed to sbatch.

    Attributes:
        account: Slurm account.
        partition: partition.
        qos: quality of service.
        gpu_type: as in ``a100``; null is any.
        gpus: GPUs a run, 1, or 0 for runs on CPUs.
        cpus: CPUs a run.
        mem_gb: memory a run, in GB; null is the cluster's default.
        time: time limit of a job, as Slurm writes it.
        runs_per_job: runs that share one job, each with a GPU of its own, or with
            ``parallel=data`` the processes of a job's one run.
        signal_s: seconds before the time limit at which the runs write their checkpoints and the
            job is requeued.
        max_requeues: time limits that a job may reach before it counts as failed.
        max_jobs: jobs of the sweep that run at a time.
        setup: shell commands at the job's start.
        wait: stay until all jobs have ended, and report; false returns after submission.
        dry_run: print what would be submitted, and submit nothing.
    """

    PREFIX: ClassVar[str] = "launch."

    account: str | None = None
    partition: str | None = None
    qos: str | None = None
    gpu_type: str | None = None
    gpus: int = checked(1, one_gpu_or_none)
    cpus: int = checked(8, at_least(1))
    mem_gb: int | None = checked(32, or_null(at_least(1)))
    time: str = "24:00:00"
    runs_per_job: int = checked(1, at_least(1))
    signal_s: int = checked(120, at_least(0))
    max_requeues: int = checked(50, at_least(0))
    max_jobs: int = checked(256, at_least(1))
    setup: list[str] | None = None
    wait: bool = True
    dry_run: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gpu_type is not None and self.gpus == 0:
            raise ConfigError(f"launch.gpu_type={self.gpu_type} needs launch.gpus=1")
        self.minutes  # noqa: B018  its check

    @property
    def minutes(self) -> int:
        """The time limit in minutes, rounded up.

        Raises:
            ConfigError: it is no time as Slurm writes one.
        """
        return minutes(self.time)


Options = TypeVar("Options", LocalOptions, SlurmOptions)


def read(kind: type[Options], node: Any) -> Options:
    """The options of a composed configuration's ``launch`` node.

    Raises:
        ConfigError: unknown keys, wrong types, or values out of range; the message names the key.
    """
    return structured(kind, {} if node is None else node, prefix="launch.")


def minutes(time: str) -> int:
    """Minutes, rounded up, of a time as Slurm writes it.

    That is one of M, M:S, H:M:S, D-H, D-H:M and D-H:M:S.

    Raises:
        ConfigError: it is none of them, or no time at all.
    """
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", str(time))
    if match is None:
        raise ConfigError(f"launch.time must be like 90, 24:00:00 or 2-12:00:00, got {time!r}")
    days, *parts = match.groups()
    numbers = [int(part) for part in parts if part is not None]
    if days is not None or len(numbers) == 3:
        hours, mins, seconds = (*numbers, 0, 0)[:3]
    else:
        hours, mins, seconds = 0, *(*numbers, 0)[:2]
    total = ((int(days or 0) * 24 + hours) * 60 + mins) * 60 + seconds
    if total == 0:
        raise ConfigError(f"launch.time must be longer than 0, got {time!r}")
    return -(-total // 60)
