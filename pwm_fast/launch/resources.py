"""Which GPU and how many CPU threads each of several processes gets."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from pwm_fast.config import allotted_threads
from pwm_fast.run.installation import usable_cpus


def visible_gpus() -> list[str]:
    """Identifiers of this process's GPUs, as CUDA_VISIBLE_DEVICES takes them."""
    value = os.environ.get("CUDA_VISIBLE_DEVICES")
    if value is None:
        import torch  # counts without making a CUDA context

        return [str(index) for index in range(torch.cuda.device_count())]
    return [name.strip() for name in value.split(",") if name.strip() not in ("", "-1")]


def cpus() -> int:
    """Number of CPUs that this process may use: Slurm's share, else its affinity's."""
    return allotted_threads() or usable_cpus()


def slots(count: int, gpus: Sequence[str]) -> list[dict[str, str]]:
    """The variables that share GPUs and CPUs out among ``count`` processes.

    Process i gets the GPU ``gpus[i % len(gpus)]`` alone to see, and an equal share of the CPU
    threads: at least one, and no more than OMP_NUM_THREADS where that is set.
    """
    limit = os.environ.get("OMP_NUM_THREADS", "")
    number = re.fullmatch("0*([1-9][0-9]*)", limit)
    most = int(number[1][:9]) if number else cpus()
    threads = str(max(1, min(cpus() // count, most)))
    shares = []
    for index in range(count):
        share = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        if "SLURM_CPUS_PER_TASK" in os.environ:  # where a run looks first for its threads
            share["SLURM_CPUS_PER_TASK"] = threads
        if gpus:
            share["CUDA_VISIBLE_DEVICES"] = gpus[index % len(gpus)]
        shares.append(share)
    return shares


def describe(share: dict[str, str]) -> str:
    """A slot for people."""
    gpu = share.get("CUDA_VISIBLE_DEVICES")
    threads = share["OMP_NUM_THREADS"]
    return ("no GPU" if gpu is None else f"GPU {gpu}") + (
        f", {threads} CPU thread" + ("s" if threads != "1" else "")
    )
