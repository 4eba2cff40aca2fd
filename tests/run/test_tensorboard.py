"""Event files for TensorBoard: read back with its own reader, and as they are asked for."""

from __future__ import annotations

import sys
import types
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from pwm_fast import config as configuration
from pwm_fast.config import ConfigError
from pwm_fast.run import logger, metrics, tensorboard
from pwm_fast.run.rundir import RunDirectory
from pwm_fast.run.start import train
from pwm_fast.run.tensorboard import TensorboardRun
from tests.run.conftest import Launcher, rows, tiny_arguments, tiny_config

needs_tensorboard = pytest.mark.skipif(
    find_spec("tensorboard") is None, reason="TensorBoard is not installed"
)
ENABLED = {"tensorboard__enabled": True, "tensorboard__gradients": True}


def events(run: Path) -> Any:
    """What TensorBoard shows of a run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    everything = {"scalars": 0, "tensors": 0, "histograms": 0}
    return EventAccumulator(str(run / "tensorboard"), size_guidance=everything).Reload()


def values(found: Any, tag: str) -> dict[int, float]:
    """By step, each of which may come once."""
    scalars = found.Scalars(tag)
    assert len({s.step for s in scalars}) == len(scalars)
    return {s.step: s.value for s in scalars}


@pytest.mark.usefixtures("no_plots")
@needs_tensorboard
def test_a_run_and_its_resume(whole_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for epochs in (4, 6):
        train(tiny_config(run, epochs=epochs, **ENABLED))
    logged = rows(run)
    names = sorted(path.name for path in (run / "tensorboard").iterdir())
    assert names == ["events.out.tfevents.000001", "events.out.tfevents.000002"], "of no host"
    found = events(run)
    by_name = {tag.partition("/")[2]: tag for tag in found.Tags()["scalars"]}
    for name in {key for row in logged for key in row}:
        there = {row["env_steps"]: row[name] for row in logged if row.get(name) is not None}
        assert values(found, by_name[name]) == pytest.approx(there, rel=1e-6, nan_ok=True), name
    for tag in ("loss/value_loss", "loss/wm_loss", "eval/eval_reward", "steps/steps_per_second"):
        assert tag in by_name.values()
    assert list(values(found, "summary/final_reward")) == [64, 96]
    best = [row["eval_reward"] for row in logged if "eval_reward" in row]
    assert list(values(found, "summary/best_reward").values())[-1] == pytest.approx(max(best))

    histograms = [tag for tag in found.Tags()["histograms"] if tag.startswith("gradients/actor.")]
    steps = [event.step for event in found.Histograms(histograms[0])]
    assert steps == [
        row["env_steps"] for row in logged if "eval_reward" in row and "wm_loss" in row
    ]
    texts = [e.tensor_proto.string_val[0].decode() for e in found.Tensors("config/text_summary")]
    for text, epochs in zip(texts, (4, 6), strict=True):
        assert f"\n    epochs: {epochs}\n" in text and "\n      name: cartpole\n" in text


@pytest.mark.usefixtures("no_plots")
@needs_tensorboard
def test_going_back_hides_what_is_computed_again(tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(tiny_config(run, **ENABLED))
    previous = str(run / "checkpoints" / "latest.previous.pt")
    train(tiny_config(run, epochs=5, resume=previous, **{"alg.actor.lr": 0.1}, **ENABLED))
    logged = rows(run)
    assert [row["epoch"] for row in logged] == list(range(6))
    found = events(run)
    there = {row["env_steps"]: row["actor_loss"] for row in logged if "actor_loss" in row}
    assert values(found, "loss/actor_loss") == pytest.approx(there, rel=1e-6)


@needs_tensorboard
def test_a_full_disk_stops_the_run_with_one_line(launcher: Launcher, tmp_path: Path) -> None:
    code = """
import resource
from pwm_fast.run import tensorboard
original = tensorboard.TensorboardRun.log

def limited(self, row):
    if row["epoch"] == 3:
        resource.setrlimit(resource.RLIMIT_FSIZE, (600, 600))
    return original(self, row)

