"""Figures of a run, drawn from its ``metrics.jsonl``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pwm_fast import files
from pwm_fast.run import metrics

DPI = 120
COLUMNS = 6  # of small axes side by side


class Curve(NamedTuple):
    """A line of a panel.

    Attributes:
        key: in the log.
        label: in the legend.
        color: of matplotlib's default cycle.
        spread: key of a standard deviation to shade around the line.
    """

    key: str
    label: str
    color: str = "C0"
    spread: str | None = None


class Panel(NamedTuple):
    """Curves in one pair of axes.

    Attributes:
        title: heading.
        ylabel: label of the vertical axis.
        curves: the later ones lie on top.
        log: the vertical axis is logarithmic; values that are not positive are left out.
        level: height and label of a horizontal line.
        crown: key of the curve whose highest point is marked.
    """

    title: str
    ylabel: str
    curves: tuple[Curve, ...]
    log: bool = False
    level: tuple[float, str] | None = None
    crown: str | None = None


PANELS = {
    "learning_curve": Panel(
        "Return of real episodes",
        "return",
        (
            Curve("train_reward", "training (sampled actions)", "0.6"),
            Curve("eval_reward", "evaluation (mean ± std)", "C0", spread="eval_reward_std"),
        ),
        crown="eval_reward",
    ),
    "episode_length": Panel(
        "Length of real episodes",
        "steps",
        (
            Curve("train_episode_length", "training (sampled actions)", "0.6"),
            Curve("eval_episode_length", "evaluation (mean)"),
        ),
    ),
    "world_model_losses": Panel(
        "World-model losses",
        "loss",
        (
            Curve("dynamics_loss", "dynamics", "C0"),
            Curve("reward_loss", "reward", "C1"),
            Curve("termination_loss", "termination", "C2"),
            Curve("wm_loss", "total (weighted)", "k"),
            Curve("holdout_wm_loss", "total, held out", "C3"),
        ),
        log=True,
    ),
    "actor_loss": Panel("Loss of the actor", "loss", (Curve("actor_loss", "policy"),)),
    "value_loss": Panel("Loss of the critics", "loss", (Curve("value_loss", "value"),), log=True),
    "gradient_norms": Panel(
        "Gradient norms before clipping",
        "norm",
        (
            Curve("wm_grad_norm", "world model", "C0"),
            Curve("actor_grad_norm", "actor", "C1"),
            Curve("critic_grad_norm", "critics", "C2"),
        ),
        log=True,
    ),
    "esnr": Panel(
        "Signal-to-noise ratio of the actor's gradient",
        "ESNR [dB]",
        (Curve("esnr_db", "ESNR"),),
        level=(0.0, "signal = noise"),
    ),
    "speed": Panel(
        "Speed, without evaluations",
        "environment steps / s",
        (Curve("steps_per_second", "collecting and learning"),),
        log=True,  # epochs of random actions alone are many times as fast
    ),
}


# Of a run of ``pwm_fast.pretrain``, which has no policy.
PRETRAINING = {
    "held_out": Panel(
        "Open loop, on held-out episodes",
        "",
        (
            Curve("holdout_latent_error", "error of a step, in steps", "C0"),
            Curve("holdout_reward_r2", "R2 of the reward after H steps", "C1"),
        ),
    ),
    **{name: PANELS[name] for name in ("world_model_losses", "gradient_norms")},
    "speed": Panel(
        "Speed, without evaluations", "updates / s", (Curve("updates_per_second", "learning"),)
    ),
}


def plot_run(run_dir: Path, title: str = "", directory: Path | None = None) -> list[Path]:
    """Draw the figures of a run: one PNG each, and ``summary.png`` of those that all runs have.

    A run of several tasks also has ``task_returns.png``.

    Args:
        run_dir: holds ``metrics.jsonl``; a run that still goes on, or was killed, is fine.
        title: heading; the directory's name by default.
        directory: where they go, made with its parents; ``run_dir/plots`` by default.

    Returns:
        The files written; none if nothing is logged yet.

    Raises:
        ImportError: matplotlib is missing.
        OSError: a figure cannot be written; it names the file.
    """
    # The object interface draws without a display and leaves pyplot's state to the user.
    from matplotlib.figure import Figure

    logged = metrics.read(run_dir / "metrics.jsonl")
    rows = [row for row in logged if metrics.is_number(row.get("env_steps"))]
    if not rows:
        return []
    directory = directory or run_dir / "plots"
    directory.mkdir(parents=True, exist_ok=True)
    title = title or run_dir.name
    figures = {}
    panels = PRETRAINING if along(rows)[0] == "updates" else PANELS
    for name, panel in panels.items():
        figure = Figure(figsize=(6.8, 4.2), layout="constrained")
        _draw(figure.add_subplot(), panel, rows)
        figure.suptitle(title, fontsize="small", color="0.4")
        figures[name] = figure
    if tasks := metrics.tasks_of(rows):
        figures["task_returns"] = _task_returns(Figure, tasks, rows, title)
    columns = len(panels) // 2
    figure = Figure(figsize=(6.0 * columns, 7.6), layout="constrained")
    figure.suptitle(title, fontsize="x-large")
    for axes, panel in zip(figure.subplots(2, columns).flat, panels.values(), strict=True):
        _draw(axes, panel, rows)
    figures["summary"] = figure
    return [save(figure, directory / f"{name}.png") for name, figure in figures.items()]


def save(figure: Any, path: Path) -> Path:
    """Write a figure as a PNG file, in one step.

    Raises:
        OSError: it cannot be written; it names the file.
    """
    with files.replacing(path) as file:
        figure.savefig(file, format="png", dpi=DPI)
    return path


def grid(figure_type: Any, titles: Sequence[str]) -> tuple[Any, list[Any]]:
    """A figure of small axes side by side, a row of up to :data:`COLUMNS` below the other.

    Args:
        figure_type: matplotlib's ``Figure``.
        titles: of the axes.

    Returns:
        The figure, and its axes in the titles' order.
    """
    columns = min(len(titles), COLUMNS)
    rows = -(-len(titles) // columns)
    figure = figure_type(figsize=(2.4 * columns + 0.4, 1.7 * rows + 0.9), layout="constrained")
    drawn = list(figure.subplots(rows, columns, sharex=True, squeeze=False).flat)
    for axes, title in zip(drawn, titles, strict=False):
        axes.set_title(title, fontsize="small")
        axes.tick_params(labelsize="x-small")
        tidy(axes)
        count_steps(axes)
    for axes in drawn[len(titles) :]:
        axes.remove()
    for axes in drawn[max(len(titles) - columns, 0) : len(titles)]:  # nothing stands below them
        axes.tick_params(labelbottom=True)
        axes.set_xlabel("environment steps", fontsize="x-small")
    return figure, drawn[: len(titles)]


def along(rows: Sequence[metrics.Row]) -> tuple[str, str]:
    """The key that goes along the horizontal axis, and its label: pretraining takes no steps."""
    if "updates" in rows[-1]:
        return "updates", "world-model updates"
    return "env_steps", "environment steps"


def tidy(axes: Any) -> None:
    """Thin grid lines, and a frame at the left and below alone."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)


