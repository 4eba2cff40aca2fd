"""Curves of a group: its runs' curves on one axis, up to where the shortest of them ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pwm_fast.comparison.runs import Series
from pwm_fast.comparison.statistics import Statistic, bands

POINTS = 100


class GroupCurve(NamedTuple):
    """A statistic over the runs of a group.

    Attributes:
        x: ``[P]``.
        center: the statistic, ``[P]``.
        band: its confidence band ``[2, P]``; None for a single run.
    """

    x: np.ndarray
    center: np.ndarray
    band: np.ndarray | None


def group_curve(
    xs: Sequence[np.ndarray], ys: Sequence[np.ndarray], statistic: Statistic
) -> GroupCurve | None:
    """The statistic over several curves where all of them are; None where they share nothing.

    Between points of its own a curve is linear. Beyond the end of the shortest nothing is drawn:
    a mean over the survivors would jump, and flatter.
    """
    if not xs or any(len(x) == 0 for x in xs):
        return None
    start, end = max(x[0] for x in xs), min(x[-1] for x in xs)
    if end < start:
        return None
    knots = np.unique(np.concatenate(xs))
    knots = knots[(knots >= start) & (knots <= end)]
    if len(knots) > POINTS:
        knots = np.linspace(start, end, POINTS)
    curves = np.stack([np.interp(knots, x, y) for x, y in zip(xs, ys, strict=True)])
    return GroupCurve(knots, *bands(curves, statistic))


def thinned(series: Series) -> Series:
    """At most :data:`POINTS` points: medians of as many stretches of a denser series.

    What is logged every epoch is noisy, and two runs share no outliers.
    """
    if len(series.values) <= POINTS:
        return series
    parts = [np.array_split(part, POINTS) for part in series]
    return Series(*(np.array([np.median(stretch) for stretch in part]) for part in parts))