tensorboard.TensorboardRun.log = limited
"""
    arguments = tiny_arguments(tmp_path / "run", "tensorboard.enabled=true")
    outcome = launcher.run(tmp_path, *arguments, hook=code)
    assert outcome.status == 2
    assert outcome.err == f"error: File too large: {tmp_path / 'run' / 'tensorboard'}\n"
    assert launcher.run(tmp_path, *arguments).status == 0, "with room again it goes on"
    assert list(values(events(tmp_path / "run"), "epoch/epoch").values()) == list(range(7))


# --- without TensorBoard --------------------------------------------------------------------------


class File:
    """Stands in for an event file."""

    made: ClassVar[list[File]] = []

    def __init__(self, folder: Path, again_from: int | None = None) -> None:
        self.folder, self.again_from = folder, again_from
        self.said: list[tuple[Any, ...]] = []
        self.made.append(self)

    def scalar(self, tag: str, value: float, step: int) -> None:
        self.said.append((tag, value, step))

    def histogram(self, tag: str, values: np.ndarray, step: int) -> None:
        self.said.append((tag, values.tolist(), step))

    def text(self, tag: str, text: str, step: int) -> None:
        assert tag == "config" and "\n    seed: 0\n" in text

    def flush(self) -> None:
        self.said.append(("flush",))

    def close(self) -> None:
        self.said.append(("close",))


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDirectory:
    monkeypatch.setattr(File, "made", [])
    monkeypatch.setattr(tensorboard, "EventFile", File)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.ModuleType("stand-in"))
    return RunDirectory(tmp_path)


def test_what_is_written(directory: RunDirectory) -> None:
    run = TensorboardRun(tiny_config(directory.path), directory)
    assert File.made == [], "nothing before the first row"
    run.log({"epoch": 3, "env_steps": 48, "wm_loss": 0.5, "esnr": None})
    run.log_gradients({"actor.w": np.array([1.0, 2.0])})
    run.summarize({"best_reward": 7.0, "best_diverged": None})
    run.finish(ok=True)
    (file,) = File.made
    assert (file.folder, file.again_from) == (directory.path / "tensorboard", 48)
    assert file.said == [
        ("epoch/epoch", 3, 48),
        ("env/env_steps", 48, 48),
        ("loss/wm_loss", 0.5, 48),
        ("flush",),
        ("gradients/actor.w", [1.0, 2.0], 48),
        ("flush",),
        ("summary/best_reward", 7.0, 48),
        ("flush",),
        ("close",),
    ]


def test_updates_are_the_steps_of_a_pretraining_run(directory: RunDirectory) -> None:
    run = TensorboardRun(tiny_config(directory.path), directory)
    run.log({"epoch": 2, "env_steps": 0, "updates": 30, "wm_loss": 0.5})
    assert File.made[0].again_from == 30 and ("loss/wm_loss", 0.5, 30) in File.made[0].said


def test_a_summary_of_what_another_process_logged(directory: RunDirectory) -> None:
    """As of a run that a signal stopped in its final evaluation."""
    file = metrics.MetricsFile(directory.metrics)
    for epoch in (0, 1):
        file.write({"epoch": epoch, "env_steps": 16 * epoch})
    file.close()
    run = TensorboardRun(tiny_config(directory.path), directory)
    run.summarize({"final_reward": 7.0})
    assert File.made[0].again_from is None, "the rows stay"
    assert File.made[0].said == [("summary/final_reward", 7.0, 16), ("flush",)]


def test_a_run_that_wandb_refuses_leaves_no_event_file(
    directory: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise ConfigError("no login")

    monkeypatch.setattr(logger, "WandbRun", refuse)
    config = tiny_config(directory.path, tensorboard__enabled=True, wandb__mode="online")
    with pytest.raises(ConfigError, match="no login"):
        logger.RunLogger(config, directory)
    assert File.made == [] and list(directory.path.iterdir()) == []


@pytest.mark.parametrize("error", [None, "TypeError"])
def test_an_installation_that_is_missing_or_broken(
    error: str | None, launcher: Launcher, tmp_path: Path
) -> None:
    lib = tmp_path / "lib"
    lib.mkdir()
    hook = f"import sys\nsys.path.insert(0, {str(lib)!r})\nsys.modules.pop('tensorboard', None)\n"
    if error is None:
        hook += "sys.modules['tensorboard'] = None\n"
    else:
        (lib / "tensorboard.py").write_text(f"raise {error}('Descriptors cannot be created')\n")
    arguments = tiny_arguments(tmp_path / "run", "logger=tensorboard")
    outcome = launcher.run(tmp_path, *arguments, hook=hook)
    assert outcome.status == 2
    needed = "tensorboard.enabled=true needs TensorBoard: pip install 'pwm-fast[tensorboard]'"
    broken = "; tensorboard is installed, but its import fails: Descriptors cannot be created"
    assert outcome.err == f"error: {needed}{broken if error else ''}\n"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "wandb", "enabled"),
    [
        ([], "disabled", False),
        (["wandb.mode=online"], "online", False),
        (["logger=tensorboard"], "disabled", True),
        (["logger=wandb"], "online", False),
        (["logger=[wandb,tensorboard]"], "online", True),
        (["logger=[tensorboard]", "wandb.mode=offline"], "offline", True),
        (["wandb.mode=offline", "logger=wandb"], "offline", False),
        (["tensorboard.enabled=true"], "disabled", True),
    ],
)
def test_how_it_is_asked_for(
    overrides: list[str], wandb: str, enabled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    config = configuration.compose(*overrides)
    assert (config.wandb.mode, config.tensorboard.enabled) == (wandb, enabled)


def test_pretraining_can_be_asked_for_it_too(launcher: Launcher, tmp_path: Path) -> None:
    asked = ("data.path=nowhere", "logger=[tensorboard,wandb]", "--cfg", "job", "--resolve")
    outcome = launcher.run(tmp_path, *asked, module="pwm_fast.pretrain")
    assert (outcome.status, outcome.err) == (0, "")
    assert "  mode: online\n" in outcome.out and "tensorboard:\n  enabled: true\n" in outcome.out
