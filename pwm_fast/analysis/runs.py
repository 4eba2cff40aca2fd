"""Finding run directories and reading what they hold, whatever state they are in."""

from __future__ import annotations

import glob
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pwm_fast import config as configuration
from pwm_fast import files
from pwm_fast.config import ConfigError, EnvConfig, TrainConfig
from pwm_fast.run import metrics
from pwm_fast.run.provenance import flat as flatten

FILES = ("metrics.jsonl", "config.yaml")  # a directory with one of them is of a run
RETURN = "eval_reward"


class LeftOut(NamedTuple):
    """A run that cannot be compared, and why, as part of a sentence."""

    path: Path
    reason: str


class Series(NamedTuple):
    """Finite values of a metric over a run.

    Attributes:
        steps: environment steps ``[T]``, increasing.
        seconds: wall-clock time since the start, over all processes that continued it ``[T]``.
        values: ``[T]``.
    """

    steps: np.ndarray
    seconds: np.ndarray
    values: np.ndarray


@dataclass
class Run:
    """One run directory.

    Attributes:
        path: the directory.
        config: its configuration with dotted keys; keys that its version lacked have defaults.
        rows: of ``metrics.jsonl``.
        summary: ``summary.json``; empty for a run that is still going on or was killed.
        age: seconds since its last row was written.
        notes: what is wrong with it, though it can be compared.
    """

    path: Path
    config: dict[str, Any]
    rows: list[metrics.Row]
    summary: dict[str, Any]
    age: float
    notes: list[str] = field(default_factory=list)

    @property
    def seed(self) -> int:
        """Of its random numbers."""
        return int(self.config["seed"])

    @property
    def alg(self) -> str:
        """Name of its configuration, with that of its policy."""
        return f"{self.config['alg.name']}{self.config['alg.actor.suffix']}"

    @property
    def status(self) -> str:
        """How it ended; ``unfinished`` is running or killed.

        The others are ``finished``, ``interrupted``, ``diverged`` and ``nothing to learn``.
        """
        return str(self.summary.get("status", "unfinished"))

    @property
    def finished(self) -> bool:
        """It did all its epochs and its final evaluation."""
        return self.status == "finished" and self.final is not None

    @property
    def epochs(self) -> int:
        """Epochs logged."""
        return int(self.rows[-1]["epoch"])

    @property
    def env_steps(self) -> int:
        """Environment steps logged."""
        return int(self.rows[-1]["env_steps"])

    @property
    def final(self) -> dict[str, Any] | None:
        """The final evaluation of a finished run."""
        result = self.summary.get("evaluation")
        good = isinstance(result, dict) and metrics.is_number(result.get("reward_mean"))
        return result if good else None

    @cached_property
    def evaluations(self) -> Series:
        """Mean return of every evaluation on real episodes."""
        return self.series(RETURN)

    def series(self, key: str) -> Series:
        """A metric where it was logged as a finite number."""
        there = [row for row in self.rows if metrics.is_number(row.get(key))]
        return Series(
            np.array([row["env_steps"] for row in there], dtype=float),
            np.array([_number(row.get("wall_time")) for row in there], dtype=float),
            np.array([row[key] for row in there], dtype=float),
        )

    def progress(self) -> str:
        """The status for people, with how far an unfinished run is."""
        if self.finished:
            return "finished"
        planned = self.config.get("epochs", "?")
        text = f"{self.status} at epoch {self.epochs} of {planned}"
        if self.status == "unfinished":
            text += f", last row {ago(self.age)} ago"
        return text


def find(arguments: Sequence[str]) -> list[Path]:
    """The run directories that paths and patterns name, each once, in order.

    A directory that is no run stands for all runs below it; one without any is returned itself, so
    that it is reported.

    Raises:
        ConfigError: a path or pattern matches nothing.
    """
    found: dict[Path, Path] = {}
    for argument in arguments:
        name = str(files.user_path(argument))
        pattern = glob.has_magic(name) and not Path(name).exists()
        paths = [Path(p) for p in sorted(glob.glob(name, recursive=True))] if pattern else [name]
        paths = [p for p in map(Path, paths) if p.exists() and not (pattern and p.is_file())]
        if not paths:
            what = "no directory matches it" if pattern else "there is no such directory"
            raise ConfigError(f"{argument}: {what}")
        for path in paths:
            for run in _runs_below(path):
                found.setdefault(run.resolve(), run)
    return list(found.values())


