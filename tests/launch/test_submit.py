"""``python -m pwm_fast.submit``: what it submits, without a Slurm."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pwm_fast import submit
from pwm_fast.launch import experiment
from tests.run.conftest import Launcher, Outcome, tiny_arguments

pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="needs pwm-fast[slurm]")

TINY = [a for a in tiny_arguments(Path("x")) if not a.startswith(("env=", "run_dir="))]


def run(launcher: Launcher, cwd: Path, *arguments: str, **env: str) -> Outcome:
    return launcher.run(cwd, *arguments, module="pwm_fast.submit", env=env)


def flags(out: str) -> dict[str, str]:
    lines = (line.strip() for line in out.splitlines())
    pairs = (line.split("--", 1)[1].partition("=") for line in lines if line.startswith("#SBATCH"))
    return {key: value for key, _, value in pairs}


def listed(out: str) -> list[str]:
    lines = [line.strip() for line in out.splitlines()]
    return [line for line in lines if line.startswith(("job of", "run "))]


def test_seeds(launcher: Launcher, tmp_path: Path) -> None:
    outcome = run(launcher, tmp_path, "seeds", "--seeds", "3-4", "--dry-run", *TINY)
    assert outcome.status == 0, outcome.err
    assert outcome.out.startswith("2 runs in 2 Slurm jobs\nnothing is submitted")
    assert listed(outcome.out) == [
        "job of 1 run",
        "run 0 (seed=3): runs/cartpole/pwm_tiny_flow/seed_3",
        "job of 1 run",
        "run 1 (seed=4): runs/cartpole/pwm_tiny_flow/seed_4",
    ]
    given = flags(outcome.out)
    assert given.pop("output").endswith("/slurm/%A_%a/%A_%a_0_log.out")
    assert given == {  # and nothing for account, partition and QOS, which are null
        "array": "0-1%2",
        "cpus-per-task": "8",
        "gpus-per-node": "1",
        "job-name": "pwm_fast",
        "mem": "32GB",
        "nodes": "1",
        "ntasks-per-node": "1",
        "open-mode": "append",
        "requeue": "",
        "signal": "USR2@120",
        "time": "1440",
    }
    assert "srun" in outcome.out and "--cpus-per-task=8 " in outcome.out
    assert {p.name for p in tmp_path.iterdir()} == {"stdout.txt", "stderr.txt"}, "nothing is left"


def test_every_key_reaches_sbatch(launcher: Launcher, tmp_path: Path) -> None:
    keys = [
        *("launch.account=a", "launch.partition=p", "launch.qos=q", "launch.gpu_type=h100"),
        *("launch.cpus=3", "launch.mem_gb=5", "launch.time=1-00:30:00", "launch.signal_s=300"),
        *("launch.runs_per_job=2", "launch.max_jobs=1", "hydra.launcher.constraint=fast"),
    ]
    setup = 'launch.setup=["module load cuda"]'
    extra = "+hydra.launcher.additional_parameters.mail-type=END"
    outcome = run(
        launcher, tmp_path, "seeds", "--seeds=0-3", "--dry-run", *TINY, *keys, setup, extra
    )
    assert outcome.status == 0, outcome.err
    given = flags(outcome.out)
    wanted = {
        "account": "a",
        "partition": "p",
        "qos": "q",
        "gpus-per-node": "h100:2",
        "cpus-per-task": "6",
        "mem": "10GB",
        "time": "1470",
        "signal": "USR2@300",
        "array": "0-1%1",
        "constraint": "fast",
        "mail-type": "END",
        "requeue": "",
    }
    assert {key: given[key] for key in wanted} == wanted
    assert "module load cuda" in outcome.out


def test_cpu_runs_and_default_memory(launcher: Launcher, tmp_path: Path) -> None:
    outcome = run(
        launcher,
        tmp_path,
        *("seeds", "--seeds=0", "--dry-run", *TINY, "launch.gpus=0", "launch.mem_gb=null"),
    )
    given = flags(outcome.out)
    assert not {"gpus-per-node", "gres", "mem", "array"} & given.keys()


def test_tasks(launcher: Launcher, tmp_path: Path) -> None:
    outcome = run(
        launcher, tmp_path, "tasks", "--tasks=cartpole,hopper", "--seeds=0,1", "--dry-run", *TINY
    )
    assert outcome.status == 0, outcome.err
    assert [line.split(": ")[1] for line in listed(outcome.out) if line.startswith("run")] == [
        f"runs/{env}/pwm_tiny_flow/seed_{seed}" for env in ("cartpole", "hopper") for seed in (0, 1)
    ]


def test_compare_gives_each_alg_its_node(launcher: Launcher, tmp_path: Path) -> None:
    arguments = ["compare", "--baseline", "pwm_tiny", "--launch", "slurm_4gpu", "--dry-run"]
    outcome = run(launcher, tmp_path, *arguments, *TINY)
    assert outcome.status == 0, outcome.err
    seeds = [range(4), range(4, 8)]
    assert listed(outcome.out) == [
        line
        for alg, indices in zip(("pwm_tiny", "pwm_tiny_flow"), seeds, strict=True)
        for line in (
            "job of 4 runs",
            *(
                f"run {i} (alg={alg} seed={i % 4}): runs/cartpole/{alg}/seed_{i % 4}"
                for i in indices
            ),
        )
    ]
    given = flags(outcome.out)
    assert (given["gpus-per-node"], given["cpus-per-task"], given["array"]) == ("4", "32", "0-1%2")


def test_runs_that_do_not_fill_the_last_job(launcher: Launcher, tmp_path: Path) -> None:
    arguments = ["seeds", "--seeds", "0-4", "--launch", "slurm_4gpu", "--dry-run"]
    outcome = run(launcher, tmp_path, *arguments, *TINY)
    assert outcome.out.startswith("5 runs in 2 Slurm jobs")
    assert [line for line in listed(outcome.out) if line.startswith("job")] == [
        "job of 4 runs",
        "job of 1 run",
    ]
    assert outcome.out.count("#!/bin/bash") == 2, "with resources of its own"


WRONG = {
    "option": (["seeds", "--sedes=1"], "--sedes=1: there is no such option; --help shows them"),
    "seeds": (["seeds", "--seeds=3-1"], "--seeds must be like 0-3 or 0,1,7, got '3-1'"),
    "a seed twice": (["seeds", "--seeds=0-3,2"], "--seeds=0-3,2 names a seed twice"),
    "seed": (["seeds", "seed=1"], "seed=1: seeds takes this from --seeds"),
    "alg": (["compare", "--baseline=pwm", "alg=pwm"], "compare takes this from --baseline"),
    "env": (["tasks", "--tasks=ant", "env=ant"], "env=ant: tasks takes this from --tasks"),
    "directory": (["status", "nowhere"], "nowhere is no directory of a sweep"),
    "no override": (["status", "x", "seed=1"], "status takes no overrides, got seed=1"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_options(
    case: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    arguments, message = WRONG[case]
    monkeypatch.setattr(sys, "argv", ["submit", *arguments])
    with pytest.raises(SystemExit) as stop:
        submit.main()
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and message in err and len(err.splitlines()) == 1


REFUSED = {
    "no Slurm": (["seeds"], "launch=slurm needs Slurm, but there is no sbatch here"),
    "override": (["seeds", "epochs=-1"], "run 0 (seed=0): epochs must be 0 or more, got -1"),
    "env": (["tasks", "--tasks=ant,moon"], "Could not find 'env/moon'; Available options"),
    "flow": (["compare", "--baseline=pwm_tiny_flow"], "Could not find 'alg/pwm_tiny_flow_flow'"),
    "gpus": (["seeds", "launch.gpus=4"], "launch.gpus must be 1 or 0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_submission(case: str, launcher: Launcher, tmp_path: Path) -> None:
    arguments, message = REFUSED[case]
    outcome = run(launcher, tmp_path, *arguments, PATH="/nowhere")
    assert outcome.status == 2
    assert outcome.err.startswith("error: ") and message in outcome.err, outcome
    assert len(outcome.err.splitlines()) == 1
    assert not list(tmp_path.glob("runs/multirun/*/s*")) and not (tmp_path / "runs/ant").exists()


def test_without_the_slurm_extra(launcher: Launcher, tmp_path: Path) -> None:
    hidden = (
        "import sys\n"
        "import hydra_plugins\n"
        "sys.modules['hydra_plugins.hydra_submitit_launcher'] = None\n"
        "import pkgutil\n"
        "walk = pkgutil.walk_packages\n"
        "pkgutil.walk_packages = lambda *a, **k: (\n"
        "    m for m in walk(*a, **k) if 'submitit' not in m.name)\n"
    )
    outcome = launcher.run(tmp_path, "seeds", module="pwm_fast.submit", hook=hidden)
    assert outcome.status == 2
    assert outcome.err == "error: launch=slurm needs more packages: pip install 'pwm-fast[slurm]'\n"
    outcome = launcher.run(tmp_path, "-m", "seed=0", "launch.dry_run=true", hook=hidden)
    assert outcome.status == 0, outcome.err


@pytest.mark.parametrize("name", submit.SCRIPTS)
def test_scripts(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "argv", ["submit", "script", name])
    with pytest.raises(SystemExit) as stopped:
        submit.main()
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith("#!/bin/bash\n")
    (tmp_path / "script").write_text(text)
    subprocess.run(["bash", "-n", str(tmp_path / "script")], check=True)


def test_help() -> None:
    text = submit.parser().format_help()
    for word in ("seeds", "tasks", "compare", "status", "script", "--seeds 0-3 env=ant"):
        assert word in text


@pytest.mark.parametrize(
    ("text", "seeds"), [("0-3", [0, 1, 2, 3]), ("5", [5]), ("7,0-1", [7, 0, 1]), ("2-2", [2])]
)
def test_seed_lists(text: str, seeds: list[int]) -> None:
    assert experiment.seeds(text) == seeds
