"""The commands as a user meets them: output, exit status, and one line where something is wrong."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import struct
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from pwm_fast import cli, info
from pwm_fast import config as configuration
from pwm_fast.backends import native, select
from pwm_fast.run import installation
from tests.run.conftest import Launcher, clean_environment, command, rows, tiny_arguments

PNG = b"\x89PNG\r\n\x1a\n"


# --- train ----------------------------------------------------------------------------------------


def test_a_run_from_the_shell(tmp_path: Path) -> None:
    done = subprocess.run(
        command("pwm_fast.train", *tiny_arguments(Path("here"))),
        cwd=tmp_path,
        env=clean_environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "quiet where there is no terminal"
    lines = done.stdout.splitlines()
    assert [line.split()[1] for line in lines if line.startswith("epoch ")] == [
        "0/6",
        "2/6",
        "4/6",
        "6/6",
    ]
    assert lines[-2].startswith("finished: 6 epochs, 96 environment steps")
    assert "\r" not in done.stdout and "\x1b" not in done.stdout
    assert os.listdir(tmp_path) == ["here"], "everything of a run is in its directory"
    assert set(os.listdir(tmp_path / "here")) == {
        ".lock",
        "checkpoints",
        "config.yaml",
        "metrics.jsonl",
        "plots",
        "provenance.json",
        "summary.json",
    }
    plots = list((tmp_path / "here" / "plots").iterdir())
    assert {p.name for p in plots} == {
        "learning_curve.png",
        "episode_length.png",
        "world_model_losses.png",
        "actor_loss.png",
        "value_loss.png",
        "gradient_norms.png",
        "esnr.png",
        "speed.png",
        "summary.png",
    }
    assert all(p.read_bytes().startswith(PNG) for p in plots)


@pytest.mark.skipif(os.name != "posix", reason="pseudo terminals")
def test_progress_bar_on_a_terminal(tmp_path: Path) -> None:
    import fcntl
    import pty
    import termios

    terminal, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    process = subprocess.Popen(
        command("pwm_fast.train", *tiny_arguments(tmp_path / "run", "epochs=30"), plots=False),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=clean_environment(),
    )
    os.close(theirs)
    shown = b""
    while True:
        try:
            part = os.read(terminal, 65536)
        except OSError:  # Linux says so when the other end is closed
            break
        if not part:
            break
        shown += part
    os.close(terminal)
    assert process.wait() == 0, shown
    bars = [part for part in shown.decode().split("\r") if "epoch/s" in part or "s/epoch" in part]
    last = bars[-1]
    for text in ("100%", "30/30", "reward=", "wm=", "actor=", "value="):
        assert text in last, last
    assert any(re.search(r"<\d\d:\d\d", bar) for bar in bars), "the time to the end"
    assert any("bootstrap" in bar for bar in bars)
    reward = float(last.split("reward=")[1].split(",")[0])
    assert reward == pytest.approx(rows(tmp_path / "run")[-1]["reward"], rel=0.01)


WRONG = {
    "unknown key": (["foo=1"], "foo: there is no such key"),
    "unknown nested key": (["alg.actor.foo=1"], "alg.actor.foo: there is no such key"),
    "added key": (["+foo=1"], "foo"),
    "added option": (["+env.foo=1"], "env 'cartpole': got an unexpected keyword argument 'foo'"),
    "no number": (["epochs=many"], "epochs=many; Value 'many' of type 'str'"),
    "no integer": (["checkpoint.every=1.5"], "checkpoint.every=1.5"),
    "no list": (["alg.actor.units=[a]"], "alg.actor.units=[a]"),
    "no value": (["epochs"], "'epochs' cannot be read as key=value"),
    "no grammar": (["wandb.name=~me"], "'wandb.name=~me' cannot be read"),
    "negative": (["epochs=-1"], "epochs must be 0 or more, got -1"),
    "no envs": (["num_envs=0"], "num_envs must be positive"),
    "no episodes": (["eval.episodes=0"], "eval.episodes must be positive"),
    "not a number": (["alg.actor.lr=nan"], "alg.actor.lr must be positive"),
    "esnr": (["esnr.samples=9"], "esnr.samples must be at most alg.actor.batch_size (8), got 9"),
    "unknown env": (["env=moon"], "Could not find 'env/moon'; Available options in 'env': ant, "),
    "unknown alg": (["alg=moon"], "Could not find 'alg/moon'"),
    "unknown env name": (["env.name=moon"], "env.name must be one of ant, "),
    "device": (["device=tpu"], "device must be auto, cpu, cuda or cuda:N, got 'tpu'"),
    "wandb mode": (["wandb.mode=maybe"], "wandb.mode must be one of disabled, offline, online"),
    "resume": (["resume=nowhere.pt"], "resume=nowhere.pt: there is no such file"),
    "envs": (["num_envs=10000000000"], "10000000000 envs of cartpole need at least "),
    "episodes": (["eval.episodes=9000000000"], "lower eval.episodes"),
    "last episodes": (["eval.final_episodes=9000000000"], "lower eval.final_episodes"),
    "windows": (
        ["alg.model_learning.batch_size=9000000000"],
        "lower alg.model_learning.batch_size, the horizon or alg.world_model.latent_dim",
    ),
    "rollouts": (["alg.actor.batch_size=9000000000"], "lower alg.actor.batch_size, the horizon"),
    "threads": (["env.threads=100000"], "env.threads must be at most 1024, got 100000"),
    "members": (["alg.critic.members=100000"], "members must be at most 1024, got 100000"),
    "digits": (["alg.critic.passes=1" + "0" * 21], "alg.critic.passes must be at most 2147483647"),
    "overflow": (["alg.actor.min_logstd=1e300"], "min_logstd must be at most 3e+38 in size"),
    "nested widths": (["alg.critic.units=[[64]]"], "alg.critic.units must be a list of positive"),
    "no layer of a critic": (
        ["alg.critic.units=[]"],
        "alg.critic.units must be a list of at least",
    ),
    "no layer": (
        ["alg.world_model.reward_units=[]"],
        "reward_units must be a list of at least one",
    ),
    "long": (["env.max_episode_steps=2147483647"], "and at most 10000000, got 2147483647"),
    "steps": (["env.max_episode_steps=9000000000"], "env.max_episode_steps must be below 2^31"),
    "options of another env": (["env.kwargs.x=1"], "unexpected keyword argument 'kwargs'"),
    "memory": (["alg.replay_capacity=1000000000000000"], "alg.replay_capacity=1000000000000000"),
    "directory": (["run_dir=/proc/no"], "run_dir=/proc/no cannot be used"),
}


CHOICES = {
    "env=null": "env must be a name, or a list of names, of its files, got None",
    "+env=null": "env must be a name, or a list of names, of its files, got None",
    "env=true": "got True",
    "env={a:1}": "env must be a name, or a list of names, of its files, got {'a': 1}",
    "alg=5": "alg must be a name, or a list of names, of its files, got 5",
    "alg=1.5": "got 1.5",
    "alg=[pwm_tiny,5]": "got ['pwm_tiny', 5]",
    "alg=[[pwm_tiny]]": "got [['pwm_tiny']]",
    "launch=null": "launch must be a name",
    "hydra=5": "hydra must be a name",
    "hydra/launcher=null": "hydra/launcher must be a name",
    "hydra.verbose=7": "Hydra cannot use hydra.verbose=7: AssertionError",
    "-m alg=5,6": "alg must be a name, or a list of names, of its files, got 5",
    "-m env=cartpole,null": "env must be a name, or a list of names, of its files, got None",
    "-m hydra.verbose=7": "Hydra cannot use hydra.verbose=7: AssertionError",
}


@pytest.mark.parametrize("given", CHOICES)
def test_choices_of_no_file(given: str, launcher: Launcher, tmp_path: Path) -> None:
    """One line from every command, of one run or of a sweep, before anything is made."""
    *sweep, override = given.split()
    arguments = [*sweep, *tiny_arguments(Path("run"), override)]
    modules = {"pwm_fast.train": arguments}
    if not sweep and override.startswith(("env", "+env")):
        modules["pwm_fast.data"] = ["export", "out=run", override]
    if not sweep and override.startswith("env"):
        modules["pwm_fast.parity"] = ["alg=pwm_5M_flow", override]
    for module, own in modules.items():
        outcome = launcher.run(tmp_path, *own, module=module)
        assert (outcome.status, outcome.out) == (2, ""), outcome.err
        assert outcome.err.startswith("error: ") and CHOICES[given] in outcome.err
        assert len(outcome.err.splitlines()) == 1
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("given", ["env='cartpole'", "alg=[]", "-m alg='pwm_tiny',pwm_tiny_flow"])
def test_choices_that_are_files(given: str, launcher: Launcher, tmp_path: Path) -> None:
    *sweep, override = given.split()
    own = ["launch=hydra"] if sweep else []  # which starts no processes
    arguments = tiny_arguments(Path("run_${alg.name}"), "epochs=0", override, *own)
    outcome = launcher.run(tmp_path, *sweep, *arguments)
    assert outcome.status == 0, outcome.err


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input(case: str, launcher: Launcher, tmp_path: Path) -> None:
    arguments, message = WRONG[case]
    outcome = launcher.run(tmp_path, *tiny_arguments(Path("run"), *arguments))
    assert outcome.status == 2
    assert outcome.out == ""
    assert len(outcome.err.splitlines()) == 1, outcome.err
    assert outcome.err.startswith("error: ") and message in outcome.err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


NOT_MADE = {
    "env=dmc env.action_repeat=1000000": "action_repeat must be at most 1024, got 1000000",
    "env=gym env.id=Pendulum-v1 env.kwargs=5": "env.kwargs must be a mapping of the environment's",
    "env=gym env.id=Pendulum-v1 env.kwargs.max_episode_steps=5": "must not be given, got 5",
    "env=gym env.id=Pendulum-v1 env.kwargs.foo=5": "env.kwargs={'foo': 5}: TypeError: ",
    "env=gym env.id=Hopper-v5 env.kwargs.frame_skip=0": "env.kwargs={'frame_skip': 0}: ZeroDivi",
    "env=gym env.id=Hopper-v5 env.kwargs.xml_file=no.xml": "env.id='Hopper-v5' with env.kwargs=",
    "env=gym env.id=Hopper-v5 env.kwargs.reset_noise_scale=nan": "Hopper-v5, env 0, reset of ",
    "env=dmc env.action_repeat=1.5": "action_repeat must be a whole number, at least 1, got 1.5",
    "env=dmc env.action_repeat=null": "action_repeat must be a whole number, at least 1, got None",
    "env.start=[hanging]": "env.start must be one of hanging, upright, got ['hanging']",
    "env.start={a:1}": "env.start must be one of hanging, upright, got {'a': 1}",
}


@pytest.mark.parametrize("given", NOT_MADE)
def test_envs_that_cannot_be_made(given: str, launcher: Launcher, tmp_path: Path) -> None:
    """One line, of training and of an export, and no directory."""
    pytest.importorskip("gymnasium.envs.mujoco", reason="needs pip install 'pwm-fast[gym]'")
    if "dmc" in given:
        pytest.importorskip("dm_control", reason="needs pip install 'pwm-fast[dmc]'")
    own = given.split()
    arguments = tiny_arguments(Path("run"), *own)
    arguments = arguments[1:] if own[0].startswith("env=") else arguments
    export = ["export", "out=run", *(own if own[0].startswith("env=") else ["env=cartpole", *own])]
    for module, values in {"pwm_fast.train": arguments, "pwm_fast.data": export}.items():
        outcome = launcher.run(tmp_path, *values, module=module)
        assert (outcome.status, outcome.out) == (2, ""), outcome.err
        assert NOT_MADE[given] in outcome.err and "Traceback" not in outcome.err
        assert len(re.findall(r"^error: ", outcome.err, re.MULTILINE)) == 1
        assert not (tmp_path / "run").exists()


def test_an_error_within_a_step_is_one_line(launcher: Launcher, tmp_path: Path) -> None:
    pytest.importorskip("gymnasium", reason="needs pip install 'pwm-fast[gym]'")
    own = ["env=gym", "env.id=Pendulum-v1", "env.kwargs.g=abc"]
    outcome = launcher.run(tmp_path, *tiny_arguments(Path("run"), *own)[1:])
    line = r"error: Pendulum-v1, env 0, step 1 of episode \d: TypeError: .*\n"
    assert outcome.status == 2 and re.fullmatch(line, outcome.err), outcome.err


def test_a_bug_shows_its_traceback(launcher: Launcher, tmp_path: Path) -> None:
    code = (
        "from pwm_fast.agent import PWM\n"
        "def broken(self, *starts):\n"
        "    raise ValueError('a bug of ours')\n"
        "PWM.update_policy = broken\n"
    )
    outcome = launcher.run(tmp_path, *tiny_arguments(Path("run")), hook=code)
    assert outcome.status == 1
    assert "Traceback" in outcome.err and "in broken" in outcome.err
    assert outcome.err.rstrip().endswith("ValueError: a bug of ours")


def test_warnings_are_shown(launcher: Launcher, tmp_path: Path) -> None:
    code = (
        "import logging, warnings\n"
        "from pwm_fast.agent import PWM\n"
        "observe = PWM.observe\n"
        "def warns(self, *args):\n"
        "    warnings.warn('mind this')\n"
        "    logging.getLogger('a.library').warning('and that')\n"
        "    logging.getLogger('a.library').info('but not this')\n"
        "    observe(self, *args)\n"
        "PWM.observe = warns\n"
    )
    outcome = launcher.run(tmp_path, *tiny_arguments(Path("run"), "epochs=1"), hook=code)
    assert outcome.status == 0
    assert "mind this" in outcome.err and "and that" in outcome.err
    assert "but not this" not in outcome.err + outcome.out


def test_sweep(launcher: Launcher, tmp_path: Path) -> None:
    arguments = [a for a in tiny_arguments(Path("x"), "epochs=2") if not a.startswith("run_dir")]
    outcome = launcher.run(tmp_path, "-m", *arguments, "seed=0,1", "launch=hydra")
    assert outcome.status == 0, outcome.err
    for seed in (0, 1):
        run_dir = tmp_path / f"runs/cartpole/pwm_tiny_flow/seed_{seed}"
        assert json.loads((run_dir / "summary.json").read_text())["seed"] == seed
        assert len(rows(run_dir)) == 3


def test_hydras_own_sweep_with_a_failure(launcher: Launcher, tmp_path: Path) -> None:
    arguments = tiny_arguments(Path("run_${seed}"), "epochs=1", "seed=-1,0", "launch=hydra")
    outcome = launcher.run(tmp_path, "-m", *arguments)
    assert outcome.status == 2
    assert "error: seed must be in" in outcome.err and "Traceback" not in outcome.err
    assert len(rows(tmp_path / "run_0")) == 2, "the other run is made all the same"


def test_hydras_own_sweep_stops_when_interrupted(launcher: Launcher, tmp_path: Path) -> None:
    code = (
        "import os, signal\n"
        "from pwm_fast.agent import PWM\n"
        "observe = PWM.observe\n"
        "def stopped(self, *args):\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    PWM.observe = observe\n"
        "PWM.observe = stopped\n"
    )
    arguments = tiny_arguments(Path("run_${seed}"), "seed=0,1", "launch=hydra")
    outcome = launcher.run(tmp_path, "-m", *arguments, hook=code)
    assert outcome.status == 130
    assert (tmp_path / "run_0" / "checkpoints" / "latest.pt").exists()
    assert not (tmp_path / "run_1").exists()


def test_lost_reader_does_not_stop_a_run(tmp_path: Path) -> None:
    process = subprocess.Popen(
        command("pwm_fast.train", *tiny_arguments(tmp_path / "run"), plots=False),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=clean_environment(),
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    errors = process.stderr.read().decode()
    assert (process.wait(), errors) == (0, "")
    assert len(rows(tmp_path / "run")) == 7


# --- evaluate -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["best", "latest", "final"])
def test_evaluate(name: str, whole_run: Path, launcher: Launcher, tmp_path: Path) -> None:
    outcome = launcher.run(
        tmp_path,
        f"checkpoint={whole_run}/checkpoints/{name}.pt",
        "episodes=3",
        "json=result.json",
        module="pwm_fast.evaluate",
    )
    assert outcome.status == 0, outcome.err
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["episodes"] == len(result["returns"]) == 3
    assert result["reward_mean"] == pytest.approx(sum(result["returns"]) / 3)
    assert result["lengths"] == [12, 12, 12]
    for text in ("return", "episode length", "12.0", f"{result['reward_mean']:.1f}"):
        assert text in outcome.out
    # The final evaluation of the run had other start states, but the same policy.
    summary = json.loads((whole_run / "summary.json").read_text())
    assert result["env_steps"] == (summary["best"]["env_steps"] if name == "best" else 96)


def test_evaluate_to_stdout(whole_run: Path, launcher: Launcher, tmp_path: Path) -> None:
    results = []
    for seed in (0, 0, 1):
        outcome = launcher.run(
            tmp_path,
            f"checkpoint={whole_run}/checkpoints/final.pt",
            "episodes=1",
            f"seed={seed}",
            "json=-",
            module="pwm_fast.evaluate",
        )
        results.append(json.loads(outcome.out))
        assert "return" in outcome.err
    assert results[0] == results[1] != results[2]
    assert results[0]["reward_std"] == 0.0


def test_evaluate_writes_beside_the_checkpoint(
    whole_run: Path, launcher: Launcher, tmp_path: Path
) -> None:
    (tmp_path / "final.pt").write_bytes((whole_run / "checkpoints" / "final.pt").read_bytes())
    outcome = launcher.run(tmp_path, "checkpoint=final.pt", module="pwm_fast.evaluate")
    assert outcome.status == 0, outcome.err
    assert json.loads((tmp_path / "final.evaluation.json").read_text())["episodes"] == 12


def test_evaluate_with_a_planner(whole_run: Path, launcher: Launcher, tmp_path: Path) -> None:
    """The defaults are TD-MPC2's, in the file as in the schema."""
    outcome = launcher.run(
        tmp_path,
        f"checkpoint={whole_run}/checkpoints/final.pt",
        "episodes=2",
        "json=-",
        "planning=mppi",
        "planning.samples=96",
        module="pwm_fast.evaluate",
    )
    assert outcome.status == 0, outcome.err
    planning = json.loads(outcome.out)["planning"]
    assert planning == dataclasses.asdict(configuration.PlanningConfig("mppi", samples=96))
    assert "2 episodes, planner mppi (horizon 3, 6 iterations, 96 samples), seed 0" in outcome.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "checkpoint=PATH is needed"),
        (["checkpoint=no.pt"], "there is no checkpoint file no.pt"),
        (["checkpoint={}", "episodes=0"], "episodes must be positive, got 0"),
        (["checkpoint={}", "episodes=few"], "episodes=few"),
        (["checkpoint={}", "seed=-1"], "seed must be in"),
        (["checkpoint={}", "device=tpu"], "device must be auto, cpu, cuda or cuda:N"),
        (["checkpoint={}", "json=no/where.json"], "json=no/where.json: there is no directory"),
        (["checkpoint={}", "foo=1"], "foo: there is no such key"),
        (["checkpoint=stdout.txt"], "stdout.txt is no readable checkpoint"),
        (["checkpoint={}", "planning=cem"], "mppi, none"),
        (["checkpoint={}", "planning=null"], "planning must be a name, or a list of names"),
        (["checkpoint={}", "planning.samples=9"], "planning.samples must be left at 512 without"),
        (
            ["checkpoint={}", "planning=mppi", "planning.samples=9"],
            "planning.elites must be at most planning.samples=9, got 64",
        ),
    ],
)
def test_evaluate_wrong_input(
    arguments: list[str], message: str, whole_run: Path, launcher: Launcher, tmp_path: Path
) -> None:
    path = whole_run / "checkpoints" / "final.pt"
    filled = [a.format(path) for a in arguments]
    outcome = launcher.run(tmp_path, *filled, module="pwm_fast.evaluate")
    assert outcome.status == 2
    assert len(outcome.err.splitlines()) == 1 and message in outcome.err, outcome.err


