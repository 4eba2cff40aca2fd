"""Runs of two processes: what they write, how they stop, what goes on from their checkpoints."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pwm_fast.config import ConfigError
from pwm_fast.launch import resources
from pwm_fast.run import build, checkpoint
from pwm_fast.run.start import train
from tests.run.conftest import (
    Command,
    Launcher,
    Outcome,
    clean_environment,
    rows,
    tiny_arguments,
    tiny_config,
    wait_for_change,
)

SECONDS = 60.0  # within which a run ends that lost a process
LONG = ("epochs=2000", "eval.every=0", "esnr.every=0", "checkpoint.every=1")


@pytest.fixture
def start(launcher: Launcher, tmp_path: Path) -> Callable[..., list[Command]]:
    """Starts a run of two processes, in ``tmp_path / "run"`` unless another is given."""

    def started(*arguments: str, run: str = "run", hooks: tuple[str, str] = ("", "")):
        given = tiny_arguments(tmp_path / run, *arguments)
        return [
            launcher.start(tmp_path / f"rank_{rank}", *given, env=variables, hook=hooks[rank])
            for rank, variables in enumerate(resources.ranks([{}, {}]))
        ]

    return started


def ends(commands: list[Command]) -> list[Outcome]:
    return [command.wait() for command in commands]


def test_one_log_and_checkpoint_of_all(
    start: Callable[..., list[Command]], launcher: Launcher, tmp_path: Path
) -> None:
    first, second = ends(start("eval.episodes=3"))
    assert (first.status, second.status) == (0, 0), first.err + second.err
    assert "in each of 2 processes" in first.out and second.out == second.err == ""
    logged = rows(tmp_path / "run")
    assert [row["epoch"] for row in logged] == list(range(7))
    # 4 envs of 4 steps an epoch, in both processes together.
    assert [row["replay_size"] for row in logged[1:]] == [16 * i for i in range(1, 7)]
    assert logged[-1]["env_steps"] == 96 and logged[-1]["wm_loss"] > 0
    latest = checkpoint.load(tmp_path / "run" / "checkpoints" / "latest.pt")
    assert latest["replay"]["shape"][0] == len(latest["obs"]) == len(latest["held_action"]) == 4
    assert latest["env"] is None and len(latest["ranks"]["env"]) == len(latest["ranks"]["rng"]) == 2
    noise = [state["torch"] for state in latest["ranks"]["rng"]]
    assert not torch.equal(*noise), "both ranks draw the same noise"
    obs = latest["replay"]["data"][..., : latest["obs"].shape[1]]
    assert not torch.equal(obs[:2], obs[2:]), "both ranks have the same envs"

    # One process goes on from there with the same data, and so do two from what that writes.
    alone = launcher.run(tmp_path / "alone", *tiny_arguments(tmp_path / "run", "epochs=8"))
    assert alone.status == 0 and "after epoch 6" in alone.out, alone.err
    assert rows(tmp_path / "run")[7]["replay_size"] == 96 + 16
    outcomes = ends(start("epochs=9"))
    assert [o.status for o in outcomes] == [0, 0], outcomes
    assert "after epoch 8" in outcomes[0].out
    assert [row["replay_size"] for row in rows(tmp_path / "run")[7:]] == [112, 128, 144]


def test_a_signal_to_one_stops_both_and_they_go_on_to_the_bit(
    start: Callable[..., list[Command]], tmp_path: Path
) -> None:
    whole = ends(start("epochs=12", run="whole"))
    assert [o.status for o in whole] == [0, 0], whole
    commands = start("epochs=12", "checkpoint.every=0")
    wait_for_change(tmp_path / "run" / "metrics.jsonl")
    commands[1].kill(signal.SIGTERM)
    stopped = ends(commands)
    assert {o.status for o in stopped} <= {128 + signal.SIGTERM, 0}, stopped
    if stopped[0].status:  # else they were through
        assert "interrupted" in stopped[0].out and stopped[1].out == ""
    again = ends(start("epochs=12", "checkpoint.every=0"))
    assert [o.status for o in again] == [0, 0], again
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")


@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_process_ends_the_run(
    lost: int, start: Callable[..., list[Command]], tmp_path: Path
) -> None:
    commands = start(*LONG)
    latest = tmp_path / "run" / "checkpoints" / "latest.pt"
    wait_for_change(latest)
    wait_for_change(latest)
    commands[lost].kill(signal.SIGKILL)
    before = time.monotonic()
    left = commands[1 - lost].wait()
    assert time.monotonic() - before < SECONDS
    assert left.status == 2
    assert "error: another process of this run is gone, or cannot be reached" in left.err
    assert "Traceback" not in left.err and commands[lost].wait().status == -signal.SIGKILL
    epoch = checkpoint.load(latest)["epoch"]  # a whole one
    again = ends(start(*LONG[1:], f"epochs={epoch + 1}"))
    assert [o.status for o in again] == [0, 0], again


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("num_envs=5", "num_envs must be a multiple of 2 processes, got 5"),
        ("alg.actor.batch_size=9", "alg.actor.batch_size must be a multiple of 2 processes"),
        ("eval.episodes=1", "eval.episodes must be at least 2"),
        ("graphs=true", "graphs must be"),  # by the configuration, before the processes meet
        ("device=cuda", "device=cuda"),
        ("resume=none.pt", "resume=none.pt"),
    ],
)
def test_refused_once(
    given: str, said: str, start: Callable[..., list[Command]], tmp_path: Path
) -> None:
    if given == "device=cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    outcomes = ends(start(given))
    assert [o.status for o in outcomes] == [2, 2], outcomes
    assert outcomes[0].err.startswith("error: ") and said in outcomes[0].err
    assert outcomes[0].err.count("\n") == 1 and outcomes[1].err == ""
    assert not (tmp_path / "run").exists()


def test_what_one_cannot_use_ends_both(start: Callable[..., list[Command]], tmp_path: Path) -> None:
    """Where the second process has a fault of its own, before the run and within it."""
    refuse = (
        "from pwm_fast.run import build\n"
        "from pwm_fast.config import ConfigError\n"
        "def make_replay(*_): raise ConfigError('no room on this machine')\n"
        "build.make_replay = make_replay\n"
    )
    first, second = ends(start(hooks=("", refuse)))
    assert (first.status, second.status) == (2, 2)
    assert (first.err, second.err) == ("", "error: no room on this machine\n")
    assert not (tmp_path / "run").exists()
    fail = (
        "from pwm_fast.envs import EnvironmentFault\n"
        "from pwm_fast.run import build\n"
        "made = build.make_env\n"
        "def make_env(config, num_envs, *rest):\n"
        "    env = made(config, num_envs, *rest)\n"
        "    step, count = env.step, [0]\n"
        "    def failing(action):\n"
        "        count[0] += 1\n"
        "        if num_envs == 2 and count[0] == 14:\n"
        "            raise EnvironmentFault('a wheel came off')\n"
        "        return step(action)\n"
        "    env.step = failing\n"
        "    return env\n"
        "build.make_env = make_env\n"
    )
    quiet = ("eval.episodes=6", "eval.final_episodes=6", "checkpoint.every=0")
    first, second = ends(start(*quiet, hooks=("", fail)))
    assert (first.status, second.status) == (2, 2), first.err + second.err
    assert "an environment failed in epoch 4: the state before is in" in first.out
    assert (first.err, second.err) == ("", "error: a wheel came off\n")
    again = ends(start(*quiet))
    assert [o.status for o in again] == [0, 0] and "after epoch 3" in again[0].out, again


def test_policy_that_cannot_act_ends_both(
    start: Callable[..., list[Command]], tmp_path: Path
) -> None:
    broken = (
        "from pwm_fast.agent import PWM\n"
        "act, calls = PWM.act, [0]\n"
        "def acting(self, obs, **kw):\n"
        "    calls[0] += 1\n"
        "    action = act(self, obs, **kw)\n"
        "    return action * float('nan') if calls[0] == 20 and len(obs) == 2 else action\n"
        "PWM.act = acting\n"
    )
    first, second = ends(start("eval.episodes=6", "eval.every=0", hooks=("", broken)))
    assert (first.status, second.status) == (2, 2), first.err + second.err
    assert first.err.startswith("error: the policy cannot act") and second.err == ""
    assert "diverged" in (tmp_path / "run" / "summary.json").read_text()


def test_refused_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="parallel=data is for several processes"):
        train(tiny_config(tmp_path / "run", parallel="data"))
    for name, value in resources.ranks([{}, {}])[0].items():
        monkeypatch.setenv(name, value)
    from pwm_fast.run.pretraining import Pretrainer

    with pytest.raises(ConfigError, match="pretrain is one process"):
        train(tiny_config(tmp_path / "run"), Pretrainer)
    assert not (tmp_path / "run").exists()


def test_threads_of_a_slurm_job_are_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in resources.ranks([{}, {}])[0].items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "2")
    torch.set_num_threads(2)
    build.set_threads(None)
    assert torch.get_num_threads() == 1


def test_all_begin_with_the_same_networks(
    start: Callable[..., list[Command]], tmp_path: Path
) -> None:
    """Whatever an environment does to the generators; and where they do not, nothing begins."""
    draws = (
        "import torch\n"
        "from pwm_fast.run import build\n"
        "made = build.make_env\n"
        "def make_env(*given):\n"
        "    torch.manual_seed(5)\n"
        "    return made(*given)\n"
        "build.make_env = make_env\n"
    )
    outcomes = ends(start(hooks=("", draws)))
    assert [o.status for o in outcomes] == [0, 0], outcomes
    other = (
        "import torch\n"
        "from pwm_fast.run import build\n"
        "made = build.make_agent\n"
        "def make_agent(*given):\n"
        "    agent = made(*given)\n"
        "    with torch.no_grad():\n"
        "        agent.actor.logstd += 1e-6\n"
        "    return agent\n"
        "build.make_agent = make_agent\n"
    )
    first, second = ends(start(run="other", hooks=("", other)))
    assert (first.status, second.status) == (2, 2)
    assert "the 2 processes of this run begin with different networks" in first.err
    assert second.err == "" and not (tmp_path / "other").exists()


def test_others_wait_for_what_the_first_still_writes(
    start: Callable[..., list[Command]], tmp_path: Path
) -> None:
    """Who started them may end the first one, too, once another has ended with a status."""
    slow = (
        "import time\n"
        "from pwm_fast.run import trainer\n"
        "trainer.plot_run = lambda *_: time.sleep(3)\n"
    )
    commands = start(*LONG, hooks=(slow, ""))
    wait_for_change(tmp_path / "run" / "metrics.jsonl")
    commands[0].kill(signal.SIGTERM)
    assert commands[1].wait().status == 128 + signal.SIGTERM
    assert "interrupted" in (tmp_path / "run" / "summary.json").read_text()
    assert commands[0].wait().status == 128 + signal.SIGTERM


@pytest.mark.slow
def test_torchrun(tmp_path: Path) -> None:
    """The command of the documentation, and a sweep under it."""
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    given = tiny_arguments(tmp_path / "run", "parallel=data")
    done = subprocess.run(
        [*run, "-m", "pwm_fast.train", *given],
        cwd=tmp_path,
        env=clean_environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("final evaluation") == 1
    assert [row["epoch"] for row in rows(tmp_path / "run")] == list(range(7))
    sweep = subprocess.run(
        [*run, "-m", "pwm_fast.train", "-m", *given, "seed=0,1"],
        cwd=tmp_path,
        env=clean_environment(),
        capture_output=True,
        text=True,
    )
    assert sweep.returncode != 0 and "leave torchrun away" in sweep.stderr
