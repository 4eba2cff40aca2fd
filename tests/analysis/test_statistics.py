"""Means, interquartile means and their intervals."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pwm_fast.analysis.statistics import (
    Interval,
    bands,
    estimate,
    improvement,
    iqm,
    mean,
    stratified_estimate,
)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([3.0], 3.0),
        ([1.0, 5.0, 9.0], 5.0),
        ([100.0, 1.0, 2.0, -50.0], 1.5),
        ([0.0, 1.0, 2.0, 3.0, 40.0], 2.0),
        ([9.0, 1.0, 2.0, 3.0, 4.0, 5.0, -8.0, 7.0], (2.0 + 3.0 + 4.0 + 5.0) / 4),
    ],
)
def test_interquartile_mean(values: list[float], expected: float) -> None:
    """Whole values are cut: a quarter of them, rounded down, at each end."""
    assert iqm(np.array(values)) == pytest.approx(expected)
    assert iqm(np.array([values, values[::-1]])).tolist() == pytest.approx([expected] * 2)


def test_single_run_has_no_interval() -> None:
    found = estimate([7.0])
    assert (found.n, found.mean, found.iqm) == (1, 7.0, 7.0)
    assert found.mean_interval is None and found.iqm_interval is None


def test_runs_without_the_value_do_not_count() -> None:
    assert estimate([1.0, math.nan, 3.0, math.inf]).n == 2
    assert estimate([1.0, math.nan, 3.0]).mean == 2.0
    nothing = estimate([math.nan])
    assert nothing.n == 0 and math.isnan(nothing.mean) and nothing.mean_interval is None


def test_interval_of_the_mean_is_the_normal_one() -> None:
    """Of many runs; the bootstrap's standard error is that of n, not n - 1."""
    values = np.random.default_rng(1).normal(10.0, 3.0, size=200)
    found = estimate(values.tolist())
    half = 1.96 * values.std() / 200**0.5
    assert found.mean_interval is not None
    assert found.mean_interval.low == pytest.approx(values.mean() - half, abs=0.05)
    assert found.mean_interval.high == pytest.approx(values.mean() + half, abs=0.05)


def test_interval_of_two_runs() -> None:
    """Of two runs a resample is both (half the time), or one of them twice."""
    assert estimate([0.0, 1.0]).mean_interval == Interval(0.0, 1.0)


def test_same_values_give_the_same_interval() -> None:
    values = [1.0, 4.0, 2.0, 8.0]
    assert estimate(values) == estimate(values)
    assert estimate(values) != estimate([*values, 9.0])


def test_strata_are_resampled_apart() -> None:
    """Differences between the environments are no uncertainty; those within them are."""
    apart = stratified_estimate([[0.0, 0.0, 0.0], [10.0, 10.0, 10.0]])
    assert apart.mean == 5.0 and apart.mean_interval == Interval(5.0, 5.0)
    together = stratified_estimate([[0.0, 0.0, 0.0, 10.0, 10.0, 10.0]])
    assert together.mean_interval is not None and together.mean_interval.low < 2.0


def test_band_resamples_whole_runs() -> None:
    """Runs that are parallel give a band of the same width everywhere."""
    points = np.linspace(0.0, 5.0, 7)
    curves = np.stack([points + offset for offset in (0.0, 1.0, 3.0, 9.0)])
    center, band = bands(curves, mean)
    assert center == pytest.approx(points + 3.25)
    assert band is not None
    assert band[0] - points == pytest.approx([band[0][0]] * 7)
    assert band[1] - band[0] == pytest.approx([band[1][0] - band[0][0]] * 7)
    assert band[0][0] < 3.25 < band[1][0]
    assert bands(curves[:1], mean)[1] is None


def test_probability_of_improvement() -> None:
    assert improvement([5.0, 6.0], [1.0, 2.0]) == (1.0, Interval(1.0, 1.0))
    assert improvement([1.0, 3.0], [2.0, 3.0])[0] == pytest.approx((0 + 0 + 1 + 0.5) / 4)
    assert improvement([1.0], [0.0, 2.0]) == (0.5, None)
    assert math.isnan(improvement([math.nan], [1.0])[0])
    low, high = improvement([1.0, 3.0, 5.0, 7.0], [2.0, 4.0, 6.0, 8.0])[1] or (0.5, 0.5)
    assert 0.0 <= low < 0.375 < high <= 1.0
