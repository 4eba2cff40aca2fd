"""The keys of ``configs/launch/*.yaml``, with their checks."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pwm_fast.config import ConfigError


@dataclass
class LocalOptions:
    """Runs of a sweep in parallel processes on this machine.

    Attributes:
        jobs: runs at a time; null is one a GPU, or without GPUs as many as there are CPUs.
        gpus: GPUs to use, as CUDA_VISIBLE_DEVICES names them; null is all visible ones.
        dry_run: print what would be run, and run nothing.
    """

    jobs: int | None = None
    gpus: list[Any] | None = None
    dry_run: bool = False

    def __post_init__(self) -> None:
        if self.jobs is not None:
            _at_least("jobs", self.jobs, 1)
        if self.gpus is not None and not self.gpus:
            raise ConfigError("launch.gpus must be null or a list such as [0,1], got []")


@dataclass
class SlurmOptions:
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
        runs_per_job: runs that share one job, each with a GPU of its own.
        signal_s: seconds before the time limit at which the runs write their checkpoints and the
            job is requeued.
        max_requeues: time limits that a job may reach before it counts as failed.
        max_jobs: jobs of the sweep that run at a time.
        setup: shell commands at the job's start.
        wait: stay until all jobs have ended, and report; false returns after submission.
        dry_run: print what would be submitted, and submit nothing.
    """

    account: str | None = None
    partition: str | None = None
    qos: str | None = None
    gpu_type: str | None = None
    gpus: int = 1
    cpus: int = 8
    mem_gb: int | None = 32
    time: str = "24:00:00"
    runs_per_job: int = 1
    signal_s: int = 120
    max_requeues: int = 50
    max_jobs: int = 256
    setup: list[str] | None = field(default=None)
    wait: bool = True
    dry_run: bool = False

    def __post_init__(self) -> None:
        if self.gpus not in (0, 1):
            raise ConfigError(
                f"launch.gpus must be 1 or 0 (a run uses one GPU or none), got {self.gpus}; for "
                "several runs on a node with several GPUs set launch.runs_per_job"
            )
        if self.gpu_type is not None and self.gpus == 0:
            raise ConfigError(f"launch.gpu_type={self.gpu_type} needs launch.gpus=1")
        for name in ("cpus", "runs_per_job", "max_jobs"):
            _at_least(name, getattr(self, name), 1)
        for name in ("signal_s", "max_requeues"):
            _at_least(name, getattr(self, name), 0)
        if self.mem_gb is not None:
            _at_least("mem_gb", self.mem_gb, 1)
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
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        merged = OmegaConf.merge(OmegaConf.structured(kind), {} if node is None else node)
        options = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        text, key = str(error).splitlines()[0], getattr(error, "full_key", None)
        raise ConfigError(f"launch.{key}: {text}" if key else text) from error
    assert isinstance(options, kind)
    return options


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


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ConfigError(f"launch.{name} must be at least {least}, got {value}")
