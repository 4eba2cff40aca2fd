"""Runs from before robots had variants stay on the physics that they began on."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from pwm_fast.analysis import runs
from pwm_fast.analysis.diagnosis import DiagnoseConfig, diagnose
from pwm_fast.analysis.groups import arrange
from pwm_fast.config import ConfigError, TrainConfig
from pwm_fast.run import build, checkpoint, evaluation, export
from pwm_fast.run.checkpoint import CheckpointError
from pwm_fast.run.start import train
from tests.run.conftest import tiny_config, train_without_plots

pytestmark = pytest.mark.usefixtures("no_plots")
SMALL: dict[str, Any] = {"epochs": 2, "esnr.every": 0, "alg.random_epochs": 1}


def config(run_dir: Path, **changes: Any) -> TrainConfig:
    return tiny_config(run_dir, env="ant", **{**SMALL, **changes})


@pytest.fixture(scope="module")
def older(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the ant whose files name no variant."""
    run_dir = tmp_path_factory.mktemp("older") / "run"
    train_without_plots(config(run_dir, env__variant="dflex"))
    for path in (run_dir / "checkpoints").glob("*.pt"):
        content = checkpoint.load(path)
        del content["config"]["env"]["options"]["variant"]
        checkpoint.save(path, content)
    written = yaml.safe_load((run_dir / "config.yaml").read_text())
    del written["env"]["options"]["variant"]
    (run_dir / "config.yaml").write_text(yaml.safe_dump(written))
    return run_dir


@pytest.fixture
def run_dir(older: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(older, tmp_path / "run"))


@pytest.fixture
def masses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Of the robots of every environment that is made, in kg."""
    found: list[float] = []

    def made(*args: Any, **options: Any) -> Any:
        env = make(*args, **options)
        found.append(round(float(env.task.model().body_mass.sum())))
        return env

    make = build.make
    monkeypatch.setattr(build, "make", made)
    return found


def test_what_only_reads_a_checkpoint(older: Path, tmp_path: Path, masses: list[float]) -> None:
    best = str(older / "checkpoints" / "best.pt")
    evaluation.evaluate_checkpoint(evaluation.EvaluateConfig(best, episodes=2, device="cpu"))
    diagnose(DiagnoseConfig(best, episodes=2, windows=8, points=4, probes=2, device="cpu"))
    export.export(export.ExportConfig(str(tmp_path / "data"), best, episodes=2, device="cpu"))
    assert masses == [182] * 4  # diagnose makes another, whose state it sets


def test_the_same_command_goes_on_as_often_as_it_is_given(
    run_dir: Path, masses: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    for epochs in (3, 4):
        assert train(config(run_dir, epochs=epochs))[0]["epochs"] == epochs
        said = capsys.readouterr().out
        assert ("goes on with the physics that it began with, env.variant=dflex" in said) == (
            epochs == 3
        )
        saved = checkpoint.load(run_dir / "checkpoints" / "latest.pt")
        assert saved["config"]["env"]["options"] == {"variant": "dflex"}
    assert set(masses) == {182}


def test_named_checkpoints_go_on_as_they_began(
    older: Path, tmp_path: Path, masses: list[float]
) -> None:
    latest = str(older / "checkpoints" / "latest.pt")
    for epochs, resume in ((3, latest), (4, "auto")):
        train(config(tmp_path / "new", epochs=epochs, resume=resume))
    assert set(masses) == {182}


def test_init_starts_a_new_run_on_any_variant(
    older: Path, tmp_path: Path, masses: list[float]
) -> None:
    train(config(tmp_path / "new", init=str(older / "checkpoints" / "best.pt")))
    assert set(masses) == {36}


def test_a_finished_run_is_left_alone(run_dir: Path, masses: list[float]) -> None:
    before = (run_dir / "provenance.json").read_bytes()
    train(config(run_dir))
    shutil.rmtree(run_dir / "checkpoints")
    train(config(run_dir))
    assert (run_dir / "provenance.json").read_bytes() == before


def test_a_new_run_records_its_variant_and_keeps_it(tmp_path: Path, masses: list[float]) -> None:
    new = tmp_path / "new"
    train(config(new, epochs=1))
    assert set(masses) == {36}
    latest = new / "checkpoints" / "latest.pt"
    assert checkpoint.load(latest)["config"]["env"]["options"] == {"variant": "default"}
    with pytest.raises(ConfigError, match=r"env\.options\.variant was 'default', is 'dflex'"):
        train(config(new, env__variant="dflex"))
    with pytest.raises(CheckpointError, match=r"env\.name=ant, this run has .*\.variant=dflex\."):
        train(config(tmp_path / "other", env__variant="dflex", resume=str(latest)))
    with pytest.raises(ConfigError, match="variant of ant must be one of default, dflex, got 'x'"):
        train(config(tmp_path / "other", env__variant="x"))


def test_comparisons_keep_them_apart(older: Path, tmp_path: Path) -> None:
    train(config(tmp_path / "new", epochs=1))
    found = [runs.load(path) for path in (older, tmp_path / "new")]
    environments, _ = arrange([run for run in found if isinstance(run, runs.Run)])
    assert [e.label for e in environments] == [
        "ant (variant=dflex, max_episode_steps=12)",
        "ant (max_episode_steps=12)",
    ]
