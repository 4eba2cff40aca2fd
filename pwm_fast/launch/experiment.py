"""Experiments of several runs: the sweep that each is, and how its runs do."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from pwm_fast.config import ConfigError
from pwm_fast.launch import queue, sweep
from pwm_fast.run import metrics


def sweep_arguments(options: argparse.Namespace, overrides: Sequence[str]) -> list[str]:
    """The arguments of ``python -m pwm_fast.train`` for an experiment.

    Raises:
        ConfigError: an option cannot be used, or an override says the same.
    """
    chosen = {"launch": options.launch}
    if options.what == "tasks":
        chosen["env"] = options.tasks
    elif options.what == "compare":
        chosen["alg"] = f"{options.baseline},{options.flow or options.baseline + '_flow'}"
    chosen["seed"] = ",".join(map(str, seeds(options.seeds)))  # last: they go together to a node
    names = {"seed": "seeds", "env": "tasks", "alg": "baseline and --flow", "launch": "launch"}
    for text in overrides:
        key = text.split("=")[0].lstrip("+")
        if key in chosen:
            raise ConfigError(f"{text}: {options.what} takes this from --{names[key]}")
    arguments = ["-m", *(f"{key}={value}" for key, value in chosen.items()), *overrides]
    if options.dry_run:
        arguments.append("launch.dry_run=true")
    if options.launch != "local":  # which always waits
        arguments.append(f"launch.wait={str(options.wait).lower()}")
    return arguments


def seeds(text: str) -> list[int]:
    """Seeds of a list such as ``0-3,7``.

    Raises:
        ConfigError: it is no such list, or names a seed twice.
    """
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise ConfigError(f"--seeds must be like 0-3 or 0,1,7, got {text!r}")
        found += range(int(match[1]), int(match[2] or match[1]) + 1)
    if len(set(found)) < len(found):
        raise ConfigError(f"--seeds={text} names a seed twice")
    return found


def status(directory: Path) -> int:
    """Print how the runs of a sweep do; 1 if one of those that have ended did not finish."""
    runs, jobs = sweep.read(directory)
    known = (queue.states() if jobs else {}) or {}
    job_of = {index: job for job, indices in jobs.items() for index in indices}
    failed = False
    for run in runs:
        job = job_of.get(run.index)
        rows = metrics.read(Path(run.run_dir) / "metrics.jsonl")
        epoch = f", epoch {rows[-1]['epoch']}" if rows else ""
        ended = run.status()
        if job in known:
            state = f"{known[job]} (job {job})"
            if ended is not None:  # in a job whose other runs go on, or that was requeued
                state = f"{sweep.describe(ended)} (job {job} {known[job]})"
        elif ended is not None:
            state = sweep.describe(ended)
        elif job is not None:
            state = f"ended without a status (job {job}: {queue.last_state(job)})"
        else:
            state = "has not ended"
        failed = failed or (job not in known and ended != 0 and state != "has not ended")
        print(f"run {run.index} ({run.label}): {state}{epoch}; log {sweep.shown(run.log)}")
    return 1 if failed else 0
