"""Parts of the comparison's page: tables, cells, and text for people."""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path

from pwm_fast.analysis.figures import Picture
from pwm_fast.analysis.groups import Environment, Group, shown
from pwm_fast.analysis.legend import color_of, dashes_of
from pwm_fast.analysis.measures import Comparison
from pwm_fast.analysis.runs import Run
from pwm_fast.analysis.statistics import Estimate, Interval

WIDE = 800  # figures of more pixels take the whole width
NONE = "–"
SHORT = 24  # characters of a label that is not broken


def figure_card(picture: Picture) -> str:
    """A figure with its heading and caption, inside the page."""
    data = base64.b64encode(picture.png).decode("ascii")
    wide = " wide" if picture.width > WIDE else ""
    return (
        f'<figure class="card{wide}"><h3>{escape(picture.title)}</h3>'
        f'<img src="data:image/png;base64,{data}" alt="{escape(picture.title)}" '
        f'width="{picture.width}" height="{picture.height}">'
        f"<figcaption>{escape(picture.caption)}</figcaption></figure>"
    )


def card(title: str, note: str, content: str) -> str:
    """A section with a heading, a note and what it is about."""
    text = f'<p class="note">{escape(note)}</p>' if note else ""
    return f'<section class="card"><h3>{escape(title)}</h3>{text}{content}</section>'


def table(head: str, rows: Sequence[str]) -> str:
    """A table that scrolls within its own frame where it is wide."""
    return (
        f'<div class="scroll"><table><thead>{head}</thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def group_table(
    comparison: Comparison, head: Sequence[tuple[str, str]], rows: Sequence[Sequence[str]]
) -> str:
    """One row a group; headings with their units."""
    top = "<tr>" + heading("configuration", "", True)
    top += "".join(heading(label, unit, False) for label, unit in head) + "</tr>"
    body = [
        f"<tr>{row_head(i, group)}" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
        for i, (group, cells) in enumerate(zip(comparison.environment.groups, rows, strict=True))
    ]
    return table(top, body)


def heading(label: str, unit: str, text: bool) -> str:
    """A column's heading, with its unit below it."""
    shown = f'<span class="unit">{escape(unit)}</span>' if unit else ""
    kind = ' class="text"' if text else ""
    return f"<th{kind}>{escape(label)}{shown}</th>"


def row_head(index: int, group: Group) -> str:
    """A group at the head of its row."""
    key = f'<span class="key" title="{escape(group.label)}">{swatch(index, group)}'
    key += label_of(group)
    return f'<th scope="row">{key}</span></th>'


def label_of(group: Group, *, alg: bool = True) -> str:
    """On one line, unless it is long; behind a letter only the algorithm's name."""
    if group.mark and not alg:
        return f'<span class="whole">{group.mark}</span>'
    text = f"{group.mark} {group.alg}" if group.mark else group.label
    kind = "whole" if len(text) <= SHORT else "long"
    return f'<span class="{kind}">{escape(text)}</span>'


def swatch(index: int, group: Group) -> str:
    """A dot, or a piece of the group's line where several lines have one colour."""
    color = color_of(index)
    if not group.mark:
        return f'<span class="swatch" style="background:{color}"></span>'
    dashes = " ".join(f"{2 * length:g}" for length in dashes_of(index))
    return (
        '<svg class="line" viewBox="0 0 26 8" width="26" height="8" aria-hidden="true">'
        f'<path d="M0 4H26" stroke="{color}" stroke-width="2.6" stroke-dasharray="{dashes}">'
        "</path></svg>"
    )


def badge(run: Run) -> str:
    """A run's status."""
    kind = "badge" if run.finished else "badge open"
    detail = "" if run.finished else f'<span class="detail">{escape(_detail(run))}</span>'
    return f'<span class="{kind}">{escape(run.status)}</span>{detail}'


def _detail(run: Run) -> str:
    """How far an unfinished run is."""
    return run.progress().removeprefix(run.status).replace(", ", "; ").strip()


def seeds(group: Group) -> str:
    """How many runs a group has, and of which seeds if these are few."""
    shown = ", ".join(str(run.seed) for run in group.runs)
    return f"{len(group.runs)}<span class=ci>{shown if len(shown) < 16 else ''}</span>"


def iqm_cell(e: Estimate, runs: int, digits: int | None = None) -> str:
    """The interquartile mean of :func:`cell`."""
    return cell(e.iqm, e.iqm_interval, e.n, runs, digits)


def mean_cell(e: Estimate, runs: int, digits: int | None = None) -> str:
    """The mean of :func:`cell`."""
    return cell(e.mean, e.mean_interval, e.n, runs, digits)


def cell(
    value: float,
    interval: Interval | None,
    n: int = 0,
    runs: int = 0,
    digits: int | None = None,
) -> str:
    """A number, its interval below it, and how many runs have it where that is not all."""
    if math.isnan(value):
        return NONE
    text = number(value, digits)
    if interval is not None:
        text += (
            f'<span class="ci">[{number(interval.low, digits)}, '
            f"{number(interval.high, digits)}]</span>"
        )
    if n < runs:
        text += f'<span class="ci">{n} of {runs} runs</span>'
    return text


def percent(e: Estimate) -> Estimate:
    """Shares as percentages."""
    return Estimate(e.n, 100 * e.mean, scaled(e.mean_interval), 100 * e.iqm, scaled(e.iqm_interval))


def scaled(interval: Interval | None) -> Interval | None:
    """An interval of shares as percentages."""
    return None if interval is None else Interval(100 * interval.low, 100 * interval.high)


def final_of(run: Run) -> str:
    """The return of a run's final evaluation, if there was one."""
    if not run.finished or run.final is None:
        return NONE
    mean, std = run.final["reward_mean"], run.final.get("reward_std")
    return number(mean) + (f" ± {number(std)}" if isinstance(std, (int, float)) else "")


def reached(value: float, digits: int) -> str:
    """A time or a number of steps, or that there is none."""
    return number(value, digits) if math.isfinite(value) else "not reached"


def number(value: float, digits: int | None = None) -> str:
    """A number for people: about four significant digits, a true minus sign."""
    if not math.isfinite(value):
        return NONE
    if value == 0:
        return "0"
    if digits is None:
        size = abs(value)
        digits = 0 if size >= 1000 else 1 if size >= 100 else 2 if size >= 1 else 3
        if 0 < size < 0.001:
            return f"{value:.1e}".replace("-", "−")
    text = f"{value:,.{digits}f}"
    return text.replace("-", "−" if float(text.replace(",", "")) else "")


def value_cell(value: object) -> str:
    """A cell with a value of the configuration."""
    return f'<td class="text value"><code>{breakable(shown(value), ",")}</code></td>'


def breakable(text: str, after: str) -> str:
    """Text that may be broken behind some characters."""
    return re.sub(f"([{re.escape(after)}])", r"\1<wbr>", escape(text, quote=False))


def path_of(path: Path) -> str:
    """A path that may be broken after its slashes."""
    return breakable(str(path), "/")


def plural(noun: str, count: int) -> str:
    """A noun of so many."""
    return noun if count == 1 else f"{noun}s"


def id_of(environment: Environment) -> str:
    """What links to an environment lead to."""
    return f"env-{environment.slug}"
