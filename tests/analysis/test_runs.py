"""Finding and reading run directories in every state."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from pwm_fast.analysis.runs import LeftOut, Run, ago, find, load
from pwm_fast.config import ConfigError
from pwm_fast.run import charts
from tests.analysis.conftest import write_run


def loaded(path: Path) -> Run:
    run = load(path)
    assert isinstance(run, Run), run
    return run


def left_out(path: Path) -> str:
    item = load(path)
    assert isinstance(item, LeftOut)
    assert item.path == path
    return item.reason


def test_find(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(study)
    flow = [Path(f"runs/flow/seed_{s}") for s in range(4)]
    assert find(["runs/flow/seed_1"]) == flow[1:2]
    assert find(["runs/flow/seed_*"]) == flow
    assert find(["runs/flow"]) == flow, "a directory stands for the runs below it"
    assert find([str(study / "runs/*/seed_[12]")]) == [
        study / f"runs/{alg}/seed_{s}" for alg in ("base", "flow") for s in (1, 2)
    ]
    assert find(["runs/**/seed_3"]) == [Path("runs/base/seed_3"), flow[3]]
    assert find(["runs/flow/seed_1", "runs/flow", str(study / "runs/flow/seed_1")]) == [
        flow[1],
        flow[0],
        *flow[2:],
    ], "each once"
    assert Path("runs/no_config") in find(["runs"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", "nowhere: there is no such directory"),
        ("runs/x*", r"runs/x\*: no directory"),
        ("runs/flow/seed_0/*.jsonl", "no directory matches it"),
    ],
)
def test_find_nothing(
    name: str, message: str, study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(study)
    with pytest.raises(ConfigError, match=message):
        find(["runs/flow/seed_0", name])


def test_whole_run(study: Path) -> None:
    run = loaded(study / "runs/flow/seed_2")
    assert (run.alg, run.seed, run.status, run.finished) == ("pwm_tiny_flow", 2, "finished", True)
    assert (run.epochs, run.env_steps, run.progress()) == (40, 4000, "finished")
    assert run.final is not None and run.final["reward_mean"] == 120.0
    assert run.evaluations.steps.tolist() == list(range(0, 4001, 500))
    assert run.evaluations.values.tolist() == [s / 40.0 + 20.0 for s in range(0, 4001, 500)]
    assert run.evaluations.seconds.tolist() == [4.0 * e for e in range(0, 41, 5)]
    assert run.notes == []


def test_run_that_goes_on(study: Path) -> None:
    """A torn last line is being written."""
    run = loaded(study / "runs/flow/seed_3")
    assert (run.status, run.finished, run.epochs, run.notes) == ("unfinished", False, 22, [])
    assert run.progress().startswith("unfinished at epoch 22 of 40, last row ")


@pytest.mark.parametrize("status", ["interrupted", "diverged"])
def test_run_that_ended_early(status: str, tmp_path: Path) -> None:
    run = loaded(write_run(tmp_path / "run", epochs=10, status=status))
    assert not run.finished
    assert run.progress() == f"{status} at epoch 10 of 40"


def test_damaged_rows(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run")
    lines = (path / "metrics.jsonl").read_text().splitlines(keepends=True)
    lines[3] = lines[3][:20] + "\n"
    lines[7] = "\0\0\0\n"
    (path / "metrics.jsonl").write_text("".join(lines))
    run = loaded(path)
    assert len(run.rows) == 39
    assert run.notes == ["each of lines 4, 8 of metrics.jsonl could not be read and was skipped"]


def test_metrics_that_are_no_numbers(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", epochs=3)
    with (path / "metrics.jsonl").open("a") as file:
        for epoch, value in ((4, None), (5, "high"), (6, True), (7, [1.0])):
            row = {"epoch": epoch, "env_steps": 100 * epoch, "eval_reward": value}
            file.write(json.dumps(row) + "\n")
        file.write('{"epoch": 8}\n{"epoch": 9, "env_steps": 900, "eval_reward": 5}\n')
    run = loaded(path)
    assert run.evaluations.steps.tolist() == [0.0, 900.0]
    assert np.isnan(run.evaluations.seconds[1]), "a row without a time"
    assert run.notes == ["1 rows of metrics.jsonl lack env_steps"]


def test_what_is_left_out(study: Path, tmp_path: Path) -> None:
    assert left_out(study / "runs/no_config") == (
        "config.yaml is missing, so what was run is not known"
    )
    assert "is empty: nothing has been logged yet" in left_out(study / "runs/empty")
    assert left_out(study / "runs").startswith("it holds no run")
    (tmp_path / "file").write_text("")
    assert left_out(tmp_path / "file") == "it is no directory"
    run = write_run(tmp_path / "run")
    (run / "metrics.jsonl").unlink()
    assert left_out(run) == "metrics.jsonl is missing"
    (run / "metrics.jsonl").write_text("not\nrows\n")
    assert left_out(run) == "metrics.jsonl has no readable row"
    (run / "metrics.jsonl").write_text('{"epoch": 0, "env_steps": 0}\n')
    assert "holds no evaluation" in left_out(run)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a: [", "config.yaml is damaged"),
        ("", "lacks env.name, alg.name, seed"),
        ("- 1", "lacks env.name, alg.name, seed"),
        ("env: {name: ant}\nseed: 1", "lacks alg.name"),
        ("env: {name: ant}\nalg: {name: x}\nseed: one", "has seed='one', which is no number"),
    ],
)
def test_broken_config(text: str, reason: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (run / "config.yaml").write_text(text)
    assert reason in left_out(run)


def test_config_of_another_version(tmp_path: Path) -> None:
    """Keys that it lacks have today's defaults; keys that are gone are kept."""
    run = write_run(tmp_path / "run")
    values = yaml.safe_load((run / "config.yaml").read_text())
    del values["alg"]["value_scale"], values["esnr"]
    values["alg"]["gone"] = 3
    (run / "config.yaml").write_text(yaml.safe_dump(values))
    config = loaded(run).config
    assert (config["alg.value_scale"], config["esnr.every"], config["alg.gone"]) == (1.0, 10, 3)


