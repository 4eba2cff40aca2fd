"""Sweeps and scripts on a real Slurm: requeued, preempted, cancelled and failing jobs.

No run here writes a checkpoint on its own (checkpoint.every=0): what a job goes on from is what it
wrote because it was told to stop.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pwm_fast.run import checkpoint, metrics
from tests.launch.slurm import Cluster, wait_until
from tests.run.conftest import ROOT, Command, Launcher, Outcome, rows, tiny_arguments

pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="needs pwm-fast[slurm]")

pytestmark = pytest.mark.slow
EPOCHS = 60
RESOURCES = ("launch.cpus=1", "launch.mem_gb=1", "launch.time=60")


class Site:
    """A user's directory on a cluster."""

    def __init__(self, path: Path, cluster: Cluster, launcher: Launcher, python_path: str) -> None:
        self.path, self.cluster, self.launcher = path, cluster, launcher
        self.variables = {
            "SLURM_CONF": cluster.environment["SLURM_CONF"],
            "PYTHONPATH": python_path,
            "OMP_NUM_THREADS": "1",
        }

    def sweep(self, *arguments: str) -> Command:
        """Start a sweep of ``run_SEED`` and wait for its submission."""
        given = run_arguments(Path("run_${seed}"), "hydra.sweep.dir=sweep", *RESOURCES)
        keys = {argument.split("=")[0] for argument in arguments}
        given = [a for a in given if a.split("=")[0] not in keys]
        command = self.launcher.start(self.path, "-m", *given, *arguments, env=self.variables)
        wait_until((self.path / "sweep" / "sweep.json").exists, "the submission", command.said)
        return command

    def end(self, command: Command) -> Outcome:
        """The end of a sweep that waits for its jobs."""
        jobs = self.jobs()
        wait_until(
            lambda: not set(jobs) & set(self.cluster.jobs()),
            f"the end of {jobs}",
            lambda: self.outputs() + self.cluster.logs(),
            seconds=600.0,
        )
        return command.wait()

    def jobs(self) -> list[str]:
        """Ids of the sweep's jobs."""
        return list(json.loads((self.path / "sweep" / "sweep.json").read_text())["jobs"])

    def submit_script(self, name: str, *arguments: str, flags: tuple[str, ...] = ()) -> str:
        """Submit one of the batch scripts as a user would; the job's id."""
        printed = self.launcher.run(self.path, "script", name, module="pwm_fast.submit")
        (self.path / f"{name}.sbatch").write_text(printed.out)
        resources = ("--cpus-per-task=2", "--mem=1G", "--time=60", "--output=log", *flags)
        return self.cluster.submit(
            self.path / f"{name}.sbatch",
            *run_arguments(Path("run_${seed}"), *arguments),
            flags=resources,
            cwd=self.path,
            PYTHON=sys.executable,
            **self.variables,
        )

    def wait_for_rows(self, *runs: str) -> None:
        """Wait until runs are under way."""
        logs = [self.path / run / "metrics.jsonl" for run in runs]
        wait_until(
            lambda: all(len(metrics.read(log)) > 2 for log in logs),
            f"rows of {runs}",
            lambda: self.outputs() + self.cluster.logs(),
        )

    def preempt(self) -> None:
        """Take all of the node for a moment."""
        script = self.path / "urgent"
        script.write_text("#!/bin/bash\nexit 0\n")
        flags = ("--partition=urgent", "--cpus-per-task=8", "--output=/dev/null")
        urgent = self.cluster.submit(script, flags=flags, cwd=self.path)
        self.cluster.wait_for(urgent, "COMPLETED")

    def outputs(self) -> str:
        """Everything that the jobs printed."""
        files = [*self.path.glob("sweep/slurm/*/*.out"), *self.path.glob("sweep/*.log")]
        files += [f for f in (self.path / "log",) if f.exists()]
        return "\n".join(f"--- {f}\n{f.read_text()}" for f in files)


