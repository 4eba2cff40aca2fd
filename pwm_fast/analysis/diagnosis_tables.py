"""A diagnosis as text for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

LATENT_TITLES = {
    "latent_per_displacement": "latent error / displacement (1: as if nothing moved)",
    "latent_per_displacement_p50": "the same, median of the windows' own ratios",
    "latent_per_spread": "latent error / spread of the latents (1: as if always the mean)",
    "latent_rms": "latent error, root mean square",
    "reward_rmse": "reward error, root mean square (environment units)",
    "return_rmse": "error of the summed rewards, root mean square (environment units)",
    "termination_bce": "termination error, cross-entropy (nats)",
}
METHODS = {
    "model": "model",
    "persistence": "last reward, carried on",
    "linear_obs": "linear in o_0",
    "linear_obs_actions": "linear in o_0 and actions",
}
INTEGRATION = ("latent_per_displacement", "reward_r2")
SENSITIVITY_TITLES = {
    "reward_cosine": "effect of an action on the reward n steps later: cosine of the model's "
    "derivative\nand the simulator's (1: right direction, 0: knows nothing of it)",
    "reward_ratio": "the same: the model's norm over the simulator's, median (1: as large)",
    "latent_cosine": "effect of an action on the latent n steps later: cosine",
    "latent_ratio": "the same: the model's norm over the simulator's, median",
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
LATENT_COLUMNS = {
    "D": "width",
    "effective": "dimensions",
    "O": "obs_width",
    "its effective": "obs_dimensions",
    "R2, median": "obs_r2_median",
    "R2, worst": "obs_r2_min",
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
        where = f"{c['env']} {c['task']}" if c["task"] else c["env"]
        blocks.append(
            f"{c['label']}: {c['checkpoint']}\n"
            f"  {where}, {c['episodes']} held-out episodes, {c['steps']:,} steps, mean return "
            f"{_number(c['return_mean']).strip()}, policy {settings['policy']}"
            + (f" with {settings['random_share']:.0%} random" if settings["random_share"] else "")
            + f"; {prediction['windows'][0]:.0f} windows, of which "
            f"{prediction['windows'][-1]:.0f} last {c['horizon']} steps"
            f"\n  saturated actions of the policy (beyond 0.98): {_share(c['action_saturation'])}"
        )
    blocks.append(
        _section(
            "What latents hold: widths and effective dimensions of latents and observations; R2 of "
            "a linear\nregression of the observation's entries on the latent (1: all is there)",
            "latents",
            LATENT_COLUMNS,
            checkpoints,
        )
    )
    blocks += [_rewards(c) for c in checkpoints]
    for section, titles in (("prediction", LATENT_TITLES), ("simplex", SIMPLEX_TITLES)):
        for key, title in titles.items():
            rows = {
                label: dict(zip(c[section]["step"], c[section][key], strict=True))
                for label, c in zip(labels, checkpoints, strict=True)
                if key in c[section]
            }
            if rows:
                blocks.append(_over_steps(title, "step", rows))
    blocks += _sensitivity(checkpoints)
    blocks += [_integration(c) for c in checkpoints if c["integration"] is not None]
    blocks.append(
        _section(
            "Jacobian of the macro step: size; relative change (dz of Jz, da of Ja) to a nearby "
            "latent,\naction, and to the step's end",
            "jacobian",
            JACOBIAN_COLUMNS,
            checkpoints,
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


def _section(
    title: str, name: str, columns: dict[str, str], checkpoints: Sequence[dict[str, Any]]
) -> str:
    """A row of numbers for each checkpoint; ``columns`` are keys of that section by heading."""
    rows = {c["label"]: [c[name][key] for key in columns.values()] for c in checkpoints}
    return _table(title, "", list(columns), rows)


def _rewards(c: dict[str, Any]) -> str:
    """R2 of one checkpoint's predicted rewards, beside what needs no model."""
    rewards = c["rewards"]
    rows = {name: _by_step(rewards, key) for key, name in METHODS.items()}
    lead = rewards["advantage"][-1]
    between = "-" if lead is None else f"{_number(lead)}{_interval(rewards, 'advantage')}"
    return (
        _over_steps(
            f"{c['label']}: R2 of the reward of step h, open loop (1: perfect, 0: as the mean)",
            "step",
            rows,
        )
        + f"\n  at step {rewards['step'][-1]}: model {_number(rewards['model'][-1])}"
        + f"{_interval(rewards, 'model')}, less the linear one with actions {between}"
    )


def _interval(columns: dict[str, Any], key: str) -> str:
    """The 95 % interval of the last step, where there is one."""
    low, high = columns[f"{key}_low"][-1], columns[f"{key}_high"][-1]
    return "" if low is None else f" [{_number(low)}, {_number(high)}]"


def _sensitivity(checkpoints: Sequence[dict[str, Any]]) -> list[str]:
    """What an action changes, of the checkpoints where that is known."""
    known = [c for c in checkpoints if "unavailable" not in c["sensitivity"]]
    blocks = [
        f"{c['label']}: effect of an action, not available: {c['sensitivity']['unavailable']}"
        for c in checkpoints
        if c not in known
    ]
    for key, title in SENSITIVITY_TITLES.items() if known else ():
        rows = {}
        for c in known:
            found = c["sensitivity"]
            rows[c["label"]] = dict(zip(found["after"], found[key], strict=True))
        blocks.append(_over_steps(title, "steps later", rows, powers=False))
    return blocks


def _integration(c: dict[str, Any]) -> str:
    """Errors of a flow by its integrator and number of steps."""
    found = c["integration"]
    if "unavailable" in found:
        return f"{c['label']}: integrators, not available: {found['unavailable']}"
    last = len(found["step"]) - 1
    columns = ["evaluations", *(f"{name}, {h + 1}" for name in ("error", "R2") for h in (0, last))]
    rows = {}
    for row in found["rows"]:
        name = f"{row['integrator']} K={row['substeps']}{' (the run)' if row['own'] else ''}"
        values = [row[key][h] for key in INTEGRATION for h in (0, last)]
        rows[name] = [float(row["evaluations"]), *values]
    return _table(
        f"{c['label']}: integrators; evaluations of the network a step, latent error / "
        "displacement\nand reward R2 at the first and the last step",
        "",
        columns,
        rows,
    )


def _by_step(columns: dict[str, Any], key: str) -> dict[int, float | None]:
    return dict(zip(columns["step"], columns[key], strict=True))


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


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
