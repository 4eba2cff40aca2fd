"""Which GPU and how many CPU threads each of several processes gets."""

from __future__ import annotations

import os
import random
import re
import socket
from collections.abc import Sequence
from contextlib import suppress

from pwm_fast.config import ConfigError, allotted_threads
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


def ranks(shares: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """The variables of the processes of one run that takes all shares of :func:`slots`.

    They are those of torchrun. Every process sees all GPUs, and takes the one of its number.
    """
    gpus = dict.fromkeys(s["CUDA_VISIBLE_DEVICES"] for s in shares if "CUDA_VISIBLE_DEVICES" in s)
    port = str(_free_port())
    count = str(len(shares))
    found = []
    for rank, share in enumerate(shares):
        own = {**share, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        own |= {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        if gpus:
            own["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
        if "SLURM_CPUS_PER_TASK" in share:  # of which a run takes its processes' part
            own["SLURM_CPUS_PER_TASK"] = str(int(share["SLURM_CPUS_PER_TASK"]) * len(shares))
        found.append(own)
    return found


def _free_port() -> int:
    """A port on which the first process can listen.

    Not one that the system picks: until that process listens, it may hand the same one out again.
    """
    for port in random.SystemRandom().sample(range(20000, 30000), 100):
        with socket.socket() as trial, suppress(OSError):
            trial.bind(("127.0.0.1", port))
            return port
    raise ConfigError("no port from 20000 to 29999 was free for the processes of a run")


def describe(share: dict[str, str]) -> str:
    """A slot for people."""
    gpu = share.get("CUDA_VISIBLE_DEVICES")
    threads = share["OMP_NUM_THREADS"]
    return ("no GPU" if gpu is None else f"GPU {gpu}") + (
        f", {threads} CPU thread" + ("s" if threads != "1" else "")
    )
