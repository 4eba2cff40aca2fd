"""Figures of a comparison, as PNG files in memory."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pwm_fast.analysis.curves import group_curves, thinned
from pwm_fast.analysis.groups import Environment
from pwm_fast.analysis.legend import (
    REFERENCE,
    SOME,
    color_of,
    count,
    draw_line,
    entry,
    heading,
    place,
    reference_dashes,
)
from pwm_fast.analysis.measures import GRADIENTS, Comparison, task_key
from pwm_fast.analysis.published import Published
from pwm_fast.analysis.runs import RETURN, Series
from pwm_fast.analysis.statistics import STATISTICS
from pwm_fast.run.charts import count_steps, grid, tidy

DPI = 160
MODEL = {
    "eval_reward_r2": "R2 of the last reward",
    "eval_latent_error": "latent error / displacement",
    "action_saturation": "saturated actions",
    "random_share": "random share of the replay",
}
NAMES = {"iqm": "interquartile mean", "mean": "mean"}


@dataclass
class Picture:
    """A figure.

    Attributes:
        name: of its file.
        title: heading.
        caption: what it shows, in a sentence or two.
        png: the file's content.
        width: in pixels on a page; the file has twice as many and more.
        height: likewise.
    """

    name: str
    title: str
    caption: str
    png: bytes
    width: int
    height: int


def draw_all(comparison: Comparison, statistic: str = "iqm") -> list[Picture]:
    """All figures of an environment for which something was logged.

    Args:
        comparison: of the environment.
        statistic: of the thick lines, a key of :data:`STATISTICS`.

    Raises:
        ImportError: matplotlib is missing.
    """
    return [
        picture
        for picture in (
            _returns(comparison, statistic, over_time=False),
            _returns(comparison, statistic, over_time=True),
            _final(comparison),
            _tasks(comparison, statistic),
            _success(comparison, statistic),
            _episode_length(comparison, statistic),
            _world_model(comparison, statistic),
            _esnr(comparison, statistic),
            _throughput(comparison),
            _gradients(comparison, statistic),
        )
        if picture is not None
    ]


# --- the figures ----------------------------------------------------------------------------------


def _returns(comparison: Comparison, statistic: str, *, over_time: bool) -> Picture:
    environment = comparison.environment
    figure, axes = _figure()
    for index, group in enumerate(environment.groups):
        curves = [run.evaluations for run in group.runs]
        _draw_group(axes, environment, index, curves, statistic, over_time=over_time)
    for index, published in enumerate(comparison.published):
        _draw_published(axes, index, published, over_time=over_time)
    axes.set_ylabel("return of real episodes")
    if comparison.target is not None:
        axes.axhline(comparison.target, color="0.35", linewidth=0.9, linestyle="--")
        axes.annotate(
            f"target {comparison.target:g}",
            (0.01, comparison.target),
            xycoords=("axes fraction", "data"),
            xytext=(0, 3),
            textcoords="offset points",
            fontsize="small",
            color="0.35",
        )
    where = "wall-clock time" if over_time else "environment steps"
    _finish(axes, "seconds" if over_time else where)
    _curves_key(figure, environment)
    extra = (
        "The time includes evaluations and depends on the machine and on what else ran there."
        if over_time
        else ""
    )
    return _picture(
        figure,
        "return_over_time" if over_time else "return_over_steps",
        f"Return over {where}",
        f"Mean return of every evaluation. {extra}".strip(),
    )


def _final(comparison: Comparison) -> Picture:
    measure = comparison.primary
    figure, axes = _figure(height=_rows_height(len(comparison.environment.groups)))
    _draw_intervals(axes, comparison, measure.key)
    axes.set_xlabel(measure.label)
    _rows_key(figure, comparison.environment)
    return _picture(
        figure,
        "final_return",
        measure.label[0].upper() + measure.label[1:],
        "Dots: runs. Thick mark: interquartile mean and its 95 % interval; thin mark below it: "
        "mean and its own. A single run has no interval.",
    )


def _tasks(comparison: Comparison, statistic: str) -> Picture | None:
    """Curves of each task in axes of its own, where there are several."""
    from matplotlib.figure import Figure

    environment = comparison.environment
    if not comparison.tasks:
        return None
    figure, drawn = grid(Figure, comparison.tasks)
    for axes, task in zip(drawn, comparison.tasks, strict=True):
        for index, group in enumerate(environment.groups):
            curves = [thinned(run.series(task_key(RETURN, task))) for run in group.runs]
            _draw_group(axes, environment, index, curves, statistic)
        axes.set_xlim(left=0)
    figure.supylabel("return of real episodes", fontsize="small")
    _curves_key(figure, environment)
    return _picture(
        figure,
        "task_returns",
        "Return of each task",
        "Mean return of every evaluation over the episodes of a task; each has a scale of its own.",
    )


def _success(comparison: Comparison, statistic: str) -> Picture | None:
    return _over_steps(
        comparison,
        statistic,
        "eval_success",
        "success_over_steps",
        "Goal held to the end",
        "share of episodes",
        "Share of evaluation episodes in which the goal held through the last second.",
        limits=(-0.02, 1.02),
    )


def _episode_length(comparison: Comparison, statistic: str) -> Picture | None:
    """None where all episodes last as long: of a task without terminal states there is no more."""
    key = "eval_episode_length"
    lengths = [run.series(key).values for run in comparison.environment.runs]
    if len(np.unique(np.concatenate(lengths))) < 2:
        return None
    return _over_steps(
        comparison,
        statistic,
        key,
        "episode_length",
        "Episode length",
        "steps",
        "Mean length of an evaluation's episodes.",
    )


def _esnr(comparison: Comparison, statistic: str) -> Picture | None:
    return _over_steps(
        comparison,
        statistic,
        "esnr_db",
        "esnr",
        "Signal-to-noise ratio of the actor's gradient",
        "ESNR [dB]",
        "Squared norm of the mean gradient over the gradients' variance between micro-batches; "
        "at 0 dB signal and noise are equal.",
        level=0.0,
    )


def _world_model(comparison: Comparison, statistic: str) -> Picture | None:
    environment = comparison.environment
    keys = [k for k in MODEL if any(len(r.series(k).values) for r in environment.runs)]
    if not keys:
        return None
    figure, all_axes = _figure(width=3.4 * len(keys) + 0.4, height=3.4, columns=len(keys))
    for axes, key in zip(np.atleast_1d(all_axes), keys, strict=True):
        for index, group in enumerate(environment.groups):
            curves = [thinned(run.series(key)) for run in group.runs]
            _draw_group(axes, environment, index, curves, statistic)
        axes.set_title(MODEL[key], fontsize="medium")
        if key == "eval_reward_r2":  # below 0 it may be anything
            axes.set_ylim(max(axes.get_ylim()[0], -1.0), 1.02)
        else:
            axes.set_ylim(bottom=0.0)
        _finish(axes, "environment steps")
    _curves_key(figure, environment)
    return _picture(
        figure,
        "world_model",
        "World model and actions",
        "On the evaluations' episodes: R2 of the reward of the horizon's last step, predicted from "
        "the first observation and the actions (0 is as good as the mean), and the one-step latent "
        "error over the displacement (1 is as good as that nothing moves). Of the collected "
        "actions: the share beyond 0.98; of the replay: the share of random actions.",
    )


def _throughput(comparison: Comparison) -> Picture | None:
    if not any(e["throughput"].n for e in comparison.estimates):
        return None
    figure, axes = _figure(height=_rows_height(len(comparison.environment.groups)))
    _draw_intervals(axes, comparison, "throughput")
    axes.set_xlabel("environment steps per second")
    axes.set_xlim(left=0)
    _rows_key(figure, comparison.environment)
    return _picture(
        figure,
        "throughput",
        "Throughput",
        "Environment steps per second, the median over the epochs of a run that learned; marks as "
        "in the figure of the return. It depends on the machine and its load.",
    )


def _gradients(comparison: Comparison, statistic: str) -> Picture | None:
    environment = comparison.environment
    keys = [k for k in GRADIENTS if any(len(r.series(k).values) for r in environment.runs)]
    if not keys:
        return None
    figure, first = _figure(width=4.0 * len(keys) + 0.2, height=3.6, columns=len(keys))
    for axes, key in zip(np.atleast_1d(first), keys, strict=True):
        for index, group in enumerate(environment.groups):
            curves = [_positive(thinned(run.series(key))) for run in group.runs]
            _draw_group(axes, environment, index, curves, statistic)
        axes.set_title(GRADIENTS[key])
        axes.set_yscale("log")
        _finish(axes, "environment steps")
    _curves_key(figure, environment)
    np.atleast_1d(first)[0].set_ylabel("gradient norm")
    return _picture(
        figure,
        "gradient_norms",
        "Gradient norms",
        "Before clipping, on a logarithmic axis.",
    )


def _over_steps(
    comparison: Comparison,
    statistic: str,
    key: str,
    name: str,
    title: str,
    ylabel: str,
    caption: str,
    *,
    limits: tuple[float, float] | None = None,
    level: float | None = None,
) -> Picture | None:
    """Curves of a metric over environment steps; None where no run has it."""
    if not any(len(run.series(key).values) for run in comparison.environment.runs):
        return None
    environment = comparison.environment
    figure, axes = _figure()
    for index, group in enumerate(environment.groups):
        curves = [thinned(run.series(key)) for run in group.runs]
        _draw_group(axes, environment, index, curves, statistic)
    axes.set_ylabel(ylabel)
    if limits is not None:
        axes.set_ylim(*limits)
    if level is not None:
        axes.axhline(level, color="0.35", linewidth=0.9, linestyle="--")
    _finish(axes, "environment steps")
    _curves_key(figure, environment)
    return _picture(figure, name, title, caption)


# --- parts ----------------------------------------------------------------------------------------


def _draw_group(
    axes: Any,
    environment: Environment,
    index: int,
    curves: Sequence[Series],
    statistic: str,
    *,
    over_time: bool = False,
) -> None:
    """Every run faintly, an open circle at the end of an unfinished one, and the statistic."""
    group, color = environment.groups[index], color_of(index)
    drawn = [
        (run, *_points(curve, over_time))
        for run, curve in zip(group.runs, curves, strict=True)
        if len(curve.values)
    ]
    for run, x, y in drawn:
        axes.plot(x, y, color=color, linewidth=0.8, alpha=0.35)
        if not run.finished:
            axes.plot(x[-1:], y[-1:], "o", color=color, markerfacecolor="white", markersize=5)
    label = f"{entry(environment, group)} ({count([run for run, _, _ in drawn])})"
    parts = group_curves([x for _, x, _ in drawn], [y for _, _, y in drawn], STATISTICS[statistic])
    for part in parts:
        whole = part.runs == len(drawn)
        if part.band is not None:
            alpha = 0.17 if whole else 0.08
            axes.fill_between(part.x, *part.band, color=color, alpha=alpha, linewidth=0)
        if not whole:
            axes.plot(part.x, part.center, color=color, linestyle=(0, SOME), linewidth=1.6)
            continue
        draw_line(axes, part.x, part.center, group, index, label=label, gid=group.label)


def _draw_published(axes: Any, index: int, curve: Published, *, over_time: bool) -> None:
    """A curve from elsewhere in grey dashes, with its band; over time only where it has times."""
    x = curve.seconds if over_time else curve.steps
    if x is None:
        return
    if curve.band is not None:
        axes.fill_between(x, *curve.band, color=REFERENCE, alpha=0.13, linewidth=0)
    axes.plot(
        x,
        curve.values,
        color=REFERENCE,
        linestyle=(0, reference_dashes(index)),
        linewidth=1.6,
        marker="o" if len(x) == 1 else None,
        label=curve.label,
        gid=f"reference: {curve.label}",
    )


def _draw_intervals(axes: Any, comparison: Comparison, key: str) -> None:
    """One row a group: its runs, the interquartile mean and the mean with their intervals."""
    groups = comparison.environment.groups
    for index, (group, estimates) in enumerate(zip(groups, comparison.estimates, strict=True)):
        color, found = color_of(index), estimates[key]
        if found.n == 0:
            continue
        values = [v for v in comparison.of(group, key) if np.isfinite(v)]
        axes.plot(values, [index - 0.24] * len(values), "o", color=color, alpha=0.55, markersize=5)
        for center, interval, offset, width in (
            (found.iqm, found.iqm_interval, 0.0, 5.0),
            (found.mean, found.mean_interval, 0.24, 1.6),
        ):
            if interval is not None:
                axes.plot(
                    interval,
                    [index + offset] * 2,
                    color=color,
                    linewidth=width,
                    alpha=0.35 if width > 2 else 0.8,
                    solid_capstyle="butt",
                )
            size = 15 if width > 2 else 8
            axes.plot([center], [index + offset], "|", color=color, markersize=size, mew=2.2)
    axes.set_yticks(range(len(groups)), [f"{g.name} ({count(g.runs)})" for g in groups])
    axes.set_ylim(len(groups) - 0.45, -0.55)
    axes.grid(axis="x", alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)


def _points(curve: Series, over_time: bool) -> tuple[np.ndarray, np.ndarray]:
    """Both coordinates; without those whose time was not logged."""
    if not over_time:
        return curve.steps, curve.values
    known = np.isfinite(curve.seconds)
    return curve.seconds[known], curve.values[known]


def _positive(series: Series) -> Series:
    kept = series.values > 0
    return Series(*(part[kept] for part in series))


def _curves_key(figure: Any, environment: Environment) -> None:
    """The legend of all axes: a group that one of them lacks is in another."""
    found: dict[str, tuple[Any, str]] = {}
    for axes in figure.axes:
        for line, text in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(line.get_gid(), (line, text))
    if found:
        lines, texts = zip(*found.values(), strict=True)
        place(figure, lines, texts, heading(environment))


def _rows_key(figure: Any, environment: Environment) -> None:
    """What the letters before the rows stand for."""
    from matplotlib.lines import Line2D

    if environment.marked:
        lines = [Line2D([], [], linewidth=0) for _ in environment.groups]
        texts = [entry(environment, group) for group in environment.groups]
        place(figure, lines, texts, heading(environment))


def how_to_read(statistic: str) -> str:
    """What lines, bands and circles of all curves mean."""
    return (
        f"Thick lines: {NAMES[statistic]} over the runs of a configuration, unbroken as far as its "
        "shortest run goes, then in sparse dashes over those that go on, while these are half of "
        "them or more. Bands: 95 % bootstrap intervals. Thin lines: runs. Open circles: where "
        "unfinished runs stand."
    )


def _rows_height(rows: int) -> float:
    return max(1.2 + (0.72 if rows <= 7 else 0.5) * rows, 2.6)


def _figure(width: float = 6.0, height: float = 3.9, columns: int = 1) -> tuple[Any, Any]:
    # The object interface draws without a display and leaves pyplot's state to the user.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, columns)


def _finish(axes: Any, xlabel: str) -> None:
    axes.set_xlabel(xlabel)
    axes.set_xlim(left=0)
    if xlabel != "seconds":
        count_steps(axes)
    tidy(axes)


def _picture(figure: Any, name: str, title: str, caption: str) -> Picture:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=DPI)
    width, height = (round(90 * inches) for inches in figure.get_size_inches())
    return Picture(name, title, caption, file.getvalue(), width, height)
