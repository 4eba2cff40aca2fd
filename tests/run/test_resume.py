"""A run that is killed or stopped at any moment goes on as if nothing had happened."""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from pwm_fast import config as configuration
from pwm_fast.config import ConfigError
from pwm_fast.run import checkpoint, start
from tests.run.conftest import Launcher, rows, tiny_arguments, tiny_config, wait_for_change

# Counts what a run does to its files and its agent; at the n-th event the process sends itself a
# signal. With SIGKILL that finds files halfway through being written.
EVENTS = """
import os, signal
import torch
from pwm_fast import files
from pwm_fast.run import checkpoint, metrics, trainer
from pwm_fast.agent import PWM

count = 0

def event(half=lambda: None):
    global count
    count += 1
    if count == {at}:
        if {signum} == signal.SIGKILL:
            half()
        os.kill(os.getpid(), {signum})

def before(owner, name):
    original = getattr(owner, name)
    def call(*args, **kwargs):
        event()
        return original(*args, **kwargs)
    setattr(owner, name, call)

for owner, name in (
    (os, "replace"), (os, "link"), (os, "fsync"), (PWM, "act"), (PWM, "update_world_model"),
    (PWM, "update_policy"), (PWM, "actor_esnr"), (trainer, "plot_run"),
):
    before(owner, name)

save, write = torch.save, metrics.MetricsFile.write

def torn_save(content, file):
    def half():
        file.write(b"half a checkpoint")
        file.flush()
    event(half)
    return save(content, file)

def torn_write(self, row):
    event(lambda: self._file.write(b'{{"epoch": ' + str(row["epoch"]).encode() + b', "rew'))
    write(self, row)

torch.save, metrics.MetricsFile.write = torn_save, torn_write

plain_exit = os._exit

def leave(status):
    with open("events", "w") as file:
        file.write(str(count))
    plain_exit(status)

os._exit = leave
"""
PARTS = 12
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


def hook(at: int, signum: int) -> str:
    return EVENTS.format(at=at, signum=int(signum))


@pytest.fixture(scope="module")
def events(starter: Launcher, tmp_path_factory: pytest.TempPathFactory) -> int:
    """Number of events of an uninterrupted run."""
    directory = tmp_path_factory.mktemp("events")
    outcome = starter.run(directory, *tiny_arguments(directory / "run"), hook=hook(-1, 0))
    assert outcome.status == 0, outcome.err
    return int((directory / "events").read_text())


