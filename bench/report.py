"""Tables, plots and the README's figures from stored results.

python -m bench.report RESULT.json...                  # tables of ratios
python -m bench.report RESULT.json... --plots DIR      # and plots, as PNG
python -m bench.report --readme                        # rewrite the README's tables
python -m bench.report --docs                          # and those of docs/performance.md on GPUs
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import environment, gpu_report, results
from bench.pages import PERFORMANCE, README, write
from bench.providers import GRAPH, LABELS
from bench.results import Group, Result, Row, Spread, ratio

FLOORS = {
    **dict.fromkeys(("fast_bf16", "fast_fp16", "autocast", *gpu_report.BEST_16), "floor_bf16"),
    **dict.fromkeys(("fast_tf32", "tf32", "compile_tf32", "jax", "diffrax"), "floor_tf32"),
    "jax_bf16": "floor_bf16",
}


# --- numbers as text ----------------------------------------------------------------------------


def duration(seconds: float) -> str:
    """Three significant digits and a unit."""
    scale, unit = next(
        ((s, u) for s, u in ((1.0, "s"), (1e-3, "ms")) if seconds >= s), (1e-6, "µs")
    )
    return f"{significant(seconds / scale)} {unit}"


def significant(x: float, digits: int = 3) -> str:
    """Rounded to significant digits, without an exponent."""
    text = f"{x:.{digits}g}"
    return f"{float(text):.0f}" if "e" in text or float(text) >= 10 ** (digits - 1) else text


def size(count: int | None) -> str:
    if count is None:
        return ""
    return "below 0.1 MiB" if count < 2**20 / 10 else f"{significant(count / 2**20)} MiB"


def spread(s: Spread, text: Any) -> str:
    return f"{text(s.p50)} ({text(s.p20)} to {text(s.p80)})"


def times(s: Spread) -> str:
    return f"{s.p50:.2f}x ({s.p20:.2f} to {s.p80:.2f})"


# --- tables -------------------------------------------------------------------------------------


def machine_line(result: Result) -> str:
    """What it was measured on, in one line."""
    m, software = (result.facts[key] for key in ("machine", "software"))
    where = m["gpu"] or f"{m['cpu']}, {m['isa']}"
    cuda = f", CUDA {software['cuda']}" if m["gpu"] and software["cuda"] else ""
    return (
        f"{where}, {m['cores']} cores, {_threads(m['threads'])}; torch {software['torch']}{cuda}, "
        f"triton {software['triton'] or 'none'}, Python {software['python']}; "
        f"{environment.made(result.facts)}"
    )


def _threads(count: int) -> str:
    return f"{count} thread{'' if count == 1 else 's'}"


def title(group: Group) -> str:
    """A case in words."""
    axes = dict(group.axes)
    parts = [str(axes.pop("work"))]
    mode = {"backward": "forward and backward"}.get(axes.get("mode", ""), axes.get("mode"))
    for key in ("model", "batch", "K"):
        if key in axes:
            parts.append(str(axes[key]) if key == "model" else f"{key} {axes[key]}")
    return ", ".join([*parts, *([str(mode)] if mode else [])])


def floor_of(group: Group, row: Row) -> Row | None:
    """The floor that a row is measured against: that of its precision."""
    provider = row.provider.removesuffix(GRAPH)
    found = group.rows.get(FLOORS.get(provider, "floor"))
    known = found is not None and found.status == "ok"
    return found if known and not row.provider.startswith("floor") else None


def table(group: Group) -> str:
    """Markdown: a line a provider; ratios are the anchor's time over the row's, so above 1 is
    faster than the anchor."""
    anchor = group.anchor
    lines = [
        f"| {title(group)} | time, p50 (p20 to p80) | faster than the first | of the floor "
        "| peak memory |",
        "|---|---|---|---|---|",
    ]
    for row in group.rows.values():
        label = LABELS.get(row.provider, row.provider)
        if row.status != "ok" or anchor is None:
            what = "out of memory" if row.status == "memory" else row.status
            lines.append(f"| {label} | {what}: {_cell(row.reason)} | | | |")
            continue
        bottom = floor_of(group, row)
        part = "" if bottom is None else f"{ratio(bottom, row).p50:.0%}"
        faster = "1" if row is anchor else times(ratio(anchor, row))
        time = spread(Spread.of(row.seconds), duration)
        lines.append(f"| {label} | {time} | {faster} | {part} | {size(row.peak)} |")
    return "\n".join(lines)


def aligned(markdown: str) -> str:
    """A table for the terminal: columns of equal width, without the rule below the heading."""
    lines = [line.strip("| ").split("|") for line in markdown.splitlines()]
    cells = [[cell.strip() for cell in line] for line in lines if not line[0].startswith("--")]
    columns = max(map(len, cells))
    cells = [line + [""] * (columns - len(line)) for line in cells]
    # A reason is as long as it is: it must not widen the column.
    width = [
        max(len(line[i]) for line in cells if ": " not in line[i] or i == 0) for i in range(columns)
    ]
    return "\n".join(
        "  ".join(cell.ljust(w) for cell, w in zip(line, width, strict=True)).rstrip()
        for line in cells
    )


def _cell(text: str | None) -> str:
    return (text or "").replace("|", "/")


def report(result: Result) -> str:
    """All tables of a result."""
    tables = [table(group) for group in result.groups.values()]
    return "\n\n".join([machine_line(result), *tables])


# --- the README's table -------------------------------------------------------------------------

README_CASES = (
    "rollout-5M_flow-b128-K2-backward",
    "rollout-48M_flow-b128-K2-backward",
    "world_model-5M_flow-b256-K1",
    "world_model-5M_flow-b256-K2",
    "world_model-48M_flow-b256-K2",
    "epoch-5M-K1",
    "epoch-5M",
    "epoch-48M-K1",
    "epoch-48M",
    "layer_norm_act-5M-b4096-forward",
    "layer_norm_act-5M-b4096-backward",
    "esnr-5M",
    "esnr-48M",
)


def readme_section(found: Sequence[Result]) -> str:
    """What stands between the markers: of each kind of machine the result with most figures.

    Of two with as many it is the newer one; ``found`` is sorted, the oldest first.
    """
    chosen: dict[str, Result] = {}
    for result in found:
        kind = str(sorted(result.kind().items(), key=str))
        if 0 < _figures(result) >= _figures(chosen.get(kind)):
            chosen[kind] = result
    parts = [_readme_table(result) for result in chosen.values()]
    if not parts:
        return (
            'No measurement is stored yet; `make bench ARGS="-m figures"` takes one '
            "([how](docs/performance.md))."
        )
    return "\n\n".join(parts)


def _figures(result: Result | None) -> int:
    return 0 if result is None else sum(name in result.groups for name in README_CASES)


def _readme_table(result: Result) -> str:
    lines = [
        machine_line(result) + ":",
        "",
        "| | baseline | its time | best of plain PyTorch | pwm_fast fp32 | pwm_fast bf16 "
        "| peak memory, baseline to pwm_fast fp32 |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in README_CASES:
        group = result.groups.get(name)
        if group is None or group.anchor is None:
            continue
        plain = [
            row
            for key in ("frozen", "autocast", "tf32", "compile", "graph")
            if (row := group.rows.get(key)) is not None and row.status == "ok"
        ]
        best = min(plain, key=lambda row: Spread.of(row.seconds).p50, default=None)
        baseline = group.anchor.provider
        cells = [LABELS.get(baseline, baseline), duration(Spread.of(group.anchor.seconds).p50)]
        cells.append("" if best is None else f"{_faster(group, best)}, {LABELS[best.provider]}")
        cells += [_faster(group, group.rows.get(key)) for key in ("fast", "fast_bf16")]
        cells.append(_peaks(group))
        lines.append(f"| {title(group)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _faster(group: Group, row: Row | None) -> str:
    if row is None:
        return ""
    if row.status != "ok" or group.anchor is None:
        return row.status
    return f"{times(ratio(group.anchor, row))}"


def _peaks(group: Group) -> str:
    rows = [group.anchor, group.rows.get("fast")]
    if any(row is None or row.peak is None for row in rows):
        return ""
    return " to ".join(size(row.peak) for row in rows if row is not None)


# --- runs of bench.gpu --------------------------------------------------------------------------


def stored_gpu() -> Result | None:
    """The stored run of ``bench.gpu`` that tables are made from; None where there is none."""
    return gpu_report.newest(results.stored(pattern=results.GPU_PATTERN))


def gpu_readme(result: Result | None) -> str:
    """The README's lines on GPUs."""
    if result is None:
        return "On a GPU: not measured. `make gpu` takes the measurements."
    return f"{machine_line(result)}:\n\n{gpu_report.figures(result)}"