def load(path: Path) -> Run | LeftOut:
    """Read a run directory; whatever is wrong with it is told, not raised."""
    if not path.is_dir():
        return LeftOut(path, "it is no directory")
    if not any((path / name).exists() for name in FILES):
        return LeftOut(path, f"it holds no run: neither {' nor '.join(FILES)}")
    log = path / "metrics.jsonl"
    try:
        config = _config(path / "config.yaml")
        rows, damaged, _ = metrics.scan(log)
        age = time.time() - log.stat().st_mtime if log.exists() else math.inf
    except ConfigError as error:
        return LeftOut(path, str(error))
    except OSError as error:
        return LeftOut(path, f"{error.filename} cannot be read: {error.strerror}")
    good = [row for row in rows if metrics.is_number(row.get("env_steps"))]
    if not good:
        why = "has no readable row" if damaged or rows else "is empty: nothing has been logged yet"
        return LeftOut(path, f"metrics.jsonl {why if log.exists() else 'is missing'}")
    summary = _summary(path / "summary.json")
    run = Run(path, config, good, summary or {}, max(age, 0.0))
    if len(run.evaluations.values) == 0:
        return LeftOut(path, f"metrics.jsonl holds no evaluation ({RETURN}), so there is no return")
    if summary is None:
        run.notes.append("summary.json is damaged and was left out")
    if damaged:
        run.notes.append(f"{_lines(damaged)} of metrics.jsonl could not be read and was skipped")
    if len(good) < len(rows):
        run.notes.append(f"{len(rows) - len(good)} rows of metrics.jsonl lack env_steps")
    diverged = (run.final or {}).get("diverged")
    if metrics.is_number(diverged) and diverged > 0:
        run.notes.append(f"{diverged:g} episodes of its final evaluation diverged")
    return run


def ago(seconds: float) -> str:
    """A time span in its largest unit."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def _runs_below(path: Path) -> list[Path]:
    if not path.is_dir() or any((path / name).exists() for name in FILES):
        return [path]
    below = {file.parent for name in FILES for file in path.rglob(name)}
    return sorted(below) or [path]


def _config(path: Path) -> dict[str, Any]:
    """The flat configuration.

    Raises:
        ConfigError: it is missing or not one of a run; the message is part of a sentence.
    """
    if not path.exists():
        raise ConfigError("config.yaml is missing, so what was run is not known")
    try:
        values = configuration.read_yaml(path)
    except ConfigError as error:
        raise ConfigError(f"config.yaml is damaged: {error}") from error
    flat = flatten(configuration.with_variant(values)) if isinstance(values, dict) else {}
    lacking = [key for key in ("env.name", "alg.name", "seed") if flat.get(key) is None]
    if lacking:
        raise ConfigError(f"config.yaml is not of a training run: it lacks {', '.join(lacking)}")
    if not isinstance(flat["seed"], int):
        raise ConfigError(f"config.yaml has seed={flat['seed']!r}, which is no number")
    default = TrainConfig(env=EnvConfig(str(flat["env.name"])))
    return {**flatten(configuration.to_dict(default)), **flat}


def _summary(path: Path) -> dict[str, Any] | None:
    """The summary, empty where there is none yet; None if it is damaged."""
    try:
        summary = json.loads(path.read_text("utf-8"))
    except OSError:
        return {}
    except (ValueError, RecursionError):
        return None
    return summary if isinstance(summary, dict) else None


def _number(value: Any) -> float:
    return float(value) if metrics.is_number(value) else math.nan


def _lines(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:5])) + (", ..." if len(numbers) > 5 else "")
    return f"line {shown}" if len(numbers) == 1 else f"each of lines {shown}"
