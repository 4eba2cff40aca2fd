"""Comparing runs of several tasks: each task's returns in tables, files and figures."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

from pwm_fast import compare as command
from pwm_fast.analysis import comparison, figures
from pwm_fast.analysis.groups import arrange
from pwm_fast.analysis.options import Options
from pwm_fast.analysis.report import make
from pwm_fast.analysis.runs import Run, load
from pwm_fast.data.task_names import MT30
from tests.analysis.conftest import write_run

TWO = {"walker-walk": 0.5, "cup-catch": 1.5}


def env_of(tasks: Any, **options: Any) -> dict[str, Any]:
    return {"name": "dmc_tasks", "tasks": list(tasks), "action_repeat": 2, **options}


def write(top: Path, tasks: dict[str, float], seeds: int = 2) -> Path:
    """A baseline that ends at 100 and a flow that ends at 200; the flow's last seed goes on."""
    for alg, final in (("pwm_tiny", 100.0), ("pwm_tiny_flow", 200.0)):
        for seed in range(seeds):
            last = alg == "pwm_tiny_flow" and seed == seeds - 1
            write_run(
                top / alg / str(seed),
                alg,
                seed,
                final=final + 10.0 * seed,
                returns=lambda steps, f=final: f * steps / 4000.0,
                env=env_of(tasks),
                success=None,
                tasks=tasks,
                **({"status": None, "epochs": 30} if last else {}),
            )
    return top


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    top = tmp_path_factory.mktemp("tasks")
    write(top / "runs", TWO)
    comparison.compare(Options([str(top / "runs")], resamples=100), top / "out")
    return top / "out"


def read(file: Path) -> list[dict[str, str]]:
    with file.open() as opened:
        return list(csv.DictReader(opened))


def test_tables(made: Path) -> None:
    runs = {(r["configuration"], r["seed"]): r for r in read(made / "runs.csv")}
    assert float(runs["pwm_tiny", "1"]["final_return/walker-walk"]) == 55.0
    assert float(runs["pwm_tiny", "1"]["final_return/cup-catch"]) == 165.0
    assert runs["pwm_tiny_flow", "1"]["final_return/cup-catch"] == "", "it goes on"
    assert float(runs["pwm_tiny_flow", "0"]["return_at_4000/cup-catch"]) == 300.0
    assert runs["pwm_tiny_flow", "1"]["return_at_4000/cup-catch"] == ""
    groups = {(g["configuration"], g["measure"]): g for g in read(made / "groups.csv")}
    of = groups["pwm_tiny", "final_return/walker-walk"]
    assert (float(of["mean"]), of["n"]) == (52.5, "2") and float(of["mean_low"]) == 50.0
    assert of["description"] == "return of the final evaluation, walker-walk"
    assert groups["pwm_tiny_flow", "final_return/cup-catch"]["n"] == "1"
    assert float(groups["pwm_tiny", "final_return"]["mean"]) == 105.0, "of all, as without tasks"


def test_page_and_figure(made: Path) -> None:
    page = (made / "comparison.html").read_text()
    table = page.partition("<h3>Tasks</h3>")[2].partition("</section>")[0]
    rows = [row.partition("</th>")[0] for row in table.split('<th scope="row">')[1:]]
    assert rows == list(TWO)
    assert "52.50" in table and "157.5" in table and "1 of 2 runs" in table
    assert "Return of each task" in page
    (figure,) = (made / "figures").glob("*_task_returns.png")
    assert figure.name == "dmc_tasks-2-walker_walk_cup_catch_task_returns.png"


def test_figure_of_thirty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each task has axes; what it is of fits into names of files and into the page."""
    drawn = {}
    plain = figures._picture

    def kept(figure: Any, name: str, *rest: Any) -> Any:
        drawn[name] = figure
        return plain(figure, name, *rest)

    monkeypatch.setattr(figures, "_picture", kept)
    monkeypatch.setattr(figures, "DPI", 40)
    write(tmp_path / "runs", {name: 1.0 + k for k, name in enumerate(MT30)}, seeds=1)
    (found,) = make(Options([str(tmp_path / "runs")], resamples=20)).comparisons
    figures._tasks(found, "iqm")
    axes = drawn["task_returns"].axes
    assert [a.get_title() for a in axes] == list(MT30)
    assert len({tuple(a.get_position().bounds) for a in axes}) == 30
    for k, own in enumerate(axes):
        highest = max(float(line.get_ydata().max()) for line in own.lines)
        assert highest == pytest.approx(150.0 * (1.0 + k)), "the flow's at epoch 30"
        assert own.get_legend() is None
    (legend,) = drawn["task_returns"].legends
    assert len(legend.get_texts()) == 2
    environment = found.environment
    assert ", tasks=30 such as walker-stand (" in environment.label
    assert len(environment.slug) < 60


def test_sets_of_tasks_are_environments_of_their_own(tmp_path: Path) -> None:
    """Also where they are too many to name, and begin alike."""
    sets = (MT30, MT30[:29], MT30[:2], MT30[1::-1], MT30[:1])
    for k, tasks in enumerate(sets):
        write_run(tmp_path / str(k), env=env_of(tasks), tasks=dict.fromkeys(tasks, 1.0))
    loaded = [run for run in map(load, sorted(tmp_path.iterdir())) if isinstance(run, Run)]
    environments, _ = arrange(loaded)
    assert len(environments) == 5
    assert len({e.slug for e in environments}) == len({e.label for e in environments}) == 5
    assert environments[2].label == "dmc_tasks (action_repeat=2, tasks=[walker-stand, walker-walk])"
    assert all(e.named("dmc_tasks") for e in environments)


def test_runs_of_one_task_are_as_they_were(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparison, "draw_all", lambda *_: [])
    one = {"name": "dmc", "domain": "cup", "task": "catch"}
    write_run(tmp_path / "runs" / "one", env=one, success=None)
    write_run(tmp_path / "runs" / "two", env=env_of(TWO), tasks=TWO, success=None)
    assert command.run([str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) == 0
    assert "The runs are of 2 environments" in capsys.readouterr().out
    by_env = {r["environment"]: r for r in read(tmp_path / "out" / "runs.csv")}
    assert by_env["dmc-cup-catch"]["final_return/cup-catch"] == ""
    assert by_env["dmc-cup-catch"]["final_return"] == "100.0"
    page = (tmp_path / "out" / "comparison.html").read_text()
    assert page.count("<h3>Tasks</h3>") == 1


def test_summaries_that_say_of_no_tasks(tmp_path: Path) -> None:
    """Damaged, or edited: the curves are there all the same."""
    run = write_run(tmp_path / "run", env=env_of(TWO), tasks=TWO, success=None)
    text = (run / "summary.json").read_text()
    for changed in ('"tasks": []', '"tasks": {"cup-catch": 5}', '"other": 0'):
        begin = text.index('"tasks"')
        (run / "summary.json").write_text(text[:begin] + changed + "}}")
        (found,) = make(Options([str(run)], resamples=20)).comparisons
        values = found.values[str(run)]
        assert values["final_return/cup-catch"] != values["final_return/cup-catch"]
        assert values["return_at_4000/cup-catch"] == 600.0
