"""A diagnosis as text for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

LATENT_TITLES = {
    "latent_per_displacement": "latent error / displacement (1: as if nothing moved)",
    "latent_per_spread": "latent error / spread of the latents (1: as if always the mean)",
    "latent_rms": "latent error, root mean square",
    "reward_rmse": "reward error, root mean square (environment units)",
    "return_rmse": "error of the summed rewards, root mean square (environment units)",
    "termination_bce": "termination error, cross-entropy (nats)",
}
JACOBIAN_COLUMNS = {
    "|Jz|": "norm_z",
    "|Ja|": "norm_a",
    "gain z": "gain_z",
    "gain a": "gain_a",
    "dz, near z": "change_z_near_z",
    "dz, near a": "change_z_near_a",
    "dz, step": "change_z_step",
    "da, near z": "change_a_near_z",
    "da, near a": "change_a_near_a",
    "da, step": "change_a_step",
}
SIMPLEX_TITLES = {
    "negative_mass": "imagined latents: negative mass of a group (0 on the simplex)",
    "sum_error": "imagined latents: |sum of a group - 1| (0 on the simplex)",
}


def tables(result: dict[str, Any]) -> str:
    """The tables of what ``diagnosis.json`` holds."""
    checkpoints = result["checkpoints"]
    settings = result["settings"]
    labels = [c["label"] for c in checkpoints]
    blocks = []
    for c in checkpoints:
        prediction = c["prediction"]
        blocks.append(
            f"{c['label']}: {c['checkpoint']}\n"
            f"  {c['env']}, {c['episodes']} held-out episodes, {c['steps']:,} steps, mean return "
            f"{_number(c['return_mean']).strip()}, policy {settings['policy']}"
            + (f" with {settings['random_share']:.0%} random" if settings["random_share"] else "")
            + f"; {prediction['windows'][0]:.0f} windows, of which "
            f"{prediction['windows'][-1]:.0f} last {c['horizon']} steps"
        )
    for section, titles in (("prediction", LATENT_TITLES), ("simplex", SIMPLEX_TITLES)):
        for key, title in titles.items():
            rows = {
                label: dict(zip(c[section]["step"], c[section][key], strict=True))
                for label, c in zip(labels, checkpoints, strict=True)
                if key in c[section]
            }
            if rows:
                blocks.append(_over_steps(title, "step", rows))
    columns = list(JACOBIAN_COLUMNS)
    values = [[c["jacobian"][JACOBIAN_COLUMNS[k]] for k in columns] for c in checkpoints]
    blocks.append(
        _table(
            "Jacobian of the macro step: size; relative change (dz of Jz, da of Ja) to a nearby "
            "latent,\naction, and to the step's end",
            "",
            columns,
            dict(zip(labels, values, strict=True)),
        )
    )
    rows = {}
    for label, c in zip(labels, checkpoints, strict=True):
        for row in c["esnr"]["rows"]:
            name = f"{label}, M={row['samples']}"
            rows.setdefault(name, {})[row["horizon"]] = row["esnr_db"]
    blocks.append(
        _over_steps("ESNR of the actor's first-order gradient (dB)", "horizon", rows, powers=False)
    )
    return "\n\n".join(blocks)


def shown_steps(steps: Sequence[int]) -> list[int]:
    """The powers of two among the steps, and the last one."""
    return [s for s in steps if s == steps[-1] or (s > 0 and s & (s - 1) == 0)]


def _over_steps(
    title: str, name: str, rows: dict[str, dict[int, float | None]], *, powers: bool = True
) -> str:
    steps = sorted({step for row in rows.values() for step in row})
    if powers:
        last = {max(row) for row in rows.values()}
        steps = [s for s in steps if s in last or s in shown_steps(steps)]
    values = {label: [row.get(step) for step in steps] for label, row in rows.items()}
    return _table(title, name, [str(step) for step in steps], values)


def _table(title: str, corner: str, columns: list[str], rows: dict[str, list[float | None]]) -> str:
    width = max(map(len, (corner, *rows))) + 2
    wide = max(10, *(len(column) + 2 for column in columns))
    lines = [title, f"  {corner:{width}}" + "".join(f"{column:>{wide}}" for column in columns)]
    for label, values in rows.items():
        lines.append(f"  {label:{width}}" + "".join(f"{_number(v):>{wide}}" for v in values))
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
