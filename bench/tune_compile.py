"""Compiling the tuner's choices in several processes, so that its time goes into measuring.

Nothing is launched: Triton keeps what it compiles on disk, where the process that measures finds
it. What does not compile here fails there again, and says why.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch

from bench import pool
from bench.internals import planning
from bench.tune_problems import problems
from pwm_fast.run.installation import usable_cpus

JOBS = 8  # each has a CUDA context of its own


def jobs() -> int:
    """Processes that this machine has cores for."""
    return min(JOBS, usable_cpus())


def ahead(names: Sequence[str], work: Callable[[str], object], seconds: float) -> None:
    """Compile the choices of problems, the first ones first, until all are or the time is over.

    Args:
        names: of the problems.
        work: :func:`compile_one` with its further arguments.
        seconds: after which processes are stopped.
    """
    if min(jobs(), len(names)) > 1:  # the process that measures compiles as fast
        for _ in pool.each(work, names, jobs(), seconds):
            pass


def compile_one(
    name: str, device: str, limits: planning.Limits, rates: Sequence[str], rows: Sequence[int]
) -> None:
    """What a process does for a problem of :func:`bench.tune_problems.problems`."""
    torch.cuda.set_device(torch.device(device))
    with compiling():
        for problem in problems(torch.device(device), limits, rates, rows):
            if problem.name == name:
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
