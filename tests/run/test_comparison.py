"""The comparison of runs that the trainer wrote."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest

from tests.run.conftest import Launcher, rows, tiny_arguments


def test_compare_real_runs(whole_run: Path, launcher: Launcher, tmp_path: Path) -> None:
    """A finished run and one that was killed, whose seed is another."""
    shutil.copytree(whole_run, tmp_path / "runs" / "0")
    arguments = tiny_arguments(Path("runs/1"), "seed=1")
    assert launcher.run(tmp_path, *arguments).status == 0
    (tmp_path / "runs/1/summary.json").unlink()
    log = tmp_path / "runs/1/metrics.jsonl"
    log.write_bytes(log.read_bytes()[:-30])
    arguments = ["runs", "--out", "out", "--target=-1e9"]
    outcome = launcher.run(tmp_path, *arguments, module="pwm_fast.compare")
    assert (outcome.status, outcome.err) == (0, "")
    assert "1 run of 2 not finished (seed 1 unfinished at epoch 5 of 6" in outcome.out

    with (tmp_path / "out" / "runs.csv").open(newline="") as file:
        first, second = csv.DictReader(file)
    summary = json.loads((whole_run / "summary.json").read_text())
    assert first["configuration"] == second["configuration"] == "pwm_tiny_flow"
    assert float(first["final_return"]) == pytest.approx(summary["evaluation"]["reward_mean"])
    assert float(first["finished_wall_time"]) == pytest.approx(summary["wall_time"])
    evaluations = [row["eval_reward"] for row in rows(whole_run) if "eval_reward" in row]
    assert float(first["last_return"]) == pytest.approx(evaluations[-1])
    assert float(first["best_return"]) == pytest.approx(max(evaluations))
    for key in ("esnr_db", "wm_grad_norm", "actor_grad_norm", "critic_grad_norm", "throughput"):
        assert first[key] != "" and second[key] != "", key
    assert first["env_steps"] == "96" and second["env_steps"] == "80"
    assert float(second["seconds_to_target"]) > 0.0 and second["final_return"] == ""


def test_plot_a_real_run(whole_run: Path, launcher: Launcher, tmp_path: Path) -> None:
    arguments = [str(whole_run), "--out", "figures"]
    outcome = launcher.run(tmp_path, *arguments, module="pwm_fast.plot")
    assert (outcome.status, outcome.err) == (0, "")
    written = {Path(line).name for line in outcome.out.splitlines()}
    assert written == {path.name for path in (tmp_path / "figures").iterdir()}
    assert "summary.png" in written
