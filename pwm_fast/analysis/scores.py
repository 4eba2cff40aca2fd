"""Scores across environments: returns made comparable by a low and a high reference each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from pwm_fast.analysis.groups import Group
from pwm_fast.analysis.measures import Comparison
from pwm_fast.analysis.statistics import RESAMPLES, Estimate, stratified_estimate


class Reference(NamedTuple):
    """Returns of an environment that make scores of 0 and 1."""

    low: float
    high: float

    def score(self, value: float) -> float:
        """Of a return."""
        return (value - self.low) / (self.high - self.low)


class Score(NamedTuple):
    """A configuration over several environments.

    Attributes:
        label: of the configuration.
        runs: number of runs in each environment, in the order of the references.
        estimate: of the runs' scores; environments are the strata of the bootstrap.
    """

    label: str
    runs: tuple[int, ...]
    estimate: Estimate


def across(
    comparisons: Sequence[Comparison],
    references: Mapping[str, Reference],
    resamples: int = RESAMPLES,
) -> list[Score]:
    """Scores of the agents that ran in all environments with a reference.

    An agent is the same where all of ``alg`` is: the numbers of envs and epochs may be each
    environment's own. One with several such groups in one environment is left out.

    Args:
        comparisons: of every environment.
        references: by the slug of the environment.
        resamples: of the bootstrap.
    """
    scored = [c for c in comparisons if c.environment.slug in references]
    if not scored:
        return []
    found = []
    for group in scored[0].environment.groups:
        strata = []
        for comparison in scored:
            reference = references[comparison.environment.slug]
            same = [g for g in comparison.environment.groups if _agent(g) == _agent(group)]
            values = comparison.of(same[0], comparison.primary.key) if len(same) == 1 else []
            strata.append([reference.score(v) for v in values if v == v])
        if all(strata):
            counts = tuple(map(len, strata))
            found.append(Score(group.label, counts, stratified_estimate(strata, resamples)))
    return found


def _agent(group: Group) -> dict[str, object]:
    return {k: v for k, v in group.config.items() if k.startswith("alg.")}
