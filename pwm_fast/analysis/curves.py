"""Curves of a group: one statistic over the curves of its runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pwm_fast.analysis.runs import Series
from pwm_fast.analysis.statistics import Statistic, bands

POINTS = 100


class GroupCurve(NamedTuple):
    """A statistic over the runs of a group.

    Attributes:
        runs: number of runs that it is of.
        x: ``[P]``.
        center: the statistic, ``[P]``.
        band: its confidence band ``[2, P]``; None for a single run.
    """

    runs: int
    x: np.ndarray
    center: np.ndarray
    band: np.ndarray | None


def group_curves(
    xs: Sequence[np.ndarray], ys: Sequence[np.ndarray], statistic: Statistic
) -> list[GroupCurve]:
    """The statistic over several curves: while all go on, then while half of them and more do.

    Between points of its own a curve is linear. The second part, where there is one, is of the
    same runs throughout, at least two: those that reach its end. It begins where the first ends,
    not at its height.
    """
    given = [(x, y) for x, y in zip(xs, ys, strict=True) if len(x)]
    if not given:
        return []
    ends = sorted(float(x[-1]) for x, _ in given)
    shortest, middle = ends[0], ends[len(ends) // 2]
    parts = [_part(given, -np.inf, shortest, statistic)]
    longer = [(x, y) for x, y in given if x[-1] >= middle]
    if middle > shortest and len(longer) > 1:
        parts.append(_part(longer, shortest, middle, statistic))
    return [part for part in parts if part is not None]


def _part(
    curves: Sequence[tuple[np.ndarray, np.ndarray]], start: float, end: float, statistic: Statistic
) -> GroupCurve | None:
    """The statistic from ``start``, or where all have begun, to ``end``; None for an empty span."""
    start = max(start, *(float(x[0]) for x, _ in curves))
    if end < start:
        return None
    knots = np.unique(np.concatenate([[start, end], *(x for x, _ in curves)]))
    knots = knots[(knots >= start) & (knots <= end)]
    if len(knots) > POINTS:
        knots = np.linspace(start, end, POINTS)
    stacked = np.stack([np.interp(knots, x, y) for x, y in curves])
    return GroupCurve(len(curves), knots, *bands(stacked, statistic))


def thinned(series: Series) -> Series:
    """At most :data:`POINTS` points: medians of as many stretches of a denser series.

    What is logged every epoch is noisy, and two runs share no outliers.
    """
    if len(series.values) <= POINTS:
        return series
    parts = [np.array_split(part, POINTS) for part in series]
    return Series(*(np.array([np.median(stretch) for stretch in part]) for part in parts))
