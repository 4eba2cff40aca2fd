"""How far the cost model is off: its figures beside times, its constants beside readings.

``python -m bench.tune_report`` writes the table of constants into docs/performance.md, with the
readings of the newest stored run of ``make gpu``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from bench import results
from bench.internals import CONSTANTS
from bench.pages import PERFORMANCE, write
from bench.results import Spread

if TYPE_CHECKING:
    from bench.tune_problems import Problem, Times


def summary(
    done: Sequence[Problem], times: Mapping[str, Times], readings: Mapping[str, float]
) -> str:
    """The tables that a run of the tuner ends with."""
    return "\n".join([*heuristic(done, times), "", *model(done, times), "", *constants(readings)])


def medians(times: Times) -> dict[str, float]:
    """Microseconds of what was measured."""
    return {name: Spread.of(t).p50 for name, t in times.items() if isinstance(t, list)}


def heuristic(done: Iterable[Problem], times: Mapping[str, Times]) -> list[str]:
    """By kernel: how often the heuristic took the best choice, and what it lost where not."""
    lost: dict[str, list[float]] = {}
    for problem in done:
        measured = medians(times[problem.name])
        if problem.heuristic in measured:
            share = measured[problem.heuristic] / min(measured.values())
            lost.setdefault(problem.kernel, []).append(share)
    lines = [f"{'heuristic / best choice':26} {'problems':>8} {'best':>5} {'mean':>6} {'worst':>6}"]
    for kernel, found in lost.items():
        mean = math.exp(sum(map(math.log, found)) / len(found))
        best = sum(x == 1.0 for x in found)
        lines.append(f"{kernel:26} {len(found):8} {best:5} {mean:6.2f} {max(found):6.2f}")
    return lines


def model(done: Iterable[Problem], times: Mapping[str, Times]) -> list[str]:
    """Measured over modelled time, by kernel and kind of choice: what the constants are off by."""
    found: dict[str, list[float]] = {}
    for problem in done:
        measured = medians(times[problem.name])
        for name, predicted in problem.model.items():
            if name in measured:
                kind = _kind(problem, name)
                found.setdefault(f"{problem.kernel}, {kind}", []).append(measured[name] / predicted)
    lines = [f"{'measured / model':52} {'choices':>7} {'p20':>6} {'p50':>6} {'p80':>6}"]
    for kind, ratios in sorted(found.items()):
        p20, p50, p80 = (getattr(Spread.of(ratios), p) for p in ("p20", "p50", "p80"))
        lines.append(f"{kind:52} {len(ratios):7} {p20:6.2f} {p50:6.2f} {p80:6.2f}")
    return lines


def _kind(problem: Problem, name: str) -> str:
    options = problem.choices[name]
    if not options["block_m"]:
        return "plain GEMM"
    rows = "64 rows or more" if options["block_m"] >= 64 else "fewer rows"
    n = int(problem.key.split(" N")[1].split()[0])
    return f"{rows}, {'whole rows' if options['block_n'] >= n else 'shared rows'}"


def constants(readings: Mapping[str, float]) -> list[str]:
    """The model's constants: assumed, and measured by the microbenchmarks."""
    lines = [f"{'constant of the model':44} {'assumed':>14} {'source':11} measured"]
    for c in CONSTANTS.values():
        value = readings.get(c.reading) if c.reading is not None else None
        have = "not measured" if value is None else f"{value:.4g} {c.unit}"
        lines.append(f"{c.text:44} {f'{c.value:g} {c.unit}':>14} {c.source:11} {have}")
    return lines


def table(readings: Mapping[str, float]) -> str:
    """:func:`constants` in Markdown."""
    lines = ["| constant of the model of launches | assumed | source | read by | measured |"]
    lines.append("|---|---|---|---|---|")
    for c in CONSTANTS.values():
        value = readings.get(c.reading) if c.reading is not None else None
        have = "not measured" if value is None else f"{value:.4g} {c.unit}"
        by = "the tuner's ratios" if c.reading is None else c.reading
        lines.append(
            f"| {c.text} | {f'{c.value:g} {c.unit}'.strip()} | {c.source} | {by} | {have} |"
        )
    return "\n".join(lines)


def readings(gpu: str | None = None) -> dict[str, float]:
    """What the newest stored runs of ``make gpu`` read, on this GPU or any, by name."""
    found: dict[str, float] = {}
    for result in results.stored(pattern=results.GPU_PATTERN):  # oldest first
        name = result.facts["machine"]["gpu"]
        if name is None or gpu not in (None, name) or result.gpu.get("dry"):
            continue
        for reading in _readings(result.gpu.get("micro", {})):
            if reading["value"] is not None:
                found[reading["name"]] = reading["value"]
    return found


def _readings(micro: Mapping[str, Sequence[dict[str, Any]]]) -> Iterable[dict[str, Any]]:
    return (reading for found in micro.values() for reading in found)


def main() -> None:
    """Write the table of constants."""
    write(PERFORMANCE, "constants", table(readings()))


if __name__ == "__main__":
    main()
