"""Training runs in this process: what they log, keep, refuse and continue."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pwm_fast.agent import PWM
from pwm_fast.config import ConfigError
from pwm_fast.envs import MujocoEnv, StateNotSupported
from pwm_fast.replay import Replay
from pwm_fast.run import checkpoint, metrics
from pwm_fast.run.build import make_agent, make_env
from pwm_fast.run.checkpoint import CheckpointError
from pwm_fast.run.evaluation import evaluate
from pwm_fast.run.rundir import RunDirectory
from pwm_fast.run.start import train
from pwm_fast.run.trainer import TrainingDiverged
from pwm_fast.seeding import Purpose, stream
from tests.run.conftest import content_of, rows, tiny_config

EVERY_ROW = {
    "epoch",
    "env_steps",
    "reward",
    "episode_length",
    "wall_time",
    "steps_per_second",
    "lr_wm",
    "lr_actor",
    "lr_critic",
    "replay_size",
    "random_share",
    "action_saturation",
    "train_terminated",
    "train_truncated",
    "skipped_updates",
}
LEARNING_ROW = EVERY_ROW | {
    "imagined_return",
    "wm_loss",
    "dynamics_loss",
    "reward_loss",
    "actor_loss",
    "value_loss",
    "actor_grad_norm",
    "critic_grad_norm",
    "wm_grad_norm",
    "actor_std",
}


pytestmark = pytest.mark.usefixtures("no_plots")


# --- what a run writes ----------------------------------------------------------------------------


def test_rows(finished: Path) -> None:
    logged = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in logged] == list(range(7))
    assert [row["env_steps"] for row in logged] == [16 * e for e in range(7)]
    for row in logged[1:]:
        assert not EVERY_ROW - row.keys()
    for row in logged[2:]:
        assert not LEARNING_ROW - row.keys()
        assert all(row[name] is not None for name in LEARNING_ROW)
    assert [row["epoch"] for row in logged if "esnr" in row and "esnr_db" in row] == [2, 4, 6]
    assert [row["epoch"] for row in logged if "eval_reward" in row] == [0, 2, 4, 6]


def test_how_episodes_end_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Epoch by epoch; an end of both kinds, as all terminal ones are here, is a terminal one."""
    terminal, ends = [], []
    add, step = Replay.add, MujocoEnv.step

    def both(env: MujocoEnv, action: torch.Tensor) -> tuple[Any, ...]:
        obs, reward, terminated, truncated, info = step(env, action)
        return obs, reward, terminated, truncated | terminated, info

    def spy(replay: Replay, *transition: Any, **options: Any) -> None:
        _, _, _, terminated, done, _ = transition
        terminal.append(int(terminated.sum()))
        ends.append(int(done.sum()))
        add(replay, *transition, **options)

    monkeypatch.setattr(MujocoEnv, "step", both)
    monkeypatch.setattr(Replay, "add", spy)
    changes = {"epochs": 3, "env__max_episode_steps": 20, "alg__steps_per_epoch": 20}
    train(tiny_config(tmp_path / "run", "hopper", **changes))
    logged = rows(tmp_path / "run")[1:]
    for epoch, row in enumerate(logged):
        own = slice(20 * epoch, 20 * epoch + 20)
        assert row["train_terminated"] == sum(terminal[own])
        assert row["train_truncated"] == sum(ends[own]) - sum(terminal[own])
    assert sum(terminal) > 0 and sum(ends) > sum(terminal), "both kinds"


