"""Tables of a GPU run: what it says in the terminal, and what docs/performance.md says of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from bench.predictions import EPOCH_AIM, ESNR_MODEL, ESNR_SHARE, ROLLOUT_MODEL
from bench.providers import GRAPH, OURS
from bench.readings import ASSUMED
from bench.results import Group, Result, Row, Spread

NOT_MEASURED = "not measured"
PLAIN = ("tf32", "autocast", "graph", "compile", "compile_tf32", "compile_bf16", "compile_max")
BEST_16 = ("compile_bf16", "compile_max")
ALL_OURS = (*OURS, *(name + GRAPH for name in OURS))
SHOWN = ("first rollout", "rollout layouts", "actor update")  # readings that are no constants
OURS_16 = ("fast_fp16", "fast_bf16", "fast_fp16_graph", "fast_bf16_graph")


def milliseconds(row: Row | None) -> str:
    """The median, or why there is none."""
    if row is None:
        return NOT_MEASURED
    if row.status != "ok":
        return "out of memory" if row.status == "memory" else row.status
    return figure(Spread.of(row.seconds).p50 * 1e3)


def figure(x: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{x:.0f}" if x >= 100 else f"{x:.1f}" if x >= 10 else f"{x:.3g}"


def best(group: Group | None, names: Iterable[str]) -> Row | None:
    """The fastest of these providers; else one that says why there is none; else None."""
    if group is None:
        return None
    rows = [group.rows[name] for name in names if name in group.rows]
    measured = [row for row in rows if row.status == "ok"]
    if measured:
        return min(measured, key=lambda row: Spread.of(row.seconds).p50)
    worth = [row for row in rows if row.status in ("failed", "memory")]
    return (worth or rows or [None])[0]


def faster(slow: Row | None, fast: Row | None) -> str:
    """How many times; empty where one is not measured."""
    if slow is None or fast is None or slow.status != "ok" or fast.status != "ok":
        return ""
    return f"{Spread.of(slow.seconds).p50 / Spread.of(fast.seconds).p50:.2f}x"


def of_reading(reading: dict[str, Any], digits: int) -> str:
    """A figure with its unit, or in a word why there is none."""
    if reading["value"] is None:
        return str(reading.get("reason", NOT_MEASURED)).partition(":")[0]
    return f"{reading['value']:.{digits}g} {reading['unit']}"


# --- the end of a run ---------------------------------------------------------------------------

# What the aims are multiples of.
PEERS = {
    "compile_bf16": "torch.compile and a CUDA graph in 16 bit",
    "compile": "torch.compile in fp32",
    "published": "eager as published",
}


def first_lines(result: Result) -> list[str]:
    """The headline's ratios; then what was measured here, and what is still assumed."""
    dry = ["a dry run of tiny stand-ins: its figures say nothing"] * bool(result.gpu.get("dry"))
    return [*dry, _headline(result), *_sources(result)]


def _headline(result: Result) -> str:
    title = "actor's loss and gradient, 5M_flow, batch 128, K 4, H 16"
    group = _group(result, "rollout-5M_flow-b128-K4-backward")
    ours = best(group, OURS_16)
    if group is None or ours is None or ours.status != "ok":
        return f"headline, {title}: {milliseconds(ours)}"
    ratios = []
    for name, text in PEERS.items():
        row, ratio = group.rows.get(name), faster(group.rows.get(name), ours)
        found = f"{milliseconds(row)} ms, {ratio}" if ratio else milliseconds(row)
        ratios.append(f"{text} {found}")
    ours_text = f"{ours.provider} {milliseconds(ours)} ms"
    return f"headline, {title}: {ours_text}; {'; '.join(ratios)}"


def _sources(result: Result) -> list[str]:
    software = result.facts["software"]
    machine = result.facts["machine"]["gpu"] or result.facts["machine"]["cpu"]
    rows = [row for group in result.groups.values() for row in group.rows.values()]
    count = sum(row.status == "ok" for row in rows)
    known = {r["name"] for r in headline(result) if r["value"] is not None and "replaces" in r}
    assumed = [name for name in ASSUMED if name not in known]
    lines = [
        f"measured: {count} times on {machine}, torch {software['torch']}, Triton "
        f"{software['triton']}, and {len(known)} of the cost model's {len(ASSUMED)} constants",
        f"assumed: {len(assumed)} constants{': ' * bool(assumed)}{'; '.join(assumed)}",
    ]
    compiled = result.gpu.get("compiled")
    if compiled is not None:
        names = [f"{name} {n}" for name, n in compiled["names"].items()]
        lines.append(
            f"Triton's cache: {compiled['cached']} kernels taken from it; compiled where it was "
            f"measured: {sum(compiled['names'].values())}{': ' * bool(names)}{', '.join(names)}"
        )
    return lines


