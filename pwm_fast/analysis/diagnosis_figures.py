"""Figures of a diagnosis, one line or bar a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pwm_fast.run.charts import save, tidy

Checkpoints = list[dict[str, Any]]

PREDICTION = {
    "latent_per_displacement": ("Latent error / displacement", "1: as if nothing moved"),
    "latent_per_spread": ("Latent error / spread of the latents", "1: as if always the mean"),
    "latent_p50": ("Latent error (median, 20 to 80 %)", None),
    "reward_rmse": ("Reward error (RMS)", None),
    "return_rmse": ("Error of summed rewards (RMS)", None),
    "termination_bce": ("Termination error (nats)", None),
}
CHANGES = {
    "near_z": "nearby latent",
    "near_a": "nearby action",
    "step": "along the step",
}
FLOOR = 1e-12  # smallest drift that a logarithmic axis shows; 0 lies there


def draw(result: dict[str, Any], folder: Path) -> list[Path]:
    """Draw ``prediction.png``, ``jacobian.png``, ``simplex.png`` and ``esnr.png``.

    Args:
        result: what ``diagnosis.json`` holds.
        folder: where the files go; it exists.

    Raises:
        ImportError: matplotlib is missing.
        OSError: a figure cannot be written; it names the file.
    """
    from matplotlib.figure import Figure

    checkpoints: Checkpoints = result["checkpoints"]
    written = []
    drawings: dict[str, Callable[[Any, Checkpoints], None]] = {
        "prediction": _prediction,
        "jacobian": _jacobian,
        "simplex": _simplex,
        "esnr": _esnr,
    }
    for name, drawing in drawings.items():
        figure = Figure(layout="constrained")
        drawing(figure, checkpoints)
        for axes in figure.axes:
            tidy(axes)
            axes.set_axisbelow(True)
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", fontsize="small")
        written.append(save(figure, folder / f"{name}.png"))
    return written


def _color(index: int) -> str:
    return f"C{index % 10}"


def _prediction(figure: Any, checkpoints: Checkpoints) -> None:
    from matplotlib.ticker import MaxNLocator

    keys = [k for k in PREDICTION if any(k in c["prediction"] for c in checkpoints)]
    figure.set_size_inches(12.0, 7.2)
    figure.suptitle("Prediction error on held-out episodes")
    for axes, key in zip(figure.subplots(2, 3).flat, PREDICTION, strict=True):
        if key not in keys:
            axes.set_visible(False)
            continue
        title, level = PREDICTION[key]
        axes.set_title(title, fontsize="medium")
        axes.set_xlabel("predicted steps")
        for i, c in enumerate(checkpoints):
            columns = c["prediction"]
            if key not in columns:
                continue
            x, y = columns["step"], _numbers(columns[key])
            axes.plot(x, y, marker="o", markersize=3, color=_color(i), label=c["label"])
            if key == "latent_p50":
                low, high = _numbers(columns["latent_p20"]), _numbers(columns["latent_p80"])
                axes.fill_between(x, low, high, color=_color(i), alpha=0.15, linewidth=0)
        if level is not None:
            axes.axhline(1.0, color="0.3", linewidth=0.8, linestyle="--")
            axes.annotate(
                level,
                (0.98, 1.0),
                xycoords=("axes fraction", "data"),
                xytext=(0, 3),
                textcoords="offset points",
                ha="right",
                fontsize="small",
                color="0.3",
            )
        axes.set_ylim(bottom=0.0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _jacobian(figure: Any, checkpoints: Checkpoints) -> None:
    figure.set_size_inches(11.0, 4.2)
    figure.suptitle("Jacobian of the macro step z' = F(z, a)")
    left, right = figure.subplots(1, 2, width_ratios=[1, 2])
    left.set_title("root-mean-square singular value", fontsize="medium")
    right.set_title("relative change of the Jacobian", fontsize="medium")
    sizes = {"dF/dz": "gain_z", "dF/da": "gain_a"}
    changes = {
        f"dF/d{name}\n{text}": f"change_{name}_{point}"
        for name in ("z", "a")
        for point, text in CHANGES.items()
    }
    for axes, bars in ((left, sizes), (right, changes)):
        wide = 0.8 / len(checkpoints)
        for i, c in enumerate(checkpoints):
            places = [k + (i - (len(checkpoints) - 1) / 2) * wide for k in range(len(bars))]
            heights = _numbers([c["jacobian"][key] for key in bars.values()])
            axes.bar(places, heights, wide, color=_color(i), label=c["label"])
        axes.set_xticks(range(len(bars)), list(bars), fontsize="small")
    # From one place to the next it differs by powers of ten.
    _log_scale(right, "y", [c["jacobian"][key] for c in checkpoints for key in changes.values()])


def _simplex(figure: Any, checkpoints: Checkpoints) -> None:
    figure.set_size_inches(9.0, 4.2)
    figure.suptitle("Imagined latents off the simplices")
    titles = {"negative_mass": "negative mass of a group", "sum_error": "|sum of a group - 1|"}
    for axes, (key, title) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        axes.set_title(title, fontsize="medium")
        axes.set_xlabel("imagined steps")
        drawn: list[float] = []
        clipped = False
        for i, c in enumerate(checkpoints):
            values = _numbers(c["simplex"][key])
            clipped = clipped or any(v < FLOOR for v in values)
            y = [v if math.isnan(v) else max(v, FLOOR) for v in values]
            drawn += y
            x = c["simplex"]["step"]
            axes.plot(x, y, marker="o", markersize=3, color=_color(i), label=c["label"])
        _log_scale(axes, "y", drawn)
        if clipped:
            axes.annotate(
                f"zero is drawn at {FLOOR:g}",
                (0.02, 0.98),
                xycoords="axes fraction",
                va="top",
                fontsize="x-small",
                color="0.4",
            )


def _esnr(figure: Any, checkpoints: Checkpoints) -> None:
    figure.set_size_inches(7.2, 4.8)
    axes = figure.add_subplot()
    axes.set_title("Signal-to-noise ratio of the actor's gradient")
    axes.set_xlabel("imagined horizon")
    axes.set_ylabel("ESNR [dB]")
    styles = ("-", "--", ":", "-.")
    horizons = set()
    for i, c in enumerate(checkpoints):
        rows = c["esnr"]["rows"]
        for k, samples in enumerate(dict.fromkeys(row["samples"] for row in rows)):
            mine = [row for row in rows if row["samples"] == samples]
            horizons |= {row["horizon"] for row in mine}
            axes.plot(
                [row["horizon"] for row in mine],
                _numbers([row["esnr_db"] for row in mine]),
                styles[k % len(styles)],
                marker="o",
                markersize=3,
                color=_color(i),
                label=f"{c['label']}, M={samples}",
            )
    axes.axhline(0.0, color="0.3", linewidth=0.8, linestyle="--")
    rows = [row for c in checkpoints for row in c["esnr"]["rows"]]
    shown = [row["horizon"] for row in rows if row["esnr_db"] is not None]
    if _log_scale(axes, "x", shown, base=2):
        axes.set_xticks(sorted(horizons), [str(h) for h in sorted(horizons)])
    else:
        axes.text(0.5, 0.6, "the actor has no gradient", ha="center", transform=axes.transAxes)


def _log_scale(axes: Any, axis: str, values: Sequence[float | None], **options: Any) -> bool:
    """Make an axis logarithmic if it has something to show; an untrained model may have nothing.

    Args:
        axes: matplotlib's.
        axis: ``x`` or ``y``.
        values: along it, None where there is none.
        options: of matplotlib's scale.
    """
    if not any(value is not None and value > 0 for value in values):
        return False
    getattr(axes, f"set_{axis}scale")("log", **options)
    return True


def _numbers(values: list[float | None]) -> list[float]:
    """NaN, which leaves a gap in a line, for what is not finite."""
    return [float("nan") if value is None else float(value) for value in values]
