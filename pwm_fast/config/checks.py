"""Checks of configuration values, declared where a value has its default.

``width: int = checked(512, positive())`` is a dataclass field whose value :class:`Checked` looks at
when a configuration is made. A check takes the key and the value; it raises :class:`ConfigError`.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Callable
from typing import Any, ClassVar

from pwm_fast import seeding

Check = Callable[[str, Any], None]

MISSING = "???"  # OmegaConf's mark of a value that has to be given


class ConfigError(ValueError):
    """A configuration value that cannot be used; the message names the key and the value."""


# The most that a key may be: far above what anybody needs, and below what would overflow, or run
# for days without a word.
COUNT = 2**31 - 1  # of what is done again and again
SIZE = 2**63 - 1  # of what takes memory: that is looked at where it is made
WIDTH = 2**20  # of a layer
FLOAT = 3e38  # float32 has no larger numbers
LOGSTD = 88.0  # whose exponential is a float32

MAX_THREADS = 1024  # with many more the system has none left, for anybody


def require(condition: bool, key: str, value: object, expected: str) -> None:
    """Raise :class:`ConfigError`, which says what ``key`` must be, unless ``condition`` holds."""
    if not condition:
        raise ConfigError(f"{key} must be {expected}, got {value!r}")


def checked(default: Any, *checks: Check) -> Any:
    """A dataclass field with a default and its checks; a list is copied for every instance."""
    metadata = {"checks": checks}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


class Checked:
    """A dataclass whose fields are checked as they are declared (:func:`checked`).

    Attributes:
        PREFIX: of its keys in messages, such as ``alg.``.
    """

    PREFIX: ClassVar[str] = ""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # type: ignore[arg-type]  # subclasses are some
            for check in field.metadata.get("checks", ()):
                check(f"{self.PREFIX}{field.name}", getattr(self, field.name))


def at_most(key: str, value: float | None, most: float) -> None:
    """Raise :class:`ConfigError` for a number above ``most``; None and infinity are none."""
    ok = value is None or value <= most or value == math.inf
    require(ok, key, value, f"at most {most}")


def limit(most: float) -> Check:
    """At most ``most``; null and infinity are allowed."""
    return lambda key, value: at_most(key, value, most)


def number(accepts: Callable[[float], bool], expected: str, most: float = COUNT) -> Check:
    """A number that ``accepts`` takes, not above ``most``, or float32's largest for a float."""

    def check(key: str, value: float) -> None:
        require(accepts(value), key, value, expected)
        at_most(key, value, FLOAT if isinstance(value, float) else most)

    return check


def positive(most: int = COUNT) -> Check:
    """Above 0."""
    return number(lambda value: value > 0, "positive", most)


def not_negative(most: int = COUNT) -> Check:
    """0 or more."""
    return number(lambda value: value >= 0, "0 or more", most)


def at_least(least: int, most: int = COUNT) -> Check:
    """``least`` or more."""

    def check(key: str, value: int) -> None:
        require(value >= least, key, value, f"at least {least}")
        at_most(key, value, most)

    return check


def or_null(check: Check) -> Check:
    """Null, or what ``check`` takes."""
    return lambda key, value: None if value is None else check(key, value)


def positive_or_null(most: int = COUNT) -> Check:
    """Above 0, or null."""
    return or_null(number(lambda value: value > 0, "positive or null", most))


def finite(key: str, value: float) -> None:
    """Neither infinite nor NaN, and within float32."""
    require(math.isfinite(value), key, value, "finite")
    require(abs(value) <= FLOAT, key, value, f"at most {FLOAT} in size")


def one_of(*allowed: str) -> Check:
    """One of these words."""
    return lambda key, value: require(value in allowed, key, value, f"one of {', '.join(allowed)}")


def widths(key: str, units: list[int]) -> None:
    """Widths of hidden layers."""
    ok = all(isinstance(u, int) and u > 0 for u in units)
    require(ok, key, list(units), "a list of positive widths")
    require(max(units, default=0) <= WIDTH, key, list(units), f"a list of widths up to {WIDTH}")


def adam_betas(key: str, value: list[float]) -> None:
    """Adam's two betas."""
    ok = len(value) == 2 and all(isinstance(b, (int, float)) and 0.0 <= b < 1.0 for b in value)
    require(ok, key, list(value), "two numbers in [0, 1)")


def not_empty(expected: str) -> Check:
    """Any text but an empty one."""
    return lambda key, value: require(value != "", key, value, expected)


def thread_count(key: str, value: int | None) -> None:
    """A number of CPU threads, or null."""
    expected = f"positive and at most {MAX_THREADS}, or null"
    require(value is None or 0 < value <= MAX_THREADS, key, value, expected)


def seed_range(key: str, value: int) -> None:
    """A seed."""
    require(seeding.in_range(value), key, value, "in [0, 2^63)")


def allotted_threads() -> int | None:
    """What Slurm allots to this task, at most :data:`MAX_THREADS`; None where it says nothing.

    Raises:
        ConfigError: SLURM_CPUS_PER_TASK is no positive number.
    """
    text = os.environ.get("SLURM_CPUS_PER_TASK", "").strip()
    if not text:
        return None
    ok = re.fullmatch("0*[1-9][0-9]*", text) is not None
    require(ok, "SLURM_CPUS_PER_TASK", text, "a positive number, or unset")
    digits = text.lstrip("0")
    return min(int(digits[:5]), MAX_THREADS)  # of more digits it is larger
