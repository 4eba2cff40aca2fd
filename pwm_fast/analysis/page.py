"""The page of a comparison: one HTML file with its figures inside, which asks no network."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import pwm_fast
from pwm_fast.analysis.elements import (
    badge,
    breakable,
    card,
    cell,
    figure_card,
    final_of,
    group_table,
    heading,
    id_of,
    iqm_cell,
    label_of,
    mean_cell,
    path_of,
    percent,
    plural,
    reached,
    row_head,
    scaled,
    seeds,
    swatch,
    table,
    value_cell,
)
from pwm_fast.analysis.elements import number as _number
from pwm_fast.analysis.figures import Picture, how_to_read
from pwm_fast.analysis.groups import Environment, short_key
from pwm_fast.analysis.measures import GRADIENTS, Comparison, at_key
from pwm_fast.analysis.report import Report
from pwm_fast.analysis.style import CSS

# Nothing is fetched or run, whatever the text of a run directory says.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def render(report: Report, pictures: Sequence[Sequence[Picture]], made: str) -> str:
    """The page.

    Args:
        report: what to show.
        pictures: figures of every environment, in the report's order.
        made: when, for people.
    """
    runs = sum(len(c.environment.runs) for c in report.comparisons)
    parts = [
        f"<h1>{escape(report.title)}</h1>",
        f'<p class="lead">{runs} runs in '
        f"{sum(len(c.environment.groups) for c in report.comparisons)} configurations and "
        f"{len(report.comparisons)} {plural('environment', len(report.comparisons))}. "
        f"Made on {escape(made)} by pwm_fast {escape(pwm_fast.__version__)}.</p>",
        _contents(report),
        _mind(report.notes),
    ]
    if report.scores:
        parts.append(_scores(report))
    for comparison, figures in zip(report.comparisons, pictures, strict=True):
        parts.append(_environment(comparison, figures, report.options.statistic))
    parts += [_left_out(report), _method(report)]
    return _document(report.title, "\n".join(part for part in parts if part))


def _document(title: str, body: str) -> str:
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n{body}\n"
        "</body>\n</html>\n"
    )


# --- parts of the page ----------------------------------------------------------------------------


def _contents(report: Report) -> str:
    links = [("#across", "All environments")] if report.scores else []
    links += [
        (f"#{id_of(c.environment)}", c.environment.label)
        for c in report.comparisons
        if len(report.comparisons) > 1
    ]
    links += [("#left-out", "Runs left out")] if report.left_out else []
    links.append(("#method", "How the numbers are made"))
    return (
        "<nav>" + "".join(f'<a href="{href}">{escape(text)}</a>' for href, text in links) + "</nav>"
    )


def _mind(notes: Sequence[str]) -> str:
    if not notes:
        return ""
    items = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return f'<section class="card mind"><h3>Notes</h3><ul>{items}</ul></section>'


def _environment(comparison: Comparison, pictures: Sequence[Picture], statistic: str) -> str:
    environment = comparison.environment
    sections = [
        _configurations(environment) + _results(comparison),
        _improvements(comparison),
        _efficiency(comparison),
        _times(comparison),
        _gradients(comparison),
    ]
    return (
        f'<h2 id="{id_of(environment)}">{escape(environment.label)}</h2>'
        f'<p class="lead">{len(environment.runs)} '
        f"{plural('run', len(environment.runs))} in {len(environment.groups)} "
        f"{plural('configuration', len(environment.groups))}.</p>"
        + "".join(sections[:1])
        + f'<p class="note">{escape(how_to_read(statistic))}</p>'
        + f'<div class="figures">{"".join(map(figure_card, pictures))}</div>'
        + "".join(sections[1:])
        + _runs(comparison)
        + _differences(environment)
    )


def _configurations(environment: Environment) -> str:
    """What the letters stand for; nothing where labels are short enough to stand everywhere."""
    if not environment.marked:
        return ""
    head = "<tr>" + heading("configuration", "", True)
    keys = (breakable(short_key(key), "._") for key in environment.keys)
    head += "".join(f'<th class="text">{key}</th>' for key in keys) + "</tr>"
    rows = [
        f"<tr>{row_head(i, group)}"
        + "".join(value_cell(group.config.get(key)) for key in environment.keys)
        + "</tr>"
        for i, group in enumerate(environment.groups)
    ]
    note = "A letter stands for each. The columns are what those of one algorithm differ in."
    return card("Configurations", note, table(head, rows))


def _results(comparison: Comparison) -> str:
    measure = comparison.primary
    has_success = any(e["final_success"].n for e in comparison.estimates)
    head = [
        ("seeds", ""),
        (f"{measure.label}, IQM", measure.unit),
        (f"{measure.label}, mean", measure.unit),
        ("area under the curve, IQM", "return"),
    ]
    if has_success:
        head.append(("goal held in the final evaluation, mean", "% of episodes"))
    rows = []
    for group, e in zip(comparison.environment.groups, comparison.estimates, strict=True):
        n = len(group.runs)
        row = [
            seeds(group),
            iqm_cell(e[measure.key], n),
            mean_cell(e[measure.key], n),
            iqm_cell(e["auc"], n),
        ]
        rows.append([*row, mean_cell(percent(e["final_success"]), n, 1)] if has_success else row)
    note = (
        "IQM: interquartile mean over seeds. Below each number its 95 % confidence interval. The "
        "area under the curve is the mean return "
        f"from 0 to {comparison.budget:,.0f} environment steps: it rewards learning early."
    )
    return card("Result", note, group_table(comparison, head, rows))


def _improvements(comparison: Comparison) -> str:
    found = comparison.improvements()
    if not found:
        return ""
    if len(found) > 15:
        note = f"Not shown of {len(found)} pairs; up to six configurations are compared in pairs."
        return card("Probability of improvement", note, "")
    rows = [
        f'<tr><th scope="row">{escape(first)}</th><td class="text">{escape(second)}</td>'
        f"<td>{cell(100 * probability, scaled(interval), digits=0)}</td></tr>"
        for first, second, probability, interval in found
    ]
    head = (
        '<tr><th class="text">a run of</th><th class="text">is better than one of</th>'
        "<th>probability<span class=unit>%</span></th></tr>"
    )
    note = (
        f"Share of the pairs of runs in which the first has the higher {comparison.primary.label}; "
        "50 % is no difference. An interval that holds 50 % does not tell the two apart."
    )
    return card("Probability of improvement", note, table(head, rows))


def _efficiency(comparison: Comparison) -> str:
    head = [(f"{steps:,.0f}", "environment steps") for steps in comparison.steps]
    rows = [
        [iqm_cell(e[at_key(steps)], len(group.runs)) for steps in comparison.steps]
        for group, e in zip(comparison.environment.groups, comparison.estimates, strict=True)
    ]
    note = (
        "Return at fixed environment steps: IQM over the runs that got there, "
        "between two evaluations by the line through both."
    )
    return card("Sample efficiency", note, group_table(comparison, head, rows))


def _times(comparison: Comparison) -> str:
    head = [("time of finished runs, mean", "s"), ("throughput, mean", "environment steps/s")]
    rows = [
        [
            mean_cell(e["finished_wall_time"], len(group.runs), 0),
            mean_cell(e["throughput"], len(group.runs)),
        ]
        for group, e in zip(comparison.environment.groups, comparison.estimates, strict=True)
    ]
    note = (
        "Throughput is the median over the epochs of a run that learned; the wall-clock "
        "time includes evaluations. Both depend on the machine and on what else ran there."
    )
    if comparison.target is None:
        note += " With --target RETURN the time to that return stands here, too."
        return card("Time", note, group_table(comparison, head, rows))
    target = _number(comparison.target)
    head += [
        (f"reached {target}", "runs"),
        (f"time to {target}, median", "s"),
        (f"steps to {target}, median", "environment steps"),
    ]
    for row, reach in zip(rows, comparison.reaches, strict=True):
        spread = (
            f'<span class="ci">{_number(reach.least_seconds, 0)} to '
            f"{_number(reach.most_seconds, 0)}</span>"
            if reach.reached > 1
            else ""
        )
        row += [
            f"{reach.reached} of {reach.runs}",
            reached(reach.seconds, 0) + spread,
            reached(reach.steps, 0),
        ]
    note += (
        f" A run has reached {target} at its first evaluation there or above. Runs "
        "that never did count as infinitely slow in the median; below it, the fastest and the "
        "slowest of those that did."
    )
    return card("Time", note, group_table(comparison, head, rows))


def _gradients(comparison: Comparison) -> str:
    keys = [k for k in GRADIENTS if any(e[k].n for e in comparison.estimates)]
    head = [("ESNR of the actor's gradient", "dB")]
    head += [(f"gradient norm, {GRADIENTS[key]}", "before clipping") for key in keys]
    head.append(("skipped updates", "non-finite"))
    rows = [
        [mean_cell(e[key], len(group.runs)) for key in ("esnr_db", *keys, "skipped_updates")]
        for group, e in zip(comparison.environment.groups, comparison.estimates, strict=True)
    ]
    note = "Median over each run, then the mean over runs; skipped updates: all of a run."
    return card("Gradients", note, group_table(comparison, head, rows))


def _runs(comparison: Comparison) -> str:
    has_success = any(e["final_success"].n for e in comparison.estimates)
    columns = [
        ("configuration", "", True),
        ("seed", "", False),
        ("status", "", True),
        ("steps", "environment steps", False),
        ("final return", "mean ± std of episodes", False),
        ("last evaluation", "return", False),
        ("best evaluation", "return", False),
        *([("goal held", "%", False)] if has_success else []),
        ("time", "s", False),
        ("directory", "", True),
    ]
    head = "<tr>" + "".join(heading(*column) for column in columns) + "</tr>"
    rows = []
    for index, group in enumerate(comparison.environment.groups):
        for run in group.runs:
            values = comparison.values[str(run.path)]
            cells = [
                str(run.seed),
                badge(run),
                f"{run.env_steps:,}",
                f'<span class="whole">{final_of(run)}</span>',
                _number(values["last_return"]),
                _number(values["best_return"]),
                *([_number(100 * values["final_success"], 0)] if has_success else []),
                _number(values["wall_time"], 0),
                f'<code class="path">{path_of(run.path)}</code>',
            ]
            text = {1, len(cells) - 1}
            rows.append(
                f"<tr>{row_head(index, group)}"
                + "".join(
                    f'<td class="text">{cell}</td>' if i in text else f"<td>{cell}</td>"
                    for i, cell in enumerate(cells)
                )
                + "</tr>"
            )
    return card("Runs", "", table(head, rows))


def _differences(environment: Environment) -> str:
    found = environment.differences()
    if not found:
        return ""
    head = (
        '<tr><th class="text">key</th>'
        + "".join(
            f'<th class="text"><span class="key">{swatch(i, g)}{label_of(g, alg=False)}</span></th>'
            for i, g in enumerate(environment.groups)
        )
        + "</tr>"
    )
    rows = [
        f'<tr><th scope="row"><code>{escape(key)}</code></th>'
        + "".join(map(value_cell, values))
        + "</tr>"
        for key, values in found.items()
    ]
    note = "Every key of the configuration in which they are not all equal."
    return card("What the configurations differ in", note, table(head, rows))


def _scores(report: Report) -> str:
    head = (
        '<tr><th class="text">configuration</th><th>runs<span class="unit">per environment</span>'
        "</th><th>score, interquartile mean</th><th>score, mean</th></tr>"
    )
    rows = [
        f'<tr><th scope="row">{escape(s.label)}</th><td>{", ".join(map(str, s.runs))}</td>'
        f"<td>{iqm_cell(s.estimate, s.estimate.n, 3)}</td>"
        f"<td>{mean_cell(s.estimate, s.estimate.n, 3)}</td>"
        "</tr>"
        for s in report.scores
    ]
    references = "; ".join(
        f"{name}: {low:g} and {high:g}" for name, (low, high) in report.options.references.items()
    )
    note = (
        f"Over {', '.join(report.scored)}. A score is a return on a scale with 0 and 1 at "
        f"{references}. All runs of all environments are pooled; the bootstrap draws runs anew "
        "within each environment."
    )
    return '<h2 id="across">All environments</h2>' + card("Scores", note, table(head, rows))


def _left_out(report: Report) -> str:
    if not report.left_out:
        return ""
    head = '<tr><th class="text">directory</th><th class="text">why</th></tr>'
    rows = [
        f'<tr><td class="text"><code>{path_of(item.path)}</code></td>'
        f'<td class="text">{escape(item.reason)}</td></tr>'
        for item in report.left_out
    ]
    return '<h2 id="left-out">Runs left out</h2>' + card("Not compared", "", table(head, rows))


def _method(report: Report) -> str:
    return (
        '<h2 id="method">How the numbers are made</h2><section class="card">'
        "<p>Runs belong to one configuration if they differ in nothing but the seed and in keys "
        "that do not change what is learnt (run directory, device, threads, checkpoints, "
        "evaluations, logging). Returns are undiscounted sums of the environment's rewards over "
        "real episodes of the deterministic policy.</p>"
        "<p>The interquartile mean is the mean without the lowest and the highest quarter of the "
        "runs (whole runs are cut: of four runs one at each end, of fewer none). Confidence "
        "intervals are the 2.5th and the 97.5th percentile of "
        f"{report.options.resamples:,} bootstrap resamples of the runs, each configuration in "
        "each environment being a stratum of its own; bands of curves resample whole runs. "
        "They speak of the spread between seeds alone. Agarwal et al., "
        "<i>Deep Reinforcement Learning at the Edge of the Statistical Precipice</i>, "
        "arXiv 2108.13264.</p>"
        "<p>The budget is the number of environment steps up to which all finished runs of the "
        "environment were evaluated (all runs, where none has finished).</p></section>"
    )
