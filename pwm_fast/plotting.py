"""Figures of a run, drawn from its ``metrics.jsonl``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pwm_fast import metrics

Series = tuple[str, str]  # key in the log, label in the figure

FIGURES: dict[str, tuple[str, str, bool, tuple[Series, ...]]] = {
    "learning_curve": (
        "Return of real episodes",
        "return",
        False,
        (("eval_reward", "evaluation (deterministic)"), ("train_reward", "training (sampled)")),
    ),
    "world_model_losses": (
        "World-model losses",
        "loss",
        True,
        (
            ("wm_loss", "total"),
            ("dynamics_loss", "dynamics"),
            ("reward_loss", "reward"),
            ("termination_loss", "termination"),
        ),
    ),
    "gradient_norms": (
        "Gradient norms before clipping",
        "norm",
        True,
        (
            ("wm_grad_norm", "world model"),
            ("actor_grad_norm", "actor"),
            ("critic_grad_norm", "critics"),
        ),
    ),
    "esnr": (
        "Signal-to-noise ratio of the actor's gradient",
        "ESNR [dB]",
        False,
        (("esnr_db", "ESNR"),),
    ),
}


def plot_run(run_dir: Path, title: str = "") -> list[Path]:
    """Draw the figures of a run into ``run_dir/plots``: one PNG each, and ``summary.png`` of all.

    Args:
        run_dir: holds ``metrics.jsonl``; a run that still goes on, or was killed, is fine.
        title: heading of the summary.

    Returns:
        The files written; none if nothing is logged yet.
    """
    # The object interface draws without a display and leaves pyplot's state to the user.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = metrics.read(run_dir / "metrics.jsonl")
    if not rows:
        return []
    directory = run_dir / "plots"
    directory.mkdir(exist_ok=True)
    written = []

    def write(figure: Figure, name: str) -> None:
        FigureCanvasAgg(figure)
        path = directory / f"{name}.png"
        temporary = directory / f".{name}.tmp.png"
        figure.savefig(temporary, dpi=120)
        temporary.replace(path)
        written.append(path)

    for name in FIGURES:
        figure = Figure(figsize=(6.4, 4.0), layout="constrained")
        _draw(figure.add_subplot(), name, rows)
        write(figure, name)
    figure = Figure(figsize=(11.0, 7.0), layout="constrained")
    figure.suptitle(title or run_dir.name)
    for axes, name in zip(figure.subplots(2, 2).flat, FIGURES, strict=True):
        _draw(axes, name, rows)
    write(figure, "summary")
    return written


def _draw(axes: Any, name: str, rows: Sequence[metrics.Row]) -> None:
    heading, ylabel, log_scale, series = FIGURES[name]
    axes.set_title(heading)
    axes.set_xlabel("environment steps")
    axes.set_ylabel(ylabel)
    drawn = False
    positive = True
    for key, label in series:
        points = [(r["env_steps"], r[key]) for r in rows if r.get(key) is not None]
        if not points:
            continue
        x, y = zip(*points, strict=True)
        positive = positive and min(y) > 0
        marker = "o" if len(points) < 40 else None
        axes.plot(x, y, label=label, linewidth=1.2, marker=marker, markersize=3)
        drawn = True
    if not drawn:
        axes.text(0.5, 0.5, "nothing logged yet", ha="center", transform=axes.transAxes)
        return
    if log_scale and positive:
        axes.set_yscale("log")
    axes.grid(alpha=0.3)
    if len(series) > 1:
        axes.legend()
