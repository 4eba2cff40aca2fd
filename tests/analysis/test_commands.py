"""compare and plot as a user meets them."""

from __future__ import annotations

import csv
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from pwm_fast import cli, plot
from pwm_fast import compare as command
from pwm_fast.analysis import comparison
from tests.analysis.conftest import write_run

PNG = b"\x89PNG\r\n\x1a\n"


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def fails(run: Any, arguments: list[str], capsys: pytest.CaptureFixture) -> str:
    """The one line that a wrong command line gives."""
    with pytest.raises(SystemExit) as stopped:
        cli.plain(lambda: run(arguments))
    assert stopped.value.code == 2
    shown = capsys.readouterr()
    assert shown.out == "" and len(shown.err.splitlines()) == 1, shown
    assert shown.err.startswith("error: ")
    return str(shown.err)


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take the longest; test_compare and the page's tests have them."""
    monkeypatch.setattr(comparison, "draw_all", lambda *arguments: [])


# --- compare --------------------------------------------------------------------------------------


def test_compare(study: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "made" / "here"
    arguments = [str(study / "runs"), "--out", str(out), "--target", "70", "--resamples", "500"]
    assert command.run(arguments) == 0
    shown = capsys.readouterr().out
    assert "pwm_tiny_flow  interquartile mean 110.0 [" in shown
    assert "(3 runs of 4)" in shown
    assert f"left out: {study}/runs/no_config: config.yaml is missing" in shown
    assert "note: pwm_tiny_flow: 1 run of 4 not finished (seed 3" in shown
    assert {p.name for p in out.iterdir()} == {
        "comparison.html",
        "runs.csv",
        "groups.csv",
        "figures",
    }
    figures = list((out / "figures").iterdir())
    assert {p.name.removeprefix("cartpole-hanging_") for p in figures} == {
        "return_over_steps.png",
        "return_over_time.png",
        "final_return.png",
        "success_over_steps.png",
        "esnr.png",
        "throughput.png",
        "gradient_norms.png",
    }
    assert all(p.read_bytes().startswith(PNG) for p in figures)


@pytest.mark.usefixtures("no_figures")
def test_csv(study: Path, tmp_path: Path) -> None:
    command.run([str(study / "runs"), "--out", str(tmp_path), "--target", "70"])
    runs = read(tmp_path / "runs.csv")
    assert len(runs) == 8
    [unfinished] = [r for r in runs if r["status"] != "finished"]
    assert unfinished["configuration"] == "pwm_tiny_flow" and unfinished["seed"] == "3"
    assert unfinished["final_return"] == "" and unfinished["return_at_4000"] == ""
    assert (unfinished["epochs"], unfinished["epochs_planned"]) == ("22", "40")
    assert unfinished["run_dir"] == str(study / "runs/flow/seed_3")
    first = next(r for r in runs if r["configuration"] == "pwm_tiny")
    assert float(first["final_return"]) == 40.0 and float(first["auc"]) == pytest.approx(20.0)
    groups = read(tmp_path / "groups.csv")
    by_key = {(g["configuration"], g["measure"]): g for g in groups}
    assert len(by_key) == len(groups)
    flow = by_key["pwm_tiny_flow", "final_return"]
    assert (flow["runs"], flow["finished"], flow["n"], float(flow["mean"])) == (
        "4",
        "3",
        "3",
        110.0,
    )
    assert float(flow["mean_low"]) == 100.0 and float(flow["mean_high"]) == 120.0
    assert by_key["pwm_tiny", "throughput"]["unit"] == "environment steps/s"
    assert by_key["pwm_tiny", "seconds_to_target"]["n"] == "1"


@pytest.mark.usefixtures("no_figures")
def test_single_seed_has_no_interval(
    tmp_path: Path, capsys: pytest.CaptureFixture, study: Path
) -> None:
    command.run([str(study / "runs/flow/seed_0"), "--out", str(tmp_path)])
    [row] = [g for g in read(tmp_path / "groups.csv") if g["measure"] == "final_return"]
    assert row["mean"] == row["iqm"] == "100.0"
    assert row["mean_low"] == row["mean_high"] == row["iqm_low"] == row["iqm_high"] == ""
    assert "note: A single seed, so no interval: pwm_tiny_flow." in capsys.readouterr().out


@pytest.mark.usefixtures("no_figures")
def test_environments_are_kept_apart(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for name, final in (("ant", 10.0), ("hopper", 1000.0)):
        for seed in range(2):
            path = tmp_path / "runs" / name / str(seed)
            write_run(path, seed=seed, env={"name": name}, final=final + seed, success=None)
    common = [str(tmp_path / "runs"), "--out", str(tmp_path / "out")]
    scores = ["--score", "ant=0:10", "--score", "hopper=0:1000"]
    assert command.run([*common, "--target", "ant=30", "--target", "200", *scores]) == 0
    assert "note: The runs are of 2 environments" in capsys.readouterr().out
    groups = {(g["environment"], g["measure"]): g for g in read(tmp_path / "out" / "groups.csv")}
    assert float(groups["ant", "final_return"]["mean"]) == 10.5
    assert float(groups["hopper", "final_return"]["mean"]) == 1000.5
    assert groups["ant", "seconds_to_target"]["description"].endswith("return of 30")
    assert groups["hopper", "seconds_to_target"]["description"].endswith("return of 200")
    page = (tmp_path / "out" / "comparison.html").read_text()
    assert "All environments" in page and "1.025" in page, "the mean score"


@pytest.mark.usefixtures("no_figures")
def test_compare_while_the_run_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Cut anywhere, the log compares; what is missing is the last row at most."""
    run = write_run(tmp_path / "run", status=None)
    whole = (run / "metrics.jsonl").read_bytes()
    for size in (len(whole), len(whole) - 1, len(whole) - 40, len(whole) // 2, 150):
        (run / "metrics.jsonl").write_bytes(whole[:size])
        assert command.run([str(run), "--out", str(tmp_path / "out"), "--resamples", "50"]) == 0
        shown = capsys.readouterr().out
        assert "unfinished at epoch" in shown and "could not be read" not in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: RUN_OR_GLOB, --out"),
        (["{}/runs"], "the following arguments are required: --out"),
        (["{}/nowhere", "--out", "{}/x"], "there is no such directory"),
        (["{}/runs/no_config", "--out", "{}/x"], "nothing to compare: "),
        (["{}/runs/flow", "--out", "{}/x", "--target", "high"], "--target must hold finite"),
        (["{}/runs/flow", "--out", "{}/x", "--target", "ant=3"], "there are cartpole-hanging"),
        (["{}/runs/flow", "--out", "{}/x", "--score", "ant=3"], "--score must be ENV=LOW:HIGH"),
        (["{}/runs/flow", "--out", "{}/x", "--score", "ant=3:3"], "LOW and HIGH apart"),
        (["{}/runs/flow", "--out", "{}/x", "--score", "ant=0:3"], "no run is of that environment"),
        (["{}/runs/flow", "--out", "{}/x", "--steps", "-3"], "--steps must not be negative"),
        (["{}/runs/flow", "--out", "{}/x", "--steps", "1,a"], "--steps must hold finite numbers"),
        (["{}/runs/flow", "--out", "{}/x", "--resamples", "0"], "--resamples must be positive"),
        (["{}/runs/flow", "--out", "{}/x", "--statistic", "max"], "invalid choice: 'max'"),
        (["{}/runs/flow", "--out", "{}/runs/flow/seed_0/config.yaml"], "is no directory"),
    ],
)
def test_compare_wrong_input(
    arguments: list[str], message: str, study: Path, capsys: pytest.CaptureFixture
) -> None:
    given = [a.format(study) for a in arguments]
    assert message in fails(command.run, given, capsys)
    assert not (study / "x").exists()


# --- plot -----------------------------------------------------------------------------------------


def test_plot(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = write_run(tmp_path / "run", status=None)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 41, "en')
    assert plot.run([str(run)]) == 0
    written = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert {p.parent for p in written} == {run / "plots"}
    assert {p.name for p in written} >= {"summary.png", "learning_curve.png", "esnr.png"}
    assert all(p.read_bytes().startswith(PNG) for p in written)


def test_plot_elsewhere_and_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [write_run(tmp_path / f"runs/{seed}", seed=seed) for seed in range(2)]
    drawn = []

    def draw(run_dir: Path, title: str, directory: Path | None) -> list[Path]:
        drawn.append((run_dir, title, directory))
        return [run_dir]

    monkeypatch.setattr(plot, "plot_run", draw)
    assert plot.run([str(runs[0]), "--out", str(tmp_path / "a")]) == 0
    assert plot.run([str(tmp_path / "runs")]) == 0
    title = "cartpole, pwm_tiny_flow, seed {} (finished)"
    assert drawn == [
        (runs[0], title.format(0), tmp_path / "a"),
        (runs[0], title.format(0), None),
        (runs[1], title.format(1), None),
    ]


def test_plot_without_a_configuration(tmp_path: Path) -> None:
    """The figures need the metrics alone."""
    run = write_run(tmp_path / "run", epochs=5)
    (run / "config.yaml").unlink()
    assert plot.run([str(run), "--out", str(tmp_path / "made" / "here")]) == 0
    assert (tmp_path / "made" / "here" / "summary.png").exists()
    assert not (run / "plots").exists()


def test_plot_wrong_input(study: Path, capsys: pytest.CaptureFixture) -> None:
    for arguments, message in (
        ([], "required: RUN_OR_GLOB"),
        ([str(study / "nowhere")], "there is no such directory"),
        ([str(study / "runs/empty")], "nothing has been logged yet"),
        ([str(study / "runs/flow"), "--out", "x"], "--out takes the figures of one run, but 4"),
    ):
        assert message in fails(plot.run, arguments, capsys)


@pytest.mark.parametrize("module", ["pwm_fast.compare", "pwm_fast.plot", "pwm_fast.parity"])
def test_help(module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(sys, "argv", [module, "--help"])
    monkeypatch.delitem(sys.modules, module, raising=False)  # runpy imports it anew
    try:
        runpy.run_module(module, run_name="__main__")
    except SystemExit as stopped:
        assert not stopped.code
    shown = capsys.readouterr()
    assert shown.err == "" and module in shown.out
