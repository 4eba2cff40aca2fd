"""Which cases each measuring stage of :mod:`bench.gpu` has, and in which order they are taken."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from bench import micro
from bench.cases import Case, matrix
from bench.worker import Job

MEASURED = ("quick", "esnr", "epoch", "matrix")


def cases(stage: str, dry: bool) -> list[Case]:
    """The cases of a stage, or small stand-ins."""
    if dry:
        return matrix.dry(stage)
    if stage == "quick":
        return matrix.quick()
    if stage == "matrix":
        return matrix.full()
    return matrix.esnr() if stage == "esnr" else matrix.epoch()


def jobs(stage: str, found: Sequence[Case], dry: bool) -> Iterator[Job]:
    """All jobs of a stage, in order.

    Rollouts in passes: all over their cheap providers, then over those that take compiling.
    """
    if stage == "micro":
        yield from (Job("micro", stage, name, dry=dry) for name in micro.BENCHMARKS)
        return
    taken: dict[str, set[str]] = {case.name: set() for case in found}
    rest = tuple(dict.fromkeys(p for case in found for p in case.providers))
    for names in (*(matrix.PASSES if stage in ("quick", "matrix") else ()), rest):
        for case in found:
            chosen = tuple(p for p in case.providers if p in names and p not in taken[case.name])
            taken[case.name].update(chosen)
            if chosen:
                yield Job("case", stage, case.name, chosen, dry)
