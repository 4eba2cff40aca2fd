"""Comparing runs: the page, the tables and the figures of a set of runs."""

from __future__ import annotations

import datetime
from pathlib import Path

from pwm_fast import files
from pwm_fast.analysis.figures import draw_all
from pwm_fast.analysis.groups import plural
from pwm_fast.analysis.options import Options
from pwm_fast.analysis.page import render
from pwm_fast.analysis.report import Report, make, outputs
from pwm_fast.analysis.statistics import Estimate, Interval
from pwm_fast.analysis.tables import groups_csv, runs_csv


def compare(options: Options, directory: Path) -> Report:
    """Compare runs and write the page, the CSV files and the figures into ``directory``.

    Raises:
        ConfigError: see :func:`pwm_fast.analysis.report.make`; nothing was written.
        ImportError: matplotlib is missing.
        OSError: a file cannot be written; it names the file.
    """
    report = make(options)
    paths = outputs(directory)
    pictures = [draw_all(comparison, options.statistic) for comparison in report.comparisons]
    paths["figures"].mkdir(parents=True, exist_ok=True)
    for comparison, drawn in zip(report.comparisons, pictures, strict=True):
        for picture in drawn:
            name = f"{comparison.environment.slug}_{picture.name}.png"
            with files.replacing(paths["figures"] / name) as file:
                file.write(picture.png)
    files.write_text(paths["runs"], runs_csv(report))
    files.write_text(paths["groups"], groups_csv(report))
    made = datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    files.write_text(paths["page"], render(report, pictures, made))
    return report


def summary(report: Report) -> str:
    """The comparison in a few lines, for a terminal."""
    lines = []
    for comparison in report.comparisons:
        measure = comparison.primary
        lines.append(f"{comparison.environment.label}: {measure.label}")
        groups = comparison.environment.groups
        width = max(len(group.name) for group in groups)
        for group, estimates in zip(groups, comparison.estimates, strict=True):
            lines.append(
                f"  {group.name:{width}}  {_shown(estimates[measure.key], len(group.runs))}"
            )
        lines += [f"  {g.mark:{width}}  is {g.label}" for g in groups if g.mark]
    lines += ["", *(f"note: {note}" for note in report.notes)] if report.notes else []
    lines += [f"left out: {item.path}: {item.reason}" for item in report.left_out]
    return "\n".join(lines)


def _shown(e: Estimate, runs: int) -> str:
    count = plural("run", e.n) + (f" of {runs}" if e.n < runs else "")
    if e.n == 0:
        return f"none yet ({count})"
    return (
        f"interquartile mean {e.iqm:.1f}{_between(e.iqm_interval)}, "
        f"mean {e.mean:.1f}{_between(e.mean_interval)} ({count})"
    )


def _between(interval: Interval | None) -> str:
    return "" if interval is None else f" [{interval.low:.1f}, {interval.high:.1f}]"
