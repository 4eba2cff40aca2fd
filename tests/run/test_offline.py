"""Offline data in a run: verified, in the replay, resumed; and the commands around it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pwm_fast.config import ConfigError, TrainConfig
from pwm_fast.data import DataError, offline, register
from pwm_fast.data.__main__ import main
from pwm_fast.data.episodes import read_episode, write_episode
from pwm_fast.replay import Episode
from pwm_fast.run import checkpoint, provenance, trainer
from pwm_fast.run.build import make_env
from pwm_fast.run.export import ExportConfig, export
from pwm_fast.run.start import train
from tests.data.tdmpc2_files import save
from tests.run.conftest import Launcher, rows, tiny_arguments, tiny_config

OBS, ACTION, T, COUNT = 5, 1, 12, 6  # of the cart-pole, and of a tiny run's episodes


pytestmark = pytest.mark.usefixtures("no_plots")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A registered data set of :data:`COUNT` episodes with recognisable rewards."""
    folder = tmp_path / "data"
    folder.mkdir()
    for i in range(COUNT):
        episode = Episode(
            torch.randn(T + 1, OBS),
            torch.rand(T, ACTION) * 2 - 1,
            1000.0 * (i + 1) + torch.arange(float(T)),
            torch.zeros(T, dtype=torch.bool),
        )
        write_episode(folder / f"episode_{i}.npz", episode)
    register(folder)
    return folder


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def config(run_dir: Path, data: Path | None, **changes: object) -> TrainConfig:
    where = {} if data is None else {"data__path": str(data)}
    return tiny_config(run_dir, **where, **changes)  # type: ignore[arg-type]


def record(run_dir: Path, index: int = -1) -> dict:
    found: dict = provenance.read(run_dir / "provenance.json")[index]["data"]
    return found


