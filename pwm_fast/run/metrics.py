"""The run's log: one JSON object a line, always on disk before the next epoch begins."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from torch import Tensor

from pwm_fast import files
from pwm_fast.parallel import Ranks

Row = dict[str, Any]
SATURATED = 0.98  # of an action in [-1, 1]: there tanh has 4 % of its slope, and less beyond
OF_TASKS = ("eval_reward/", "train_reward/")  # keys of one task's mean returns begin so
MOST = 1e300  # what a float holds; Python's integers have no bound


class MetricsFile:
    """Appends rows to ``metrics.jsonl``.

    Args:
        path: the file.
        last_epoch: keep only the rows up to this epoch, as a resumed run needs: what a killed run
            logged after its last checkpoint is computed again. None starts an empty file.

    Raises:
        OSError: the file cannot be written; it names the file.
    """

    def __init__(self, path: Path, last_epoch: int | None = None) -> None:
        self.path = path
        rows = [] if last_epoch is None else [r for r in read(path) if r["epoch"] <= last_epoch]
        files.write_text(path, "".join(_line(row) for row in rows))
        self._file = path.open("ab", buffering=0)  # what is written is out of this process

    def write(self, row: Row) -> None:
        """Append a row; it holds ``epoch``.

        Raises:
            OSError: the disk is full or not writable; it names the file.
        """
        data = _line(row).encode("utf-8")
        try:
            while data:
                data = data[self._file.write(data) :]
        except OSError as error:
            raise files.naming(self.path, error) from error

    def sync(self) -> None:
        """Make the rows so far durable.

        Raises:
            OSError: the disk is full or not writable; it names the file.
        """
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise files.naming(self.path, error) from error

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read(path: Path) -> list[Row]:
    """Rows of a metrics file in order of their epoch; a torn last line is left out.

    Of several rows of one epoch the last one counts. A missing file has no rows.
    """
    return scan(path).rows


class Scan(NamedTuple):
    """What a metrics file holds.

    Attributes:
        rows: as :func:`read` gives them.
        damaged: numbers of lines that are no rows, or whose epoch another one has, too.
        torn: the number of a last line that was begun: it is being written, or its process was
            killed; None where there is none.
    """

    rows: list[Row]
    damaged: list[int]
    torn: int | None


def scan(path: Path) -> Scan:
    """Read a metrics file, and where it is damaged."""
    rows: dict[int, tuple[int, Row]] = {}
    damaged: list[int] = []
    torn = None
    lines = path.read_text("utf-8-sig", errors="replace").split("\n") if path.exists() else []
    for number, line in enumerate(lines, 1):
        row = _parsed(line)
        if row is not None:
            if row["epoch"] in rows:
                damaged.append(rows[row["epoch"]][0])
            rows[row["epoch"]] = number, row
        elif number < len(lines):
            damaged.append(number)
        elif line:
            torn = number
    return Scan([rows[epoch][1] for epoch in sorted(rows)], sorted(damaged), torn)


def _parsed(line: str) -> Row | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    sound = isinstance(row, dict) and type(row.get("epoch")) is int and row["epoch"] >= 0
    return row if sound else None


def tasks_of(rows: Sequence[Row]) -> list[str]:
    """The tasks whose returns were logged one by one, in their order; empty where there is one."""
    return list(
        dict.fromkeys(
            key.removeprefix(prefix)
            for row in rows
            for prefix in OF_TASKS
            for key in row
            if key.startswith(prefix)
        )
    )


def is_number(value: object) -> TypeGuard[float]:
    """A finite number, as every value of a row is that was logged and not lost or changed since."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return abs(value) < MOST and math.isfinite(value)


def saturation(action: Tensor) -> Tensor:
    """Share of the entries of actions that are beyond :data:`SATURATED`, a scalar on the device."""
    return (action.abs() > SATURATED).float().mean()


def rank(diverged: object, reward: object) -> tuple[float, float]:
    """Of an evaluation, larger is better: fewer diverged episodes first, then the reward.

    Runs of older versions do not say how many diverged, which counts as none. A reward that is no
    finite number is worse than any.
    """
    return (
        -diverged if is_number(diverged) else 0.0,
        reward if is_number(reward) else -math.inf,
    )


def to_numbers(metrics: Mapping[str, Tensor | float | int | None]) -> Row:
    """Metrics as plain numbers: the one place where a log step waits for the device."""
    return {k: v.detach().cpu().item() if isinstance(v, Tensor) else v for k, v in metrics.items()}


def mean_over(ranks: Ranks, row: Row) -> Row:
    """The means of numbers over the ranks that have them; NaN where none has a finite one."""
    if ranks.size == 1:
        return row
    rows = ranks.gather(row)
    means = {}
    for key in dict.fromkeys(key for each in rows for key in each):
        values = [each[key] for each in rows if is_number(each.get(key))]
        means[key] = sum(values) / len(values) if values else math.nan
    return means


def finite(value: Any) -> Any:
    """``value`` with None for NaN and infinity, which are no JSON, also within containers."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return value


def _line(row: Row) -> str:
    return json.dumps(finite(row), allow_nan=False) + "\n"
