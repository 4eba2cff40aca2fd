"""Data sets of any format: what they are said to hold, what their tasks are called, and the fit."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from pwm_fast.config import TrainConfig, from_dict
from pwm_fast.data import DataError, describe, offline, register
from pwm_fast.data.__main__ import main
from pwm_fast.data.task_names import SETS
from pwm_fast.replay import Episode
from tests.data.tdmpc2_files import save

OBS, ACTION = 4, 3


def chunk(tasks: list[int], rows: int = 5, obs: int = OBS, action: int = ACTION) -> dict[str, Any]:
    """Episode e has the observation e + 1 and the action 0.1 (e + 1) everywhere."""
    number = torch.arange(1.0, len(tasks) + 1)[:, None, None]
    return {
        "obs": number.expand(-1, rows, obs).clone(),
        "action": 0.1 * number.expand(-1, rows, action),
        "reward": number[..., 0].expand(-1, rows).clone(),
        "task": torch.tensor(tasks, dtype=torch.int32)[:, None].expand(-1, rows).clone(),
    }


def save_episode(path: Path, steps: int = 4, obs: int = OBS, **more: Any) -> Path:
    np.savez(
        path,
        obs=np.ones((steps + 1, obs)),
        action=np.zeros((steps, ACTION)),
        reward=np.zeros(steps),
        terminated=np.zeros(steps, bool),
        **more,
    )
    return path


def config(path: Path) -> TrainConfig:
    values = {"env": {"name": "cartpole"}, "data": {"path": str(path)}, "alg": {"horizon": 4}}
    return from_dict({"run_dir": "r", **values})


def environment(obs: int, action: int, tasks: dict[str, tuple[int, int]] | None = None) -> Any:
    """What the data are fitted to; ``tasks``: number and components of the action by name."""
    env = SimpleNamespace(
        single_observation_space=SimpleNamespace(shape=(obs,)),
        single_action_space=SimpleNamespace(shape=(action,)),
    )
    if tasks is not None:
        numbers, widths = zip(*tasks.values(), strict=True)
        env.tasks = SimpleNamespace(names=tuple(tasks), numbers=numbers, action_dims=widths)
    return env


def fitted(path: Path, env: Any) -> list[Episode]:
    register(path, update=True)
    data = offline.load(config(path), env)
    assert data is not None
    episodes = list(data.episodes)
    assert len(data.episodes) == len(episodes)
    assert data.transitions == sum(len(e.action) for e in episodes)
    return episodes


# What a data set holds


def test_formats_side_by_side(tmp_path: Path) -> None:
    save(tmp_path / "a.pt", chunk([2, 0]))
    save_episode(tmp_path / "b.npz", steps=7, task=np.int64(2))
    save_episode(tmp_path / "c.npz")
    values = {
        "obs": torch.ones(4, OBS),
        "action": torch.zeros(3, ACTION),
        "reward": torch.zeros(3),
        "terminated": torch.zeros(3, dtype=torch.bool),
        "task": torch.tensor(1),
    }
    torch.save(values, tmp_path / "d.pt")
    (tmp_path / "notes.txt").write_text("left alone")
    data = describe(tmp_path)
    assert data.tasks == {0: (2, 8, 4, 4), 1: (1, 3, 3, 3), 2: (2, 11, 4, 7)}
    assert [(e.task, len(e.action)) for _, e in data.episodes()] == [
        (2, 4),
        (0, 4),
        (2, 7),
        (0, 4),
        (1, 3),
    ]
    assert [e.task for _, e in data.episodes([1, 2])] == [2, 2, 1]
    assert data.text().splitlines() == [
        f"{tmp_path}: 1 TD-MPC2 chunk, 3 episode files; obs [4], action [3]",
        "  5 episodes of 3 to 7 steps, 22 transitions",
        "  task 0: 2 episodes of 4 steps, 8 transitions",
        "  task 1: 1 episode of 3 steps, 3 transitions",
        "  task 2: 2 episodes of 4 to 7 steps, 11 transitions",
    ]


def test_what_does_not_go_together(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no episodes"):
        describe(tmp_path)
    save_episode(tmp_path / "a.npz")
    save_episode(tmp_path / "b.npz", obs=5)
    with pytest.raises(DataError, match=r"b\.npz has obs \[5\] and action \[3\], .*a\.npz has"):
        describe(tmp_path)


@pytest.mark.parametrize("task", [-1, 0.5, [0, 1], True, "walk"])
def test_task_of_an_episode(task: Any, tmp_path: Path) -> None:
    save_episode(tmp_path / "a.npz", task=np.array(task))
    with pytest.raises(DataError, match=r"a\.npz: task must be an integer of 0 or more, got"):
        describe(tmp_path)


def test_an_episode_is_not_read_to_describe_it(tmp_path: Path) -> None:
    path = save_episode(tmp_path / "a.npz", steps=20_000)
    content = bytearray(path.read_bytes())
    content[len(content) // 4] ^= 1  # among the observations, whose checksum is wrong now
    path.write_bytes(content)
    assert describe(path).whole == (1, 20_000, 20_000, 20_000)
    with pytest.raises(DataError, match=r"is no readable \.npz file"):
        list(describe(path).episodes())


# Names


def test_names_of_tdmpc2() -> None:
    """Spot checks of its list; the data sets' pages say 30 and 80 tasks."""
    mt30, mt80 = SETS["mt30"], SETS["mt80"]
    assert (len(set(mt30)), len(set(mt80))) == (len(mt30), len(mt80)) == (30, 80)
    assert mt80[:30] == mt30
    at = {0: "walker-stand", 6: "acrobot-swingup", 12: "cup-catch", 18: "hopper-hop"}
    at |= {19: "walker-walk-backwards", 22: "cheetah-run-front", 29: "pendulum-spin"}
    at |= {30: "mw-assembly", 47: "mw-hammer", 65: "mw-reach", 79: "mw-hand-insert"}
    assert {n: mt80[n] for n in at} == at