HOME = "'~nobody_of_this_name/x'"
PATHS = {
    "pwm_fast.evaluate": ["checkpoint={}", "checkpoint=x json={}"],
    "pwm_fast.diagnose": ["checkpoint={}", "checkpoint=[{}]", "checkpoint=x out={}"],
    "pwm_fast.data": ["export out=y checkpoint={}", "export env=cartpole out={}"],
    "pwm_fast.train": ["run_dir={}", "init={}", "resume={}", "data.path={}"],
}


@pytest.mark.parametrize("path", ["''", "'.'", "'./'", "/", "/.", "'..'", HOME])
@pytest.mark.parametrize(
    ("module", "text"), [(module, text) for module, texts in PATHS.items() for text in texts]
)
def test_paths_that_name_no_file(
    module: str, text: str, path: str, launcher: Launcher, tmp_path: Path
) -> None:
    """One line of every command; nothing is made."""
    of_a_file = "checkpoint=x" not in text and text.split("=")[0] not in ("run_dir", "data.path")
    if path != HOME and (not of_a_file or "out={}" in text):
        return  # a folder may be meant
    given = text.format(path).split()
    own = tiny_arguments(Path("run"), *given) if module == "pwm_fast.train" else given
    outcome = launcher.run(tmp_path, *own, module=module)
    assert (outcome.status, outcome.out) == (2, ""), outcome.err
    assert outcome.err.startswith("error: ") and len(outcome.err.splitlines()) == 1
    if path == HOME:
        assert "there is no home directory of such a user: ~nobody_of_this_name/x" in outcome.err
    elif module != "pwm_fast.train":
        assert "checkpoint must be a file" in outcome.err
    assert {*os.listdir(tmp_path)} == {"stdout.txt", "stderr.txt"}


