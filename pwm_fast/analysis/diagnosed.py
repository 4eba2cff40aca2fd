"""What ``python -m pwm_fast.diagnose`` has found of a run's checkpoints, read from its files."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from pwm_fast.analysis.runs import Run
from pwm_fast.analysis.statistics import Interval
from pwm_fast.run import metrics


class Diagnosed(NamedTuple):
    """A diagnosis of one checkpoint; NaN for what it does not hold.

    Attributes:
        checkpoint: its file's name, and of a model of several tasks the one that was looked at.
        epoch: epochs behind it.
        policy: of the held-out episodes.
        horizon: H.
        latent_error: one-step latent error over the displacement.
        reward_r2: of the reward of step H, open loop.
        reward_interval: of it.
        linear_r2: the same of the linear regression on observation and actions.
        cosine: of what an action changes in the reward H steps later, model and simulator.
    """

    checkpoint: str
    epoch: int
    policy: str
    horizon: int
    latent_error: float
    reward_r2: float
    reward_interval: Interval | None
    linear_r2: float
    cosine: float


def diagnosed(run: Run) -> list[Diagnosed]:
    """Diagnoses in ``checkpoints/*.diagnosis``, but damaged ones and those of older versions."""
    found = []
    for file in sorted((run.path / "checkpoints").glob("*.diagnosis/diagnosis.json")):
        try:
            result = json.loads(file.read_text("utf-8"))
            policy = str(result["settings"]["policy"])
            ours = [c for c in result["checkpoints"] if _is_of(run, c)]
            found += [_row(policy, c) for c in ours]
        except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError):
            continue
    return found


def _is_of(run: Run, checkpoint: dict[str, Any]) -> bool:
    """A diagnosis of several checkpoints lies beside the first: others are of other runs."""
    path = Path(checkpoint["checkpoint"])
    there = run.path / "checkpoints"
    return (there / path.name).exists() and (
        path.parent.resolve() == there.resolve() or not path.exists()
    )


def _row(policy: str, c: dict[str, Any]) -> Diagnosed:
    rewards, sensitivity = c["rewards"], c["sensitivity"]
    low, high = _number(rewards["model_low"][-1]), _number(rewards["model_high"][-1])
    task = f" ({c['task']})" if c.get("task") else ""  # older versions do not say
    return Diagnosed(
        Path(c["checkpoint"]).name + task,
        int(c["epoch"]),
        policy,
        int(c["horizon"]),
        _number(c["prediction"]["latent_per_displacement"][0]),
        _number(rewards["model"][-1]),
        None if math.isnan(low) else Interval(low, high),
        _number(rewards["linear_obs_actions"][-1]),
        _number(sensitivity["reward_cosine"][-1]) if "reward_cosine" in sensitivity else math.nan,
    )


def _number(value: object) -> float:
    return float(value) if metrics.is_number(value) else math.nan
