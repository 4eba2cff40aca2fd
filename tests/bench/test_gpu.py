"""The GPU command: its line, its checks, and that it runs where there is no Hydra and no GPU."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench import (
    gpu,
    gpu_checks,
    matrix,
    micro,
    plain,
    predictions,
    report,
    results,
    train_ant,
)
from bench.environment import ROOT
from bench.matrix import Job
from bench.providers import LABELS
from bench.readings import ASSUMED
from bench.results import Row
from bench.stages import Deadline, Record
from bench.worker import Ended
from pwm_fast import config
from pwm_fast.config import ConfigError
from tests.bench.synthetic import FACTS

# As on a machine that has torch, triton and nvcc alone. What torch.compile traces runs without
# Inductor, whose kernels in C++ would take g++ a minute and are PyTorch's matter.
BLOCKED = ("hydra", "omegaconf", "mujoco", "wandb", "yaml", "gymnasium", "jax", "pytest")
INDUCTOR = "torch._inductor.compile_fx"
SITE = f"""
import importlib.util
import sys


class Absent:
    def find_spec(name, path=None, target=None):
        if name == {INDUCTOR!r}:
            return importlib.util.spec_from_file_location(name, __file__[:-3] + "_inductor.py")
        if name.partition(".")[0] in {BLOCKED!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}} in this test", name=name)


sys.meta_path.insert(0, Absent)
"""
NO_INDUCTOR = """
from torch._dynamo.backends.debugging import aot_eager


def compile_fx(model, inputs, **_):
    print("compiled without Inductor")
    return aot_eager(model, inputs)
