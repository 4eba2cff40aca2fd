"""Results on disk: one JSON file a run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pwm_fast import files

SCHEMA = 1
STORE = Path(__file__).with_name("results")
PATTERN = "speed_*.json"
GPU_PATTERN = "gpu_*.json"


class ResultError(ValueError):
    """A file that is no result of the benchmarks; the message names it."""


@dataclass
class Row:
    """One provider of a case.

    Attributes:
        provider: a key of :data:`bench.providers.LABELS`.
        status: ``ok``, ``failed`` (the check was red or it raised: no speed), ``memory`` (it does
            not fit into the GPU's), or ``absent``.
        reason: why, unless it is ``ok``.
        seconds: of one call, one figure a round.
        peak: bytes that a call adds to the memory in use; None where that is not known.
    """

    provider: str
    status: str
    reason: str | None = None
    seconds: list[float] = field(default_factory=list)
    peak: int | None = None


@dataclass
class Group:
    """A case: its axes and the rows in the order of its providers, the anchor first."""

    name: str
    axes: dict[str, Any]
    rows: dict[str, Row]

    @property
    def anchor(self) -> Row | None:
        """What ratios are of: the first row that was measured, which is the published code's."""
        return next((row for row in self.rows.values() if row.status == "ok"), None)


@dataclass
class Result:
    """A run.

    Attributes:
        facts: commit, date, machine, software.
        groups: cases by name.
        path: where it was read from.
        gpu: of a run of ``bench.gpu``: ``stages`` and ``micro``; else empty.
    """

    facts: dict[str, Any]
    groups: dict[str, Group]
    path: Path | None = None
    gpu: dict[str, Any] = field(default_factory=dict)

    def kind(self) -> dict[str, Any]:
        """What two runs must share to be compared: machine, threads, ISA and versions."""
        software = self.facts["software"]
        python = ".".join(str(software["python"]).split(".")[:2])
        versions = {name: software.get(name) for name in ("torch", "triton", "cuda")}
        return {**self.facts["machine"], **versions, "python": python}


def to_json(result: Result) -> dict[str, Any]:
    """Plain containers, rounded to what was measured."""
    return {
        "schema": SCHEMA,
        **result.facts,
        "cases": [
            {
                "name": group.name,
                "axes": dict(group.axes),
                "rows": [row_to_json(row) for row in group.rows.values()],
            }
            for group in result.groups.values()
        ],
        **({"gpu": result.gpu} if result.gpu else {}),
    }


def write(path: Path, data: dict[str, Any], indent: int | None = 1) -> dict[str, Any]:
    """Write a file of results in one step: a run that is killed leaves the old file. The data."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(path, json.dumps(data, indent=indent) + "\n")
    return data


def row_from_json(data: dict[str, Any]) -> Row:
    """What :func:`row_to_json` made of a row."""
    return Row(
        data["provider"],
        data["status"],
        data.get("reason"),
        list(data.get("seconds", ())),
        data.get("peak_bytes"),
    )


def row_to_json(row: Row) -> dict[str, Any]:
    if row.status != "ok":
        return {"provider": row.provider, "status": row.status, "reason": row.reason}
    seconds = [float(f"{s:.5g}") for s in row.seconds]
    return {"provider": row.provider, "status": "ok", "peak_bytes": row.peak, "seconds": seconds}


def load(path: Path) -> Result:
    """Read a result.

    Raises:
        ResultError: it is not there, or not a result.
    """
    try:
        data = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ResultError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise ResultError(f"{path} is not JSON: {error}") from error
    try:
        if data["schema"] != SCHEMA:
            raise ResultError(f"{path} has schema {data['schema']}, this code reads {SCHEMA}")
        groups = {}
        for case in data["cases"]:
            rows = {r["provider"]: row_from_json(r) for r in case["rows"]}
            groups[case["name"]] = Group(case["name"], case["axes"], rows)
        facts = {key: data[key] for key in ("date", "commit", "machine", "software")}
        result = Result(facts, groups, path, data.get("gpu", {}))
        result.kind()
    except (KeyError, TypeError, AttributeError) as error:
        raise ResultError(
            f"{path} is no result of `pytest bench --benchmark-json=...`: {error!r}"
        ) from error
    return result


def stored(directory: Path = STORE, *, pattern: str = PATTERN) -> list[Result]:
    """All stored results of speed, oldest first."""
    found = [load(path) for path in sorted(directory.glob(pattern))]
    return sorted(found, key=lambda r: str(r.facts["date"]))


# --- statistics ---------------------------------------------------------------------------------


def quantile(values: Sequence[float], q: float) -> float:
    """Linear interpolation between the order statistics; ``q`` in [0, 1]."""
    ordered = sorted(values)
    place = q * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


@dataclass(frozen=True)
class Spread:
    """The 20th, 50th and 80th percentile."""

    p20: float
    p50: float
    p80: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(*(quantile(values, q) for q in (0.2, 0.5, 0.8)))


def ratio(over: Row, under: Row) -> Spread:
    """``over / under``, round by round: a round measured both next to each other.

    So what slows the whole machine down cancels.
    """
    pairs = list(zip(over.seconds, under.seconds, strict=False))
    return Spread.of([a / b for a, b in pairs])