def test_normalisers_are_logged_where_they_are_used(tmp_path: Path) -> None:
    start = {"epochs": 3, "alg__world_model__num_bins": 1}
    on = {"alg__normalize_obs": True, "alg__normalize_rewards": True}
    train(tiny_config(tmp_path / "on", **start, **on))
    agent = checkpoint.load(tmp_path / "on" / "checkpoints" / "final.pt")["agent"]
    first, last = (rows(tmp_path / "on")[k] for k in (1, -1))
    assert [row["obs_rms_count"] for row in (first, last)] == [16, 48]
    assert last["obs_rms_std_max"] == agent["obs_rms"]["var"].max().sqrt().item()
    assert last["reward_rms_mean"] == agent["rew_rms"]["mean"].item()
    assert last["return_rms_std"] == agent["ret_rms"]["var"].sqrt().item()
    train(tiny_config(tmp_path / "off", **start, alg__normalize_returns=False))
    assert not [key for key in rows(tmp_path / "off")[-1] if "_rms_" in key]


def test_reward_is_of_real_episodes(finished: Path) -> None:
    config = tiny_config(finished)
    env = make_env(config, config.eval.episodes, 99)
    agent = make_agent(config, env, torch.device("cpu"))
    saved = checkpoint.load(finished / "checkpoints" / "latest.pt")
    agent.load_state_dict(saved["agent"])
    result = evaluate(agent, env, stream(config.seed, Purpose.EVALUATION))
    assert rows(finished)[-1]["reward"] == result.returns.mean().item()
    assert rows(finished)[-1]["episode_length"] == 12


