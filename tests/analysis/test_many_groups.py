"""Pages and figures of 2 to 20 configurations that differ in up to five keys, or by long names."""

from __future__ import annotations

import csv
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pwm_fast import compare as command
from pwm_fast.analysis import comparison, figures, legend
from pwm_fast.analysis.groups import LONGEST, MOST, arrange
from pwm_fast.analysis.options import Options
from pwm_fast.analysis.report import outputs
from pwm_fast.analysis.runs import Run, load
from tests.analysis.browser import OUTSIDE
from tests.analysis.conftest import write_run
from tests.analysis.test_page import BROWSER, Browser, browser  # noqa: F401

VALUES: dict[str, list[Any]] = {
    "alg__horizon": [8, 16, 32, 5, 24],
    "alg__gamma": [0.99, 0.95, 0.9, 0.97],
    "alg__world_model__units": [[512, 512], [256], [1024, 1024, 1024]],
    "alg__actor__lr": [3e-4, 1e-3],
    "num_envs": [64, 128, 32, 16, 8, 4, 2],
}
LONG = "pwm_5M_flow_with_a_rather_long_name_of_its_own"
# Groups, keys that they differ in, and algorithms that share them.
CASES = {
    "2 in five": (2, 5, ["pwm_tiny"]),
    "2 of long names": (2, 0, [LONG, f"{LONG}_too"]),
    "6 in five": (6, 5, ["pwm_tiny"]),
    "8 in one": (8, 1, ["pwm_tiny"]),
    "20 in five, of long names": (20, 5, [LONG, f"{LONG}_too"]),
}


def changes_of(index: int, keys: int) -> dict[str, Any]:
    """The same for no two, and each key takes several values."""
    if keys == 1:
        return {"num_envs": 2 + index}
    return {name: VALUES[name][index % len(VALUES[name])] for name in list(VALUES)[:keys]}


def write(top: Path, groups: int, keys: int, algs: list[str]) -> None:
    for index in range(groups):
        for seed in range(2):
            unfinished = {"epochs": 25, "status": None} if (index + seed) % 5 == 4 else {}
            write_run(
                top / f"g{index}" / f"seed_{seed}",
                algs[index * len(algs) // groups],
                seed,
                returns=lambda steps, i=index, s=seed: steps / (20.0 + i) - 9.0 * i + 5.0 * s,
                final=200.0 - 9.0 * index + 5.0 * seed,
                **unfinished,
                **changes_of(index, keys),
            )


@pytest.fixture(scope="module", params=CASES, ids=str)
def case(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, Path, dict[str, Any]]]:
    """A case's name, its directory of results, and its figures as they were drawn."""
    top = tmp_path_factory.mktemp("many")
    write(top / "runs", *CASES[request.param])
    drawn: dict[str, Any] = {}
    plain = figures._picture

    def kept(figure: Any, name: str, *rest: Any) -> Any:
        drawn[name] = figure
        return plain(figure, name, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "_picture", kept)
        patch.setattr(figures, "DPI", 40)  # the layout is in inches; drawing fewer dots is quicker
        comparison.compare(Options([str(top / "runs")], resamples=100), top / "out")
    yield request.param, top, drawn


@functools.cache
def environment(top: Path) -> Any:
    """Read once for all tests of a case: nothing writes to its runs."""
    runs = [load(path) for path in sorted((top / "runs").glob("*/*"))]
    [found], left_out = arrange([run for run in runs if isinstance(run, Run)])
    assert left_out == []
    return found


def test_labels_hide_nothing(case: tuple[str, Path, dict[str, Any]]) -> None:
    """Each has every key in which it differs from its namesakes; letters stand for long ones."""
    name, top, _ = case
    count, keys, algs = CASES[name]
    groups = environment(top).groups
    labels = [group.label for group in groups]
    assert len(groups) == len(set(labels)) == len({g.name for g in groups}) == count
    for group in groups:
        names = [part.split("=")[0] for part in group.label.split(", ")]
        assert names[0] in algs and "more" not in group.label
        assert len(names) == 1 + keys
    short = count <= MOST and all(len(label) <= LONGEST for label in labels)
    assert short == all(group.mark == "" for group in groups)
    entries = [legend.entry(environment(top), group) for group in groups]
    assert len(set(entries)) == count
    with outputs(top / "out")["groups"].open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {(r["configuration"], r["mark"]) for r in rows} == {(g.label, g.mark) for g in groups}