def test_the_replay_holds_the_data_from_the_start(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = []
    collect = trainer.Trainer._collect

    def looked(self: trainer.Trainer) -> None:
        held.append((len(self.state.replay), self.state.replay.num_windows()))
        if len(held) == 1:
            rewards = self.state.replay.sample(400).reward
            assert set((rewards // 1000).int().flatten().tolist()) == set(range(1, COUNT + 1))
        collect(self)

    monkeypatch.setattr(trainer.Trainer, "_collect", looked)
    train(config(tmp_path / "run", data, epochs=2))
    assert held[0] == (COUNT * T, COUNT * (T - 4 + 1))
    assert held[1] == (COUNT * T + 16, held[0][1] + 4)
    assert rows(tmp_path / "run")[-1]["replay_size"] == COUNT * T + 32


def test_learning_can_start_in_the_first_epoch(data: Path, tmp_path: Path) -> None:
    train(config(tmp_path / "run", data, epochs=1, alg__random_epochs=1))
    assert "wm_loss" in rows(tmp_path / "run")[1]


def test_the_data_change_what_is_learnt(data: Path, tmp_path: Path) -> None:
    train(config(tmp_path / "with", data))
    train(config(tmp_path / "without", None))
    with_data, without = rows(tmp_path / "with"), rows(tmp_path / "without")
    assert with_data[0] == without[0] and with_data[-1] != without[-1]


def test_statistics_know_the_data(data: Path, tmp_path: Path) -> None:
    train(
        config(
            tmp_path / "run",
            data,
            epochs=0,
            alg__normalize_obs=True,
            alg__normalize_rewards=True,
            alg__world_model__num_bins=1,
        )
    )
    agent = checkpoint.load(tmp_path / "run" / "checkpoints" / "latest.pt")["agent"]
    episodes = [read_episode(p, OBS, ACTION) for p in sorted(data.glob("*.npz"))]
    obs = torch.cat([e.obs[:-1] for e in episodes]).double()
    assert torch.allclose(agent["obs_rms"]["mean"], obs.mean(0))
    assert torch.allclose(agent["obs_rms"]["var"], obs.var(0, correction=0))
    rewards = torch.cat([e.reward for e in episodes]).double()
    assert torch.allclose(agent["rew_rms"]["mean"], rewards.mean())
    assert agent["rew_rms"]["count"] == COUNT * T


def test_what_is_recorded(data: Path, tmp_path: Path) -> None:
    train(config(tmp_path / "run", data, epochs=1))
    registered, _ = register(data)
    expected = {
        "path": str(data),
        "manifest_sha256": registered.sha256,
        "episodes": COUNT,
        "transitions": COUNT * T,
    }
    assert record(tmp_path / "run") == expected
    assert checkpoint.load(tmp_path / "run" / "checkpoints" / "latest.pt")["data"] == expected


def test_the_same_episodes_as_a_chunk(data: Path, tmp_path: Path) -> None:
    """TD-MPC2's form of them fills the replay with the same rows, and the statistics alike."""
    episodes = [read_episode(p, OBS, ACTION) for p in sorted(data.glob("*.npz"))]
    first = {"action": torch.full((1, ACTION), torch.nan), "reward": torch.full((1,), torch.nan)}
    values = {
        "obs": torch.stack([e.obs for e in episodes]),
        "action": torch.stack([torch.cat([first["action"], e.action]) for e in episodes]),
        "reward": torch.stack([torch.cat([first["reward"], e.reward]) for e in episodes]),
        "task": torch.full((COUNT, T + 1), 3, dtype=torch.int32),
    }
    chunk = save(tmp_path / "chunk_0.pt", values)
    register(chunk)
    kept = []
    for name, path in (("npz", data), ("chunk", chunk)):
        train(config(tmp_path / name, path, epochs=1, alg__normalize_obs=True))
        kept.append(checkpoint.load(tmp_path / name / "checkpoints" / "latest.pt"))
        assert record(tmp_path / name)["transitions"] == COUNT * T
    assert all(torch.equal(kept[0]["replay"][k], kept[1]["replay"][k]) for k in ("data", "run"))
    means = [content["agent"]["obs_rms"]["mean"] for content in kept]
    assert torch.equal(*means) and bool(means[0].any())


# Refusals


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: flip(d / "episode_3.npz"), "changed: episode_3.npz"),
        (lambda d: (d / "episode_0.npz").unlink(), "missing: episode_0.npz"),
        (lambda d: shutil.copy(d / "episode_0.npz", d / "extra.npz"), "unknown: extra.npz"),
        (lambda d: (d / "manifest.json").unlink(), "is not registered"),
        (lambda d: shutil.rmtree(d), "there is no data set"),
    ],
)
@pytest.mark.parametrize("resumed", [False, True])
def test_changed_data_are_refused(
    change: Callable[[Path], object],
    message: str,
    resumed: bool,
    data: Path,
    starter: Launcher,
    tmp_path: Path,
) -> None:
    """At the start and when a run goes on: by name, in one line, with nothing written."""
    run_dir = tmp_path / "run"
    if resumed:
        first = starter.run(tmp_path, *tiny_arguments(run_dir, f"data.path={data}", "epochs=2"))
        assert first.status == 0, first.err
    change(data)
    before = {p: p.read_bytes() for p in run_dir.rglob("*") if p.is_file()}
    outcome = starter.run(tmp_path, *tiny_arguments(run_dir, f"data.path={data}"))
    assert outcome.status == 2 and outcome.out == ""
    assert len(outcome.err.splitlines()) == 1 and message in outcome.err, outcome.err
    if resumed:
        assert {p: p.read_bytes() for p in run_dir.rglob("*") if p.is_file()} == before
    else:
        assert not (run_dir / "metrics.jsonl").exists()


