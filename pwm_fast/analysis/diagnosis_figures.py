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
METHODS: dict[str, tuple[str, str, str | None]] = {  # None: the checkpoint's colour
    "model": ("model (colour of the checkpoint)", "-", None),
    "linear_obs_actions": ("linear in o_0 and actions", "--", "0.15"),
    "linear_obs": ("linear in o_0", "-.", "0.45"),
    "persistence": ("last reward, carried on", ":", "0.45"),
}
LOWEST_R2 = -1.0  # that a figure shows
FLOOR = 1e-12  # smallest drift that a logarithmic axis shows; 0 lies there


def draw(result: dict[str, Any], folder: Path) -> list[Path]:
    """Draw a PNG file of each kind, ``prediction.png`` and so on, and return their paths.

    ``integration.png`` is drawn where a checkpoint was tested with several integrators,
    ``simplex.png`` where one has an encoder whose latents lie on simplices.

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
        "rewards": _rewards,
        "sensitivity": _sensitivity,
        "jacobian": _jacobian,
        "simplex": _simplex,
        "esnr": _esnr,
    }
    if not any(_on_simplices(c) for c in checkpoints):
        del drawings["simplex"]
    if any(_integrated(c) for c in checkpoints):
        drawings["integration"] = _integration
    for name, drawing in drawings.items():
        figure = Figure(layout="constrained")
        drawing(figure, checkpoints)
        for axes in figure.axes:
            tidy(axes)
            axes.set_axisbelow(True)
        found: dict[str, Any] = {}
        for axes in figure.axes:  # a line may be in one of them alone
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
                found.setdefault(label, handle)
        figure.legend(
            list(found.values()), list(found), loc="outside lower center", fontsize="small"
        )
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
            _level(axes, 1.0, level)
        axes.set_ylim(bottom=0.0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _level(axes: Any, height: float, text: str) -> None:
    """A dashed line with its meaning above it."""
    axes.axhline(height, color="0.3", linewidth=0.8, linestyle="--")
    axes.annotate(
        text,
        (0.98, height),
        xycoords=("axes fraction", "data"),
        xytext=(0, 3),
        textcoords="offset points",
        ha="right",
        fontsize="small",
        color="0.3",
    )


def _rewards(figure: Any, checkpoints: Checkpoints) -> None:
    from matplotlib.ticker import MaxNLocator

    figure.set_size_inches(4.6 * len(checkpoints) + 0.6, 4.8)
    figure.suptitle("R2 of open-loop rewards on held-out episodes")
    panels = figure.subplots(1, len(checkpoints), sharey=True, squeeze=False).flat
    lowest = 0.0
    for i, (axes, c) in enumerate(zip(panels, checkpoints, strict=True)):
        columns = c["rewards"]
        x = columns["step"]
        axes.set_title(c["label"], fontsize="small")
        axes.set_xlabel("predicted steps")
        for key, (name, style, color) in METHODS.items():
            y, color = _numbers(columns[key]), color or _color(i)
            width = 2.0 if key == "model" else 1.2
            axes.plot(x, y, style, color=color, linewidth=width, label=name)
            low, high = (_numbers(columns[f"{key}_{end}"]) for end in ("low", "high"))
            axes.fill_between(x, low, high, color=color, alpha=0.12, linewidth=0)
            lowest = min([lowest, *(v for v in y if not math.isnan(v))])
        _level(axes, 0.0, "0: as always the mean")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.axes[0].set_ylim(max(lowest - 0.05, LOWEST_R2), 1.05)


def _sensitivity(figure: Any, checkpoints: Checkpoints) -> None:
    figure.set_size_inches(11.0, 4.4)
    known = [(i, c) for i, c in enumerate(checkpoints) if "unavailable" not in c["sensitivity"]]
    step = f", steps of {known[0][1]['sensitivity']['step']:g}" if known else ""
    figure.suptitle(f"What an action changes: model against simulator (differences{step})")
    left, right = figure.subplots(1, 2)
    left.set_title("cosine of the derivatives (mean, 20 to 80 %)", fontsize="medium")
    right.set_title("norm of the model's / of the simulator's (median)", fontsize="medium")
    ratios: list[float | None] = []
    for place, (i, c) in enumerate(known):
        found = c["sensitivity"]
        for of, style, marker in (("reward", "-", "o"), ("latent", ":", "s")):
            # Beside one another, not on top.
            x = [n * (1.0 + 0.04 * (place - (len(known) - 1) / 2)) for n in found["after"]]
            named = {"color": _color(i), "marker": marker, "label": f"{c['label']}, {of}"}
            y = _numbers(found[f"{of}_cosine"])
            left.plot(x, y, style, **named)
            for at, low, high in zip(
                x,
                _numbers(found[f"{of}_cosine_p20"]),
                _numbers(found[f"{of}_cosine_p80"]),
                strict=True,
            ):
                left.plot([at, at], [low, high], color=_color(i), linewidth=1.0, alpha=0.5)
            right.plot(x, _numbers(found[f"{of}_ratio"]), style, **named)
            ratios += found[f"{of}_ratio"]
    for axes, level in ((left, "0: nothing of the direction"), (right, "1: as large")):
        axes.set_xlabel("steps after the action")
        _level(axes, float(level[0]), level)
        if not known:
            axes.text(0.5, 0.6, "not available", ha="center", transform=axes.transAxes)
    left.set_ylim(-1.05, 1.05)
    if _log_scale(right, "y", ratios):
        there = [r for r in ratios if r is not None and r > 0]
        right.set_ylim(min(0.1, *there, 1.0) * 0.8, max(10.0, *there, 1.0) * 1.25)
    shown = sorted({n for _, c in known for n in c["sensitivity"]["after"]})
    for axes in (left, right):
        if _log_scale(axes, "x", shown, base=2):
            axes.set_xticks(shown, [str(n) for n in shown])
            axes.minorticks_off()


def _integrated(c: dict[str, Any]) -> bool:
    return c["integration"] is not None and "unavailable" not in c["integration"]


def _integration(figure: Any, checkpoints: Checkpoints) -> None:
    from matplotlib.ticker import MaxNLocator

    figure.set_size_inches(12.0, 4.8)
    figure.suptitle("Open-loop errors by integrator and its steps K")
    left, middle, right = figure.subplots(1, 3)
    left.set_title("latent error / displacement", fontsize="medium")
    middle.set_title("R2 of rewards", fontsize="medium")
    right.set_title("latent error at the last step, by its cost", fontsize="medium")
    right.set_xlabel("evaluations of the network a step")
    for axes in (left, middle):
        axes.set_xlabel("predicted steps")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    lowest, place = 0.0, 0
    for c in filter(_integrated, checkpoints):
        several = f"{c['label']}, " if len(checkpoints) > 1 else ""
        for row in c["integration"]["rows"]:
            own = " (the run's)" if row["own"] else ""
            style = {
                "color": _color(place),
                "linestyle": "-" if row["integrator"] == "heun" else "--",
                "label": f"{several}{row['integrator']} K={row['substeps']}{own}",
            }
            place += 1
            x, ratio = c["integration"]["step"], _numbers(row["latent_per_displacement"])
            scores = _numbers(row["reward_r2"])
            left.plot(x, ratio, **style)
            middle.plot(x, scores, **style)
            right.plot([row["evaluations"]], ratio[-1:], marker="o", markersize=6, **style)
            lowest = min([lowest, *(v for v in scores if not math.isnan(v))])
    _level(left, 1.0, "1: as if nothing moved")
    left.set_ylim(bottom=0.0)
    right.set_ylim(bottom=0.0)
    right.xaxis.set_major_locator(MaxNLocator(integer=True))
    middle.set_ylim(max(lowest - 0.05, LOWEST_R2), 1.05)


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


def _on_simplices(c: dict[str, Any]) -> bool:
    return "sum_error" in c["simplex"]


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
            if not _on_simplices(c):
                continue
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