"""


def start_bare(tmp_path: Path, *args: str, **variables: str) -> subprocess.Popen[str]:
    """Start Python as on such a machine, its child processes too."""
    (tmp_path / "sitecustomize.py").write_text(SITE, "utf-8")
    (tmp_path / "sitecustomize_inductor.py").write_text(NO_INDUCTOR, "utf-8")
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    return subprocess.Popen(
        [sys.executable, *args],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path, **variables},
    )


def bare(tmp_path: Path, *args: str) -> subprocess.CompletedProcess[str]:
    """Run it to its end."""
    process = start_bare(tmp_path, *args)
    said, errors = process.communicate()
    return subprocess.CompletedProcess(args, process.returncode, said, errors)


# --- the plan ------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", matrix.MEASURED)
def test_every_provider_of_every_case_is_in_one_job(stage: str) -> None:
    cases = matrix.cases(stage, False)
    jobs = list(matrix.jobs(stage, cases, False))
    taken = [(job.name, name) for job in jobs for name in job.providers]
    assert sorted(taken) == sorted((c.name, p) for c in cases for p in c.providers)
    assert {name for _, name in taken} <= set(LABELS)


def test_what_the_aims_are_about_comes_first() -> None:
    def order(stage: str) -> list[tuple[str, tuple[str, ...]]]:
        return [
            (j.name, j.providers) for j in matrix.jobs(stage, matrix.cases(stage, False), False)
        ]

    compiled = [p for _, names in order("quick") for p in names if p.startswith("compile")]
    assert set(compiled[:6]) == {"compile_bf16"} and len(compiled) == 18
    (case,) = matrix.cases("headline", False)
    assert case.name == "rollout-5M_flow-b128-K4-backward"
    assert next(iter(case.providers)) == "published"  # ratios are of the first row
    peers = [name for _, names in order("headline") for name in names]
    assert peers[:4] == ["fast_fp16_graph", "published", "compile_bf16", "compile"]
    updates, physics = order("epoch")
    assert updates[0] == "updates-5M" and physics[0] == "epoch-5M"
    assert updates[1][:3] == ("published_baseline", "published", "fast_fp16_graph")
    assert len(order("esnr")) == 9  # samples of 38 GB are drawn once


def test_the_matrix_is_what_is_to_be_measured() -> None:
    quick, full = ({c.name for c in found} for found in (matrix.quick(), matrix.full()))
    assert len(quick) == 6 and quick <= full
    assert len(full) == 3 * 5 * 2 * 2
    assert {c.name for c in matrix.esnr()} >= {"esnr-317M-M64", "esnr-5M-M4"}
    for model, batch, substeps in predictions.ROLLOUT_MODEL:
        assert f"rollout-{model}_flow-b{batch}-K{substeps}-backward" in full
    assert sum(b for b in gpu.BUDGETS.values() if b < float("inf")) > gpu.BUDGET - 60


def test_the_first_questions_fit_into_one_visit() -> None:
    """And what takes a compiler, or the memory of the card, comes after the headline."""
    names = list(gpu.BUDGETS)
    assert names[:5] == ["first", "headline", "profile", "epoch", "micro"]
    assert names.index("headline") < names.index("build") < names.index("smoke")
    assert sum(gpu.BUDGETS[name] for name in names[:5]) < gpu.BUDGET
    assert list(micro.CONSTANTS)[:2] == ["flags", "bandwidth"]


def test_nobody_shares_a_process_with_jax(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It keeps what memory it has had."""
    wanted = [Job("case", "quick", "a", names) for names in (("tf32",), ("jax",), ("compile_max",))]
    wanted.insert(2, Job("case", "quick", "b", ("jax_bf16", "diffrax")))
    case = SimpleNamespace(axes={}, providers=("tf32", "jax", "compile_max", "jax_bf16", "diffrax"))
    monkeypatch.setattr(gpu, "cases", lambda stage, dry: [])
    monkeypatch.setattr(gpu, "jobs", lambda stage, found, dry: wanted)
    record = Record(tmp_path / "gpu_x.json", copy.deepcopy(FACTS))
    log: list[str] = []

    class Worker:
        def run(self, job: Job, seconds: float, take: Any) -> Ended:
            log.append(" ".join(job.providers))
            for name in job.providers:
                record.add(job.name, case.axes, Row(name, "ok", None, [1.0]), case.providers)
            return Ended("done")

        def stop(self) -> None:
            log.append("stop")

    outcome = gpu.measure(Deadline(60.0), "quick", record, Worker(), False)  # type: ignore[arg-type]
    assert outcome.status == "ok"
    assert log == ["tf32", "jax", "jax_bf16 diffrax", "stop", "compile_max"]


def test_every_constant_of_the_model_has_a_measurement() -> None:
    pytest.importorskip("triton")
    from bench.micro import kernels

    text = Path(micro.__file__).read_text("utf-8")
    names = {f"product {kind} 8192" for kind in micro.DTYPES} | set(kernels.reads(132))
    for name in ASSUMED:
        assert name in names or f'"{name}"' in text, name


def test_the_kernels_that_measure_compile(tmp_path: Path) -> None:
    triton = pytest.importorskip("triton")
    from bench import fake_driver
    from bench.fake_cuda import DEVICE, FakeCuda
    from bench.micro import kernels

    if (reason := fake_driver.why_not()) is not None:
        pytest.skip(reason)
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(tmp_path)
        with FakeCuda(compile=True):
            kernels.start_all(DEVICE, 132)
    found = [(path.stem, path.read_text("utf-8")) for path in tmp_path.rglob("*.ptx")]
    assert sorted(name for name, _ in found) == ["clock", "flags", "read", "read", "read"]
    for name, text in found:  # past L1, 16 bytes a load
        assert name != "read" or "ld.global.cg.v4" in text


# --- configurations without OmegaConf ------------------------------------------------------------


@pytest.mark.parametrize("path", sorted((plain.CONFIGS / "alg").glob("*.yaml")), ids=str)
def test_configurations_are_those_that_hydra_composes(path: Path) -> None:
    assert plain.algorithm(path.stem) == config.compose(f"alg={path.stem}").alg


