"""Tiny runs, in this process and as commands."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from pwm_fast import config as configuration
from pwm_fast.config import TrainConfig
from pwm_fast.run import metrics

try:
    import hydra  # noqa: F401
    import mujoco.batch  # noqa: F401
except ImportError:
    collect_ignore_glob = ["test_*.py"]  # the trainer needs pwm-fast[train]

ROOT = Path(__file__).parents[2]

# A run of a fraction of a second: 6 epochs of 4 steps in 4 envs, with episodes of 12 steps.
TINY = {
    "env.max_episode_steps": 12,
    "num_envs": 4,
    "epochs": 6,
    "device": "cpu",
    "threads": 1,
    "eval.every": 2,
    "eval.episodes": 2,
    "eval.final_episodes": 2,
    "esnr.every": 2,
    "esnr.samples": 2,
    "checkpoint.every": 2,
    "alg.horizon": 4,
    "alg.steps_per_epoch": 4,
    "alg.random_epochs": 2,
    "alg.random_hold": 3,
    "alg.replay_capacity": 400,
    "alg.world_model.latent_dim": 16,
    "alg.world_model.units": [16],
    "alg.world_model.encoder_units": [16],
    "alg.world_model.reward_units": [16],
    "alg.model_learning.updates": 2,
    "alg.model_learning.bootstrap_updates": 5,
    "alg.model_learning.batch_size": 8,
    "alg.actor.units": [16],
    "alg.actor.batch_size": 8,
    "alg.critic.units": [16],
    "alg.critic.passes": 1,
}
NO_PLOTS = "from pwm_fast.run import trainer\ntrainer.plot_run = lambda *_: []\n"
VOLATILE = ("wall_time", "steps_per_second")


def tiny_config(run_dir: Path, env: str = "cartpole", **changes: object) -> TrainConfig:
    """A tiny run's configuration; ``changes`` has ``__`` for the dots of a key."""
    values: dict = {"env": {"name": env}}
    for key, value in {**TINY, **{k.replace("__", "."): v for k, v in changes.items()}}.items():
        *parents, last = key.split(".")
        place = values
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
    return dataclasses.replace(copy.deepcopy(_parsed(pickle.dumps(values))), run_dir=str(run_dir))


@functools.cache
def _parsed(values: bytes) -> TrainConfig:
    """OmegaConf takes longer for it than an epoch of a tiny run."""
    return configuration.from_dict(pickle.loads(values))


def tiny_arguments(run_dir: Path, *extra: str) -> list[str]:
    """The same as command-line arguments; ``extra`` ones win."""
    given = {argument.split("=")[0].lstrip("+") for argument in extra}
    own = [f"{key}={value}".replace(" ", "") for key, value in TINY.items() if key not in given]
    return ["env=cartpole", *own, f"run_dir={run_dir}", *extra]


def train_without_plots(config: TrainConfig) -> None:
    """A whole run in this process; for fixtures that outlive a test's own patches."""
    from pwm_fast.run import trainer
    from pwm_fast.run.start import train

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "plot_run", lambda *_: [])
        train(config)


def finish(directory: Path, **changes: object) -> Path:
    """A finished run, with a plot that is none."""
    train_without_plots(tiny_config(directory, **changes))
    assert json.loads((directory / "summary.json").read_text())["status"] == "finished"
    (directory / "plots").mkdir()
    (directory / "plots" / "summary.png").write_bytes(b"a picture")
    return directory


def content_of(directory: Path) -> dict[str, bytes]:
    """The content of all files below, by their relative names."""
    files = (p for p in directory.rglob("*") if p.is_file())
    return {str(p.relative_to(directory)): p.read_bytes() for p in files}


