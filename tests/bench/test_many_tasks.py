"""The study of several tasks: its data, its commands, and the table of what they came to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import many_tasks
from bench.many_tasks import ALGS, JOINT, TOGETHER, WAYS
from bench.pages import PRETRAINING
from pwm_fast.data import describe
from pwm_fast.run.start import train
from tests.bench.stored import check_page, stored
from tests.envs.suites import dm_control_suite
from tests.run.conftest import tiny_config

TASKS = ("cartpole-swingup", "walker-walk", "cheetah-run")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two short runs, of tasks of different widths."""
    dm_control_suite()
    found = []
    for domain, task in (("cartpole", "swingup"), ("reacher", "easy")):
        folder = tmp_path_factory.mktemp(domain)
        options = {"env__domain": domain, "env__task": task, "esnr__every": 0}
        train(tiny_config(folder, "dmc", epochs=8, **options))
        found.append(folder)
    return found


def test_data_are_the_episodes_that_runs_have_seen(runs: list[Path], tmp_path: Path) -> None:
    """8 epochs of 4 steps in 4 envs are 2 episodes of 12 in each, padded to the widest."""
    out = tmp_path / "data"
    assert many_tasks.main(["data", *map(str, runs), "--out", str(out)]) == 0
    said = json.loads((out / "returns.json").read_text())
    together = describe(out / TOGETHER)
    assert together.names == ("cartpole-swingup", "reacher-easy")
    assert (together.obs_dim, together.action_dim) == (6, 2)
    for number, (task, width) in enumerate((("cartpole-swingup", 5), ("reacher-easy", 6))):
        assert said[task]["episodes"] == together.tasks[number].episodes == 8
        alone = describe(out / task)
        assert (alone.obs_dim, alone.whole.transitions) == (width, 96)
        saved = torch.load(runs[number] / "checkpoints" / "latest.pt", weights_only=True)
        kept = saved["replay"]["data"]
        for _, episode in alone.episodes():
            assert len(episode.action) == 12
            rows = torch.cat([episode.obs[:-1], episode.action, episode.reward[:, None]], 1)
            near = (kept[:, :, None, : rows.shape[1]] == rows[0]).all(-1).nonzero()
            assert len(near), "its first step is in the replay"
            env, first, _ = near[0].tolist()
            assert torch.equal(kept[env, first : first + 12, : rows.shape[1]], rows)
    returns = [float(e.reward.sum()) for _, e in describe(out / "reacher-easy").episodes()]
    assert said["reacher-easy"]["best"] == pytest.approx(max(returns))


def test_runs_that_give_no_data_are_named(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other, short = tmp_path / "other", tmp_path / "short"
    train(tiny_config(other, epochs=1, esnr__every=0))
    options = {"env__domain": "cartpole", "env__task": "swingup", "esnr__every": 0}
    train(tiny_config(short, "dmc", epochs=2, **options))
    for given, message in (
        ([runs[0], other], f"{other} must be a run of env=dmc, got env=cartpole"),
        ([runs[1], short], f"{short / 'checkpoints' / 'latest.pt'} holds no whole episode of 12"),
        ([runs[0], runs[0]], "cartpole-swingup, as a run before it is: give one of each task"),
    ):
        arguments = ["data", *map(str, given), "--out", str(tmp_path / "data")]
        assert many_tasks.main(arguments) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "data").exists()


def test_what_is_missing_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["data", "--out", str(tmp_path)], "data needs run directories"),
        (["data", str(tmp_path)], "data needs --out=DIR"),
        (["collect", "--out", str(tmp_path)], "collect needs --data=DIR"),
        (["data", str(tmp_path), "--out", str(tmp_path)], f"--out={tmp_path} is there already"),
        (["data", str(tmp_path / "none"), "--out", str(tmp_path / "data")], "none"),
    ):
        assert many_tasks.main(arguments) == 2
        assert message in capsys.readouterr().err


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    episode = {"obs": torch.zeros(1, 30, 3), "action": torch.zeros(1, 30, 2)}
    rest = {"reward": torch.zeros(1, 30)}
    chunks = [
        {**episode, **rest, "task": torch.full((1, 30), k, dtype=torch.int32)} for k in range(3)
    ]
    together = {key: torch.cat([chunk[key] for chunk in chunks]) for key in chunks[0]}
    many_tasks._write(folder / TOGETHER, together, dict(enumerate(TASKS)))
    returns = {task: {"episodes": 1, "steps": 29, "mean": 5.0, "best": 9.0} for task in TASKS}
    (folder / "returns.json").write_text(json.dumps(returns))
    return folder


def finished(folder: Path, **found: Any) -> None:
    folder.mkdir(parents=True)
    about = {"status": "finished", "wall_time": 7.4, "env_steps": 12, "updates": 640}
    about["best"] = {"reward": 400.0}
    (folder / "summary.json").write_text(json.dumps({**about, **found}))


def test_the_table_in_the_docs_is_the_stored_result() -> None:
    check_page(PRETRAINING, "many_tasks", many_tasks.table(stored(many_tasks.OUT)))


def test_every_policy_begins_with_a_model_that_is_made_before(data: Path, tmp_path: Path) -> None:
    for kind, alg in ALGS.items():
        made: set[str] = set()
        for module, *overrides in many_tasks.commands(data, tmp_path, kind):
            given = dict(text.split("=", 1) for text in overrides)
            begins = given.get("init", "").removesuffix("/checkpoints/final.pt")
            assert not begins or begins in made
            assert module == "pwm_fast.pretrain" or begins or given["alg"] == alg
            assert Path(given.get("data.path", data / TOGETHER)).parent == data
            assert given["run_dir"] not in made, "each has a directory of its own"
            made.add(given["run_dir"])
        assert len(made) == 4 + sum(
            len(models) * (1 if way == JOINT else 3) for way, (models, _) in WAYS.items()
        )


def test_the_table_has_what_is_finished(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(many_tasks, "OUT", tmp_path / "stored.json")
    out = tmp_path / "runs"
    given = ["collect", "--data", str(data), "--out", str(out)]
    assert many_tasks.main(given) == 2
    assert "holds no finished policy" in capsys.readouterr().err
    measured = {"holdout_latent_error": 0.25, "holdout_reward_r2": 0.875}
    finished(many_tasks._model(out, "flow", TOGETHER), holdout=measured)
    own = {task: {"reward_mean": 100.0 + k, "reward_std": 1.0} for k, task in enumerate(TASKS)}
    joint = many_tasks._policy(out, "flow", JOINT, TOGETHER, JOINT)
    finished(joint, evaluation={"reward_mean": 101.0, "reward_std": 1.0, "tasks": own})
    alone = many_tasks._policy(out, "mlp", "frozen", "apart", "walker-walk")
    finished(alone, evaluation={"reward_mean": 321.0, "reward_std": 1.0, "tasks": {}})
    begun = many_tasks._policy(out, "mlp", "new", "nothing", "walker-walk")
    finished(begun, status="stopped")
    assert many_tasks.main(given) == 0
    said = capsys.readouterr().out
    assert "| flow | together | 640 | 7 | 0.25 | 0.875 |" in said
    assert "| `walker-walk` | 5 | 9 | flow |  |  |  | 101 |  |  |" in said
    assert "| `walker-walk` | 5 | 9 | mlp |  | 321 (400) |  |  |  |  |" in said
    assert many_tasks.table(json.loads((tmp_path / "stored.json").read_text())) in said
