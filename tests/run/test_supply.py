"""A run that cannot learn says so as soon as that shows, with what to set."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pwm_fast import cli
from pwm_fast.config import ConfigError, TrainConfig
from pwm_fast.run import checkpoint
from pwm_fast.run.start import train
from pwm_fast.run.supply import ENOUGH, NothingToLearn
from tests.run.conftest import Launcher, rows, tiny_arguments, tiny_config

pytest.importorskip("gymnasium", reason="needs pip install 'pwm-fast[gym]'")
numbered = pytest.importorskip("tests.run.numbered")

HORIZON = 4


pytestmark = pytest.mark.usefixtures("no_plots")


def config(run_dir: Path, longest: int, **changes: Any) -> TrainConfig:
    """Episodes of 2 to ``longest`` steps, of which many have the most."""
    kwargs = {"longest": longest, "grow": changes.pop("grow", 0)}
    own = {"env.name": "gym", "env.id": numbered.ID, "env.kwargs": kwargs}
    return tiny_config(run_dir, **{**own, "alg.horizon": HORIZON, **changes})


def refused(run_dir: Path, longest: int, **changes: Any) -> str:
    with pytest.raises(NothingToLearn) as caught:
        train(config(run_dir, longest, **changes))
    assert isinstance(caught.value, cli.USER_ERRORS), "one line, exit status 2"
    return str(caught.value)


@pytest.mark.parametrize(("longest", "num_envs", "horizon"), [(3, 8, 4), (2, 3, 4), (5, 16, 11)])
def test_short_episodes(
    longest: int, num_envs: int, horizon: int, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    changes = {
        "num_envs": num_envs,
        "epochs": 400,
        "checkpoint.every": 0,
        "alg.horizon": horizon,
        "env.max_episode_steps": 20,
        "alg.random_epochs": 3,
    }
    text = refused(tmp_path / "run", longest, **changes)
    assert f"alg.horizon={horizon}" in text
    assert f"had {longest}; set alg.horizon={longest} or less" in text
    out = capsys.readouterr().out
    assert "warning: after epoch 3 there is nothing to learn from: a window has " in out
    assert out.count("warning") == 1
    done = checkpoint.load(tmp_path / "run" / "checkpoints" / "latest.pt")["epoch"]
    steps = 4 * num_envs * (done + 1)
    assert 3 < done < 400 and steps / longest >= ENOUGH / 2, "not before it is known"
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["status"], summary["epochs"]) == ("nothing to learn", done)
    before = rows(tmp_path / "run")
    again = refused(tmp_path / "run", longest, **changes)  # at once, without more steps
    assert again.partition(" episodes had")[2] == text.partition(" episodes had")[2]
    assert rows(tmp_path / "run") == before


def test_said_at_the_end_of_a_short_run(tmp_path: Path) -> None:
    assert "set alg.horizon=3 or less" in refused(tmp_path / "run", 3, epochs=3)
    assert not (tmp_path / "run" / "checkpoints" / "final.pt").exists()


def test_episodes_that_just_fit(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    train(config(tmp_path / "run", HORIZON))
    assert "wm_loss" in rows(tmp_path / "run")[2]
    assert "warning" not in capsys.readouterr().out


def test_episodes_that_get_longer(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    train(config(tmp_path / "run", 2, grow=4, epochs=20))
    learned = ["wm_loss" in row for row in rows(tmp_path / "run")]
    assert not any(learned[:3]) and learned[-1]
    assert capsys.readouterr().out.count("warning: after epoch 2 there is nothing") == 1


@pytest.mark.parametrize(
    ("changes", "warning"),
    [
        ({"epochs": 2, "alg.random_epochs": 3}, "epochs=2 end before the random actions of"),
        ({"epochs": 2, "alg.horizon": 11}, "epochs=2 of alg.steps_per_epoch=4 steps are shorter"),
        ({"epochs": 0, "alg.random_epochs": 3}, None),
        ({"epochs": 2}, None),
    ],
)
def test_what_the_configuration_tells(
    changes: dict[str, Any],
    warning: str | None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    """A trial run may be that short: it says so before it starts."""
    _, status = train(tiny_config(tmp_path / "run", **changes))
    out = capsys.readouterr().out
    assert status == 0
    assert ("warning" in out) == (warning is not None)
    if warning is not None:
        assert f"warning: {warning}" in out
        assert out.index("warning:") < out.index("epoch 0/"), "before the work"
        assert "nothing was learned" in out


def test_an_episode_shorter_than_a_window_by_configuration(tmp_path: Path) -> None:
    for changes in ({"env.max_episode_steps": 3}, {"alg.horizon": 13}):
        with pytest.raises(ConfigError, match=r"alg\.horizon=\d+ is longer than an episode"):
            train(tiny_config(tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_few_windows(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    train(tiny_config(tmp_path / "run", **{"alg.horizon": 7, "num_envs": 2}))
    assert "updates on 4 windows; these are few, a batch has 8" in capsys.readouterr().out
    train(tiny_config(tmp_path / "more"))
    assert "updates on 20 windows\n" in capsys.readouterr().out


def test_command(launcher: Launcher, tmp_path: Path) -> None:
    pytest.importorskip("gymnasium.envs.mujoco", reason="needs pip install 'pwm-fast[gym]'")
    arguments = tiny_arguments(
        tmp_path / "run",
        "env=gym",
        "env.id=InvertedDoublePendulum-v5",
        "env.max_episode_steps=100",
        "alg.horizon=40",
        "alg.replay_capacity=4000",
        "alg.random_epochs=12",
        "epochs=30",
    )
    outcome = launcher.run(tmp_path, *arguments)
    assert outcome.status == 2
    assert outcome.err.startswith("error: there is nothing to learn from: a window has alg.horizon")
    assert outcome.err.count("\n") == 1
    assert "warning: after epoch 12 there is nothing" in outcome.out
    assert (tmp_path / "run" / "checkpoints" / "latest.pt").exists()
