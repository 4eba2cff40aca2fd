"""Small results made up for the tests, in the place of a run of minutes."""

from __future__ import annotations

from typing import Any

from bench.results import Group, Result, Row

FACTS: dict[str, Any] = {
    "date": "2026-01-02T03:04:05+00:00",
    "commit": {"id": "0123456789ab", "dirty": False},
    "machine": {
        "device": "cpu",
        "system": "Linux",
        "arch": "x86_64",
        "cpu": "Some CPU",
        "cores": 2,
        "threads": 2,
        "isa": "AVX2",
        "native_isa": "avx2",
        "gpu": None,
    },
    "software": {
        "pwm_fast": "0.1.0",
        "python": "3.11.7",
        "cuda": None,
        "torch": "2.13.0+cpu",
        "triton": "3.7.1",
        "numpy": "2.4.6",
        "mujoco": "3.17.0",
    },
}
ROLLOUT = "rollout-5M_flow-b128-K2-backward"
AXES = {"work": "imagined rollout", "model": "5M_flow", "batch": 128, "K": 2, "mode": "backward"}


def row(provider: str, *seconds: float, peak: int | None = 2**20) -> Row:
    return Row(provider, "ok", None, list(seconds), peak)


def group(name: str = ROLLOUT, *rows: Row, **axes: Any) -> Group:
    return Group(name, {**AXES, **axes}, {r.provider: r for r in rows})


def result(*groups: Group, **changes: Any) -> Result:
    """A result; changes are of the machine, or ``date`` and ``dirty``."""
    facts = {key: dict(value) if isinstance(value, dict) else value for key, value in FACTS.items()}
    for key, value in changes.items():
        if key == "date":
            facts["date"] = value
        elif key == "dirty":
            facts["commit"]["dirty"] = value
        else:
            facts["machine"][key] = value
    return Result(facts, {g.name: g for g in groups})


def rollout(*, published: float = 1.0, fast: float = 0.25, noise: float = 0.02) -> Group:
    """Five rounds of three providers, the machine 3 times as slow in the fourth."""
    pace = [1.0, 1.0 + noise, 1.0 - noise, 3.0, 1.0]
    return group(
        ROLLOUT,
        row("published", *(published * p for p in pace), peak=100 * 2**20),
        row("reference", *(0.9 * published * p * (1 + noise * i) for i, p in enumerate(pace))),
        row("fast", *(fast * p * (1 + noise * (i % 2)) for i, p in enumerate(pace)), peak=2**26),
        row("floor", *(0.2 * p for p in pace), peak=None),
    )