def gpu_docs(result: Result | None) -> str:
    """The tables of docs/performance.md: the model's figures and the measured ones."""
    if result is None:
        return f"Measured: nothing yet.\n\n{gpu_report.comparison(None)}"
    return f"Measured: {machine_line(result)}.\n\n{gpu_report.comparison(result)}"


# --- plots --------------------------------------------------------------------------------------


def plots(result: Result, directory: Path) -> list[Path]:
    """Bars of the providers of each case, and time over batch of each kind of work."""
    directory.mkdir(parents=True, exist_ok=True)
    prefix = result.path.stem if result.path is not None else "speed"
    written = []
    for group in result.groups.values():
        if group.anchor is not None and len([r for r in group.rows.values() if r.seconds]) > 1:
            written.append(_bars(group, result, directory / f"{prefix}-{group.name}.png"))
    for name, family in families(result).items():
        written.append(
            _scaling(name, family, result, directory / f"{prefix}-over-batch-{name}.png")
        )
    return written


def families(result: Result) -> dict[str, list[Group]]:
    """Cases that differ in nothing but their batch, if there are at least three, smallest first."""
    found: dict[str, list[Group]] = {}
    for group in result.groups.values():
        if "batch" in group.axes:
            name = group.name.replace(f"-b{group.axes['batch']}", "")
            found.setdefault(name, []).append(group)
    return {
        name: sorted(groups, key=lambda g: int(g.axes["batch"]))
        for name, groups in found.items()
        if len(groups) >= 3
    }