def run_arguments(run_dir: Path, *extra: str) -> list[str]:
    quiet = (f"epochs={EPOCHS}", "checkpoint.every=0", "eval.every=0")
    return tiny_arguments(run_dir, *quiet, *extra)


@pytest.fixture
def site(tmp_path: Path, cluster: Cluster, launcher: Launcher, no_plots: str) -> Site:
    return Site(tmp_path, cluster, launcher, f"{no_plots}:{ROOT}")


@pytest.fixture(scope="module")
def whole(launcher: Launcher, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Runs of two seeds that were never interrupted."""
    directory = tmp_path_factory.mktemp("whole")
    for seed in (0, 1):
        arguments = run_arguments(directory / f"run_{seed}", f"seed={seed}")
        outcome = launcher.run(directory, *arguments)
        assert outcome.status == 0, outcome
    yield directory


def assert_same(site: Site, whole: Path, *seeds: int) -> None:
    """Every row once and whole, and to the bit the uninterrupted run's."""
    for seed in seeds:
        assert rows(site.path / f"run_{seed}") == rows(whole / f"run_{seed}"), site.outputs()


def assert_continued(log: Path, seed: int) -> None:
    """A run went on, once, from a checkpoint in its middle."""
    found = re.findall(
        rf"continuing run_{seed}/checkpoints/latest.pt after epoch (\d+)", log.read_text()
    )
    assert len(found) == 1 and 1 <= int(found[0]) < EPOCHS, log.read_text()


def test_job_array_with_one_requeued(site: Site, whole: Path) -> None:
    command = site.sweep("launch=slurm", "seed=0,1")
    jobs = site.jobs()
    assert len(jobs) == 2 and jobs[0].split("_")[0] == jobs[1].split("_")[0], "one array"
    site.wait_for_rows("run_0")
    site.cluster.ask("scontrol", "requeue", jobs[0])
    outcome = site.end(command)
    assert outcome.status == 0, (outcome, site.outputs())
    assert outcome.out.splitlines()[-1] == "all runs finished"
    assert [site.cluster.show(job)["Restarts"] for job in jobs] == ["1", "0"]
    assert {site.cluster.state(job) for job in jobs} == {"COMPLETED"}
    assert_continued(site.path / "sweep" / "0_seed=0.log", 0)
    assert_same(site, whole, 0, 1)


def test_preempted_with_grace(site: Site, whole: Path) -> None:
    """Slurm takes a job that ends within its grace as ended: it requeues itself."""
    command = site.sweep("launch=slurm", "launch.partition=patient", "seed=0")
    (job,) = site.jobs()
    site.wait_for_rows("run_0")
    site.preempt()
    outcome = site.end(command)
    assert outcome.status == 0, (outcome, site.outputs())
    assert site.cluster.show(job)["Restarts"] == "1"
    assert_continued(site.path / "sweep" / "0_seed=0.log", 0)
    assert_same(site, whole, 0)


def test_time_limit_of_a_job_with_several_runs(site: Site, whole: Path) -> None:
    """The warning before the limit: checkpoints, a requeue by submitit, and on they go."""
    command = site.sweep("launch=slurm_4gpu", "seed=0,1", "launch.wait=false")
    outcome = command.wait()
    assert outcome.status == 0, outcome
    (job,) = site.jobs()
    site.wait_for_rows("run_0", "run_1")
    status = site.launcher.run(
        site.path, "status", "sweep", module="pwm_fast.submit", env=site.variables
    )
    assert status.status == 0
    assert f"run 1 (seed=1): RUNNING (job {job}), epoch " in status.out, status
    site.cluster.ask("scancel", "--signal=USR2", job)  # as Slurm does signal_s before the limit
    shown = site.cluster.wait_for(job, "COMPLETED")
    assert shown["Restarts"] == "1"
    out = next(site.path.glob("sweep/slurm/*/*.out")).read_text()
    assert "this job is preempted" in out and f"Requeued job {job}" in out, out
    # A GPU and a share of the CPUs for each.
    for gpu in (0, 1):
        assert f"run {gpu} (seed={gpu}): on GPU {gpu}, 1 CPU thread" in out
        assert_continued(site.path / "sweep" / f"{gpu}_seed={gpu}.log", gpu)
    assert_same(site, whole, 0, 1)
    status = site.launcher.run(
        site.path, "status", "sweep", module="pwm_fast.submit", env=site.variables
    )
    assert status.status == 0 and status.out.count(f"finished, epoch {EPOCHS}") == 2, status


def test_one_run_in_the_processes_of_a_job(site: Site) -> None:
    """Two processes share a run, whose job is requeued in the middle."""
    command = site.sweep("launch=slurm_4gpu", "launch.runs_per_job=2", "parallel=data", "seed=0")
    (job,) = site.jobs()
    site.wait_for_rows("run_0")
    site.cluster.ask("scontrol", "requeue", job)
    outcome = site.end(command)
    assert outcome.status == 0, (outcome, site.outputs())
    assert site.cluster.show(job)["Restarts"] == "1"
    log = site.path / "sweep" / "0_seed=0.log"
    assert "in each of 2 processes" in log.read_text()
    assert_continued(log, 0)
    arguments = run_arguments(Path("whole"), "parallel=data", "launch.jobs=2", "seed=0")
    whole = site.launcher.run(site.path, "-m", *arguments, env=site.variables)
    assert whole.status == 0, whole
    assert rows(site.path / "run_0") == rows(site.path / "whole")


def test_cancelled_and_submitted_again(site: Site, whole: Path) -> None:
    command = site.sweep("launch=slurm", "seed=0")
    (job,) = site.jobs()
    site.wait_for_rows("run_0")
    site.cluster.ask("scancel", job)
    outcome = site.end(command)
    assert outcome.status == 143
    assert "run 0 (seed=0): stopped by SIGTERM, with a checkpoint" in outcome.err, outcome
    assert f"(job {job}: CANCELLED)" in outcome.err
    assert site.cluster.show(job)["Restarts"] == "0"
    saved = checkpoint.load(site.path / "run_0" / "checkpoints" / "latest.pt")
    summary = json.loads((site.path / "run_0" / "summary.json").read_text())
    assert (summary["status"], summary["epochs"]) == ("interrupted", saved["epoch"])
    assert 1 <= saved["epoch"] < EPOCHS
    (site.path / "sweep" / "sweep.json").unlink()
    outcome = site.end(site.sweep("launch=slurm", "seed=0"))
    assert outcome.status == 0, outcome
    assert_same(site, whole, 0)


def test_failing_runs(site: Site) -> None:
    """Those beside them go on, the job's exit status is theirs, and it is said where to look."""
    command = site.sweep(
        "launch=slurm_4gpu",
        "epochs=1",
        "env.start=hanging,sideways",
        "run_dir=run_${env.start}",
    )
    outcome = site.end(command)
    (job,) = site.jobs()
    assert outcome.status == 2, (outcome, site.outputs())
    lines = outcome.err.splitlines()
    assert lines[0] == "1 of 2 runs did not finish:"
    assert lines[1] == (
        f"  run 1 (env.start=sideways): failed with exit status 2 (job {job}: FAILED)"
    )
    assert lines[2].startswith("    error: ") and "sideways" in lines[2]
    assert lines[3] == "    log sweep/1_env.start=sideways.log"
    assert site.cluster.show(job)["ExitCode"] == "2:0"
    assert len(rows(site.path / "run_hanging")) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["launch.partition=nowhere"], "there are main, patient, urgent"),
        (["launch.cpus=1000"], "sbatch refused the job: "),
        (["launch.gpu_type=h100"], "sbatch refused the job: "),
    ],
)
def test_refused_by_slurm(arguments: list[str], message: str, site: Site) -> None:
    given = [*run_arguments(Path("run_${seed}")), *RESOURCES, "launch=slurm", "seed=0,1"]
    keys = {argument.split("=")[0] for argument in arguments}
    given = [a for a in given if a.split("=")[0] not in keys]
    outcome = site.launcher.run(site.path, "-m", *given, *arguments, env=site.variables)
    assert outcome.status == 2
    assert len(outcome.err.splitlines()) == 1, outcome.err
    assert message in outcome.err, outcome
    assert site.cluster.jobs() == []


