"""What is compared: measures of every run, and their estimates over the runs of a group."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from pwm_fast.analysis.groups import Environment, Group
from pwm_fast.analysis.published import Published
from pwm_fast.analysis.runs import RETURN, Run, Series
from pwm_fast.analysis.statistics import Estimate, Interval, estimate, improvement
from pwm_fast.run import metrics

FRACTIONS = (0.25, 0.5, 0.75, 1.0)  # of the budget, where sample efficiency is read off
GRADIENTS = {
    "wm_grad_norm": "world model",
    "actor_grad_norm": "actor",
    "critic_grad_norm": "critics",
}


class Measure(NamedTuple):
    """A number of a run.

    Attributes:
        key: in CSV files.
        label: for people.
        unit: of the number; empty for a ratio.
    """

    key: str
    label: str
    unit: str


@dataclass
class Reach:
    """When the runs of a group reached a target.

    Attributes:
        reached: how many did.
        runs: how many there are.
        seconds: median wall-clock time over all runs, those that never got there counting as
            infinite; infinite where half of them or more did not.
        steps: median environment steps, likewise.
        least_seconds: of the fastest run.
        most_seconds: of the slowest run that got there.
    """

    reached: int
    runs: int
    seconds: float
    steps: float
    least_seconds: float
    most_seconds: float


@dataclass
class Comparison:
    """Everything measured in one environment.

    Attributes:
        environment: what was run.
        budget: environment steps that curves are compared over.
        steps: environment steps at which returns are read off.
        target: return whose time is taken; None without one.
        measures: in the order of the tables.
        values: of every run by the measure's key, NaN where it has none; keyed by the run's path.
        estimates: of every group, in the environment's order, by the measure's key.
        reaches: of every group; empty without a target.
        seconds: wall-clock times at which returns are read off; empty where none were logged.
        published: curves from elsewhere.
        tasks: whose returns were logged one by one; empty where there is one.
    """

    environment: Environment
    budget: float
    steps: list[float]
    target: float | None
    measures: list[Measure]
    values: dict[str, dict[str, float]]
    estimates: list[dict[str, Estimate]]
    reaches: list[Reach]
    seconds: list[float] = field(default_factory=list)
    published: list[Published] = field(default_factory=list)
    tasks: list[str] = field(default_factory=list)

    @property
    def primary(self) -> Measure:
        """What groups are ranked by.

        The return of the final evaluation, or, where no run of some group has finished, the return
        at the last of ``steps``.
        """
        finished = all(e["final_return"].n for e in self.estimates)
        key = "final_return" if finished else at_key(self.steps[-1])
        return next(m for m in self.measures if m.key == key)

    def of(self, group: Group, key: str) -> list[float]:
        """A measure of every run of a group."""
        return [self.values[str(run.path)][key] for run in group.runs]

    def improvements(self) -> list[tuple[str, str, float, Interval | None]]:
        """For every pair of groups: names, probability that the first is better, interval."""
        found = []
        for first, second in itertools.combinations(self.environment.groups, 2):
            key = self.primary.key
            found.append(
                (
                    first.name,
                    second.name,
                    *improvement(self.of(first, key), self.of(second, key)),
                )
            )
        return found


def at_key(steps: float) -> str:
    """Key of the return at so many environment steps."""
    return f"return_at_{steps:.0f}"


def task_key(key: str, task: str) -> str:
    """Key of a measure of one task, where there are several."""
    return f"{key}/{task}"


def after_key(seconds: float) -> str:
    """Key of the return after so many seconds of wall-clock time."""
    return f"return_after_{seconds:.0f}_s"


def measure(
    environment: Environment,
    *,
    target: float | None = None,
    steps: Sequence[float] = (),
    resamples: int = 10_000,
    published: Sequence[Published] = (),
) -> Comparison:
    """Measure all runs of an environment and estimate every measure over the runs of a group.

    Args:
        environment: with at least one group.
        target: return whose time is taken.
        steps: environment steps at which returns are read off; quarters of the budget by default.
        resamples: of the bootstrap.
        published: curves from elsewhere, to be shown beside them.
    """
    budget = budget_of(environment.runs)
    steps = sorted(set(steps)) or sorted({round(f * budget) for f in FRACTIONS})
    seconds = seconds_of(environment.runs)
    tasks = metrics.tasks_of([row for run in environment.runs for row in run.rows])
    measures = [
        Measure("final_return", "return of the final evaluation", "return"),
        Measure("final_success", "goal held in the final evaluation", ""),
        Measure("final_episode_length", "episode length in the final evaluation", "steps"),
        Measure("last_return", "return of the last evaluation", "return"),
        Measure("best_return", "return of the best evaluation", "return"),
        Measure("auc", f"area under the curve up to {budget:.0f} steps", "return"),
        *(Measure(at_key(s), f"return at {s:.0f} steps", "return") for s in steps),
        *(Measure(after_key(s), f"return after {s:.0f} seconds", "return") for s in seconds),
        *(
            Measure(task_key(key, task), f"{label}, {task}", "return")
            for key, label in (
                ("final_return", "return of the final evaluation"),
                (at_key(steps[-1]), f"return at {steps[-1]:.0f} steps"),
            )
            for task in tasks
        ),
        *(
            [
                Measure("seconds_to_target", f"wall-clock time to a return of {target:g}", "s"),
                Measure("steps_to_target", f"environment steps to a return of {target:g}", "steps"),
            ]
            if target is not None
            else []
        ),
        Measure("wall_time", "wall-clock time so far", "s"),
        Measure("finished_wall_time", "wall-clock time of finished runs", "s"),
        Measure("throughput", "median throughput", "environment steps/s"),
        Measure("esnr_db", "median ESNR of the actor's gradient", "dB"),
        *(Measure(k, f"median gradient norm, {v}", "") for k, v in GRADIENTS.items()),
        Measure("skipped_updates", "updates skipped as non-finite", ""),
    ]
    values = {
        str(run.path): _of_run(run, budget, steps, seconds, target, tasks)
        for run in environment.runs
    }
    estimates = [
        {
            m.key: estimate([values[str(run.path)][m.key] for run in group.runs], resamples)
            for m in measures
        }
        for group in environment.groups
    ]
    reaches = []
    if target is not None:
        reaches = [_reach([values[str(run.path)] for run in g.runs]) for g in environment.groups]
    return Comparison(
        environment,
        budget,
        steps,
        target,
        measures,
        values,
        estimates,
        reaches,
        seconds,
        list(published),
        tasks,
    )


def budget_of(runs: Sequence[Run]) -> float:
    """Steps up to which all finished runs were evaluated; all runs, where none has finished."""
    finished = [run for run in runs if run.finished] or list(runs)
    return float(min(run.evaluations.steps[-1] for run in finished))


def seconds_of(runs: Sequence[Run]) -> list[float]:
    """Quarters of the time that all finished runs took up to their last evaluation, whole seconds.

    Of all runs, where none has finished; none where a run did not log its time.
    """
    finished = [run for run in runs if run.finished] or list(runs)
    last = min(float(run.evaluations.seconds[-1]) for run in finished)
    if not math.isfinite(last):
        return []
    return sorted({float(round(f * last)) for f in FRACTIONS} - {0.0})


def value_after(series: Series, seconds: float) -> float:
    """A curve's value at a time between its points, linearly; NaN before and after them."""
    known = np.isfinite(series.seconds)
    times = series.seconds[known]
    if len(times) == 0 or not times[0] <= seconds <= times[-1]:
        return math.nan
    return float(np.interp(seconds, times, series.values[known]))


