"""The page of a comparison: one HTML file with its figures inside, which asks no network.

``templates/comparison.html`` is the page; this module has what the template calls.
"""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Sequence

import jinja2
from markupsafe import Markup, escape

import pwm_fast
from pwm_fast.analysis.diagnosed import diagnosed
from pwm_fast.analysis.figures import Picture, how_to_read
from pwm_fast.analysis.groups import plural, short_key, shown
from pwm_fast.analysis.legend import REFERENCE, color_of, dashes_of, reference_dashes
from pwm_fast.analysis.measures import GRADIENTS, after_key, at_key, task_key
from pwm_fast.analysis.report import Report
from pwm_fast.analysis.runs import Run
from pwm_fast.analysis.statistics import Estimate, Interval

WIDE = 800  # figures of more pixels take the whole width
SHORT = 24  # characters of a label that is not broken
NONE = "–"


def render(report: Report, pictures: Sequence[Sequence[Picture]], made: str) -> str:
    """The page.

    Args:
        report: what to show.
        pictures: figures of every environment, in the report's order.
        made: when, for people.
    """
    return (
        _environment()
        .get_template("comparison.html")
        .render(
            report=report,
            shown_comparisons=list(zip(report.comparisons, pictures, strict=True)),
            runs=sum(len(c.environment.runs) for c in report.comparisons),
            configurations=sum(len(c.environment.groups) for c in report.comparisons),
            how_to_read=how_to_read(report.options.statistic),
            made=made,
        )
    )


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pwm_fast.analysis"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.globals.update(
        GRADIENTS=GRADIENTS,
        REFERENCE=REFERENCE,
        SHORT=SHORT,
        WIDE=WIDE,
        after_key=after_key,
        at_key=at_key,
        diagnosed=diagnosed,
        task_key=task_key,
        version=pwm_fast.__version__,
        zip=zip,
    )
    environment.filters.update(
        base64=lambda data: base64.b64encode(data).decode("ascii"),
        breakable=breakable,
        color=color_of,
        dashes=lambda index: " ".join(f"{2 * length:g}" for length in dashes_of(index)),
        final_return=final_return,
        finite=math.isfinite,
        how_far=how_far,
        interval=lambda bounds: None if bounds is None else Interval(*bounds),
        number=number,
        percent=percent,
        plural=plural,
        reference_dashes=lambda index: " ".join(f"{2 * n:g}" for n in reference_dashes(index)),
        scaled=scaled,
        short_key=short_key,
        shown=shown,
    )
    return environment


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


def breakable(text: str, after: str) -> Markup:
    """Text that may be broken behind some characters."""
    return Markup(re.sub(f"([{re.escape(after)}])", r"\1<wbr>", str(escape(text))))


def percent(e: Estimate) -> Estimate:
    """Shares as percentages."""
    return Estimate(e.n, 100 * e.mean, scaled(e.mean_interval), 100 * e.iqm, scaled(e.iqm_interval))


def scaled(interval: Interval | None) -> Interval | None:
    """An interval of shares as percentages."""
    return None if interval is None else Interval(100 * interval.low, 100 * interval.high)


def how_far(run: Run) -> str:
    """How far an unfinished run is."""
    return run.progress().removeprefix(run.status).replace(", ", "; ").strip()


def final_return(run: Run) -> str:
    """The return of a run's final evaluation, if there was one."""
    if not run.finished or run.final is None:
        return NONE
    mean, std = run.final["reward_mean"], run.final.get("reward_std")
    return number(mean) + (f" ± {number(std)}" if isinstance(std, (int, float)) else "")