def rows(run_dir: Path) -> list[metrics.Row]:
    """Logged rows without what depends on the clock, read strictly."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in VOLATILE} for line in lines]


@dataclass
class Outcome:
    """How a command ended."""

    status: int
    out: str
    err: str


class Command:
    """A command that runs."""

    def __init__(self, ask: Callable[[dict], object], pid: int, files: tuple[Path, Path]) -> None:
        self.ask, self.pid, self.files = ask, pid, files

    def kill(self, signum: int) -> None:
        """Send a signal; none to a process that has ended."""
        os.kill(self.pid, signum)

    def said(self) -> str:
        """What it printed so far."""
        return "\n".join(file.read_text() for file in self.files)

    def wait(self) -> Outcome:
        """Wait for the end; the status of a process that a signal killed is its negative."""
        status = self.ask({"wait": self.pid})
        assert isinstance(status, int)
        return Outcome(status, *(file.read_text() for file in self.files))


class Launcher:
    """Starts commands of pwm_fast in processes of their own."""

    _composed = False

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("zygote.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=clean_environment(),
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"

    def composing_once(self) -> Launcher:
        """The same for training runs of which Hydra's part is not what is tested."""
        other = copy.copy(self)
        other._composed = True
        return other

    def ask(self, request: dict) -> object:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def start(
        self,
        cwd: Path,
        *arguments: str,
        module: str = "pwm_fast.train",
        hook: str = "",
        plots: bool = False,
        env: dict[str, str] | None = None,
    ) -> Command:
        changes = None
        if self._composed and module == "pwm_fast.train":
            pairs = (a.partition("=") for a in arguments)
            changes = {key: value for key, _, value in pairs if key in ("run_dir", "resume")}
            arguments = tuple(a for a in arguments if a.partition("=")[0] not in changes)
        cwd.mkdir(parents=True, exist_ok=True)
        files = (cwd / "stdout.txt", cwd / "stderr.txt")
        pid = self.ask(
            {
                "module": module,
                "arguments": arguments,
                "hook": hook if plots else NO_PLOTS + hook,  # they take the longest
                "cwd": str(cwd),
                "env": env or {},
                "composed": changes,
                "stdout": str(files[0]),
                "stderr": str(files[1]),
            }
        )
        assert isinstance(pid, int)
        return Command(self.ask, pid, files)

    def run(self, cwd: Path, *arguments: str, **options: object) -> Outcome:
        return self.start(cwd, *arguments, **options).wait()  # type: ignore[arg-type]

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)


def clean_environment() -> dict[str, str]:
    """The environment of a user without settings of ours, where Python finds this checkout."""
    hidden = ("WANDB_", "HYDRA_", "PWM_FAST_", "SLURM_")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(hidden)}
    ours = {"OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg", "PYTHONPATH": str(ROOT)}
    return {**kept, **ours}


def command(module: str, *arguments: str, plots: bool = True) -> list[str]:
    """A command to start with :mod:`subprocess`, where a warm process will not do."""
    code = f"import runpy; runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
    how = ["-m", module] if plots else ["-c", NO_PLOTS + code]
    return [sys.executable, *how, *arguments]


def wait_for_change(path: Path, seconds: float = 60.0) -> None:
    """Return as soon as a file has another content, and some."""
    before = path.read_bytes() if path.exists() else b""
    end = time.monotonic() + seconds
    while not path.exists() or path.read_bytes() in (before, b""):
        assert time.monotonic() < end, f"nothing was written to {path}"
        time.sleep(0.005)


@pytest.fixture(scope="session")
def launcher() -> Iterator[Launcher]:
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    started = Launcher()
    yield started
    started.close()


@pytest.fixture(scope="session")
def starter(launcher: Launcher) -> Launcher:
    """Starts training runs whose arguments Hydra composes once for all of them."""
    return launcher.composing_once()


@pytest.fixture(scope="session")
def whole_run(launcher: Launcher, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run that was never interrupted; not to be written."""
    directory = tmp_path_factory.mktemp("whole")
    outcome = launcher.run(directory, *tiny_arguments(directory / "run"))
    assert outcome.status == 0, outcome.err
    return directory / "run"


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a finished run, made in this process; not to be written."""
    return finish(tmp_path_factory.mktemp("finished") / "run")


@pytest.fixture
def run_dir(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run."""
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs in this process draw nothing: plots take the longest."""
    monkeypatch.setattr("pwm_fast.run.trainer.plot_run", lambda *_: [])


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Runs in this process set torch's threads and signal handlers; put them back."""
    threads = torch.get_num_threads()
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    yield
    torch.set_num_threads(threads)
    for signum, handler in handlers.items():
        assert signal.getsignal(signum) == handler, "a signal handler was left behind"