def test_where_names_come_from(tmp_path: Path) -> None:
    for name, tasks in {
        "mt30": [29, 0],
        "my_mt80_part": [79],
        "mt30_more": [30],
        "own": [1],
    }.items():
        (tmp_path / name).mkdir()
        save(tmp_path / name / "chunk_0.pt", chunk(tasks))
    assert describe(tmp_path / "mt30").name(29) == "29 (pendulum-spin)"
    assert describe(tmp_path / "mt30" / "chunk_0.pt").name(0) == "0 (walker-stand)"
    assert describe(tmp_path / "my_mt80_part").name(79) == "79 (mw-hand-insert)"
    inner = tmp_path / "mt30" / "a" / "b"
    inner.mkdir(parents=True)
    save(inner / "chunk_0.pt", chunk([0]))
    assert describe(inner).names == (), "another folder of another's name far above it"
    assert describe(tmp_path / "mt30_more").names == describe(tmp_path / "own").names == ()
    (tmp_path / "own" / "tasks.json").write_text(json.dumps(["stand", "walk", "run"]))
    assert describe(tmp_path / "own").name(1) == "1 (walk)"
    own = tmp_path / "mt30_npz"
    own.mkdir()
    save_episode(own / "a.npz")
    assert describe(own).names == (), "TD-MPC2's numbers are those of its own files"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[", "is no JSON"),
        ('{"walk": 0}', "must be a list of the tasks' names, each once"),
        ('["walk", ""]', "each once"),
        ('["walk", "walk"]', "each once"),
        ('["walk"]', "names 1 tasks, the data are of task 1 as well"),
    ],
)
def test_wrong_names(content: str, message: str, tmp_path: Path) -> None:
    save(tmp_path / "c.pt", chunk([1]))
    (tmp_path / "tasks.json").write_text(content)
    with pytest.raises(DataError, match=message):
        describe(tmp_path)


# The fit to an environment


def test_one_task_for_one(tmp_path: Path) -> None:
    save(tmp_path / "c.pt", chunk([7, 7]))
    episodes = fitted(tmp_path, environment(OBS, ACTION))
    assert [e.task for e in episodes] == [0, 0]
    assert episodes[1].obs.shape == (5, OBS) and bool((episodes[1].action == 0.2).all())


