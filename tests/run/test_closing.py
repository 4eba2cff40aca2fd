"""Every environment that a command makes is closed, however the command ends."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pwm_fast.analysis.diagnosis import DiagnoseConfig, diagnose
from pwm_fast.config import ConfigError, TrainConfig, compose
from pwm_fast.envs import EnvironmentFault
from pwm_fast.run import build, start, trainer
from pwm_fast.run.evaluation import EvaluateConfig, evaluate_checkpoint
from pwm_fast.run.export import ExportConfig, export
from pwm_fast.run.interrupt import Interrupt, Interrupted
from tests.run.conftest import rows, tiny_config

gymnasium = pytest.importorskip("gymnasium", reason="needs pip install 'pwm-fast[gym]'")

from tests.envs.scripted import Walk  # noqa: E402

ID = "pwm_fast/Counted-v0"


class Counted(Walk):
    """Counts what was made and closed; ``fault`` is what a reset or step does in time."""

    made: int = 0
    closed: int = 0
    calls: int = 0
    fault_at: int = -1

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(length=30, **kwargs)
        Counted.made += 1

    def step(self, action: Any) -> Any:
        Counted.calls += 1
        if Counted.calls == Counted.fault_at:
            raise OSError("the simulator is gone")
        return super().step(action)

    def close(self) -> None:
        Counted.closed += 1


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    Counted.made = Counted.closed = Counted.calls = 0
    Counted.fault_at = -1
    monkeypatch.setattr(trainer, "plot_run", lambda *_: [])
    gymnasium.register(ID, entry_point=Counted, max_episode_steps=30)
    yield
    del gymnasium.registry[ID]


def config(path: Path, **changes: object) -> TrainConfig:
    return tiny_config(path / "run", "gym", env__options={"id": ID}, **changes)


def test_a_run_and_what_reads_it(tmp_path: Path) -> None:
    summary, status = start.train(config(tmp_path))
    assert (summary["status"], status) == ("finished", 0)
    assert Counted.made == Counted.closed == 4 + 2 + 2
    assert all(row["diverged"] == 0 for row in rows(tmp_path / "run")[1:])
    path = str(tmp_path / "run" / "checkpoints" / "final.pt")
    evaluate_checkpoint(EvaluateConfig(path, episodes=3, device="cpu"))
    assert Counted.made == Counted.closed == 11
    diagnose(DiagnoseConfig(path, episodes=3, windows=8, points=4, probes=2, device="cpu"))
    assert Counted.made == Counted.closed == 14
    export(ExportConfig(out=str(tmp_path / "out"), checkpoint=path, episodes=2, device="cpu"))
    assert Counted.made == Counted.closed == 16
    start.train(config(tmp_path))  # finished already
    assert Counted.made == Counted.closed == 20


@pytest.mark.parametrize("at", [1, 30, 60, 95, 130])
def test_an_error_at_any_time(at: int, tmp_path: Path) -> None:
    """In the first evaluation, while collecting, and in later evaluations."""
    Counted.fault_at = at
    with pytest.raises(OSError, match="the simulator is gone"):
        start.train(config(tmp_path))
    assert Counted.made == Counted.closed > 0


@pytest.mark.parametrize("at", [3, 20, 40, 80])
def test_an_interrupt_at_any_time(at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = iter(range(1, 10_000))

    def check(stop: Interrupt) -> None:
        if next(calls) == at:
            raise Interrupted

    monkeypatch.setattr(Interrupt, "check_alone", check)
    summary, _ = start.train(config(tmp_path))
    assert summary["status"] == "interrupted"
    assert Counted.made == Counted.closed > 0


def test_a_start_that_is_not_finite_ends_the_run_with_its_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reset = Walk.reset

    def spoilt(env: Walk, **options: Any) -> Any:
        obs, info = reset(env, **options)
        return (obs * float("nan") if Counted.calls > 30 else obs), info

    monkeypatch.setattr(Walk, "reset", spoilt)
    match = rf"{ID}, env \d, reset of episode \d: .*entry 0 is nan"
    with pytest.raises(EnvironmentFault, match=match):
        start.train(config(tmp_path))
    assert Counted.made == Counted.closed


def test_diverged_envs_are_counted_in_the_metrics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Walk.step

    def spoilt(env: Walk, action: Any) -> Any:
        obs, reward, *rest = step(env, action)
        return (obs, float("nan") if env.t == 5 else reward, *rest)

    monkeypatch.setattr(Walk, "step", spoilt)
    with pytest.warns(RuntimeWarning, match=rf"{ID}: \d of \d envs diverged"):
        start.train(config(tmp_path))
    # 24 steps in each of 4 envs, whose every fifth diverges; 4 steps an epoch.
    counts = [row["diverged"] for row in rows(tmp_path / "run")[1:]]
    assert sum(counts) == 4 * 4 and set(counts) == {0, 4}
    replay = torch.load(tmp_path / "run" / "checkpoints" / "latest.pt", weights_only=True)["replay"]
    assert torch.isfinite(replay["data"]).all()


@pytest.mark.parametrize("plus", ["", "+", "++"])
def test_options_of_a_gymnasium_environment_need_no_plus(plus: str) -> None:
    given = [f"{plus}env.kwargs.truncates=true", f"{plus}env.kwargs.deep.er=2"]
    run = compose("env=gym", f"env.id={ID}", *given)
    assert run.env.options["kwargs"] == {"truncates": True, "deep": {"er": 2}}
    if plus != "+":
        run = compose("env=gym", f"{plus}env.kwargs={{truncates: true}}")
        assert run.env.options["kwargs"] == {"truncates": True}
    with pytest.raises(ConfigError, match="unexpected keyword argument 'no'"):
        build.make_env(compose("env=gym", f"env.id={ID}", "env.kwargs.no=1"), 1, 0)
    assert Counted.made == Counted.closed == 0