def test_summary(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    rewards = [row["reward"] for row in rows(finished)]
    assert summary["status"] == "finished"
    assert (summary["epochs"], summary["env_steps"]) == (6, 96)
    assert summary["best"]["reward"] == max(rewards)
    assert summary["best"]["epoch"] == rewards.index(max(rewards))
    assert len(summary["evaluation"]["returns"]) == 2
    assert summary["parameters"]["total"] > 0


def test_checkpoints(finished: Path) -> None:
    files = {p.name for p in (finished / "checkpoints").iterdir()}
    assert files == {"latest.pt", "latest.previous.pt", "best.pt", "final.pt"}
    loaded = {name: checkpoint.load(finished / "checkpoints" / name) for name in files}
    assert [loaded[f]["epoch"] for f in ("latest.pt", "latest.previous.pt", "final.pt")] == [
        6,
        4,
        6,
    ]
    best = json.loads((finished / "summary.json").read_text())["best"]
    assert (loaded["best.pt"]["epoch"], loaded["best.pt"]["best"]) == (best["epoch"], best)
    assert loaded["latest.pt"]["replay"] is not None
    assert loaded["best.pt"]["replay"] is None and loaded["final.pt"]["replay"] is None


@pytest.mark.parametrize(
    "changes",
    [
        {"num_envs": 1},
        {"eval__episodes": 1, "eval__final_episodes": 1},
        {"eval__every": 0, "esnr__every": 0, "checkpoint__every": 0},
        {"alg__model_learning__updates": 0, "alg__actor__updates": 0},
        {"env": "hopper", "env__max_episode_steps": 30},
        {"alg__world_model__kind": "mlp", "alg__world_model__num_bins": 1},
    ],
    ids=str,
)
def test_unusual_runs(tmp_path: Path, changes: dict[str, Any]) -> None:
    summary, status = train(tiny_config(tmp_path / "run", epochs=3, **changes))
    assert (summary["status"], summary["epochs"], status) == ("finished", 3, 0)
    logged = rows(tmp_path / "run")
    assert [row["epoch"] for row in logged] == [0, 1, 2, 3]
    assert all(row["reward"] is not None for row in logged)


def test_no_epochs(tmp_path: Path) -> None:
    summary, status = train(tiny_config(tmp_path / "run", epochs=0))
    assert (summary["epochs"], status) == (0, 0)
    assert len(rows(tmp_path / "run")) == 1
    assert train(tiny_config(tmp_path / "run", epochs=0))[0]["wall_time"] == summary["wall_time"]


def test_same_seed_same_run(finished: Path, tmp_path: Path) -> None:
    train(tiny_config(tmp_path / "same"))
    assert rows(tmp_path / "same") == rows(finished)
    train(tiny_config(tmp_path / "other", seed=1))
    assert rows(tmp_path / "other")[-1]["wm_loss"] != rows(finished)[-1]["wm_loss"]


def test_learns_only_from_what_replay_holds(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    # 3 steps an epoch and windows of 8: the third epoch is the first that holds one.
    changes = {"alg__horizon": 8, "alg__steps_per_epoch": 3}
    train(tiny_config(tmp_path / "run", epochs=4, **changes))
    assert ["wm_loss" in row for row in rows(tmp_path / "run")] == [False] * 3 + [True] * 2
    assert "nothing was learned" not in capsys.readouterr().out
    train(tiny_config(tmp_path / "short", epochs=2, **changes))
    assert "nothing was learned" in capsys.readouterr().out


# --- going on -------------------------------------------------------------------------------------


def test_finished_run_again_does_nothing(run_dir: Path, capsys: pytest.CaptureFixture) -> None:
    before = content_of(run_dir)
    summary, status = train(tiny_config(run_dir, eval__every=3))
    assert status == 0 and summary == json.loads(before["summary.json"])
    assert content_of(run_dir) == before
    assert "nothing to do" in capsys.readouterr().out


def test_more_epochs_on_a_finished_run(run_dir: Path) -> None:
    before = rows(run_dir)
    summary, _ = train(tiny_config(run_dir, epochs=8))
    assert (summary["status"], summary["epochs"]) == ("finished", 8)
    after = rows(run_dir)
    assert after[:7] == before
    assert [row["epoch"] for row in after] == list(range(9))
    assert after[-1]["replay_size"] == 8 * 16, "it went on with its replay"
    assert checkpoint.load(run_dir / "checkpoints" / "final.pt")["epoch"] == 8


@pytest.mark.parametrize("name", ["best", "final"])
def test_goes_on_without_a_replay(finished: Path, tmp_path: Path, name: str) -> None:
    source = finished / "checkpoints" / f"{name}.pt"
    start = checkpoint.load(source)["epoch"]
    config = tiny_config(
        tmp_path / "run", resume=str(source), epochs=start + 4, alg__steps_per_epoch=3
    )
    summary, status = train(config)
    assert (summary["status"], summary["epochs"], status) == ("finished", start + 4, 0)
    logged = rows(tmp_path / "run")
    assert [row["epoch"] for row in logged] == [start + i for i in (1, 2, 3, 4)]
    # 3 steps hold no window of 4: it collects first.
    assert ["wm_loss" in row for row in logged] == [False, True, True, True]


def test_goes_on_from_the_one_before_the_latest(
    run_dir: Path, capsys: pytest.CaptureFixture
) -> None:
    before = rows(run_dir)
    (run_dir / "checkpoints" / "latest.pt").unlink()  # as a kill between two renames may leave it
    train(tiny_config(run_dir))
    assert "latest.previous.pt after epoch 4" in capsys.readouterr().out
    assert rows(run_dir) == before


def test_named_checkpoint_of_the_same_run_goes_back(run_dir: Path) -> None:
    before = rows(run_dir)
    previous = run_dir / "checkpoints" / "latest.previous.pt"
    train(tiny_config(run_dir, resume=str(previous)))
    assert rows(run_dir) == before


def test_environment_without_saved_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: MujocoEnv) -> None:
        raise StateNotSupported("a simulator of another kind")

    monkeypatch.setattr(MujocoEnv, "get_state", refuse)
    train(tiny_config(tmp_path / "run", epochs=2))
    assert checkpoint.load(tmp_path / "run" / "checkpoints" / "latest.pt")["env"] is None
    train(tiny_config(tmp_path / "run", epochs=4))
    assert [row["epoch"] for row in rows(tmp_path / "run")] == list(range(5))


def test_best_ignores_what_is_not_finite() -> None:
    assert metrics.rank(None, math.nan) == metrics.rank(None, None) == (0.0, -math.inf)
    assert metrics.rank(None, -3.0) == (0.0, -3.0)
    assert metrics.rank(1, 5.0) < metrics.rank(0, math.nan) < metrics.rank(0, -9.0)


# --- refusing -------------------------------------------------------------------------------------


def shorten(run_dir: Path) -> None:
    path = run_dir / "checkpoints" / "latest.pt"
    path.write_bytes(path.read_bytes()[:5000])


def foreign(run_dir: Path) -> None:
    torch.save({"state_dict": {}}, run_dir / "checkpoints" / "latest.pt")


def other_run(run_dir: Path) -> None:
    shutil.copytree(run_dir, run_dir.parent / "other")


def nothing(run_dir: Path) -> None:
    pass


REFUSED: dict[str, tuple[Callable[[Path], None], dict[str, Any], type[Exception], str]] = {
    "cut short": (shorten, {}, CheckpointError, r"latest\.pt is no readable.*latest\.previous\.pt"),
    "foreign": (foreign, {}, CheckpointError, r"latest\.pt is not a pwm_fast checkpoint"),
    "other settings": (
        nothing,
        {"seed": 3, "alg__actor__lr": 0.1},
        ConfigError,
        r"latest\.pt is of .*alg\.actor\.lr was 0\.0005, is 0\.1; seed was 0, is 3",
    ),
    "other environment": (nothing, {"env": "hopper"}, ConfigError, "env.name was 'cartpole', is"),
    "fewer epochs": (nothing, {"epochs": 3}, ConfigError, "epochs=3, but .* 6 epochs behind it"),
    "no resume": (nothing, {"resume": None}, ConfigError, "holds a run already: resume=auto"),
    "missing file": (nothing, {"resume": "/nix.pt"}, ConfigError, "resume=/nix.pt: there is no"),
    "another run's": (
        other_run,
        {"resume": "{}/../other/checkpoints/best.pt"},
        ConfigError,
        "holds a run already, and resume=.* is of another one",
    ),
    "other architecture": (
        nothing,
        {"resume": "{}/checkpoints/best.pt", "alg__actor__units": [8]},
        CheckpointError,
        r"best\.pt does not fit this run: .* instead of \[8",
    ),
    "other num_envs": (
        nothing,
        {"resume": "{}/checkpoints/latest.pt", "num_envs": 5},
        CheckpointError,
        r"latest\.pt does not fit this run: the saved replay has",
    ),
    "small replay": (
        nothing,
        {"alg__replay_capacity": 23},
        ConfigError,
        "alg.replay_capacity=23 .* at least 24",
    ),
    "short episodes": (
        nothing,
        {"env__max_episode_steps": 3},
        ConfigError,
        "alg.horizon=4 is long",
    ),
    "no CUDA": (nothing, {"device": "cuda:77"}, ConfigError, "device=cuda:77, but torch"),
    "no CUDA for graphs": (
        nothing,
        {"graphs": "true", "device": "cpu"},
        ConfigError,
        "graphs must be auto or false where device is cpu",
    ),
    "unknown option": (nothing, {"env__options": {"x": 1}}, ConfigError, "env 'cartpole': .*'x'"),
}


def test_resume_of_a_run_older_than_a_key(run_dir: Path) -> None:
    """A saved configuration without the key has its default; another value is refused."""
    latest = run_dir / "checkpoints" / "latest.pt"
    saved = checkpoint.load(latest)
    del saved["config"]["env"]["engine"], saved["config"]["alg"]["max_skipped_updates"]
    checkpoint.save(latest, saved)
    with pytest.raises(ConfigError, match=r": alg\.max_skipped_updates was 20, is 3\. Give"):
        train(tiny_config(run_dir, resume="auto", alg__max_skipped_updates=3))
    summary, status = train(tiny_config(run_dir, resume="auto", epochs=7))
    assert (summary["epochs"], status) == (7, 0)


@pytest.mark.parametrize("case", REFUSED)
def test_refused_start_changes_nothing(case: str, run_dir: Path) -> None:
    prepare, changes, kind, message = REFUSED[case]
    prepare(run_dir)
    if changes.get("resume"):
        changes = {**changes, "resume": changes["resume"].format(run_dir)}
    before = content_of(run_dir)
    with pytest.raises(kind, match=message) as caught:
        train(tiny_config(run_dir, **changes))
    assert "\n" not in str(caught.value)
    assert content_of(run_dir) == before


def test_refuses_other_settings_before_the_first_checkpoint(run_dir: Path) -> None:
    shutil.rmtree(run_dir / "checkpoints")
    (run_dir / "summary.json").unlink()
    (run_dir / "no_checkpoint_yet.txt").write_text("as a run that has just begun has it")
    before = content_of(run_dir)
    with pytest.raises(ConfigError, match=r"config\.yaml is of .* seed was 0, is 1"):
        train(tiny_config(run_dir, seed=1))
    assert content_of(run_dir) == before
    logged = rows(run_dir)
    train(tiny_config(run_dir))  # the same settings start anew
    assert rows(run_dir) == logged


def test_one_process_a_directory(run_dir: Path) -> None:
    before = content_of(run_dir)
    with RunDirectory(run_dir), pytest.raises(ConfigError, match="another process is training"):
        train(tiny_config(run_dir, epochs=8))
    assert content_of(run_dir) == before
    assert train(tiny_config(run_dir))[1] == 0, "the lock goes with its holder"


def test_unusable_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigError, match=f"run_dir={path} cannot be used: Not a directory"):
            train(tiny_config(path))
    assert (tmp_path / "file").read_text() == "mine"


