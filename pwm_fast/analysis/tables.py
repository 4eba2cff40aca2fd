"""CSV files of a comparison: one row a run, and one row a group and measure."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence

from pwm_fast.analysis.report import Report
from pwm_fast.analysis.statistics import Interval

GROUP_COLUMNS = (
    "environment",
    "configuration",
    "mark",
    "runs",
    "finished",
    "measure",
    "description",
    "unit",
    "n",
    "mean",
    "mean_low",
    "mean_high",
    "iqm",
    "iqm_low",
    "iqm_high",
)


def runs_csv(report: Report) -> str:
    """Every run with its status and measures; a measure that a run does not have is empty."""
    keys = list(dict.fromkeys(m.key for c in report.comparisons for m in c.measures))
    rows = []
    for comparison in report.comparisons:
        for group in comparison.environment.groups:
            for run in group.runs:
                values = comparison.values[str(run.path)]
                rows.append(
                    [
                        comparison.environment.slug,
                        group.label,
                        group.mark,
                        run.seed,
                        run.status,
                        run.epochs,
                        run.config.get("epochs"),
                        run.env_steps,
                        run.path,
                        *(_number(values.get(key, math.nan)) for key in keys),
                    ]
                )
    fixed = ("environment", "configuration", "mark", "seed", "status", "epochs")
    return _csv([*fixed, "epochs_planned", "env_steps", "run_dir", *keys], rows)


def groups_csv(report: Report) -> str:
    """Every group and measure: mean and interquartile mean with their 95 % intervals."""
    rows = []
    for comparison in report.comparisons:
        groups = comparison.environment.groups
        for group, estimates in zip(groups, comparison.estimates, strict=True):
            for m in comparison.measures:
                e = estimates[m.key]
                rows.append(
                    [
                        comparison.environment.slug,
                        group.label,
                        group.mark,
                        len(group.runs),
                        len(group.runs) - len(group.unfinished),
                        *m,
                        e.n,
                        _number(e.mean),
                        *_interval(e.mean_interval),
                        _number(e.iqm),
                        *_interval(e.iqm_interval),
                    ]
                )
    return _csv(GROUP_COLUMNS, rows)


def _interval(interval: Interval | None) -> list[object]:
    return ["", ""] if interval is None else [_number(v) for v in interval]


def _number(value: float) -> object:
    return value if math.isfinite(value) else ""


def _csv(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return file.getvalue()