def test_a_wrong_configuration_is_named() -> None:
    with pytest.raises(ConfigError, match=r"alg must be one of pwm, .*got 'pwm_6M'"):
        plain.algorithm("pwm_6M")
    with pytest.raises(ConfigError, match="AlgConfig has no key speed"):
        plain.build(config.AlgConfig, {"speed": 1})
    with pytest.raises(ConfigError, match=r"alg\.gamma must be in \(0, 1\]"):
        plain.build(config.AlgConfig, {"gamma": 2.0})
    with pytest.raises(ConfigError, match="cannot read the line '& anchor'"):
        plain.parse("a: 1\n& anchor")


# --- build, sanitizer ---------------------------------------------------------------------


def test_a_command_is_stopped_with_what_it_started(tmp_path: Path) -> None:
    script = "sleep 60 & echo $! > child; wait"
    done = gpu_checks.run_command(["sh", "-c", script], Deadline(1.0), cwd=tmp_path)
    assert done.status is None and done.seconds < 30.0
    child = (tmp_path / "child").read_text().strip()
    end = time.monotonic() + 10.0  # a killed process is there until somebody takes note of it
    while _lives(child) and time.monotonic() < end:
        time.sleep(0.05)
    assert not _lives(child)


def _lives(process: str) -> bool:
    try:
        return " Z " not in Path(f"/proc/{process}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_small_work_runs_through_every_operation() -> None:
    from bench import exercise

    assert exercise.main(["--device", "cpu"]) == 0


def test_small_work_goes_on_after_a_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from bench import exercise

    def fail() -> Any:
        raise RuntimeError("no such kernel")

    def work() -> Any:
        return SimpleNamespace(make={"fast": fail, "fast_bf16": lambda: SimpleNamespace(call=list)})

    monkeypatch.setattr(exercise, "workloads", lambda device: {"this": work, "that": work})
    assert exercise.main(["--device", "cpu"]) == 1
    out = capsys.readouterr().out
    assert out.count("fast: Error: RuntimeError: no such kernel") == 2
    assert out.count("fast_bf16: ran") == 2


# --- the command ---------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    ("args", "says"),
    [
        ([], "--device=cuda, but torch"),
        (["--device", "cpu"], "needs --quick"),
        (["--device", "cpu", "--quick"], "--out"),
        (["--device", "meta", "--quick", "--out", "x"], "must be cuda"),
        (["--device", "cpu", "--quick", "--out", "x", "--budget", "1"], "--budget"),
        (["--device", "cpu", "--quick", "--out", "x", "--restart", "--resume", "y"], "name one"),
        (["--device", "cpu", "--quick", "--out", "/dev/null/x"], "cannot write to"),
    ],
)
def test_what_cannot_run_is_said_in_a_line(
    args: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gpu.main(args) == 2
    err = capsys.readouterr().err
    assert says in err and err.startswith("error: ") and len(err.splitlines()) == 1


@pytest.mark.slow
def test_a_run_is_terminated_and_gone_on_with(tmp_path: Path) -> None:
    """Without Hydra and MuJoCo: it leaves what it has, is ended later, and goes on elsewhere."""
    out, later = tmp_path / "out", tmp_path / "later"
    command = ["-m", "bench.gpu", "--device=cpu", "--quick"]
    stages = ["--stage=first", "--stage=headline", "--stage=epoch"]
    process = start_bare(tmp_path, *command, *stages, OUT=str(out))
    end = time.monotonic() + 120.0
    while "first: ok" not in _text(out / "run.log") and time.monotonic() < end:
        time.sleep(0.1)
    process.terminate()
    said, _ = process.communicate(timeout=60.0)
    assert process.returncode == 130
    assert said.endswith("stopped; the same command goes on from here\n")
    assert _text(out / "run.log") == said
    found = results.load(out / "gpu_cpu.json").gpu
    assert list(found["stages"]) == ["first"] and found["micro"]["first rollout"]
    assert {p.name for p in out.iterdir()} == {"gpu_cpu.json", "run.log", "worker.log"}

    done = bare(tmp_path, *command, *stages, f"--out={out}")
    assert done.returncode == 0, done.stdout + done.stderr
    result = results.load(out / "gpu_cpu.json")
    rows = {f"{g.name} {r.provider}": r for g in result.groups.values() for r in g.rows.values()}
    for provider in ("published", "compile"):
        assert rows[f"rollout-tiny_flow-b7-K1-backward {provider}"].status == "ok"
    assert "compiled without Inductor" in _text(out / "worker.log")
    assert rows["updates-tiny published"].status == "ok"
    assert report.report(result)

    stages = ["--stage=first", "--stage=headline", "--stage=build"]
    done = bare(tmp_path, *command, *stages, f"--out={later}", f"--resume={out}")
    assert done.returncode == 0 and "0 failed" in done.stdout, done.stdout + done.stderr
    before, again = (json.loads(_text(x / "gpu_cpu.json")) for x in (out, later))
    assert again["cases"] == before["cases"]
    assert list(again["gpu"]["stages"]) == ["first", "headline", "epoch", "build"]


def _text(path: Path) -> str:
    return path.read_text("utf-8") if path.exists() else ""


def test_a_bare_machine_says_what_is_missing(tmp_path: Path) -> None:
    """The command can be read, an epoch without physics is absent, training is refused."""
    script = (
        "import torch\nfrom bench import gpu, matrix, session, train_ant\n"
        "case = next(c for c in matrix.dry_cases('epoch') if c.name == 'epoch-tiny')\n"
        "for x in session.one_by_one(case, ['published', 'fast'], torch.device('cpu')): print(x)\n"
        "args = ['--minutes=1', '--device=cpu', '--alg=pwm_tiny_flow']\n"
        "raise SystemExit(train_ant.main(args))"
    )
    done = bare(tmp_path, "-c", script)
    assert done.returncode == 2, done.stderr
    assert done.stdout.count("absent") == 2 and done.stdout.count("no physics engine") == 2
    assert done.stderr.startswith("error: ") and "MuJoCo" in done.stderr
    assert len(done.stderr.splitlines()) == 1


# --- training for some minutes -------------------------------------------------------------------


def test_speed_and_curve_of_a_run() -> None:
    rows: list[Any] = [
        {"epoch": 0, "env_steps": 0, "eval_reward": 1.0, "eval_reward_std": 0.5, "wall_time": 0.0},
        {"epoch": 1, "steps_per_second": 900.0, "wall_time": 1.0},
        {"epoch": 2, "steps_per_second": 10.0, "actor_loss": 1.0, "wall_time": 10.0},
        {"epoch": 3, "steps_per_second": 200.0, "actor_loss": 1.0, "wall_time": 11.0},
        {"epoch": 4, "steps_per_second": 400.0, "actor_loss": 1.0, "wall_time": 14.0},
    ]
    assert train_ant.speed(rows, 100) == {
        "epochs_per_second": 3.0,
        "epochs_per_second_with_evaluations": 0.5,
    }
    assert train_ant.speed(rows[:2], 100)["epochs_per_second"] is None
    assert [p["eval_reward"] for p in train_ant.curve(rows)] == [1.0]


@pytest.mark.slow
def test_ant_learns_for_a_moment_and_leaves_its_curve(tmp_path: Path) -> None:
    pytest.importorskip("mujoco")
    path = tmp_path / "ant.json"
    args = ["--minutes", "0.05", "--device", "cpu", "--alg", "pwm_tiny_flow", "--worlds", "4"]
    args += ["--out", str(path), "--run-dir", str(tmp_path / "run"), "--eval-every", "0"]
    assert train_ant.main(args) == 0
    run = json.loads(path.read_text("utf-8"))["run"]
    assert run["status"] == "interrupted" and run["worlds"] == 4 and run["engine"]
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