def test_stops_when_nothing_is_finite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"alg__max_skipped_updates": 4, "epochs": 50}
    original = PWM.update_world_model

    def poisoned(self: PWM, windows: Any) -> Any:
        return original(self, windows._replace(obs=windows.obs * math.inf))

    with monkeypatch.context() as patch:
        patch.setattr(PWM, "update_world_model", poisoned)
        with pytest.raises(TrainingDiverged, match=r"alg\.max_skipped_updates=4.*latest\.pt"):
            train(tiny_config(tmp_path / "run", **changes))
    assert len(rows(tmp_path / "run")) < 5, "it stopped soon"
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "diverged"
    saved = checkpoint.load(tmp_path / "run" / "checkpoints" / "latest.pt")
    assert all(t.isfinite().all() for t in saved["agent"]["world_model"].values())


def test_long_bootstrap_stops_when_nothing_is_finite(tmp_path: Path) -> None:
    changes = {
        "alg__max_skipped_updates": 4,
        "alg__model_learning__bootstrap_updates": 1000,
        "alg__model_learning__lr": 1e38,
    }
    with pytest.raises(TrainingDiverged):
        train(tiny_config(tmp_path / "run", **changes))
    assert [row["epoch"] for row in rows(tmp_path / "run")] == [0, 1]


@pytest.mark.parametrize(("hold", "low", "high"), [(1, 0.0, 0.0), (4, 0.6, 0.9)])
def test_random_actions_are_held(tmp_path: Path, hold: int, low: float, high: float) -> None:
    """With ``random_hold`` = n the share of repeated actions is 1 - 1/n; with 1 none repeats."""
    changes = {"alg.random_hold": hold, "alg.random_epochs": 50, "epochs": 40}
    train(tiny_config(tmp_path / "run", **changes))
    replay = checkpoint.load(tmp_path / "run" / "checkpoints" / "latest.pt")["replay"]
    _, _, obs, action, _ = replay["shape"]
    data, length = replay["data"], replay["run"]
    acted = (length[:, 1:] > 0) & (length[:, :-1] > 0)
    actions = data[..., obs : obs + action]
    repeated = (actions[:, 1:] == actions[:, :-1]).all(-1)[acted].float().mean()
    assert low <= repeated <= high