# --- info and messages ----------------------------------------------------------------------------


def test_info(capsys: pytest.CaptureFixture) -> None:
    info.main()
    lines = dict(
        re.split(" {2,}", line, maxsplit=1) for line in capsys.readouterr().out.splitlines()
    )
    assert torch.__version__.startswith(lines["torch"])
    assert set(lines) >= {"pwm_fast", "python", "cpu", "triton", "mujoco", "native extension"}
    assert "gpu" in lines or "gpu 0" in lines


def test_info_of_a_build(monkeypatch: pytest.MonkeyPatch) -> None:
    build = {
        "compiler": "gcc",
        "compiler_version": "12.2",
        "cxx_standard": "c++17",
        "flags": "-O3",
        "cuda": False,
        "cuda_detail": "no sources",
    }
    fake = types.SimpleNamespace(cpu_isa=lambda: "avx2", build_info=lambda: build)
    monkeypatch.setitem(sys.modules, "pwm_fast._C", fake)
    rows = installation.report()
    assert rows["native extension"].startswith("loaded, instruction set avx2")
    assert rows["native build"] == "gcc 12.2, c++17"
    assert rows["native CUDA"] == "no: no sources"
    build |= {"cuda": True, "cuda_detail": "nvcc 13.0, for 80"}
    fake.cuda_devices = lambda: (0, "no driver")
    assert installation.report()["native CUDA"] == "nvcc 13.0, for 80; GPUs: none, no driver"
    fake.cuda_devices = lambda: (2, "")
    assert installation.report()["native CUDA"] == "nvcc 13.0, for 80; GPUs: 2"

    def unknown() -> str:
        raise ValueError("PWM_FAST_ISA=x is unknown")

    fake.cpu_isa = unknown
    state = installation.report()["native extension"]
    assert state == "loaded, but its operations fail: PWM_FAST_ISA=x is unknown"
    monkeypatch.setitem(sys.modules, "pwm_fast._C", None)
    assert installation.report()["native extension"] == "not built; pwm_fast runs without it"