def event_in(part: int, events: int) -> int:
    """A random event in one of the parts of a run."""
    return random.Random(part).randrange(events * part // PARTS, events * (part + 1) // PARTS) + 1


def assert_same(run_dir: Path, whole: Path) -> None:
    """The rows are the uninterrupted run's to the bit, and so are the weights."""
    assert rows(run_dir) == rows(whole)
    ours, theirs = (checkpoint.load(d / "checkpoints" / "final.pt") for d in (run_dir, whole))
    for module in ("world_model", "actor", "critic"):
        for name, value in theirs["agent"][module].items():
            assert torch.equal(ours["agent"][module][name], value), name
    assert ours["best"] == theirs["best"]


@pytest.mark.parametrize("part", range(PARTS))
def test_killed(part: int, events: int, starter: Launcher, whole_run: Path, tmp_path: Path) -> None:
    at = event_in(part, events)
    arguments = tiny_arguments(tmp_path / "run")
    outcome = starter.run(tmp_path, *arguments, hook=hook(at, signal.SIGKILL))
    assert outcome.status == -signal.SIGKILL, (at, outcome)
    outcome = starter.run(tmp_path, *arguments)
    assert outcome.status == 0, (at, outcome)
    assert_same(tmp_path / "run", whole_run)


# Epochs 3 and 4, of these parts, do what 5 and 6 do; each signal has two parts that stay.
REPEATED = range(4, 8)


@pytest.mark.parametrize(
    "part",
    [pytest.param(p, marks=[pytest.mark.repeats] * (p in REPEATED)) for p in range(PARTS)],
)
def test_stopped(
    part: int, events: int, starter: Launcher, whole_run: Path, tmp_path: Path
) -> None:
    at = event_in(part, events)
    signum = STOPPING[part % len(STOPPING)]
    arguments = tiny_arguments(tmp_path / "run")
    outcome = starter.run(tmp_path, *arguments, hook=hook(at, signum))
    assert outcome.status == 128 + signum, (at, outcome)
    assert outcome.err == f"\n{signum.name}: stopping; a checkpoint will be written\n"
    latest = checkpoint.load(tmp_path / "run" / "checkpoints" / "latest.pt")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["epochs"] == latest["epoch"]
    assert summary["status"] in ("interrupted", "finished")
    outcome = starter.run(tmp_path, *arguments)
    assert outcome.status == 0, (at, outcome)
    assert_same(tmp_path / "run", whole_run)


@pytest.mark.parametrize("at", [1, 2, 3, 4, 5, 6, 8, 11, 15, 20, 26])
def test_killed_after_going_back(
    at: int, starter: Launcher, whole_run: Path, tmp_path: Path
) -> None:
    """Whenever that is, the directory goes on from one of the two states, and has all rows."""
    run = tmp_path / "run"
    shutil.copytree(whole_run, run)
    arguments = tiny_arguments(run)
    back = f"resume={run}/checkpoints/latest.previous.pt"
    outcome = starter.run(tmp_path, *arguments, back, hook=hook(at, signal.SIGKILL))
    assert outcome.status == -signal.SIGKILL, outcome
    outcome = starter.run(tmp_path, *arguments)
    assert outcome.status == 0, outcome
    assert_same(run, whole_run)


def test_stopped_within_the_first_epoch(starter: Launcher, whole_run: Path, tmp_path: Path) -> None:
    arguments = tiny_arguments(tmp_path / "run")
    code = (
        "import os, signal\n"
        "from pwm_fast.agent import PWM\n"
        "observe = PWM.observe\n"
        "def stopped(self, *args):\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    observe(self, *args)\n"
        "PWM.observe = stopped\n"
    )
    for steps in (1, 2):
        assert starter.run(tmp_path, *arguments, hook=code).status == 143
        saved = checkpoint.load(tmp_path / "run" / "checkpoints" / "latest.pt")
        assert (saved["epoch"], saved["progress"]["done"]) == (0, {"steps": steps})
        assert [row["epoch"] for row in rows(tmp_path / "run")] == [0]
    assert starter.run(tmp_path, *arguments).status == 0
    assert_same(tmp_path / "run", whole_run)


@pytest.mark.parametrize("extra", [(), ("alg.model_learning.start_noise=auto",)])
def test_stopped_within_the_bootstrap(
    extra: tuple[str, ...], starter: Launcher, tmp_path: Path
) -> None:
    """Also between two measurements of the model's own error."""
    arguments = tiny_arguments(
        tmp_path / "run", "alg.model_learning.bootstrap_updates=40", "epochs=3", *extra
    )
    whole = [*arguments, f"run_dir={tmp_path / 'whole'}"]
    assert starter.run(tmp_path, *whole).status == 0
    code = (
        "import os, signal\n"
        "from pwm_fast.agent import PWM\n"
        "update, count = PWM.update_world_model, 0\n"
        "def counted(self, windows):\n"
        "    global count\n"
        "    count += 1\n"
        "    if count == 15:\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return update(self, windows)\n"
        "PWM.update_world_model = counted\n"
    )
    for done in (15, 30):
        outcome = starter.run(tmp_path, *arguments, hook=code)
        assert outcome.status == 143, outcome
        saved = checkpoint.load(tmp_path / "run" / "checkpoints" / "latest.pt")
        assert (saved["epoch"], saved["bootstrapped"]) == (1, False)
        assert saved["progress"]["done"]["model_updates"] == done
    assert starter.run(tmp_path, *arguments).status == 0
    assert_same(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
def test_killed_again_and_again(starter: Launcher, tmp_path: Path) -> None:
    arguments = tiny_arguments(
        tmp_path / "run", "epochs=25", "checkpoint.every=1", "alg.model_learning.updates=4"
    )
    whole = [*arguments, f"run_dir={tmp_path / 'whole'}"]
    assert starter.run(tmp_path, *whole).status == 0
    draw, kills = random.Random(0), 0
    metrics = tmp_path / "run" / "metrics.jsonl"
    while kills < 6:
        command = starter.start(tmp_path, *arguments)
        # Not before it has done something: the clock of a busy machine would make this endless.
        wait_for_change(metrics)
        time.sleep(draw.uniform(0.0, 0.05))
        command.kill(signal.SIGKILL)
        if command.wait().status == 0:
            break
        kills += 1
    assert kills > 0, "the run is too short for this test"
    assert starter.run(tmp_path, *arguments).status == 0
    assert_same(tmp_path / "run", tmp_path / "whole")


def test_stopped_with_everything_on(starter: Launcher, tmp_path: Path) -> None:
    arguments = tiny_arguments(
        tmp_path / "run",
        "env=hopper",
        "env.max_episode_steps=30",
        "epochs=12",
        "alg=pwm",
        "alg.world_model.num_bins=1",
        "alg.normalize_obs=true",
        "alg.normalize_rewards=true",
        "alg.replay_capacity=120",  # the ring wraps
        "alg.keep_random=0.2",
    )
    whole = [*arguments, f"run_dir={tmp_path / 'whole'}"]
    assert starter.run(tmp_path, *whole).status == 0
    assert any(row["train_episode_length"] or 30 < 30 for row in rows(tmp_path / "whole")[1:])
    for at in (70, 60, 50):
        outcome = starter.run(tmp_path, *arguments, hook=hook(at, signal.SIGTERM))
        assert outcome.status == 143, outcome
    assert starter.run(tmp_path, *arguments).status == 0
    assert_same(tmp_path / "run", tmp_path / "whole")


LIBRARIES = {
    "gym": ("env=gym", "env.id=Hopper-v5"),
    "gym, not saved": ("env=gym", "env.id=Pendulum-v1"),
    "dmc": ("env=dmc", "env.domain=cartpole", "env.task=swingup"),
}


@pytest.mark.slow
@pytest.mark.parametrize("library", LIBRARIES)
def test_killed_in_another_library(library: str, starter: Launcher, tmp_path: Path) -> None:
    """To the bit where the envs can be saved, and else with every epoch once."""
    pytest.importorskip("dm_control" if library == "dmc" else "gymnasium.envs.mujoco")
    arguments = tiny_arguments(tmp_path / "run", *LIBRARIES[library], "checkpoint.every=1")
    whole = [*arguments, f"run_dir={tmp_path / 'whole'}"]
    assert starter.run(tmp_path, *whole).status == 0
    for at in (30, 45, 20, 60):  # more events than an epoch has: each time it gets further
        outcome = starter.run(tmp_path, *arguments, hook=hook(at, signal.SIGKILL))
        assert outcome.status == -signal.SIGKILL, (at, outcome)
    assert starter.run(tmp_path, *arguments).status == 0
    if library == "gym, not saved":
        assert [row["epoch"] for row in rows(tmp_path / "run")] == list(range(7))
    else:
        assert_same(tmp_path / "run", tmp_path / "whole")


def test_second_interrupt_stops_at_once(starter: Launcher, tmp_path: Path) -> None:
    code = (
        "import os, signal\n"
        "from pwm_fast.agent import PWM\n"
        "def impatient(self, windows):\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "PWM.update_world_model = impatient\n"
    )
    outcome = starter.run(tmp_path, *tiny_arguments(tmp_path / "run"), hook=code)
    assert outcome.status == 130
    assert "stopped at once" in outcome.err and "Traceback" not in outcome.err


def test_a_run_of_linear_networks_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """None begins any more; one that earlier versions began is continued."""
    changes = {"epochs": 2, "alg__actor__units": [], "alg__world_model__units": []}
    with pytest.raises(ConfigError, match="at least one positive width to train"):
        start.train(tiny_config(tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()
    with monkeypatch.context() as patch:
        patch.setattr(configuration, "check_trainable", lambda *_, **__: None)
        start.train(tiny_config(tmp_path / "run", **changes))
    summary, status = start.train(tiny_config(tmp_path / "run", **{**changes, "epochs": 3}))
    assert (summary["epochs"], status) == (3, 0)


def test_q_functions_are_not_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither from a checkpoint of such an agent, as an import writes one."""
    changes = {"alg__critic__kind": "tdmpc2", "epochs": 0}
    with monkeypatch.context() as patch:
        patch.setattr(configuration, "check_trainable", lambda *_, **__: None)
        start.train(tiny_config(tmp_path / "made", **changes))
    changes |= {"resume": str(tmp_path / "made" / "checkpoints" / "final.pt"), "epochs": 3}
    with pytest.raises(ConfigError, match=r"alg\.critic\.kind must be pwm to train"):
        start.train(tiny_config(tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()
