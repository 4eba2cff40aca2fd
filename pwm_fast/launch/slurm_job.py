"""What a Slurm job of a sweep does: its runs, and a requeue when its time is up.

Who owns which signal: Slurm's signals reach every process of the job. A run (pwm_fast.train) takes
each as a request to stop, writes its checkpoint and exits. This process waits for that, and only
then lets submitit, which had taken SIGUSR2 before, requeue the job. Imports nothing heavy.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Sequence
from typing import Any

from pwm_fast.launch import resources, sweep
from pwm_fast.run.interrupt import WARNINGS, hand_on  # submitit has one, SIGUSR2 unless told else


class SlurmJob:
    """Makes runs side by side, each on a GPU of its own; submitit pickles and calls it.

    Args:
        places: shares of the job; one run that is ``parallel`` takes all of them.
    """

    def __init__(self, places: int) -> None:
        self.places = places

    def __call__(self, runs: Sequence[sweep.Run]) -> None:
        """Make the runs; those that a requeued job had finished already are left alone.

        Raises:
            SystemExit: not all of them finished, with their exit status; or submitit requeued the
                job.
        """
        if int(os.environ.get("SLURM_RESTART_COUNT") or 0) > 0:
            runs = [run for run in runs if run.status() != 0]
        if not runs:
            return
        # Where Slurm names no GPUs, those of the node; one run needs no share and no look for them.
        named = "CUDA_VISIBLE_DEVICES" in os.environ
        places = self.places if runs[0].parallel else len(runs)
        gpus = resources.visible_gpus() if named or places > 1 else []
        outcome = sweep.execute(runs, resources.slots(places, gpus))
        text = sweep.failures(runs, outcome.statuses)
        if not text:
            return
        print(text, flush=True)
        if any(s in outcome.signals for s in WARNINGS) or (outcome.signals and preempted()):
            for signum in WARNINGS:
                handler = signal.getsignal(signum)
                if callable(handler):
                    hand_on(signum, handler)  # submitit's: requeues the job and exits
        raise SystemExit(sweep.exit_status(outcome.statuses, outcome.signals))

    def checkpoint(self, runs: Sequence[sweep.Run]) -> Any:
        """What submitit is to run in the requeued job: the same, from the runs' checkpoints."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, runs)


def preempted() -> bool:
    """Slurm is preempting this job, with a time of grace, and has not requeued it yet.

    A job that ends within its grace counts as ended: to come back it has to requeue itself.
    """
    job = os.environ.get("SLURM_JOB_ID", "")
    try:
        shown = subprocess.run(
            ["scontrol", "show", "job", "-o", job], capture_output=True, text=True, timeout=60
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return False
    return bool(re.search(r"\bJobState=RUNNING\b.* PreemptTime=\d", shown))
