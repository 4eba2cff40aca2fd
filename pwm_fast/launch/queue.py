"""Asking Slurm about jobs, with or without its accounting database."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Sequence

from pwm_fast.launch.sweep import Run

LOOK_SECONDS = (1.0, 15.0)  # between looks at the queue, at first and in the end
SETTLE_SECONDS = 10.0  # for what the jobs wrote to show on this machine's shared file system


def states() -> dict[str, str] | None:
    """State of each of the user's jobs that Slurm still has, by its id; None without an answer.

    A waiting job's state comes with the reason, as in ``PENDING: Resources``.
    """
    answer = _ask("squeue", "-h", "-r", "-u", str(os.getuid()), "-o", "%i|%T|%r")
    if answer is None:
        return None
    known = {}
    for line in answer.splitlines():
        job, state, why = line.strip().split("|", 2)
        known[job] = f"{state}: {why}" if state == "PENDING" else state
    return known


def wait(jobs: Sequence[str]) -> None:
    """Return when none of the jobs waits or runs any more.

    Raises:
        KeyboardInterrupt: Ctrl-C; the jobs go on.
    """
    pause, most = LOOK_SECONDS
    try:
        while True:
            known = states()
            if known is not None and not any(job in known for job in jobs):
                return
            time.sleep(pause)
            pause = min(pause * 1.2, most)
    except KeyboardInterrupt:
        arrays = sorted({job.split("_")[0] for job in jobs}, key=int)
        print(f"\nno longer waiting; the jobs go on, until: scancel {' '.join(arrays)}", flush=True)
        raise


def ends(
    runs: Sequence[Run], jobs: dict[str, list[int]]
) -> tuple[list[int | None], dict[int, str]]:
    """Exit statuses of runs whose jobs have ended, and what Slurm says of those without one."""
    deadline = time.monotonic() + SETTLE_SECONDS
    statuses = [run.status() for run in runs]
    while None in statuses and time.monotonic() < deadline:
        time.sleep(0.5)
        statuses = [run.status() for run in runs]
    job_of = {index: job for job, indices in jobs.items() for index in indices}
    notes = {}
    for run, status in zip(runs, statuses, strict=True):
        if status != 0 and run.index in job_of:
            notes[run.index] = f"job {job_of[run.index]}: {last_state(job_of[run.index])}"
    return statuses, notes


def last_state(job: str) -> str:
    """How Slurm says a job ended."""
    accounted = _ask("sacct", "-n", "-X", "-P", "-o", "State", "-j", job)
    if accounted and accounted.split():
        return accounted.split("\n")[0].strip()
    shown = _ask("scontrol", "show", "job", "-o", job) or ""
    match = re.search(r"JobState=(\S+)", shown)
    return match[1] if match else "Slurm has no record of its end"


def reason(error: Exception) -> str:
    """What sbatch said, in one line, with the partitions there are if it was about them."""
    lines = [line.strip() for line in str(error).splitlines() if "error:" in line]
    said = "; ".join(re.sub(r"^sbatch: error: ", "", line) for line in lines) or str(error)
    if "partition" in said.lower():
        there = (_ask("sinfo", "-h", "-o", "%R") or "").split()
        if there:
            said += f" (launch.partition; there are {', '.join(sorted(set(there)))})"
    return said


def _ask(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