def test_script_at_its_time_limit(site: Site, whole: Path) -> None:
    job = site.submit_script("one_gpu", "seed=0")
    site.wait_for_rows("run_0")
    site.cluster.ask("scancel", "--signal=USR1", job)  # as --signal=USR1@120 asks
    shown = site.cluster.wait_for(job, "COMPLETED", "FAILED")
    assert (shown["JobState"], shown["Restarts"]) == ("COMPLETED", "1"), site.outputs()
    assert_continued(site.path / "log", 0)
    assert_same(site, whole, 0)


def test_script_that_is_preempted_with_grace(site: Site, whole: Path) -> None:
    job = site.submit_script(
        "four_gpus", "hydra.sweep.dir=sweep", "seed=0,1", flags=("--partition=patient",)
    )
    site.wait_for_rows("run_0", "run_1")
    site.preempt()
    shown = site.cluster.wait_for(job, "COMPLETED", "FAILED", "PREEMPTED")
    assert (shown["JobState"], shown["Restarts"]) == ("COMPLETED", "1"), site.outputs()
    for seed in (0, 1):
        assert_continued(site.path / "sweep" / f"{seed}_seed={seed}.log", seed)
    assert_same(site, whole, 0, 1)


def test_script_that_is_cancelled(site: Site) -> None:
    job = site.submit_script("one_gpu", "seed=0")
    site.wait_for_rows("run_0")
    site.cluster.ask("scancel", job)
    wait_until(lambda: not site.cluster.jobs(), "the end", site.outputs)
    shown = site.cluster.show(job)
    assert (shown["JobState"], shown["Restarts"]) == ("CANCELLED", "0")
    summary = json.loads((site.path / "run_0" / "summary.json").read_text())
    assert summary["status"] == "interrupted", site.outputs()
    assert (site.path / "run_0" / "checkpoints" / "latest.pt").exists()