def short(result: Result) -> str:
    """The headline, stages, what was read, what failed, and last a line a case."""
    lines = [*first_lines(result), "", f"{'stage':9} {'status':8} {'s':>5}"]
    for name, stage in result.gpu.get("stages", {}).items():
        lines.append(f"{name:9} {stage['status']:8} {stage['seconds']:5.0f}  {stage['detail']}")
    lines.append("")
    for reading in headline(result):
        model = ASSUMED[reading["name"]]
        text = f"{of_reading(reading, 4)} (model: {model.value:g} {model.unit})"
        lines.append(f"{reading['name']}: {text}")
    for name in SHOWN:
        for reading in result.gpu.get("micro", {}).get(name, ()):
            lines.append(f"{reading['name']}: {of_reading(reading, 4)}".rstrip())
    messages = [
        f"failed: {name}: {text}"
        for name, found in result.gpu.get("tests", {}).items()
        for text in found["messages"]
    ]
    constants = [
        f"failed: {reading['name']}: {reading['reason'].removeprefix('failed: ')}"
        for readings in result.gpu.get("micro", {}).values()
        for reading in readings
        if reading.get("reason", "").startswith("failed")
    ]
    failed = [
        f"failed: {group.name}, {row.provider}: {row.reason}"
        for group in result.groups.values()
        for row in group.rows.values()
        if row.status == "failed"
    ]
    lines += [*messages[:10], *constants[:20], *failed[:20], ""]
    lines.append(_line("case (ms)", "eager", "best plain", "best ours", "floor", "gain", "by"))
    for group in result.groups.values():
        slow, ours = group.rows.get("published"), best(group, ALL_OURS)
        plain = best(group, PLAIN)
        bottom = best(group, ("floor_bf16", "floor"))
        by = ours.provider if ours is not None and ours.status == "ok" else ""
        gain = faster(plain if plain is not None else slow, ours)
        cells = [milliseconds(row) for row in (slow, plain, ours, bottom)]
        lines.append(_line(group.name, *cells, gain, by))
    return "\n".join(lines)


def _line(name: str, *cells: str) -> str:
    widths = (13, 13, 13, 13, 7, 16)
    return f"{name:34}" + " ".join(c.rjust(w) for c, w in zip(cells, widths, strict=True))


def headline(result: Result) -> list[dict[str, Any]]:
    """The readings that replace an assumption."""
    return [
        reading
        for readings in result.gpu.get("micro", {}).values()
        for reading in readings
        if reading["name"] in ASSUMED
    ]


# --- predicted and measured ---------------------------------------------------------------------


def comparison(result: Result | None) -> str:
    """Markdown: the model's figures beside those of a result, or beside "not measured"."""
    return "\n\n".join([_rollouts(result), _esnr(result), _epoch(result)])


def _rollouts(result: Result | None) -> str:
    lines = [
        "| rollout, forward and backward, H = 16 (ms) | eager fp32: model | measured "
        "| compile + graph, tf32: model | measured | the same, 16 bit: model | measured "
        "| pwm_fast, 16 bit: model | measured |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for (model, batch, substeps), values in ROLLOUT_MODEL.items():
        group = _group(result, f"rollout-{model}_flow-b{batch}-K{substeps}-backward")
        rows = (("published",), ("compile_tf32",), BEST_16, OURS_16)
        cells = [f"{model}, batch {batch}, K {substeps}"]
        for value, names in zip(values, rows, strict=True):
            cells += ["" if value is None else f"{value:g}", milliseconds(best(group, names))]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _esnr(result: Result | None) -> str:
    lines = ["| ESNR (ms) | model: floor | aim | measured | one read of the samples |"]
    lines.append("|---|---|---|---|---|")
    for (model, samples), value in ESNR_MODEL.items():
        group = _group(result, f"esnr-{model}-M{samples}")
        ours, floor = best(group, ("fast", "fast_graph")), best(group, ("floor",))
        lines.append(
            f"| {model}, M {samples} | {value:g} | {figure(ESNR_SHARE * value)} "
            f"| {milliseconds(ours)} | {milliseconds(floor)} |"
        )
    return "\n".join(lines)


def _epoch(result: Result | None) -> str:
    group = _group(result, "updates-5M")
    return (
        "| updates of an epoch, `pwm_5M_flow`, K = 2 (ms) | aim | measured | eager, flow "
        "| eager, baseline |\n|---|---|---|---|---|\n"
        f"| 8 of the world model, 1 of the actor, 32 of the critics | {EPOCH_AIM:g} "
        f"| {milliseconds(best(group, ALL_OURS))} | {milliseconds(best(group, ('published',)))} "
        f"| {milliseconds(best(group, ('published_baseline',)))} |"
    )


def figures(result: Result) -> str:
    """Markdown: what users ask for first, of the cases that were measured."""
    lines = [
        "| forward and backward, H = 16 (ms) | eager fp32 as published | best torch.compile "
        "| pwm_fast, 16 bit | faster than that compile |",
        "|---|---|---|---|---|",
    ]
    for model, batch, substeps in ROLLOUT_MODEL:
        group = _group(result, f"rollout-{model}_flow-b{batch}-K{substeps}-backward")
        if group is None:
            continue
        plain, ours = best(group, ("compile_tf32", *BEST_16)), best(group, OURS_16)
        cells = [milliseconds(row) for row in (group.rows.get("published"), plain, ours)]
        name = f"rollout of {model}_flow, batch {batch}, K {substeps}"
        lines.append(f"| {name} | {' | '.join(cells)} | {faster(plain, ours)} |")
    return "\n".join(lines)


def _group(result: Result | None, name: str) -> Group | None:
    return None if result is None else result.groups.get(name)


def newest(found: Sequence[Result]) -> Result | None:
    """Of stored GPU runs that were no dry ones the newest with most cases."""
    real = [r for r in found if r.facts["machine"]["gpu"] and not r.gpu.get("dry")]
    return max(real, key=lambda r: (len(r.groups), str(r.facts["date"])), default=None)
