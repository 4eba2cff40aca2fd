"""What a run directory holds is never replaced by another state unless the user asks for it."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from pwm_fast.agent import PWM
from pwm_fast.config import ConfigError, from_dict, to_dict
from pwm_fast.run import checkpoint, metrics, trainer
from pwm_fast.run.checkpoint import CheckpointError
from pwm_fast.run.rundir import RunDirectory, refuse_other_environment
from pwm_fast.run.start import train
from tests.run.conftest import content_of, finish, rows, tiny_config

pytestmark = pytest.mark.usefixtures("no_plots")


@pytest.fixture(scope="module")
def best_in_the_middle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run whose best checkpoint has epochs behind and before it."""
    directory = tmp_path_factory.mktemp("middle") / "run"
    original = trainer.Trainer._evaluate

    def better_in_the_middle(self: trainer.Trainer, episodes: int) -> Any:
        result = original(self, episodes)
        result.returns.fill_(-abs(self.state.epoch - 3.0))
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.Trainer, "_evaluate", better_in_the_middle)
        finish(directory)
    assert checkpoint.load(directory / "checkpoints" / "best.pt")["epoch"] == 4
    return directory


@pytest.fixture
def middle(best_in_the_middle: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return shutil.copytree(best_in_the_middle, tmp_path / "run")


def write(directory: Path, content: dict[str, bytes]) -> None:
    for name, data in content.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def killed(directory: Path, monkeypatch: pytest.MonkeyPatch, **changes: object) -> None:
    """A run that ended as if it had been killed, in its third epoch."""

    def kill(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(PWM, "update_world_model", kill)
        with pytest.raises(KeyboardInterrupt):
            train(tiny_config(directory, **changes))


# --- directories that miss some files -------------------------------------------------------------

PARTS = {
    "latest": "checkpoints/latest.pt",
    "previous": "checkpoints/latest.previous.pt",
    "best": "checkpoints/best.pt",
    "final": "checkpoints/final.pt",
    "metrics": "metrics.jsonl",
    "summary": "summary.json",
    "config": "config.yaml",
    "plots": "plots/summary.png",
}
RESULTS = ("best", "final", "metrics", "summary", "plots")
SUBSETS = [s for n in range(len(PARTS) + 1) for s in itertools.combinations(PARTS, n)]


@pytest.mark.parametrize("resume", ["auto", None])
def test_every_subset_of_files(finished: Path, tmp_path: Path, resume: str | None) -> None:
    """Without a latest checkpoint a run starts where there is no result, and nowhere else."""
    whole = content_of(finished)
    for number, subset in enumerate(SUBSETS):
        if {"latest", "previous"} & set(subset) and resume == "auto":
            continue  # it goes on; tested elsewhere
        directory = tmp_path / str(number)
        write(directory, {PARTS[part]: whole[PARTS[part]] for part in subset})
        directory.mkdir(exist_ok=True)
        before = content_of(directory)
        config = tiny_config(directory, resume=resume)
        with RunDirectory(directory) as run:
            if {"summary", "config"} <= set(subset) and resume == "auto":
                source = run.source(config)
                assert source is None
                assert run.finished(config, source) == json.loads(before["summary.json"])
            elif set(subset) - {"config"}:
                with pytest.raises(ConfigError, match=f"run_dir={directory} holds a run") as caught:
                    run.source(config)
                message = str(caught.value)
                assert "\n" not in message and "another run_dir" in message
                if resume == "auto":
                    for name in ("final", "best"):  # final.pt is the newer one
                        if name in subset:
                            assert f"resume={directory}/checkpoints/{name}.pt goes on" in message
                            break
                    else:
                        assert "no checkpoint is left" in message
            else:
                assert run.source(config) is None
                assert run.finished(config, None) is None
        after = content_of(directory)
        after.pop(".lock")
        assert after == before, subset
        shutil.rmtree(directory)


@pytest.mark.parametrize("part", RESULTS)
def test_the_command_overwrites_nothing(finished: Path, tmp_path: Path, part: str) -> None:
    directory = tmp_path / "run"
    write(directory, {PARTS[part]: content_of(finished)[PARTS[part]]})
    before = content_of(directory)
    with pytest.raises(ConfigError, match=r"holds a run without its checkpoints/latest\.pt"):
        train(tiny_config(directory))
    after = content_of(directory)
    after.pop(".lock")
    assert after == before


def test_finished_run_without_its_latest_checkpoints(
    run_dir: Path, capsys: pytest.CaptureFixture
) -> None:
    for path in run_dir.glob("checkpoints/latest*.pt"):
        path.unlink()
    before = content_of(run_dir)
    assert train(tiny_config(run_dir))[1] == 0
    assert "nothing to do" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="seed was 0, is 1"):
        train(tiny_config(run_dir, seed=1))
    with pytest.raises(ConfigError, match=r"resume=\S+final\.pt goes on after its epoch 6"):
        train(tiny_config(run_dir, epochs=8))
    assert content_of(run_dir) == before
    # What the message says works.
    final = run_dir / "checkpoints" / "final.pt"
    logged = rows(run_dir)
    summary, status = train(tiny_config(run_dir, epochs=8, resume=str(final)))
    assert (summary["status"], summary["epochs"], status) == ("finished", 8, 0)
    assert rows(run_dir)[:7] == logged and len(rows(run_dir)) == 9


def test_interrupted_run_without_its_latest_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "run"
    killed(directory, monkeypatch, checkpoint__every=1)
    (directory / "checkpoints" / "latest.pt").unlink()
    if (directory / "checkpoints" / "latest.previous.pt").exists():
        (directory / "checkpoints" / "latest.previous.pt").unlink()
    before = content_of(directory)
    with pytest.raises(ConfigError, match=r"without its checkpoints/latest\.pt"):
        train(tiny_config(directory, checkpoint__every=1))
    assert content_of(directory) == before


def test_killed_before_the_first_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "run"
    killed(directory, monkeypatch, checkpoint__every=0)
    assert (directory / "checkpoints" / "best.pt").exists()
    assert "starts it anew" in (directory / "no_checkpoint_yet.txt").read_text()
    before = content_of(directory)
    with pytest.raises(ConfigError, match=r"config\.yaml is of .* seed was 0, is 1"):
        train(tiny_config(directory, seed=1))
    with pytest.raises(ConfigError, match="holds a run already"):
        train(tiny_config(directory, resume=None))
    assert content_of(directory) == before
    assert train(tiny_config(directory))[0]["status"] == "finished"
    assert [row["epoch"] for row in rows(directory)] == list(range(7))
    assert not (directory / "no_checkpoint_yet.txt").exists()


# --- going back -----------------------------------------------------------------------------------


def test_going_back_keeps_what_came_after(middle: Path, capsys: pytest.CaptureFixture) -> None:
    before = content_of(middle)
    best = middle / "checkpoints" / "best.pt"
    train(tiny_config(middle, resume=str(best)))
    after = content_of(middle)
    for name in ("checkpoints/latest", "checkpoints/final"):
        assert after[f"{name}.kept_1.pt"] == before[f"{name}.pt"]
    assert after["metrics.kept_1.jsonl"] == before["metrics.jsonl"]
    assert after["summary.kept_1.json"] == before["summary.json"]
    said = capsys.readouterr().out
    assert "held after epoch 4 is kept in " in said and "metrics.kept_1.jsonl" in said
    assert [row["epoch"] for row in rows(middle)] == list(range(7))
    train(tiny_config(middle, resume=str(best)))
    again = content_of(middle)
    assert again["metrics.kept_1.jsonl"] == before["metrics.jsonl"]
    assert again["metrics.kept_2.jsonl"] == after["metrics.jsonl"]


def test_an_older_latest_that_was_put_back(run_dir: Path) -> None:
    """As an old backup: auto goes on from it, and what had come after it is kept."""
    saved = run_dir / "checkpoints"
    (saved / "latest.previous.pt").rename(saved / "latest.pt")
    before = content_of(run_dir)
    assert train(tiny_config(run_dir))[0]["status"] == "finished"
    after = content_of(run_dir)
    assert after["checkpoints/final.kept_1.pt"] == before["checkpoints/final.pt"]
    assert after["metrics.kept_1.jsonl"] == before["metrics.jsonl"]
    assert after["summary.kept_1.json"] == before["summary.json"]


def test_a_kill_leaves_no_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tmp_path / "run"
    killed(directory, monkeypatch, checkpoint__every=1)
    assert train(tiny_config(directory, checkpoint__every=1))[0]["status"] == "finished"
    assert not list(directory.rglob("*.kept_*"))


def test_killed_just_after_going_back(middle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same directory then goes on from there, and not from the latest checkpoint before."""
    best = middle / "checkpoints" / "best.pt"
    killed(middle, monkeypatch, resume=str(best), checkpoint__every=0)
    assert checkpoint.load(middle / "checkpoints" / "latest.pt")["epoch"] == 4
    assert train(tiny_config(middle))[0]["status"] == "finished"
    assert [row["epoch"] for row in rows(middle)] == list(range(7))


def test_damaged_latest_goes_on_from_the_one_before(finished: Path, run_dir: Path) -> None:
    latest = run_dir / "checkpoints" / "latest.pt"
    data = bytearray(latest.read_bytes())
    data[3000] ^= 1
    latest.write_bytes(data)
    previous = run_dir / "checkpoints" / "latest.previous.pt"
    with pytest.raises(
        CheckpointError, match=rf"latest\.pt is no .*\(epoch 4\): resume={previous}"
    ):
        train(tiny_config(run_dir))
    assert train(tiny_config(run_dir, resume=str(previous)))[0]["status"] == "finished"
    assert rows(run_dir) == rows(finished)
    assert (run_dir / "checkpoints" / "latest.kept_1.pt").read_bytes() == data


# --- damaged records ------------------------------------------------------------------------------


def resumable(finished: Path, directory: Path) -> Path:
    """The finished run as if it had been killed after its fourth epoch's checkpoint."""
    shutil.copytree(finished, directory)
    saved = directory / "checkpoints"
    (saved / "latest.previous.pt").rename(saved / "latest.pt")
    (saved / "final.pt").unlink()
    (directory / "summary.json").unlink()
    return directory


@pytest.mark.parametrize(
    "line", ["", "{", "[1]", '{"epoch": true}', '{"reward": 1}', "\x00\x00", "[" * 100_000]
)
def test_damaged_line_is_said_and_kept(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture, line: str
) -> None:
    directory = resumable(finished, tmp_path / "run")
    log = directory / "metrics.jsonl"
    lines = log.read_text().splitlines()
    lines[2] = line
    log.write_text("\n".join(lines) + "\n")
    damaged = log.read_bytes()
    train(tiny_config(directory))
    assert "is damaged in line 3, which is left out" in capsys.readouterr().out
    assert (directory / "metrics.kept_1.jsonl").read_bytes() == damaged
    assert [row["epoch"] for row in rows(directory)] == [0, 1, 3, 4, 5, 6]


def test_lost_rows_are_said(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A checkpoint comes after the rows of its epochs: those that lack were lost by no kill."""
    directory = resumable(finished, tmp_path / "run")
    log = directory / "metrics.jsonl"
    lines = log.read_text().splitlines()
    torn = [*lines[:2], lines[3], lines[4][:-9]]
    log.write_text("\n".join(torn))
    damaged = log.read_bytes()
    train(tiny_config(directory))
    said = capsys.readouterr().out
    assert "metrics.jsonl has no sound row of epoch 2, 4" in said
    assert "is damaged in line 4, which is left out" in said
    assert (directory / "metrics.kept_1.jsonl").read_bytes() == damaged
    assert [row["epoch"] for row in rows(directory)] == [0, 1, 3, 5, 6]


@pytest.mark.parametrize("change", ["gone", "empty"])
def test_a_lost_log_is_said(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture, change: str
) -> None:
    directory = resumable(finished, tmp_path / "run")
    if change == "gone":
        (directory / "metrics.jsonl").unlink()
    else:
        (directory / "metrics.jsonl").write_bytes(b"")
    train(tiny_config(directory))
    assert "metrics.jsonl has no sound row of epoch 1, 2, 3, 4" in capsys.readouterr().out


def test_two_rows_of_an_epoch(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    directory = resumable(finished, tmp_path / "run")
    log = directory / "metrics.jsonl"
    damaged = log.read_text().replace('"epoch": 3', '"epoch": 4', 1)
    log.write_text(damaged)
    train(tiny_config(directory))
    said = capsys.readouterr().out
    assert "no sound row of epoch 3" in said and "damaged in line 4, which is left out" in said
    assert (directory / "metrics.kept_1.jsonl").read_text() == damaged


def test_a_run_that_began_elsewhere_has_lost_nothing(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    source = finished / "checkpoints" / "latest.previous.pt"
    directory = tmp_path / "run"
    assert train(tiny_config(directory, resume=str(source)))[0]["status"] == "finished"
    assert train(tiny_config(directory, resume="auto", epochs=7))[0]["status"] == "finished"
    assert "no sound row" not in capsys.readouterr().out
    assert [row["epoch"] for row in rows(directory)] == [5, 6, 7]


def swap(directory: Path, a: str, b: str) -> None:
    first, second = (directory / "checkpoints" / f"{name}.pt" for name in (a, b))
    aside = first.with_name("aside")
    first.rename(aside)
    second.rename(first)
    aside.rename(second)


@pytest.mark.parametrize("other", ["final", "best"])
def test_latest_in_anothers_place(run_dir: Path, other: str) -> None:
    """Without its replay it was not written as the latest checkpoint."""
    swap(run_dir, "latest", other)
    before = content_of(run_dir)
    with pytest.raises(CheckpointError, match=r"not written as latest.pt: it has no replay") as e:
        train(tiny_config(run_dir, epochs=9))
    assert "goes on after its epoch 6" in str(e.value)
    assert content_of(run_dir) == before


def test_latest_and_the_one_before_swapped(run_dir: Path) -> None:
    """What is further on is kept; once."""
    (run_dir / "summary.json").unlink()
    (run_dir / "checkpoints" / "final.pt").unlink()
    swap(run_dir, "latest", "latest.previous")
    before = content_of(run_dir)
    assert train(tiny_config(run_dir, epochs=9))[0]["status"] == "finished"
    after = content_of(run_dir)
    kept = after["checkpoints/latest.previous.kept_1.pt"]
    assert kept == before["checkpoints/latest.previous.pt"]
    assert after["metrics.kept_1.jsonl"] == before["metrics.jsonl"]
    assert not list(run_dir.rglob("*.kept_2.*"))


def test_a_new_replay_is_said(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for name, said in (("best", True), ("latest", False)):
        source = finished / "checkpoints" / f"{name}.pt"
        train(tiny_config(tmp_path / name, resume=str(source), epochs=8))
        assert (", with a new replay" in capsys.readouterr().out) is said


def test_torn_last_line_is_none(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    directory = resumable(finished, tmp_path / "run")
    with (directory / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 7, "rew')
    train(tiny_config(directory))
    assert "damaged" not in capsys.readouterr().out
    assert not list(directory.glob("metrics.kept*"))
    assert len(metrics.read(directory / "metrics.jsonl")) == 7


@pytest.mark.parametrize("name", ["config.yaml", "summary.json", "provenance.json"])
@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff\xfe\x00",
        b"a: [",
        b"[1, 2]",
        b"3",
        b"null",
        b"{" * 100_000,
        b"1: 2",
        b'{"x',
        b"a: &b 1\nc: *b",
    ],
    ids=lambda data: repr(data[:12]),
)
def test_damaged_records_are_named(run_dir: Path, name: str, data: bytes) -> None:
    (run_dir / name).write_bytes(data)
    before = content_of(run_dir)
    with pytest.raises(ConfigError) as caught:
        train(tiny_config(run_dir, epochs=8))
    assert str(caught.value).startswith(f"{run_dir / name} is ")
    assert "\n" not in str(caught.value) and "move it away" in str(caught.value)
    assert content_of(run_dir) == before


# --- refused runs ---------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["run", "deep/below/run"])
@pytest.mark.parametrize("case", ["environment", "damaged", "epochs", "architecture", "data"])
def test_refused_run_leaves_no_directory(
    finished: Path, tmp_path: Path, case: str, place: str
) -> None:
    best = tmp_path / "best.pt"
    shutil.copy(finished / "checkpoints" / "best.pt", best)
    changes: dict[str, Any] = {
        "environment": {"env": "hopper"},
        "damaged": {},
        "epochs": {"epochs": 0, "resume": str(finished / "checkpoints" / "final.pt")},
        "architecture": {"alg__actor__units": [8]},
        "data": {"data__path": str(tmp_path / "nowhere")},
    }[case]
    if case == "damaged":
        best.write_bytes(best.read_bytes()[:-7])
    before = {p.name for p in tmp_path.iterdir()}
    with pytest.raises((ConfigError, CheckpointError)):
        train(tiny_config(tmp_path / place, **{"resume": str(best), **changes}))
    assert {p.name for p in tmp_path.iterdir()} == before


def test_refused_run_leaves_a_directory_that_was_there(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    best = str(finished / "checkpoints" / "best.pt")
    with pytest.raises(CheckpointError):
        train(tiny_config(tmp_path / "run", env="hopper", resume=best))
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"


def test_another_environment_is_named(finished: Path, tmp_path: Path) -> None:
    for name in ("best", "latest"):
        path = finished / "checkpoints" / f"{name}.pt"
        with pytest.raises(CheckpointError) as caught:
            train(tiny_config(tmp_path / "run", env="hopper", resume=str(path)))
        message = str(caught.value)
        assert f"{path} is of another environment: env.name=cartpole, this run has " in message
        assert "env.name=hopper" in message and "instead of" not in message


@pytest.mark.parametrize(
    ("name", "key", "then", "now"),
    [
        ("dmc_tasks", "tasks", ["walker-walk", "cheetah-run"], ["cheetah-run", "walker-walk"]),
        ("dmc_tasks", "numbers", [0, 1], [1, 0]),
        ("torch", "factory", "envs:walk", "envs:run"),
    ],
)
def test_other_tasks_are_another_environment(name: str, key: str, then: Any, now: Any) -> None:
    """Their widths may be the same; the replay's transitions are of the tasks that were."""
    saved, config = (from_dict({"env": {"name": name, key: value}}) for value in (then, now))
    path = Path("final.pt")
    refuse_other_environment(to_dict(saved), saved, path)
    with pytest.raises(CheckpointError, match=rf"another environment: .*env.options.{key}="):
        refuse_other_environment(to_dict(saved), config, path)


def test_other_sizes_are_named_with_their_keys(finished: Path, tmp_path: Path) -> None:
    path = finished / "checkpoints" / "latest.pt"
    for change, said in (
        ({"num_envs": 5}, "num_envs was 4, is 5"),
        ({"alg__actor__units": [8, 8]}, "alg.actor.units was [16], is [8, 8]"),
        ({"alg__horizon": 5}, "alg.horizon was 4, is 5"),
    ):
        with pytest.raises(CheckpointError, match="does not fit this run") as caught:
            train(tiny_config(tmp_path / "run", resume=str(path), **change))
        assert said in str(caught.value)