def test_hydras_own_submitit_launcher(site: Site, whole: Path) -> None:
    """There the run itself is submitit's job: its handler acts after ours wrote the checkpoint."""
    arguments = run_arguments(Path("run_${seed}"), "hydra.sweep.dir=sweep", "seed=0")
    keys = ("timeout_min=60", "max_num_timeout=3", "cpus_per_task=1")
    command = site.launcher.start(
        site.path,
        "-m",
        *arguments,
        "launch=hydra",
        "hydra/launcher=submitit_slurm",
        *(f"hydra.launcher.{key}" for key in keys),
        env=site.variables,
    )
    site.wait_for_rows("run_0")
    (job,) = site.cluster.jobs()
    site.cluster.ask("scancel", "--signal=USR2", job)
    shown = site.cluster.wait_for(job, "COMPLETED", "FAILED")
    assert (shown["JobState"], shown["Restarts"]) == ("COMPLETED", "1"), outputs_of(site)
    assert outputs_of(site).count("continuing run_0/checkpoints/latest.pt after epoch") == 1
    assert_same(site, whole, 0)
    outcome = command.wait()
    assert outcome.status == 0, outcome


def outputs_of(site: Site) -> str:
    files = sorted(site.path.glob("sweep/.submitit/*/*_log.*"))
    return "\n".join(f"--- {f}\n{f.read_text()}" for f in files)
