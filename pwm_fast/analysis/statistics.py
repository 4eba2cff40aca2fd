"""Mean and interquartile mean over runs, with bootstrap confidence intervals.

As recommended by Agarwal et al., "Deep Reinforcement Learning at the Edge of the Statistical
Precipice" (arXiv 2108.13264): runs are resampled with replacement within each stratum (a
configuration in one environment), and the interval is between percentiles of the statistic.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 10_000
Statistic = Callable[[np.ndarray], np.ndarray]  # over the last axis


class Interval(NamedTuple):
    """A confidence interval."""

    low: float
    high: float


class Estimate(NamedTuple):
    """A measure over runs.

    Attributes:
        n: runs that have the measure; with none, ``mean`` and ``iqm`` are NaN.
        mean: their mean.
        mean_interval: of the mean; None for fewer than two runs.
        iqm: their interquartile mean.
        iqm_interval: of the interquartile mean; None for fewer than two runs.
    """

    n: int
    mean: float
    mean_interval: Interval | None
    iqm: float
    iqm_interval: Interval | None


def mean(values: np.ndarray) -> np.ndarray:
    """Mean over the last axis."""
    result: np.ndarray = np.mean(values, axis=-1)
    return result


def iqm(values: np.ndarray) -> np.ndarray:
    """Interquartile mean over the last axis: of what is left without the lowest and highest 25 %.

    As scipy's ``trim_mean(values, 0.25)``: whole values are cut, so fewer than 4 are all kept.
    """
    cut = values.shape[-1] // 4
    inner = np.sort(values, axis=-1)[..., cut : values.shape[-1] - cut]
    result: np.ndarray = np.mean(inner, axis=-1)
    return result


STATISTICS: dict[str, Statistic] = {"iqm": iqm, "mean": mean}


def estimate(values: Sequence[float], resamples: int = RESAMPLES) -> Estimate:
    """Mean and interquartile mean of runs of one configuration; NaN is a run without the value."""
    return stratified_estimate([values], resamples)


def stratified_estimate(strata: Sequence[Sequence[float]], resamples: int = RESAMPLES) -> Estimate:
    """Mean and interquartile mean over all runs of several strata, which are resampled apart.

    The same values give the same intervals: the random numbers have a fixed seed.

    Args:
        strata: values of the runs of each.
        resamples: how often the runs are drawn anew.
    """
    present = [np.asarray([v for v in s if np.isfinite(v)], dtype=float) for s in strata]
    present = [values for values in present if len(values)]
    if not present:
        return Estimate(0, np.nan, None, np.nan, None)
    pooled = np.concatenate(present)
    if all(len(values) < 2 for values in present):
        return Estimate(len(pooled), float(mean(pooled)), None, float(iqm(pooled)), None)
    generator = np.random.default_rng(0)
    drawn = np.concatenate(
        [v[generator.integers(len(v), size=(resamples, len(v)))] for v in present], axis=1
    )
    return Estimate(
        len(pooled),
        float(mean(pooled)),
        _interval(mean(drawn)),
        float(iqm(pooled)),
        _interval(iqm(drawn)),
    )


def bands(
    curves: np.ndarray, statistic: Statistic, resamples: int = 1000
) -> tuple[np.ndarray, np.ndarray | None]:
    """A statistic over runs at every point of their curves, and its confidence band.

    Whole runs are resampled, so the band is of curves and not of unrelated points.

    Args:
        curves: ``[runs, points]``.
        statistic: over the last axis.
        resamples: how often the runs are drawn anew.

    Returns:
        The statistic ``[points]`` and the band ``[2, points]``, None for a single run.
    """
    center = statistic(curves.T)
    runs = len(curves)
    if runs < 2:
        return center, None
    chosen = np.random.default_rng(0).integers(runs, size=(resamples, runs))
    drawn = np.stack([statistic(point[chosen]) for point in curves.T], axis=1)
    return center, np.percentile(drawn, _percentiles(), axis=0)


def improvement(
    ours: Sequence[float], others: Sequence[float], resamples: int = RESAMPLES
) -> tuple[float, Interval | None]:
    """Probability that a run of ours scores above one of the others', ties counting half.

    Both sets of runs are resampled; the interval is None where either has fewer than two.
    """
    x, y = (np.asarray([v for v in s if np.isfinite(v)], dtype=float) for s in (ours, others))
    if len(x) == 0 or len(y) == 0:
        return np.nan, None
    wins = (x[:, None] > y[None, :]) + 0.5 * (x[:, None] == y[None, :])
    if len(x) < 2 or len(y) < 2:
        return float(wins.mean()), None
    generator = np.random.default_rng(0)
    rows = generator.integers(len(x), size=(resamples, len(x), 1))
    columns = generator.integers(len(y), size=(resamples, 1, len(y)))
    return float(wins.mean()), _interval(wins[rows, columns].mean((1, 2)))


def _percentiles() -> list[float]:
    tail = 50.0 * (1.0 - CONFIDENCE)
    return [tail, 100.0 - tail]


def _interval(values: np.ndarray) -> Interval:
    low, high = np.percentile(values, _percentiles())
    return Interval(float(low), float(high))