def test_tasks_by_name(tmp_path: Path) -> None:
    """The environment has other numbers, another task, and not all of the data's."""
    folder = tmp_path / "mt30"
    folder.mkdir()
    values = chunk([3, 1, 0, 3])
    values["action"][0::3, :, 2] = 0  # the cheetah has a component less
    save(folder / "chunk_0.pt", values)
    tasks = {"cheetah-run": (0, 2), "walker-walk": (1, 3), "hopper-hop": (2, 1)}
    episodes = fitted(folder, environment(6, 5, tasks))
    assert [e.task for e in episodes] == [0, 1, 0]
    assert [float(e.obs[0, 0]) for e in episodes] == [1, 2, 4], "walker-stand is left out"
    assert bool((episodes[1].obs[:, :OBS] == 2).all()) and not episodes[1].obs[:, OBS:].any()
    expected = torch.tensor([0.2, 0.2, 0.2, 0, 0])
    assert torch.equal(episodes[1].action, expected.expand(4, 5))
    data = offline.load(config(folder), environment(6, 5, tasks))
    assert data is not None and data.left_out == 1


def test_tasks_by_number(tmp_path: Path) -> None:
    save(tmp_path / "c.pt", chunk([3, 1, 0]))
    episodes = fitted(tmp_path, environment(OBS, ACTION, {"a": (1, 3), "b": (0, 3), "c": (9, 3)}))
    assert [e.task for e in episodes] == [1, 0]


def test_padding_is_cut_off(tmp_path: Path) -> None:
    values = chunk([0, 0])
    values["obs"][..., 3:] = values["action"][..., 1:] = 0
    save(tmp_path / "c.pt", values)
    episodes = fitted(tmp_path, environment(3, 1))
    assert bool((episodes[1].obs == 2).all()) and episodes[1].obs.shape == (5, 3)
    assert episodes[1].action.shape == (4, 1)


def test_what_does_not_fit(tmp_path: Path) -> None:
    values = chunk([0, 0])
    values["action"][..., 2] = 0
    values["action"][1, 3, 2] = 0.5
    save(tmp_path / "c.pt", values)
    where = r"c\.pt: episode 1: component 2 of the action of step 2 is 0\.5; .* 2 components"
    with pytest.raises(DataError, match=where):
        fitted(tmp_path, environment(OBS, 2))
    with pytest.raises(DataError, match=where):  # masked: the environment's other task reads it
        fitted(tmp_path, environment(OBS, 3, {"a": (0, 2), "b": (1, 3)}))
    with pytest.raises(DataError, match=r"episode 0: component 3 of the obs of step 0 is 1; "):
        fitted(tmp_path, environment(3, ACTION))
    with pytest.raises(DataError, match=r"c\.pt: obs must be \[T\+1, 9\] for this environment"):
        fitted(tmp_path, environment(9, ACTION))
    with pytest.raises(DataError, match=r"c\.pt: action must be \[T, 9\] for this environment"):
        fitted(tmp_path, environment(9, 9))
    with pytest.raises(DataError, match=r"no episode has alg\.horizon=4 steps, the longest has 3"):
        save(tmp_path / "c.pt", chunk([0], rows=4))
        fitted(tmp_path, environment(OBS, ACTION))


def test_tasks_that_the_environment_has_not(tmp_path: Path) -> None:
    save(tmp_path / "c.pt", chunk([0, 2]))
    with pytest.raises(DataError, match=r"holds the tasks 0, 2; this environment has one"):
        fitted(tmp_path, environment(OBS, ACTION))
    (tmp_path / "tasks.json").write_text('["walk", "run", "jump"]')
    with pytest.raises(
        DataError, match=r"the tasks 0 \(walk\), 2 \(jump\), and none .*: 0 \(run\)"
    ):
        fitted(tmp_path, environment(OBS, ACTION, {"run": (0, 3)}))


def test_the_longest_counts_of_the_tasks_used(tmp_path: Path) -> None:
    save(tmp_path / "a.pt", chunk([0], rows=9))
    save(tmp_path / "b.pt", chunk([1], rows=4))
    with pytest.raises(DataError, match="the longest has 3"):
        fitted(tmp_path, environment(OBS, ACTION, {"b": (1, 3)}))


# The command


def test_describe_command(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = tmp_path / "mt30"
    folder.mkdir()
    save(folder / "chunk_0.pt", chunk([1]))
    assert main(["register", str(folder)]) == 0 and main(["verify", str(folder)]) == 0
    capsys.readouterr()
    assert main(["describe", str(folder), str(folder / "chunk_0.pt")]) == 0
    said = capsys.readouterr().out
    assert said.count("task 1 (walker-walk): 1 episode of 4 steps, 4 transitions") == 2
    assert main(["describe", str(tmp_path / "none")]) == 2
    assert "there is no data set" in capsys.readouterr().err
