"""Published learning curves from CSV files, to be drawn beside one's own."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pwm_fast import files
from pwm_fast.config import ConfigError

NEEDED = ("name", "step", "return")
OPTIONAL = ("low", "high", "seconds")
FORMAT = "name,step,return[,low,high][,seconds]"


class Published(NamedTuple):
    """A curve from elsewhere.

    Attributes:
        name: in legend and tables.
        path: the file.
        steps: environment steps ``[T]``, increasing.
        values: returns ``[T]``.
        band: lower and upper bounds ``[2, T]``, whatever the source says they are; None without.
        seconds: wall-clock time ``[T]``; None without.
    """

    name: str
    path: Path
    steps: np.ndarray
    values: np.ndarray
    band: np.ndarray | None
    seconds: np.ndarray | None

    @property
    def label(self) -> str:
        """Its name, marked as no run of one's own."""
        return f"{self.name} (reference)"

    def at(self, steps: float) -> float:
        """The return after so many steps, linearly between points; NaN outside of them."""
        return self._at(self.values, steps)

    def band_at(self, steps: float) -> tuple[float, float] | None:
        """The bounds there; None without, and outside of the points."""
        if self.band is None or math.isnan(self.at(steps)):
            return None
        return self._at(self.band[0], steps), self._at(self.band[1], steps)

    def _at(self, values: np.ndarray, steps: float) -> float:
        if not self.steps[0] <= steps <= self.steps[-1]:
            return math.nan
        return float(np.interp(steps, self.steps, values))


def read(path: Path) -> list[Published]:
    """The curves of a file, in the order in which their names come first.

    The first line that is neither empty nor a comment (``#``) names the columns, in any order:
    ``name``, ``step`` and ``return``, and, if there are any, ``low`` and ``high`` together, and
    ``seconds``. Each further line is a point. The cells of optional columns are empty for all
    points of a name, or for none. A name with a comma stands in double quotes.

    Raises:
        ConfigError: the file cannot be read or used; the message names file, line and column, and
            what was expected.
    """
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
        raise ConfigError(f"--reference {path} cannot be read: {reason}") from error
    columns: list[str] | None = None
    points: dict[str, dict[float, tuple[int, dict[str, float]]]] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        where = f"--reference {path}, line {number}"
        try:
            cells = [cell.strip() for cell in next(csv.reader([line], strict=True))]
        except csv.Error as error:
            raise ConfigError(f"{where}: expected comma-separated cells, {error}") from error
        if columns is None:
            columns = _columns(where, cells)
            continue
        if len(cells) != len(columns):
            raise ConfigError(
                f"{where}: expected {len(columns)} cells ({','.join(columns)}), got {len(cells)}"
            )
        name, values = _point(where, dict(zip(columns, cells, strict=True)))
        curve = points.setdefault(name, {})
        if values["step"] in curve:
            raise ConfigError(
                f"{where}, column step: expected a step that {name!r} does not have yet, got "
                f"{values['step']:g} (also in line {curve[values['step']][0]})"
            )
        curve[values["step"]] = number, values
    if columns is None:
        raise ConfigError(f"--reference {path}: expected a header {FORMAT}, got an empty file")
    if not points:
        raise ConfigError(f"--reference {path}: expected at least one point below the header")
    return [_curve(path, name, list(curve.values())) for name, curve in points.items()]


def of_options(texts: list[str]) -> list[tuple[str | None, Published]]:
    """Environment, or None for any, and curve, of ``[ENV=]FILE.csv`` each.

    Raises:
        ConfigError: as :func:`read`.
    """
    found: list[tuple[str | None, Published]] = []
    for text in texts:
        path, environment = files.user_path(text), None
        if not path.exists() and "=" in text:
            environment, _, name = text.partition("=")
            path = files.user_path(name)
        found += [(environment, curve) for curve in read(path)]
    return found


def _columns(where: str, cells: list[str]) -> list[str]:
    expected = f"expected a header {FORMAT}"
    for name in NEEDED:
        if name not in cells:
            raise ConfigError(f"{where}: {expected}, column {name} is missing")
    for cell in cells:
        if cell not in NEEDED + OPTIONAL:
            raise ConfigError(f"{where}: {expected}, got a column {cell!r}")
        if cells.count(cell) > 1:
            raise ConfigError(f"{where}: {expected}, column {cell} is there twice")
    if ("low" in cells) != ("high" in cells):
        raise ConfigError(f"{where}: {expected}, low and high come together")
    return cells


def _point(where: str, cells: dict[str, str]) -> tuple[str, dict[str, float]]:
    """Name and numbers of a line; an empty optional cell is left out."""
    if not cells["name"]:
        raise ConfigError(f"{where}, column name: expected a name, got nothing")
    values = {}
    for column, text in cells.items():
        if column == "name" or (column in OPTIONAL and not text):
            continue
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        least = 0.0 if column in ("step", "seconds") else -math.inf
        if not math.isfinite(value) or value < least:
            of = "a finite number" + (", 0 or more" if least == 0.0 else "")
            raise ConfigError(f"{where}, column {column}: expected {of}, got {text!r}")
        values[column] = value
    if ("low" in values) != ("high" in values):
        empty = "high" if "low" in values else "low"
        raise ConfigError(f"{where}, column {empty}: expected a number, as its counterpart has one")
    if "low" in values and values["low"] > values["high"]:
        raise ConfigError(
            f"{where}, column low: expected at most high={values['high']:g}, got {values['low']:g}"
        )
    return cells["name"], values


def _curve(path: Path, name: str, rows: list[tuple[int, dict[str, float]]]) -> Published:
    for column in OPTIONAL:
        lacking = [number for number, values in rows if column not in values]
        if lacking and len(lacking) < len(rows):
            raise ConfigError(
                f"--reference {path}, line {lacking[0]}, column {column}: expected a number, as "
                f"other points of {name!r} have one"
            )
    ordered = sorted((values for _, values in rows), key=lambda values: values["step"])

    def numbers(key: str) -> np.ndarray | None:
        return np.array([v[key] for v in ordered]) if key in ordered[0] else None

    low, high, seconds = (numbers(key) for key in OPTIONAL)
    band = None if low is None or high is None else np.stack([low, high])
    steps, values = (np.array([v[key] for v in ordered]) for key in ("step", "return"))
    return Published(name, path, steps, values, band, seconds)