def _figure(width: float, height: float, heading: str, result: Result) -> Any:
    from matplotlib.figure import Figure  # no pyplot: no display is needed

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(heading, fontsize="medium")
    figure.supxlabel(machine_line(result), fontsize=6, color="0.4")
    return figure


def _colour(provider: str) -> str:
    if provider.startswith("floor"):
        return "0.7"
    return "C0" if provider.startswith("fast") else "C1"


def _bars(group: Group, result: Result, path: Path) -> Path:
    rows = [row for row in group.rows.values() if row.status == "ok"]
    spreads = [Spread.of(row.seconds) for row in rows]
    figure = _figure(7.5, 0.9 + 0.36 * len(rows), title(group), result)
    axes = figure.add_subplot()
    middle = [s.p50 * 1e3 for s in spreads]
    errors = [[(s.p50 - s.p20) * 1e3 for s in spreads], [(s.p80 - s.p50) * 1e3 for s in spreads]]
    labels = [LABELS.get(row.provider, row.provider) for row in rows]
    bars = axes.barh(
        labels, middle, xerr=errors, color=[_colour(row.provider) for row in rows], ecolor="0.3"
    )
    assert group.anchor is not None
    captions = [f" {ratio(group.anchor, row).p50:.2f}x" for row in rows]
    axes.bar_label(bars, captions, fontsize=8)
    axes.margins(x=0.15)
    axes.invert_yaxis()
    axes.set_xlabel("ms a call: median, 20th to 80th percentile")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    return path


def _scaling(name: str, family: Sequence[Group], result: Result, path: Path) -> Path:
    figure = _figure(6.5, 4.2, f"{title(family[0]).split(', batch')[0]}: {name}", result)
    axes = figure.add_subplot()
    providers = [p for p in LABELS if any(p in group.rows for group in family)]
    for provider in providers:
        points = [
            (int(group.axes["batch"]), Spread.of(row.seconds))
            for group in family
            if (row := group.rows.get(provider)) is not None and row.status == "ok"
        ]
        if not points:
            continue
        batches = [batch for batch, _ in points]
        style = "--" if provider.startswith("floor") else "-"
        axes.plot(
            batches,
            [s.p50 / batch * 1e6 for batch, s in points],
            f"{style}o",
            markersize=3,
            label=LABELS[provider],
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("batch")
    axes.set_ylabel("µs a row, median")
    axes.grid(alpha=0.3, which="both", linewidth=0.5)
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=120)
    return path


# --- command line -------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Status 0, or 2 with one line on stderr for what a user can mend."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("results", nargs="*", type=Path, metavar="RESULT.json")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="draw PNG files into DIR")
    parser.add_argument(
        "--readme", action="store_true", help="rewrite the README's tables from bench/results"
    )
    parser.add_argument(
        "--docs", action="store_true", help="rewrite docs/performance.md's tables on GPUs"
    )
    options = parser.parse_args(argv)
    if not options.results and not options.readme and not options.docs:
        parser.error("name a RESULT.json, or give --readme or --docs")
    try:
        for result in map(results.load, options.results):
            print(report(result), end="\n\n")
            for path in plots(result, options.plots) if options.plots is not None else ():
                print(f"wrote {path}")
        if options.readme:
            changed = write(README, "speed", readme_section(results.stored()))
            changed |= write(README, "gpu", gpu_readme(stored_gpu()))
            print(f"{README.name}: {'written' if changed else 'up to date'}")
        if options.docs:
            changed = write(PERFORMANCE, "gpu", gpu_docs(stored_gpu()))
            print(f"{PERFORMANCE.name}: {'written' if changed else 'up to date'}")
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
