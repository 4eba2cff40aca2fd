"""Compiling the tuner's choices in several processes, so that its time goes into measuring.

Nothing is launched: Triton keeps what it compiles on disk, where the process that measures finds
it. What does not compile here fails there again, and says why.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch

from pwm_fast.kernels.plan import Limits

JOBS = 8  # each has a CUDA context of its own


def jobs() -> int:
    """Processes that this machine has cores for."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(JOBS, cores or 1)


def ahead(
    names: Sequence[str],
    device: torch.device,
    limits: Limits,
    rates: Sequence[str],
    rows: Sequence[int],
    seconds: float,
    *,
    count: int | None = None,
    work: Callable[..., None] | None = None,
) -> None:
    """Compile the choices of problems, the first ones first, until all are or the time is over.

    Args:
        names: of the problems.
        device: see :func:`bench.tune.problems`, as the following.
        limits: of the device.
        rates: precisions.
        rows: in place of those that agents have.
        seconds: after which processes are stopped.
        count: of processes; None: :func:`jobs`.
        work: what each does, :func:`compile_some`; another for tests.
    """
    end = time.monotonic() + seconds
    count = min(jobs() if count is None else count, len(names))
    if count < 2:
        return  # the process that measures compiles as fast
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(
            target=compile_some if work is None else work,
            args=(list(names[i::count]), str(device), limits, tuple(rates), tuple(rows)),
            daemon=True,
        )
        for i in range(count)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(max(end - time.monotonic(), 0.0))
    for process in processes:
        if process.is_alive():
            process.kill()
        process.join()


def compile_some(
    names: Sequence[str], device: str, limits: Limits, rates: Sequence[str], rows: Sequence[int]
) -> None:
    """What one process does."""
    from bench.tune import problems

    wanted = set(names)
    torch.cuda.set_device(torch.device(device))
    with compiling():
        for problem in problems(torch.device(device), limits, rates, rows):
            if problem.name not in wanted:
                continue
            make = problem.prepare()
            for options in problem.choices.values():
                with contextlib.suppress(Exception):  # its result is wrong: nothing ran
                    make(options)


@contextlib.contextmanager
def compiling() -> Iterator[None]:
    """Triton's kernels are compiled where they would be launched."""
    from triton.runtime.jit import JITFunction

    launch = JITFunction.run

    def run(kernel: Any, *args: Any, **options: Any) -> Any:
        return launch(kernel, *args, **{**options, "warmup": True})

    with mock.patch.object(JITFunction, "run", run):
        yield