def test_a_manifest_elsewhere(data: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "manifest of mine.json"
    (data / "manifest.json").rename(elsewhere)
    train(config(tmp_path / "run", data, epochs=1, data__manifest=str(elsewhere)))
    flip(data / "episode_2.npz")
    with pytest.raises(DataError, match=r"changed: episode_2\.npz"):
        train(config(tmp_path / "run", data, epochs=2, data__manifest=str(elsewhere)))


def test_a_single_file_is_a_data_set(data: Path, tmp_path: Path) -> None:
    file = data / "episode_1.npz"
    register(file)
    train(config(tmp_path / "run", file, epochs=1))
    assert record(tmp_path / "run")["episodes"] == 1


def test_pt_files_and_others_beside_them(data: Path, tmp_path: Path) -> None:
    episode = read_episode(data / "episode_0.npz", OBS, ACTION)
    torch.save(episode._asdict(), data / "episode_0.pt")
    (data / "readme.md").write_text("where the data are from")
    register(data, update=True)
    train(config(tmp_path / "run", data, epochs=1))
    assert record(tmp_path / "run")["episodes"] == COUNT + 1


def test_data_that_do_not_fit_the_run(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"alg\.replay_capacity must be at least 104 for 4 envs"):
        train(config(tmp_path / "a", data, alg__replay_capacity=60))
    with pytest.raises(DataError, match=r"episode_0\.npz: action must be \[T, 3\]"):
        train(config(tmp_path / "b", data, env="hopper"))
    with pytest.raises(
        DataError, match=r"no episode has alg\.horizon=20 steps, the longest has 12"
    ):
        train(config(tmp_path / "c", data, alg__horizon=20, env__max_episode_steps=30))
    for name in "abc":
        assert not (tmp_path / name / "metrics.jsonl").exists()
    text = tmp_path / "text"
    text.mkdir()
    (text / "notes.txt").write_text("no episode")
    register(text)
    with pytest.raises(DataError, match="holds no episodes"):
        train(config(tmp_path / "d", text))


def test_a_manifest_without_data(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.manifest must be null where data\.path is null"):
        tiny_config(tmp_path, data__manifest="m.json")


# Going on


def test_a_stopped_run_goes_on_to_the_bit(data: Path, starter: Launcher, tmp_path: Path) -> None:
    """The data are in the saved replay; they are not added a second time."""
    code = (
        "import os, signal\n"
        "from pwm_fast.agent import PWM\n"
        "update, count = PWM.update_policy, 0\n"
        "def counted(self, *inputs):\n"
        "    global count\n"
        "    count += 1\n"
        "    if count == 3:\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return update(self, *inputs)\n"
        "PWM.update_policy = counted\n"
    )
    extra = (f"data.path={data}", "alg.normalize_obs=true")
    assert starter.run(tmp_path, *tiny_arguments(tmp_path / "whole", *extra)).status == 0
    arguments = tiny_arguments(tmp_path / "run", *extra)
    assert starter.run(tmp_path, *arguments, hook=code).status == 143
    assert starter.run(tmp_path, *arguments).status == 0
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")
    assert record(tmp_path / "run", 0) == record(tmp_path / "run", 1)


def test_other_data_are_refused_when_going_on(data: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    train(config(run_dir, data, epochs=2))
    with pytest.raises(ConfigError, match=r"data\.path was '.*data', is None"):
        train(config(run_dir, None, epochs=4))
    # The same place, other data that are registered: what the replay holds decides.
    flip(data / "episode_0.npz")
    (data / "episode_0.npz").unlink()
    register(data, update=True)
    with pytest.raises(ConfigError, match=r"the replay in .* was filled with a data set"):
        train(config(run_dir, data, epochs=4))
    latest = str(run_dir / "checkpoints" / "latest.pt")
    with pytest.raises(ConfigError, match=r"this run's data\.path is no data set"):
        train(config(tmp_path / "new", None, epochs=4, resume=latest))
    assert not (tmp_path / "new" / "metrics.jsonl").exists()


def test_a_checkpoint_without_replay_gets_the_data_again(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    observed: list[int] = []
    observe = trainer.PWM.observe
    monkeypatch.setattr(
        trainer.PWM,
        "observe",
        lambda self, o, *rest, **kw: (observed.append(len(o)), observe(self, o, *rest, **kw)),
    )
    train(config(tmp_path / "one", data, epochs=1))
    assert observed[:COUNT] == [T] * COUNT
    final = str(tmp_path / "one" / "checkpoints" / "final.pt")
    observed.clear()
    train(config(tmp_path / "two", data, epochs=2, resume=final))
    assert rows(tmp_path / "two")[-1]["replay_size"] == COUNT * T + 16
    assert set(observed) == {4}, "the saved statistics know the data"
    # Of a run that had no data they do not.
    train(config(tmp_path / "none", None, epochs=1))
    observed.clear()
    final = str(tmp_path / "none" / "checkpoints" / "final.pt")
    train(config(tmp_path / "three", data, epochs=2, resume=final))
    assert observed[:COUNT] == [T] * COUNT


def test_older_checkpoints_have_no_data(tmp_path: Path) -> None:
    train(tiny_config(tmp_path / "run", epochs=2))
    path = tmp_path / "run" / "checkpoints" / "latest.pt"
    content = torch.load(path, weights_only=True)
    del content["data"], content["config"]["data"], content["config"]["deterministic"]
    torch.save(content, path)
    train(tiny_config(tmp_path / "run", epochs=3))
    assert rows(tmp_path / "run")[-1]["epoch"] == 3


# The commands


def test_register_and_verify(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    other = shutil.copytree(data, tmp_path / "other")
    (other / "manifest.json").unlink()
    assert main(["register", str(data), str(other)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 and all(f"{COUNT} files" in line for line in said)
    assert said[0].split("sha256 ")[1] == said[1].split("sha256 ")[1]
    assert main(["verify", str(data), str(other)]) == 0
    assert capsys.readouterr().out.count("as registered") == 2
    flip(other / "episode_4.npz")
    (other / "episode_5.npz").unlink()
    assert main(["verify", str(data), str(other)]) == 1
    captured = capsys.readouterr()
    assert captured.err == ""
    assert captured.out.splitlines()[1:] == [
        f"{other}: not as registered in {other / 'manifest.json'}:",
        "  changed: episode_4.npz (same size, another content)",
        "  missing: episode_5.npz",
    ]
    assert main(["register", str(other)]) == 2
    assert "--update" in capsys.readouterr().err
    assert main(["register", "--update", str(other)]) == 0 and main(["verify", str(other)]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["verify", "no"], "error: there is no data set no"),
        (["register", "no"], "error: there is no data set no"),
        (["verify", "a", "b", "--manifest", "m"], "--manifest m is of one data set, got 2 paths"),
        (["verify", "."], "is not registered"),
    ],
)
def test_wrong_use(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and message in error


@pytest.mark.parametrize("arguments", [[], ["forget"], ["register"], ["verify", "--update", "x"]])
def test_usage(arguments: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2 and "usage:" in capsys.readouterr().err


@pytest.mark.skipif(os.name != "posix", reason="pseudo terminals")
@pytest.mark.parametrize("terminal", [True, False])
def test_progress_on_a_terminal_alone(
    terminal: bool, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    import sys

    from pwm_fast.data import progress

    monkeypatch.setattr(progress, "DELAY", 0.0)  # seconds before a bar shows
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    assert main(["verify", str(data)]) == 0
    assert ("B/s" in capsys.readouterr().err) == terminal


# Export


def test_export_of_random_actions(tmp_path: Path) -> None:
    values = ExportConfig(out=str(tmp_path / "out"), env={"name": "cartpole"}, episodes=3)
    out, transitions, sha256 = export(values)
    assert sorted(p.name for p in out.iterdir()) == [
        "episode_0.npz",
        "episode_1.npz",
        "episode_2.npz",
        "manifest.json",
    ]
    episodes = [read_episode(p, OBS, ACTION) for p in sorted(out.glob("*.npz"))]
    assert [len(e.action) for e in episodes] == [240] * 3 and transitions == 720
    # Episodes of the environment: its rewards are those of its observations and actions.
    env = make_env(tiny_config(tmp_path), 1, 0)
    for episode in episodes:
        reward = env.task.reward(episode.obs[:-1], episode.action)  # type: ignore[attr-defined]
        assert torch.allclose(reward, episode.reward)
    again = export(ExportConfig(out=str(tmp_path / "b"), env={"name": "cartpole"}, episodes=3))
    assert again[2] == sha256, "the seed decides every byte"
    other = ExportConfig(out=str(tmp_path / "c"), env={"name": "cartpole"}, episodes=3, seed=1)
    assert export(other)[2] != sha256


def test_more_episodes_than_envs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pwm_fast.run.export.NUM_ENVS", 4)
    env = {"name": "cartpole", "max_episode_steps": 5}
    out, transitions, _ = export(ExportConfig(out=str(tmp_path / "o"), env=env, episodes=10))
    files = sorted(out.glob("*.npz"))
    assert len(files) == 10 and transitions == 50
    starts = {tuple(read_episode(p, OBS, ACTION).obs[0].tolist()) for p in files}
    assert len(starts) == 10


def test_export_and_train(whole_run: Path, launcher: Launcher, tmp_path: Path) -> None:
    """The commands of the documentation, one after another."""
    arguments = ("export", f"checkpoint={whole_run}/checkpoints/best.pt", "out=set", "episodes=8")
    outcome = launcher.run(tmp_path, *arguments, "random_share=0.25", module="pwm_fast.data")
    assert outcome.status == 0, outcome.err
    assert "8 episodes, 96 transitions in set" in outcome.out
    assert launcher.run(tmp_path, "verify", "set", module="pwm_fast.data").status == 0
    run = launcher.run(tmp_path, *tiny_arguments(Path("run"), "data.path=set", "epochs=2"))
    assert run.status == 0, run.err
    assert "data set set: 8 episodes, 96 transitions, as registered" in run.out
    flip(tmp_path / "set" / "episode_7.npz")
    run = launcher.run(tmp_path, *tiny_arguments(Path("run"), "data.path=set", "epochs=3"))
    assert run.status == 2 and "changed: episode_7.npz" in run.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "out=DIR is needed"),
        (["out=o"], "export needs either checkpoint=PATH, or env=NAME"),
        (["out=o", "env=cartpole", "checkpoint=x.pt"], "got both"),
        (["out=o", "checkpoint=x.pt"], "there is no checkpoint file x.pt"),
        (["out=o", "env=cartpole", "policy=stochastic"], "policy must be random without"),
        (["out=o", "env=cartpole", "policy=best"], "policy must be one of stochastic,"),
        (["out=o", "env=cartpole", "random_share=2"], "random_share must be in [0, 1], got 2"),
        (["out=o", "env=cartpole", "episodes=0"], "episodes must be positive, got 0"),
        (["out=o", "env=cartpole", "random_hold=0"], "random_hold must be positive or null"),
        (["out=.", "env=cartpole"], "out=. must be a new or an empty folder"),
        (["out=/proc/o", "env=cartpole"], "/proc/o"),
        (["out=o", "env=moon"], "Could not find 'env/moon'"),
        (["out=o", "env=cartpole", "foo=1"], "foo: there is no such key"),
    ],
)
def test_wrong_exports(
    arguments: list[str], message: str, launcher: Launcher, tmp_path: Path
) -> None:
    outcome = launcher.run(tmp_path, "export", *arguments, module="pwm_fast.data")
    assert outcome.status == 2, outcome
    assert len(outcome.err.splitlines()) == 1 and message in outcome.err, outcome.err
    assert not (tmp_path / "o").exists()


def test_no_data_is_no_data(tmp_path: Path) -> None:
    values = tiny_config(tmp_path)
    assert offline.load(values, make_env(values, 1, 0)) is None
    assert json.dumps(values.data.path) == "null"
