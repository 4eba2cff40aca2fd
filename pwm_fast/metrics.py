"""The run's log: one JSON object a line, always on disk before the next epoch begins."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

Row = dict[str, Any]


class MetricsFile:
    """Appends rows to ``metrics.jsonl``.

    Args:
        path: the file.
        last_epoch: keep only the rows up to this epoch, as a resumed run needs: what a killed run
            logged after its last checkpoint is computed again. None starts an empty file.
    """

    def __init__(self, path: Path, last_epoch: int | None = None) -> None:
        rows = [] if last_epoch is None else [r for r in read(path) if r["epoch"] <= last_epoch]
        temporary = path.with_name(f".{path.name}.tmp")
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines(_line(row) for row in rows)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        self.last: Row = rows[-1] if rows else {}
        self._file = path.open("a", encoding="utf-8")

    def write(self, row: Row) -> None:
        """Append a row; it holds ``epoch``."""
        self._file.write(_line(row))
        self._file.flush()
        self.last = row

    def sync(self) -> None:
        """Make the rows so far durable."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Make the rows durable and close the file."""
        self.sync()
        self._file.close()


def read(path: Path) -> list[Row]:
    """Rows of a metrics file in order of their epoch; a torn last line is left out.

    Of several rows of one epoch the last one counts. A missing file has no rows.
    """
    rows: dict[int, Row] = {}
    if path.is_file():
        for line in path.read_text("utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict) and isinstance(row.get("epoch"), int):
                rows[row["epoch"]] = row
    return [rows[epoch] for epoch in sorted(rows)]


def to_numbers(metrics: Mapping[str, Tensor | float | int | None]) -> Row:
    """Metrics as plain numbers: the one place where a log step waits for the device."""
    return {
        k: v.detach().cpu().item() if isinstance(v, Tensor) else v for k, v in metrics.items()
    }


def _line(row: Row) -> str:
    # NaN and infinity are no JSON: null keeps the file readable by every parser.
    clean = {
        k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()
    }
    return json.dumps(clean, allow_nan=False) + "\n"
