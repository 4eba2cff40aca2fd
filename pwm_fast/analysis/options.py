"""What a comparison is asked for, from the texts of a command line."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from pwm_fast.analysis.published import Published
from pwm_fast.analysis.scores import Reference
from pwm_fast.analysis.statistics import RESAMPLES
from pwm_fast.config import ConfigError


@dataclass
class Options:
    """What a comparison is asked for.

    Attributes:
        paths: run directories, directories of such, and patterns.
        targets: returns whose time is taken, by environment; ``None`` is any environment.
        steps: environment steps at which returns are read off; quarters of the budget if empty.
        references: returns that make scores of 0 and 1, by environment.
        statistic: of the figures' thick lines: ``iqm`` or ``mean``.
        resamples: of the bootstrap.
        title: of the page; the environments' names if empty.
        published: curves from elsewhere, each with its environment, or None where all runs are of
            one.
    """

    paths: Sequence[str]
    targets: dict[str | None, float] = field(default_factory=dict)
    steps: Sequence[float] = ()
    references: dict[str, Reference] = field(default_factory=dict)
    statistic: str = "iqm"
    resamples: int = RESAMPLES
    title: str = ""
    published: Sequence[tuple[str | None, Published]] = ()


def targets_of(texts: Sequence[str]) -> dict[str | None, float]:
    """Targets by environment of ``ENV=RETURN``; a bare ``RETURN`` is any environment's.

    Raises:
        ConfigError: one is no number.
    """
    targets: dict[str | None, float] = {}
    for text in texts:
        name, equals, value = text.rpartition("=")
        targets[name if equals else None] = _number("--target", text, value)
    return targets


def references_of(texts: Sequence[str]) -> dict[str, Reference]:
    """References by environment of ``ENV=LOW:HIGH``.

    Raises:
        ConfigError: one is not of that form, or both its returns are the same.
    """
    references = {}
    for text in texts:
        name, equals, value = text.rpartition("=")
        low, colon, high = value.partition(":")
        if not (name and equals and colon):
            raise ConfigError(f"--score must be ENV=LOW:HIGH, got {text!r}")
        reference = Reference(_number("--score", text, low), _number("--score", text, high))
        if reference.low == reference.high:
            raise ConfigError(f"--score must have LOW and HIGH apart, got {text!r}")
        references[name] = reference
    return references


def steps_of(text: str) -> list[float]:
    """Environment steps of ``N,N,...``.

    Raises:
        ConfigError: one is no number, or negative.
    """
    steps = [_number("--steps", text, part) for part in text.split(",") if part]
    if any(s < 0 for s in steps):
        raise ConfigError(f"--steps must not be negative, got {text!r}")
    return steps


def _number(option: str, text: str, part: str) -> float:
    try:
        value = float(part.replace("_", ""))
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ConfigError(f"{option} must hold finite numbers, got {text!r}")
    return value
