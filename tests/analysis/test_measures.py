"""Measures of runs and groups, on curves that are known."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pwm_fast.analysis.curves import POINTS, group_curves, thinned
from pwm_fast.analysis.groups import arrange
from pwm_fast.analysis.measures import Comparison, area, first_reaching, measure, value_at
from pwm_fast.analysis.runs import Run, Series, find, load
from pwm_fast.analysis.scores import Reference, across
from pwm_fast.analysis.statistics import mean
from tests.analysis.conftest import write_run


def series(steps: list[float], values: list[float]) -> Series:
    return Series(np.array(steps), np.array(steps) / 10.0, np.array(values))


def compare(top: Path, **options: Any) -> list[Comparison]:
    runs = [run for run in map(load, find([str(top)])) if isinstance(run, Run)]
    return [measure(environment, **options) for environment in arrange(runs)[0]]


CURVE = series([0.0, 10.0, 30.0], [0.0, 20.0, 0.0])


def test_value_between_evaluations() -> None:
    assert [value_at(CURVE, s) for s in (0.0, 5.0, 10.0, 15.0, 30.0)] == [
        0.0,
        10.0,
        20.0,
        15.0,
        0.0,
    ]
    assert math.isnan(value_at(CURVE, 31.0)) and math.isnan(value_at(CURVE, -1.0))


def test_area() -> None:
    assert area(CURVE, 30.0) == pytest.approx((100.0 + 200.0) / 30.0)
    assert area(CURVE, 20.0) == pytest.approx((100.0 + 150.0) / 20.0)
    assert area(CURVE, 5.0) == pytest.approx(5.0)
    assert math.isnan(area(CURVE, 31.0)), "the run did not get there"
    assert math.isnan(area(series([10.0, 30.0], [1.0, 1.0]), 30.0)), "it began later"
    assert math.isnan(area(CURVE, 0.0))


def test_first_reaching() -> None:
    assert first_reaching(CURVE, 20.0) == (1.0, 10.0)
    assert first_reaching(CURVE, -5.0) == (0.0, 0.0)
    assert all(map(math.isnan, first_reaching(CURVE, 20.1)))


def test_study(study: Path) -> None:
    """Two groups of four, one run of which has come to 2,200 of 4,000 steps."""
    [comparison] = compare(study, target=70.0)
    base, flow = comparison.environment.groups
    assert (base.label, flow.label) == ("pwm_tiny", "pwm_tiny_flow")
    assert comparison.budget == 4000.0 and comparison.steps == [1000, 2000, 3000, 4000]
    assert comparison.of(flow, "final_return")[:3] == [100.0, 110.0, 120.0]
    assert math.isnan(comparison.of(flow, "final_return")[3])
    assert comparison.of(flow, "last_return") == [100.0, 110.0, 120.0, 2000 / 40 + 30]
    assert comparison.of(base, "auc") == pytest.approx([20.0, 30.0, 40.0, 50.0])
    estimates = comparison.estimates[1]
    assert (estimates["final_return"].n, estimates["final_return"].mean) == (3, 110.0)
    assert estimates["return_at_2000"].n == 4
    assert estimates["return_at_2000"].iqm == pytest.approx(50.0 + 15.0)
    assert estimates["return_at_3000"].n == 3, "the run that goes on is not there yet"
    assert estimates["esnr_db"].mean == pytest.approx((2.5 + 3.5 + 4.5 + 6.5) / 4)
    assert comparison.of(base, "throughput") == [50.0] * 4
    assert comparison.of(base, "wm_grad_norm") == pytest.approx([3.6] * 4, rel=0.1)
    assert estimates["finished_wall_time"].n == 3
    # The baseline's curves end at 40 to 70: one reaches 70, at the last evaluation.
    assert (comparison.reaches[0].reached, comparison.reaches[0].runs) == (1, 4)
    assert comparison.reaches[0].seconds == math.inf
    # The flow reaches it at 3000, 2500, 2000 and 2000 (of 1600) steps, 2, 3, 4 and 5 s an epoch.
    reach = comparison.reaches[1]
    assert (reach.reached, reach.least_seconds, reach.most_seconds) == (4, 60.0, 100.0)
    assert reach.steps == (2000 + 2500) / 2 and reach.seconds == (75.0 + 80.0) / 2
    assert comparison.primary.key == "final_return"
    [(first, second, probability, interval)] = comparison.improvements()
    assert (first, second, probability) == ("pwm_tiny", "pwm_tiny_flow", 0.0)
    assert interval is not None


def test_nothing_finished(tmp_path: Path) -> None:
    """What can be compared is the return where all runs have been."""
    for seed, epochs in enumerate((10, 22, 30)):
        write_run(tmp_path / str(seed), seed=seed, epochs=epochs, status=None)
    [comparison] = compare(tmp_path)
    assert comparison.budget == 1000.0
    assert comparison.primary.key == "return_at_1000"
    assert comparison.estimates[0]["return_at_1000"].n == 3
    assert comparison.reaches == []


def test_run_that_has_just_begun(tmp_path: Path) -> None:
    write_run(tmp_path / "0", epochs=0, status=None)
    [comparison] = compare(tmp_path)
    assert comparison.budget == 0.0 and comparison.steps == [0]
    values = comparison.values[str(tmp_path / "0")]
    assert values["return_at_0"] == 0.0
    for key in ("auc", "throughput", "esnr_db", "wm_grad_norm", "final_return"):
        assert math.isnan(values[key])


def test_throughput_leaves_random_epochs_out(tmp_path: Path) -> None:
    path = write_run(tmp_path / "0", epochs=6)  # of which 5 and 6 learned
    text = (path / "metrics.jsonl").read_text()
    lines = text.replace('"steps_per_second": 50.0', '"steps_per_second": 9999.0').splitlines()
    lines[5:] = text.splitlines()[5:]
    (path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    [comparison] = compare(tmp_path)
    assert comparison.values[str(path)]["throughput"] == 50.0


def test_given_steps(study: Path) -> None:
    [comparison] = compare(study, steps=[1500.0, 500.0, 9000.0])
    assert comparison.steps == [500.0, 1500.0, 9000.0]
    assert comparison.estimates[0]["return_at_9000"].n == 0


def test_curves_of_a_group() -> None:
    """All runs as far as the shortest goes, then the half that goes further."""
    xs = [np.arange(0.0, end + 1.0) for end in (4, 8, 8, 9)]
    ys = [x + offset for x, offset in zip(xs, (0.0, 4.0, 8.0, 12.0), strict=True)]
    whole, rest = group_curves(xs, ys, mean)
    assert whole.runs == 4 and whole.x.tolist() == [0, 1, 2, 3, 4]
    assert whole.center == pytest.approx(whole.x + 6.0)
    assert whole.band is not None and (whole.band[0] < whole.center).all()
    assert rest.runs == 3 and rest.x.tolist() == [4, 5, 6, 7, 8]
    assert rest.center == pytest.approx(rest.x + 8.0)


def test_curves_of_few_runs() -> None:
    x = np.array([0.0, 1.0])
    [single] = group_curves([x], [x], mean)
    assert single.band is None
    assert group_curves([], [], mean) == []
    assert group_curves([np.array([])], [np.array([])], mean) == []
    assert group_curves([x, x + 5.0], [x, x], mean) == [], "no point in common"
    [both] = group_curves([x, np.array([0.0])], [x, np.array([9.0])], mean)
    assert both.x.tolist() == [0.0] and both.center.tolist() == [4.5]


def test_long_curves_are_thinned() -> None:
    steps = np.arange(1000.0)
    dense = Series(steps, steps, np.where(steps % 10 == 3, 1e6, 2.0))
    thin = thinned(dense)
    assert len(thin.values) == POINTS and set(thin.values) == {2.0}, "medians know no outliers"
    assert thinned(thin) is thin
    [curve] = group_curves([steps, steps + 0.5], [steps, steps], mean)
    assert len(curve.x) == POINTS


def test_scores_across_environments(tmp_path: Path) -> None:
    for seed in range(2):
        for name, final in (("ant", 100.0), ("hopper", 1000.0)):
            for alg, gain in (("pwm", 1.0), ("pwm_flow", 2.0), (f"only_{name}", 1.0)):
                write_run(
                    tmp_path / name / alg / str(seed),
                    alg,
                    seed,
                    env={"name": name, "num_envs": 4 if name == "ant" else 8},
                    final=final * gain + seed,
                )
    comparisons = compare(tmp_path)
    references = {"ant": Reference(0.0, 100.0), "hopper": Reference(-1000.0, 1000.0)}
    scores = across(comparisons, references)
    assert [(s.label, s.runs) for s in scores] == [("pwm", (2, 2)), ("pwm_flow", (2, 2))]
    expected = (1.0 + 1.01 + 1.0 + 1.0005) / 4
    assert scores[0].estimate.mean == pytest.approx(expected)
    assert across(comparisons, {}) == []