def test_info_of_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each operation by backend: what auto takes, what can be asked for, and why not."""
    monkeypatch.setattr(native, "_MISSING", None)
    monkeypatch.setattr(native, "_OPENMP", "/somewhere/libgomp.so.1")
    rows = installation.report()
    assert rows["native threads"] == "torch's own, by libgomp.so.1"
    names = [name for name in select.NAMES if name != "auto"]
    assert rows["on cpu, float32"].split() == names
    for operation in select.OPERATIONS:
        cells = dict(zip(names, re.split(" {2,}", rows[f"  {operation}"]), strict=True))
        kept = "reference" if operation in ("adam", "esnr_update", "td_lambda") else "native"
        assert [name for name in names if cells[name] == "auto"] == [kept]
        assert cells["reference"] in ("auto", "if asked")
    monkeypatch.setattr(native, "_MISSING", "the native extension does not load (gone)")
    rows = installation.report()
    assert "native threads" not in rows
    cells = re.split(" {2,}", rows["  mlp"])
    assert cells[0] == "no [1]" and cells[-2:] == ["if asked", "auto"]
    assert rows["  [1]"] == "the native extension does not load (gone)"
    monkeypatch.setattr(native, "_MISSING", None)
    monkeypatch.setattr(native, "_OPENMP", None)
    assert installation.report()["native threads"].startswith(
        "1: torch has loaded no OpenMP runtime"
    )


def test_info_needs_no_hydra() -> None:
    code = (
        "import sys\n"
        "sys.modules.update(dict.fromkeys(('hydra', 'omegaconf', 'mujoco', 'matplotlib')))\n"
        "from pwm_fast import info\n"
        "info.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=clean_environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_train_without_hydra() -> None:
    code = (
        "import runpy, sys\n"
        "sys.modules.update(dict.fromkeys(('hydra', 'omegaconf')))\n"
        "runpy.run_module('pwm_fast.train', run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=clean_environment(), capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "error: this command needs more packages: pip install 'pwm-fast[train]'"
    ]


def test_messages_are_one_line() -> None:
    assert cli.message(OSError(28, "No space left on device", "a/b")) == (
        "No space left on device: a/b"
    )
    assert cli.message(ValueError("two\n  lines")) == "two lines"
    assert cli.message(KeyError()) == "KeyError"


def test_home_directory_is_understood(launcher: Launcher, tmp_path: Path) -> None:
    home = {"HOME": str(tmp_path / "home")}
    arguments = tiny_arguments(Path("'~/run'"), "epochs=1")
    assert launcher.run(tmp_path, *arguments, env=home).status == 0
    assert len(rows(tmp_path / "home" / "run")) == 2
    assert not (tmp_path / "~").exists()


# --- open mappings --------------------------------------------------------------------------------


@pytest.mark.parametrize("plus", ["", "+", "++"])
def test_export_takes_an_environments_own_arguments(
    plus: str, launcher: Launcher, tmp_path: Path
) -> None:
    """As training does: without a plus, and given to the environment."""
    pytest.importorskip("gymnasium", reason="needs pip install 'pwm-fast[gym]'")
    given = ["env=gym", "env.id=Pendulum-v1", "env.max_episode_steps=3", "episodes=1"]
    ends = {}
    for gravity in ("9.0", "-80.0"):
        out = tmp_path / f"g{gravity}"
        own = ["export", f"out={out}", *given, f"{plus}env.kwargs.g={gravity}"]
        outcome = launcher.run(tmp_path, *own, module="pwm_fast.data")
        assert outcome.status == 0, outcome.err
        with np.load(out / "episode_0.npz") as episode:
            ends[gravity] = episode["obs"][-1]
    assert not np.allclose(*ends.values())
