"""What tells configurations apart in a figure: lines, letters, and the legend below the axes."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from pwm_fast.analysis.groups import MOST, Environment, Group, plural, short_key, shown
from pwm_fast.analysis.runs import Run

# Okabe and Ito's colours, told apart by colour-blind people, without the pale yellow.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#333333")
# Of the groups whose colours were taken before: lengths of dashes and of gaps, in line widths.
DASHES: tuple[tuple[float, ...], ...] = ((), (6.0, 1.5), (3.0, 1.0, 1.0, 1.0), (1.0, 1.0))
SOME = (1.6, 2.4)  # dashes of what is of some runs alone, whatever the group's are
REFERENCE = "#777777"  # published curves
REFERENCE_DASHES: tuple[tuple[float, ...], ...] = ((4.0, 2.0), (1.0, 1.5), (6.0, 1.5, 1.0, 1.5))
CHARACTERS = 16  # of a legend's text, an inch


def color_of(index: int) -> str:
    """Colour of a group by its place."""
    return COLORS[index % len(COLORS)]


def dashes_of(index: int) -> tuple[float, ...]:
    """Dashes of a group's lines by its place; none for a solid line."""
    return DASHES[index // len(COLORS) % len(DASHES)]


def reference_dashes(index: int) -> tuple[float, ...]:
    """Dashes of a published curve's line by its place; its colour is no group's."""
    return REFERENCE_DASHES[index % len(REFERENCE_DASHES)]


def draw_line(axes: Any, x: Any, y: Any, group: Group, index: int, **named: Any) -> None:
    """Draw a group's line, with its letter on white discs where it has one."""
    color, dashes = color_of(index), (0, dashes_of(index) or None)
    if not group.mark:
        point = "o" if len(x) == 1 else None
        axes.plot(x, y, color=color, linestyle=dashes, linewidth=2.0, marker=point, **named)
        return
    # At other places than its neighbours', as shares of the axes' width.
    places = {"markevery": (0.04 + 0.037 * (index % 6), 0.22) if len(x) > 1 else 1}
    size = 5.5 + 3.0 * (len(group.mark) - 1)
    disc = {"marker": "o", "markersize": size + 2.5, "markerfacecolor": "white"}
    letter = {"marker": rf"$\mathbf{{{group.mark}}}$", "markersize": size, "linestyle": "none"}
    for style in ({"linestyle": dashes, "linewidth": 2.0, **disc}, letter):
        axes.plot(x, y, color=color, markeredgewidth=0.0, **style, **places)
    # What the legend shows: a piece of the line, then the letter in its text.
    axes.plot([], [], color=color, linestyle=dashes, linewidth=2.0, **named)


def count(runs: Sequence[Run]) -> str:
    """How many runs there are, and how many of them are not finished."""
    text = plural("run", len(runs))
    unfinished = sum(not run.finished for run in runs)
    return f"{text}, {unfinished} unfinished" if unfinished else text


def entry(environment: Environment, group: Group) -> str:
    """A group in a legend: its label, or its letter and the values of :func:`heading`."""
    if not group.mark:
        return group.label
    values = [shown(group.config.get(key)) for key in environment.keys]
    algs = [group.alg] if _has_algs(environment) or not values else []
    return f"{group.mark}:  {', '.join([*algs, *values])}"


def heading(environment: Environment) -> str:
    """What the values of a legend are of; empty where groups stand with their labels."""
    if not environment.marked:
        return ""
    algs = ["algorithm"] if _has_algs(environment) else []
    alone = "" if algs else f"{environment.groups[0].alg}, "
    return alone + ", ".join([*algs, *map(short_key, environment.keys)])


def place(figure: Any, lines: Sequence[Any], texts: Sequence[str], title: str) -> None:
    """Put a legend below the axes, in as many columns as there is room for, and make room for it.

    The axes keep the size that the figure was made for.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    width, height = figure.get_size_inches()
    renderer = FigureCanvasAgg(figure).get_renderer()
    size = "small" if len(texts) <= MOST else "x-small"
    most = int(CHARACTERS * width)
    wrapped = [
        "\n".join(textwrap.wrap(text, most - 8, subsequent_indent="     ")) for text in texts
    ]
    for columns in range(min(len(texts), 6), 0, -1):
        legend = figure.legend(
            lines,
            wrapped,
            title="\n".join(textwrap.wrap(title, most)) or None,
            loc="outside lower left",
            ncols=columns,
            fontsize=size,
            title_fontsize=size,
            alignment="left",
            frameon=False,
            handlelength=3.0 if any(line.get_linewidth() for line in lines) else 0.0,
            columnspacing=1.4,
            borderpad=0.2,
        )
        box = legend.get_window_extent(renderer)
        if box.width <= 0.93 * width * figure.dpi or columns == 1:  # beside the margins
            break
        legend.remove()
    figure.set_size_inches(width, height + box.height / figure.dpi)


def _has_algs(environment: Environment) -> bool:
    return len({group.alg for group in environment.groups}) > 1