def value_at(series: Series, steps: float) -> float:
    """A curve's value between its points, linearly; NaN before the first and after the last."""
    if len(series.steps) == 0 or not series.steps[0] <= steps <= series.steps[-1]:
        return math.nan
    return float(np.interp(steps, series.steps, series.values))


def area(series: Series, budget: float) -> float:
    """Mean height of a curve from 0 to ``budget`` steps; NaN where it does not cover them.

    It is the area under the curve, by trapezoids, divided by the budget: a return.
    """
    end = value_at(series, budget)
    if not budget > 0 or math.isnan(end) or series.steps[0] > 0:
        return math.nan
    inside = series.steps < budget
    x = np.append(series.steps[inside], budget)
    y = np.append(series.values[inside], end)
    return float(np.sum(np.diff(x) * (y[1:] + y[:-1]) / 2.0) / budget)


def first_reaching(series: Series, target: float) -> tuple[float, float]:
    """Seconds and steps of the first evaluation at or above ``target``; NaN where none is."""
    there = np.flatnonzero(series.values >= target)
    if len(there) == 0:
        return math.nan, math.nan
    return float(series.seconds[there[0]]), float(series.steps[there[0]])


def _best_return(run: Run) -> float:
    """Of the evaluation that the trainer ranks highest."""
    there = [row for row in run.rows if metrics.is_number(row.get(RETURN))]
    return float(max(metrics.rank(row.get("eval_diverged"), row[RETURN]) for row in there)[1])