def test_terminal_names_every_label(
    case: tuple[str, Path, dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    _, top, _ = case
    monkeypatch.setattr(comparison, "draw_all", lambda *arguments: [])
    command.run([str(top / "runs"), "--out", str(top / "again"), "--resamples", "50"])
    shown = capsys.readouterr().out
    assert all(group.label in shown for group in environment(top).groups)


def test_figures_have_room(case: tuple[str, Path, dict[str, Any]]) -> None:
    """No legend over curves or beyond the edge, no axes squeezed, every group told apart."""
    name, _, drawn = case
    assert len(drawn) == 7
    for which, figure in drawn.items():
        figure.draw_without_rendering()  # places everything
        renderer = figure.canvas.get_renderer()
        whole = figure.bbox
        for axes in figure.axes:
            inside, box = axes.get_window_extent(renderer), axes.get_tightbbox(renderer)
            assert inside.width / figure.dpi > 2.4, f"{which}: {inside.width / figure.dpi:.2f} in"
            assert inside.height / figure.dpi > 1.8, f"{which}: {inside.height / figure.dpi:.2f} in"
            assert box.x0 > -1 and box.x1 < whole.x1 + 1, which
            assert axes.get_legend() is None
            for key in figure.legends:
                of_key = key.get_window_extent(renderer)
                assert of_key.y1 <= box.y0 + 1, which
        for key in figure.legends:
            of_key = key.get_window_extent(renderer)
            assert of_key.x0 > -1 and of_key.x1 < whole.x1 + 1 and of_key.y0 > -1, which
            texts = [text.get_text() for text in key.get_texts()]
            assert len(texts) == len(set(texts)) == CASES[name][0], which
        if which.startswith("return_over"):
            lines = figure.legends[0].get_lines()
            seen = {(line.get_color(), str(line._dash_pattern)) for line in lines}
            assert len(seen) == min(len(lines), len(legend.COLORS) * len(legend.DASHES))


def test_returns_share_their_axis(case: tuple[str, Path, dict[str, Any]]) -> None:
    _, _, drawn = case
    limits = [drawn[f"return_over_{x}"].axes[0].get_ylim() for x in ("steps", "time")]
    assert limits[0] == pytest.approx(limits[1])


@BROWSER
@pytest.mark.parametrize("width", [1280, 800])
def test_page_has_room(
    width: int,
    case: tuple[str, Path, dict[str, Any]],
    browser: Browser,  # noqa: F811
) -> None:
    """Nothing is wider than the window; only a table scrolls, in its frame, and none at 1280."""
    name, top, _ = case
    browser.open(outputs(top / "out")["page"], width)
    assert browser.value("document.documentElement.scrollWidth") <= width
    assert browser.value(OUTSIDE) == []
    overlapping = browser.value(
        "[...document.querySelectorAll('td, th')].filter(e => e.scrollWidth > e.clientWidth + 1)"
        ".map(e => e.textContent)"
    )
    assert overlapping == []
    if width == 1280 and CASES[name][0] <= 20:
        wide = browser.value(
            "[...document.querySelectorAll('.scroll')]"
            ".filter(e => e.scrollWidth > e.clientWidth + 1)"
            ".map(e => e.parentElement.querySelector('h3').textContent)"
        )
        assert set(wide) <= {"What the configurations differ in"}
    heads = browser.value(
        "[...document.querySelectorAll('section.card')]"
        ".filter(e => e.querySelector('h3')?.textContent == 'Result')"
        ".flatMap(e => [...e.querySelectorAll('tbody th')].map(t => t.textContent))"
    )
    assert len(heads) == len(set(heads)) == CASES[name][0]
    text = browser.value("document.body.innerText")
    for group in environment(top).groups:
        parts = [group.mark, group.alg] if group.mark else [group.label]
        assert all(part in text for part in parts)