def test_broken_summary_is_none(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    for text in ("{", "[]", '{"status": "finished"}'):
        (run / "summary.json").write_text(text)
        assert not loaded(run).finished
        said = loaded(run).notes == ["summary.json is damaged and was left out"]
        assert said == (text in ("{", "[]"))


# Keys, and the row of each that is spoilt: all of evaluations but the loss, each another's.
SPOILT = {"eval_reward": 10, "eval_reward_std": 15, "wall_time": 5, "wm_loss": 12}


@pytest.mark.parametrize("value", [[], {}, "x", True, 10**400, float("nan"), [None]], ids=str)
def test_rows_of_any_content_are_read_and_drawn(
    tmp_path: Path, value: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drawing takes nearly all the time, so one run has the value under every key."""
    monkeypatch.setattr(charts, "DPI", 20)  # a small figure is drawn twice as fast
    run = write_run(tmp_path / "run", epochs=20)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for key, index in SPOILT.items():
        assert key in rows[index]
        rows[index][key] = value
    del rows[-1]["env_steps"]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = loaded(run)
    for key in SPOILT:
        assert np.isfinite(read.series(key).values).all(), key
    assert charts.plot_run(run)


def test_unreadable(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (run / "metrics.jsonl").unlink()
    (run / "metrics.jsonl").mkdir()
    assert left_out(run) == f"{run / 'metrics.jsonl'} cannot be read: Is a directory"


def test_age(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", status=None)
    then = time.time() - 3 * 3600
    os.utime(run / "metrics.jsonl", (then, then))
    assert loaded(run).progress().endswith("last row 3 h ago")
    assert [ago(s) for s in (0.4, 119, 121, 7300, 200_000)] == [
        "0 s",
        "119 s",
        "2 min",
        "2 h",
        "2 d",
    ]
