"""Sweeps in parallel processes on this machine, as a user types them."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from pwm_fast.launch import sweep
from pwm_fast.run import checkpoint, metrics, provenance
from tests.launch.slurm import wait_until
from tests.run.conftest import ROOT, Launcher, rows, tiny_arguments


@pytest.fixture
def quick(no_plots: str) -> dict[str, str]:
    return {"PYTHONPATH": f"{no_plots}:{ROOT}"}


def arguments(*extra: str) -> list[str]:
    return tiny_arguments(Path("run_${seed}"), "hydra.sweep.dir=sweep", *extra)


def test_seeds_in_parallel(
    launcher: Launcher, whole_run: Path, tmp_path: Path, quick: dict[str, str]
) -> None:
    env = {**quick, "CUDA_VISIBLE_DEVICES": "5,7"}
    given = [a for a in arguments("seed=0,1") if not a.startswith("threads=")]
    outcome = launcher.run(tmp_path, "-m", *given, "device=auto", env=env)
    assert outcome.status == 0, outcome
    assert outcome.err == ""
    lines = outcome.out.splitlines()
    assert lines[:2] == [
        "run 0 (seed=0): on GPU 5, 1 CPU thread; log sweep/0_seed=0.log",
        "run 1 (seed=1): on GPU 7, 1 CPU thread; log sweep/1_seed=1.log",
    ]
    assert sorted(lines[2:]) == ["run 0 (seed=0): finished", "run 1 (seed=1): finished"]
    assert rows(tmp_path / "run_0") == rows(whole_run)
    assert json.loads((tmp_path / "run_1" / "summary.json").read_text())["seed"] == 1
    log = (tmp_path / "sweep" / "1_seed=1.log").read_text()
    assert "(1 CPU threads), precision auto, seed 1" in log and "finished: 6 epochs" in log
    assert "launch" not in (tmp_path / "run_0" / "config.yaml").read_text()
    (record,) = provenance.read(tmp_path / "run_1" / "provenance.json")
    assert "seed=1" in record["overrides"].split() and record["seed"] == 1


def test_a_failing_run(launcher: Launcher, tmp_path: Path, quick: dict[str, str]) -> None:
    given = arguments("epochs=1", "seed=0,1", "launch.jobs=1")
    (tmp_path / "run_0").mkdir(parents=True)
    (tmp_path / "run_0" / "checkpoints").write_text("no directory")
    outcome = launcher.run(tmp_path, "-m", *given, env=quick)
    assert outcome.status == 2
    assert len(rows(tmp_path / "run_1")) == 2, "the other run is made all the same"
    assert outcome.err.splitlines() == [
        "1 of 2 runs did not finish:",
        "  run 0 (seed=0): failed with exit status 2",
        "    error: run_dir=run_0 cannot be used: File exists: run_0/checkpoints",
        "    log sweep/0_seed=0.log",
    ]
    status = launcher.run(tmp_path, "status", "sweep", module="pwm_fast.submit", env=quick)
    assert status.status == 1
    assert status.out.splitlines() == [
        "run 0 (seed=0): failed with exit status 2; log sweep/0_seed=0.log",
        "run 1 (seed=1): finished, epoch 1; log sweep/1_seed=1.log",
    ]


@pytest.mark.slow
def test_one_run_in_two_processes(
    launcher: Launcher, tmp_path: Path, quick: dict[str, str]
) -> None:
    given = arguments("parallel=data", "launch.jobs=2")
    outcome = launcher.run(tmp_path, "-m", *given, "seed=0,1", env=quick)
    assert outcome.status == 0, outcome
    assert outcome.out.splitlines() == [
        line
        for i in range(2)
        for line in (
            f"run {i} (seed={i}): in 2 processes, on no GPU, 1 CPU thread; "
            f"log sweep/{i}_seed={i}.log",
            f"run {i} (seed={i}): finished",
        )
    ]
    for i in range(2):
        log = (tmp_path / "sweep" / f"{i}_seed={i}.log").read_text()
        assert "in each of 2 processes" in log and log.count("final evaluation") == 1
        assert len(rows(tmp_path / f"run_{i}")) == 7
    dry = launcher.run(tmp_path, "-m", *given, "seed=5", "launch.dry_run=true", env=quick)
    assert "1 runs, in 2 processes, one after another; nothing is started" in dry.out


@pytest.mark.slow
def test_a_process_that_is_lost_and_a_signal(
    launcher: Launcher, tmp_path: Path, quick: dict[str, str]
) -> None:
    given = arguments("parallel=data", "launch.jobs=2", "epochs=1000", "eval.every=0", "seed=0")
    command = launcher.start(tmp_path, "-m", *given, env=quick)
    log = tmp_path / "run_0" / "metrics.jsonl"
    wait_until(lambda: len(metrics.read(log)) > 3, "rows")
    (rank,) = [p for p in children(command.pid) if b"RANK=1" in environment(p)]
    os.kill(rank, signal.SIGKILL)
    outcome = command.wait()
    assert outcome.status == 128 + signal.SIGKILL, outcome
    assert "killed by SIGKILL; the same command goes on from the latest checkpoint" in outcome.err
    before = len(metrics.read(log))
    command = launcher.start(tmp_path, "-m", *given, env=quick)
    wait_until(lambda: len(metrics.read(log)) > before + 3, "more rows")
    command.kill(signal.SIGTERM)
    outcome = command.wait()
    assert outcome.status == 128 + signal.SIGTERM
    assert "stopped by SIGTERM, with a checkpoint" in outcome.out, outcome


def children(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def environment(pid: int) -> list[bytes]:
    return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_stopped_and_continued(
    signum: signal.Signals, launcher: Launcher, tmp_path: Path, quick: dict[str, str]
) -> None:
    given = arguments("epochs=300", "checkpoint.every=0", "eval.every=0")
    several = [*given, "seed=0,1,2", "launch.jobs=2"]
    command = launcher.start(tmp_path, "-m", *several, env=quick)
    logs = [tmp_path / f"run_{i}" / "metrics.jsonl" for i in range(2)]
    wait_until(lambda: all(len(metrics.read(log)) > 2 for log in logs), "rows")
    command.kill(signum)
    outcome = command.wait()
    assert outcome.status == 128 + signum
    assert "3 of 3 runs did not finish" in outcome.err, outcome
    for i in (0, 1):
        saved = checkpoint.load(tmp_path / f"run_{i}" / "checkpoints" / "latest.pt")
        assert saved["epoch"] >= 2
        assert f"run {i} (seed={i}): stopped by {signum.name}, with a checkpoint" in outcome.out
    assert not (tmp_path / "run_2").exists()
    assert "run 2 (seed=2): did not end by itself" in outcome.err
    if signum == signal.SIGTERM:
        return
    outcome = launcher.run(tmp_path, "-m", *given, "seed=0", env=quick)
    assert outcome.status == 0, outcome
    log = (tmp_path / "sweep" / "0_seed=0.log").read_text()
    assert "continuing run_0/checkpoints/latest.pt after epoch" in log
    assert launcher.run(tmp_path, *given, "seed=0", "run_dir=whole").status == 0
    assert rows(tmp_path / "run_0") == rows(tmp_path / "whole")


WRONG = {
    "value": (["seed=0,-1"], "run 1 (seed=-1): seed must be in [0, 2^63), got -1; nothing was"),
    "environment": (["env=cartpole,moon"], "Could not find 'env/moon'; Available options in"),
    "one directory": (
        ["seed=0,1", "run_dir=x"],
        "the runs seed=0 and seed=1 have the same run_dir=x; name in it what differs",
    ),
    "one GPU for all": (["seed=0,1", "device=cuda:1"], "device=cuda:1 cannot be shared"),
    "one process": (
        ["seed=0", "parallel=data", "launch.jobs=1"],
        "parallel=data wants several processes, each with a GPU of its own or all without: ",
    ),
    "some in parallel": (
        ["parallel=auto,data", "run_dir=${parallel}"],
        "parallel must be the same",
    ),
    "jobs": (["seed=0,1", "launch.jobs=0"], "launch.jobs must be at least 1, got 0"),
    "launch": (["seed=0,1", "launch=moon"], "Could not find 'launch/moon'; Available options"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_named_before_anything_starts(
    case: str, launcher: Launcher, tmp_path: Path
) -> None:
    given, message = WRONG[case]
    outcome = launcher.run(tmp_path, "-m", *arguments(*given))
    assert outcome.status == 2
    assert outcome.out == ""
    assert len(outcome.err.splitlines()) == 1, outcome.err
    assert outcome.err.startswith("error: ") and message in outcome.err
    assert not list(tmp_path.glob("run*")) and not (tmp_path / "sweep" / "sweep.json").exists()


def test_dry_run(launcher: Launcher, tmp_path: Path) -> None:
    given = arguments("seed=0,1", "launch.dry_run=true", "launch.gpus=[3]", "device=auto")
    outcome = launcher.run(tmp_path, "-m", *given)
    assert outcome.status == 0, outcome.err
    assert outcome.out.splitlines() == [
        "2 runs, 1 at a time; nothing is started:",
        "  run 0 (seed=0): run_0",
        "  run 1 (seed=1): run_1",
    ]
    assert {p.name for p in tmp_path.iterdir()} == {"stdout.txt", "stderr.txt"}


def test_other_files_of_the_users_are_handed_on(
    launcher: Launcher, tmp_path: Path, quick: dict[str, str]
) -> None:
    group = tmp_path / "mine" / "alg"
    group.mkdir(parents=True)
    (group / "my_alg.yaml").write_text("defaults: [pwm_tiny_flow, _self_]\nname: my_alg\n")
    given = arguments("epochs=0", "alg=my_alg", "seed=7")
    outcome = launcher.run(tmp_path, f"--config-dir={tmp_path / 'mine'}", "-m", *given, env=quick)
    assert outcome.status == 0, outcome
    assert json.loads((tmp_path / "run_7" / "summary.json").read_text())["alg"] == "my_alg"
    runs, jobs = sweep.read(tmp_path / "sweep")
    assert [run.label for run in runs] == ["seed=7"] and jobs == {}


def test_hydras_own_launcher(launcher: Launcher, tmp_path: Path) -> None:
    """One run after the other in this process."""
    given = arguments("epochs=1", "seed=0,1", "launch=hydra")
    outcome = launcher.run(tmp_path, "-m", *given)
    assert outcome.status == 0, outcome.err
    assert outcome.out.count("finished: 1 epochs") == 2
    assert not (tmp_path / "sweep" / "sweep.json").exists()


def test_plus_is_accepted(launcher: Launcher, tmp_path: Path) -> None:
    outcome = launcher.run(
        tmp_path, "-m", *arguments("seed=0", "launch.dry_run=true", "+launch=local")
    )
    assert outcome.status == 0, outcome.err
    assert "1 runs" in outcome.out