def count_steps(axes: Any) -> None:
    """Write large numbers along the horizontal axis as 10k or 2M."""
    from matplotlib.ticker import EngFormatter

    axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def _task_returns(
    figure_type: Any, tasks: Sequence[str], rows: Sequence[metrics.Row], title: str
) -> Any:
    """Returns of each task in axes of its own: their scales differ, and lines of 30 are a knot."""
    figure, drawn = grid(figure_type, tasks)
    shared: dict[str, Any] = {}
    for axes, task in zip(drawn, tasks, strict=True):
        axes.set_xlim(0, max(rows[-1]["env_steps"], 1))
        for curve in (
            Curve(f"train_reward/{task}", "training (sampled actions)", "0.6"),
            Curve(f"eval_reward/{task}", "evaluation (mean)", "C0"),
        ):
            _draw_curve(axes, curve, rows, positive=False)
        shared.update(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
    figure.suptitle(title, fontsize="small", color="0.4")
    figure.supylabel("return", fontsize="small")
    figure.legend(
        shared.values(),
        shared,
        loc="outside lower left",
        fontsize="x-small",
        ncols=2,
        frameon=False,
    )
    return figure


def _draw(axes: Any, panel: Panel, rows: Sequence[metrics.Row]) -> None:
    x, label = along(rows)
    axes.set_title(panel.title)
    axes.set_xlabel(label)
    axes.set_ylabel(panel.ylabel)
    tidy(axes)
    count_steps(axes)
    axes.set_xlim(0, max(rows[-1][x], 1))
    drawn = [_draw_curve(axes, curve, rows, positive=panel.log) for curve in panel.curves]
    if not any(drawn):
        axes.text(0.5, 0.5, "nothing logged yet", ha="center", transform=axes.transAxes)
        axes.set_yticks([])
        return
    if panel.log:
        axes.set_yscale("log")
    if panel.level is not None:
        height, label = panel.level
        axes.axhline(height, color="0.3", linewidth=0.8, linestyle="--", label=label)
    if panel.crown is not None:
        _draw_best(axes, panel.crown, rows)
    axes.legend(fontsize="small", framealpha=0.85)


def _draw_curve(axes: Any, curve: Curve, rows: Sequence[metrics.Row], *, positive: bool) -> bool:
    """Draw what there is of a curve; False if that is nothing."""
    there = [row for row in rows if metrics.is_number(row.get(curve.key))]
    if positive:
        there = [row for row in there if row[curve.key] > 0]
    if not there:
        return False
    x = np.array([row[along(rows)[0]] for row in there], dtype=float)
    y = np.array([row[curve.key] for row in there], dtype=float)
    style = {"color": curve.color, "linewidth": 1.4}
    if curve.spread is not None:
        widths = [row.get(curve.spread) for row in there]
        spread = np.array([w if metrics.is_number(w) else 0.0 for w in widths], dtype=float)
        axes.fill_between(x, y - spread, y + spread, color=curve.color, alpha=0.15, linewidth=0)
    if len(x) <= 60:
        axes.plot(x, y, label=curve.label, marker="o", markersize=3, clip_on=False, **style)
    elif curve.spread is not None:
        axes.plot(x, y, label=curve.label, **style)
    else:  # every value, faintly, and their running mean
        axes.plot(x, y, color=curve.color, linewidth=0.6, alpha=0.3)
        axes.plot(x, _running_mean(y, len(y) // 25), label=curve.label, **style)
    return True


def _draw_best(axes: Any, key: str, rows: Sequence[metrics.Row]) -> None:
    there = [row for row in rows if metrics.is_number(row.get(key))]
    if there:
        best = max(there, key=lambda row: metrics.rank(row.get("eval_diverged"), row[key]))
        label = f"best: {best[key]:.4g}"
        axes.plot(
            best["env_steps"], best[key], "*", color="C3", markersize=10, label=label, clip_on=False
        )


def _running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Mean over a centred window, which is cut off at the ends."""
    half = max(width // 2, 1)
    total = np.concatenate(([0.0], np.cumsum(values)))
    index = np.arange(len(values))
    start, end = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    mean: np.ndarray = (total[end] - total[start]) / (end - start)
    return mean
