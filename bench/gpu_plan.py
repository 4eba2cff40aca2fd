"""Which cases each measuring stage of :mod:`bench.gpu` has, and in which order they are taken."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from bench import micro
from bench.cases import Case, matrix
from bench.worker import Job

MEASURED = ("headline", "epoch", "quick", "esnr", "matrix")
READ = tuple(micro.STAGES)  # stages of microbenchmarks
_PASSES = {"headline": matrix.HEADLINE, "quick": matrix.PASSES, "matrix": matrix.PASSES}


def cases(stage: str, dry: bool) -> list[Case]:
    """The cases of a stage, or small stand-ins."""
    if dry:
        return matrix.dry(stage)
    made = {
        "headline": matrix.headline,
        "epoch": matrix.epoch,
        "quick": matrix.quick,
        "esnr": matrix.esnr,
        "matrix": matrix.full,
    }
    return made[stage]()


def jobs(stage: str, found: Sequence[Case], dry: bool) -> Iterator[Job]:
    """All jobs of a stage, in order.

    Rollouts in passes: all over their cheap providers, then over those that take compiling.
    """
    if stage in READ:
        yield from (Job("micro", stage, name, dry=dry) for name in micro.STAGES[stage])
        return
    taken: dict[str, set[str]] = {case.name: set() for case in found}
    rest = tuple(dict.fromkeys(p for case in found for p in case.providers))
    for names in (*_PASSES.get(stage, ()), rest):
        for case in found:
            chosen = tuple(p for p in case.providers if p in names and p not in taken[case.name])
            taken[case.name].update(chosen)
            if chosen:
                yield Job("case", stage, case.name, chosen, dry)