def _of_run(
    run: Run,
    budget: float,
    steps: Sequence[float],
    seconds: Sequence[float],
    target: float | None,
    tasks: Sequence[str],
) -> dict[str, float]:
    curve = run.evaluations
    final = run.final if run.finished else None
    result = {
        "final_return": _get(final, "reward_mean"),
        "final_success": _get(final, "success"),
        "final_episode_length": _get(final, "episode_length_mean"),
        "last_return": float(curve.values[-1]),
        "best_return": _best_return(run),
        "auc": area(curve, budget),
        **{at_key(s): value_at(curve, s) for s in steps},
        **{after_key(s): value_after(curve, s) for s in seconds},
        **{task_key("final_return", t): _of_task(final, t) for t in tasks},
        **{
            task_key(at_key(steps[-1]), t): value_at(run.series(task_key(RETURN, t)), steps[-1])
            for t in tasks
        },
        "wall_time": _last(run.series("wall_time")),
        "finished_wall_time": _get(run.summary, "wall_time") if run.finished else math.nan,
        "throughput": _throughput(run),
        "esnr_db": _median(run.series("esnr_db")),
        **{key: _median(run.series(key)) for key in GRADIENTS},
        "skipped_updates": _last(run.series("skipped_updates")),
    }
    if target is not None:
        result["seconds_to_target"], result["steps_to_target"] = first_reaching(curve, target)
    return result


def _reach(values: Sequence[dict[str, float]]) -> Reach:
    seconds = np.array([v["seconds_to_target"] for v in values])
    steps = np.array([v["steps_to_target"] for v in values])
    there = ~np.isnan(steps)
    reached = seconds[there]
    return Reach(
        int(there.sum()),
        len(values),
        _censored_median(seconds, there),
        _censored_median(steps, there),
        float(reached.min()) if len(reached) else math.inf,
        float(reached.max()) if len(reached) else math.inf,
    )


def _censored_median(values: np.ndarray, there: np.ndarray) -> float:
    """Median with infinity for what is not there; of two middle values the mean."""
    ordered = np.sort(np.where(there, values, np.inf))
    middle = ordered[(len(ordered) - 1) // 2 : len(ordered) // 2 + 1]
    return float(middle.mean())


def _get(result: dict[str, object] | None, key: str) -> float:
    value = None if result is None else result.get(key)
    return float(value) if isinstance(value, (int, float)) else math.nan


def _of_task(final: dict[str, Any] | None, task: str) -> float:
    """A task's mean return in a final evaluation."""
    tasks = None if final is None else final.get("tasks")
    own = tasks.get(task) if isinstance(tasks, dict) else None
    return _get(own if isinstance(own, dict) else None, "reward_mean")


def _throughput(run: Run) -> float:
    """Over the epochs that learned: those of random actions alone are many times as fast."""
    learned = run.series("wm_loss").steps
    series = run.series("steps_per_second")
    values = series.values[np.isin(series.steps, learned)]
    return float(np.median(values)) if len(values) else math.nan


def _median(series: Series) -> float:
    return float(np.median(series.values)) if len(series.values) else math.nan


def _last(series: Series) -> float:
    return float(series.values[-1]) if len(series.values) else math.nan
