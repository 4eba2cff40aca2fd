"""TD-MPC2's chunks: what releases of tensordict write, the alignment, and a word for each fault."""

from __future__ import annotations

import os
import pickletools
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pwm_fast.data import DataError, describe
from pwm_fast.replay import Episode, Replay
from tests.data.tdmpc2_files import LAYOUTS, save
from tests.data.tensordict_files import make

REAL = Path(__file__).with_name("tensordict_files")
RELEASES = {"0.1.2": "0.1", "0.2.1": "0.2", "0.3.2": "0.3", "0.15.3": "0.5"}
E, T, OBS, ACTION = 3, 4, 4, 2
NAN = float("nan")


def chunk(**changes: Any) -> dict[str, Any]:
    """Episodes of a world: ``obs' = obs + [a, a]``, ``reward = obs[0] * a[0]``, row by row."""
    generator = torch.Generator().manual_seed(0)
    obs, action, reward = torch.zeros(E, T + 1, OBS), torch.zeros(E, T + 1, ACTION), []
    for e in range(E):
        now = torch.rand(OBS, generator=generator)
        rows = [(now, torch.full((ACTION,), NAN), NAN)]  # nothing led to the first observation
        for _ in range(T):
            taken = torch.rand(ACTION, generator=generator) * 2 - 1
            paid = float(now[0] * taken[0])
            now = now + taken.repeat(2)
            rows.append((now, taken, paid))
        obs[e], action[e] = (torch.stack([row[i] for row in rows]) for i in (0, 1))
        reward.append([row[2] for row in rows])
    task = torch.tensor([5, 0, 5], dtype=torch.int32)[:, None].repeat(1, T + 1)
    values = {"obs": obs, "action": action, "reward": torch.tensor(reward), "task": task}
    values.update(changes)
    return {k: v for k, v in values.items() if v is not None}


def read(path: Path, **options: Any) -> list[Episode]:
    return [episode for _, episode in describe(path).episodes(**options)]


def follows_the_world(obs: Tensor, action: Tensor, reward: Tensor) -> None:
    """``obs [H+1, ..., O]``: each action led from its own observation to the next."""
    assert torch.allclose(obs[1:], obs[:-1] + torch.cat([action, action], -1), atol=1e-6)
    assert torch.allclose(reward, obs[:-1, ..., 0] * action[..., 0], atol=1e-6)


# What is read


@pytest.mark.parametrize("release", RELEASES)
def test_files_of_tensordict_itself(release: str) -> None:
    data = describe(REAL / f"{release}.pt")
    assert (data.obs_dim, data.action_dim, data.names) == (make.OBS, make.ACTION, ())
    assert {n: (p.episodes, p.transitions) for n, p in data.tasks.items()} == {
        n: (1, make.ROWS - 1) for n in range(3)
    }
    values = make.values()
    for e, (where, episode) in enumerate(data.episodes()):
        assert where == f"{REAL / release}.pt: episode {e}"
        assert torch.equal(episode.obs, values["obs"][e])
        assert torch.equal(episode.action, values["action"][e, 1:])
        assert torch.equal(episode.reward, values["reward"][e, 1:])
        assert not episode.terminated.any() and episode.task == 2 - e


@pytest.mark.parametrize("release", RELEASES)
def test_the_files_of_these_tests_are_as_those(release: str, tmp_path: Path) -> None:
    """The same classes and functions are named, in the same order, and used in the same way."""

    def uses(path: Path) -> list[tuple[str, Any]]:
        with zipfile.ZipFile(path) as archive:
            name = next(n for n in archive.namelist() if n.endswith("data.pkl"))
            steps = pickletools.genops(archive.read(name))
        named = ("GLOBAL", "NEWOBJ", "REDUCE", "BUILD")
        used = [(op.name, arg) for op, arg, _ in steps if op.name in named]
        # The state's other entries (device, size, a set of locked parents) are in any order.
        return [u for u in used if "tensordict" in str(u[1]) or u[0] in ("NEWOBJ", "BUILD")]

    own = save(tmp_path / "own.pt", make.values(), RELEASES[release])
    assert uses(own) == uses(REAL / f"{release}.pt")


@pytest.mark.parametrize("layout", [*LAYOUTS, "dict"])
def test_an_action_belongs_to_the_observation_before_its_row(layout: str, tmp_path: Path) -> None:
    path = tmp_path / "chunk_0.pt"
    torch.save(chunk(), path) if layout == "dict" else save(path, chunk(), layout)
    episodes = read(path)
    assert [e.task for e in episodes] == [5, 0, 5]
    for episode in episodes:
        assert len(episode.action) == T and episode.obs.shape == (T + 1, OBS)
        assert all(x.dtype == torch.float32 for x in episode[:3])
        follows_the_world(episode.obs, episode.action, episode.reward)
    replay = Replay(60, 2, OBS, ACTION, horizon=3)
    replay.add_episodes([episode._replace(task=0) for episode in episodes])
    windows = replay.sample(50, torch.Generator().manual_seed(0))
    follows_the_world(windows.obs, windows.action, windows.reward)


@pytest.mark.parametrize("filler", [NAN, 0.3, 7.0])
def test_the_first_row_says_nothing(filler: float, tmp_path: Path) -> None:
    """Files of 2023 have a filler there, later ones NaN, cut episodes the step before."""
    values = chunk(terminated=torch.zeros(E, T + 1))
    for key in ("action", "reward", "terminated"):
        values[key][:, 0] = filler
    for episode in read(save(tmp_path / "c.pt", values)):
        follows_the_world(episode.obs, episode.action, episode.reward)


def test_dtypes_and_shapes_that_may_be(tmp_path: Path) -> None:
    expected = read(save(tmp_path / "a.pt", chunk()))
    values = chunk(task=torch.tensor([5, 0, 5]))  # int64, one for each episode
    values["obs"] = values["obs"].double().transpose(0, 1).contiguous().transpose(0, 1)
    values["extra"] = torch.zeros(E, T + 1, 3)
    for one, two in zip(read(save(tmp_path / "b.pt", values)), expected, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(one[:4], two[:4], strict=True))
        assert one.task == two.task
    no_task = read(save(tmp_path / "c.pt", chunk(task=None)))
    assert {e.task for e in no_task} == {0}
    half = read(save(tmp_path / "d.pt", {k: v.half() for k, v in chunk(task=None).items()}))
    assert torch.allclose(half[0].obs, expected[0].obs, atol=2e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
def test_terminated(dtype: torch.dtype, tmp_path: Path) -> None:
    flags = torch.zeros(E, T + 1)
    flags[1, T] = 1
    if dtype == torch.float32:
        flags[:, 0] = NAN
    episodes = read(save(tmp_path / "c.pt", chunk(terminated=flags.to(dtype))))
    assert [e.terminated.tolist() for e in episodes] == [
        [False] * T,
        [False, False, False, True],
        [False] * T,
    ]


def test_some_tasks_alone(tmp_path: Path) -> None:
    path = save(tmp_path / "c.pt", chunk())
    assert [e.task for e in read(path, tasks=[5])] == [5, 5]
    assert len(read(path, tasks=[0])) == 1 and read(path, tasks=[1]) == []


def test_chunks_of_other_lengths_side_by_side(tmp_path: Path) -> None:
    """Meta-World's 101 rows and dm_control's 501 in one folder."""
    for i, (rows, task) in enumerate([(101, 30), (501, 2), (101, 31)]):
        values = {
            "obs": torch.randn(2, rows, OBS),
            "action": torch.zeros(2, rows, ACTION),
            "reward": torch.zeros(2, rows),
            "task": torch.full((2, rows), task),
        }
        save(tmp_path / f"chunk_{i}.pt", values)
    data = describe(tmp_path)
    assert data.whole == (6, 2 * (100 + 500 + 100), 100, 500)
    assert list(data.tasks) == [2, 30, 31] and data.tasks[2] == (2, 1000, 500, 500)
    assert [len(e.action) for _, e in data.episodes()] == [100, 100, 500, 500, 100, 100]


def test_an_episode_keeps_nothing_of_the_file(tmp_path: Path) -> None:
    path = save(tmp_path / "c.pt", chunk())
    episodes = read(path)
    path.write_bytes(bytes(path.stat().st_size))
    for episode in episodes:
        follows_the_world(episode.obs, episode.action, episode.reward)


def memory() -> int:
    """Bytes of this process that are not of a file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="Linux says how much it is")
def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    rows, episodes = 101, 4000
    values = {
        "obs": torch.zeros(episodes, rows, 39),
        "action": torch.zeros(episodes, rows, 4),
        "reward": torch.zeros(episodes, rows),
        "task": torch.zeros(episodes, rows, dtype=torch.int32),
    }
    path = save(tmp_path / "c.pt", values)
    values.clear()
    for _ in describe(path).episodes():  # what is loaded and made once
        break
    before = memory()
    data = describe(path)
    grown = 0
    for i, _ in enumerate(data.episodes()):
        if i % 100 == 0:
            grown = max(grown, memory() - before)
    assert path.stat().st_size > 64 << 20 and grown < 8 << 20


# What is refused


def with_value(key: str, index: tuple[int, ...], value: float) -> dict[str, Any]:
    tensor = chunk(terminated=torch.zeros(E, T + 1))[key].clone()
    tensor[index] = value
    return {key: tensor}


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "missing": ({"obs": None, "reward": None}, "lacks obs, reward; it holds action, task"),
    "no tensor": ({"reward": 3}, "reward must be a tensor, got a int"),
    "flat": (
        {"obs": torch.zeros(T + 1, OBS)},
        r"obs must be \[E, T\+1, O\] with 1 or more episodes .* got \[5, 4\]",
    ),
    "no step": ({"obs": torch.zeros(E, 1, OBS)}, "of T of 1 or more steps"),
    "no episode": ({"obs": torch.zeros(0, T + 1, OBS)}, "with 1 or more episodes"),
    "action": (
        {"action": torch.zeros(E, T, ACTION)},
        r"action must be \[E, T\+1, A\] of obs's \[3, 5\], got \[3, 4, 2\]",
    ),
    "reward": ({"reward": torch.zeros(E, T + 1, 1)}, r"reward must be \[E, T\+1\] of obs's"),
    "task float": ({"task": torch.zeros(E, T + 1)}, "task must be integers .* got torch.float32"),
    "task shape": ({"task": torch.zeros(E, 2, dtype=torch.int32)}, r"got torch.int32 \[3, 2\]"),
    "task negative": (with_value("task", (1, 0), -1), r"episode 1: task\[0\] is -1"),
    "two tasks": (
        with_value("task", (1, 3), 4),
        r"episode 1: task\[3\] is 4, task\[0\] is 0: an episode is of one task",
    ),
    "nan": (with_value("obs", (2, 0, 1), NAN), r"episode 2: obs\[0, 1\] is nan"),
    "nan action": (with_value("action", (0, 2, 1), NAN), r"episode 0: action\[2, 1\] is nan"),
    "reward inf": (with_value("reward", (2, 4), -torch.inf), r"episode 2: reward\[4\] is -inf"),
    "action range": (
        with_value("action", (1, 4, 0), -1.2),
        r"episode 1: action\[4, 0\] is -1.2, outside of \[-1, 1\]",
    ),
    "terminated": (with_value("terminated", (0, 2), NAN), r"episode 0: terminated\[2\] is nan"),
    "goes on": (
        with_value("terminated", (0, 2), 1),
        r"episode 0: terminated\[2\] is True, but the episode goes on to step 4",
    ),
    "integers": ({"reward": torch.zeros(E, T + 1, dtype=torch.int32)}, "reward must be floating"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_values(case: str, tmp_path: Path) -> None:
    changes, message = WRONG[case]
    path = save(tmp_path / "chunk_7.pt", chunk(**changes))
    with pytest.raises(DataError, match=message) as error:
        read(path)
    assert str(path) in str(error.value), "names the file"


def test_damaged_files(tmp_path: Path) -> None:
    good = save(tmp_path / "good.pt", chunk()).read_bytes()
    for name, content in {"cut": good[: len(good) // 2], "text": b"no zip", "none": b""}.items():
        path = tmp_path / f"{name}.pt"
        path.write_bytes(content)
        with pytest.raises(DataError, match=rf"{name}\.pt is no readable \.pt file"):
            describe(path)


def test_a_file_that_cannot_be_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("unable to mmap 9 bytes from file <c.pt>: Cannot allocate memory (12)")

    path = save(tmp_path / "c.pt", chunk())
    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(DataError, match="refuses a file that is larger than memory and swap"):
        describe(path)


class Evil:
    """Touches a file when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("evil"),))


class Harmless:
    """Would do nothing, and is not known either."""


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("thing", [Evil(), Harmless(), print])
def test_nothing_else_is_unpickled(
    thing: Any, layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for values in ({**chunk(), "thing": thing}, {**chunk(), "obs": thing}):
        path = save(tmp_path / "c.pt", values, layout)
        with pytest.raises(DataError, match=r"is no readable \.pt file.*\(it needs "):
            describe(path)
    assert not (tmp_path / "evil").exists()


def test_what_else_is_allowed_does_not_count(tmp_path: Path) -> None:
    """Neither for a program that allowed a class, nor afterwards."""
    torch.save({**chunk(), "thing": Harmless()}, tmp_path / "c.pt")
    with torch.serialization.safe_globals([Harmless, (list, "tensordict._td.TensorDict")]):
        before = set(torch.serialization.get_safe_globals())
        with pytest.raises(DataError, match="Harmless"):
            describe(tmp_path / "c.pt")
        save(tmp_path / "c.pt", chunk())
        assert len(read(tmp_path / "c.pt")) == E
        assert set(torch.serialization.get_safe_globals()) == before


def test_a_tensordict_without_tensors(tmp_path: Path) -> None:
    path = save(tmp_path / "c.pt", chunk())
    path.write_bytes(path.read_bytes().replace(b"_tensordict", b"_tensordicT"))
    with pytest.raises(DataError, match="is damaged: its TensorDict has no tensors"):
        describe(path)


def test_forms_that_only_tensordict_reads(tmp_path: Path) -> None:
    path = save(tmp_path / "c.pt", chunk())
    content = path.read_bytes()
    assert content.count(b"tensordict._reductions\n_make_td") == 1
    path.write_bytes(content.replace(b"_reductions\n_make_td", b"_reductions\n_rebuild"))
    with pytest.raises(DataError, match=r"\(tensordict\._reductions\._rebuild\).*convert it"):
        describe(path)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_observations_of_several_parts(layout: str, tmp_path: Path) -> None:
    values = chunk()
    values["obs"] = {"state": values["obs"], "goal": values["obs"]}
    path = save(tmp_path / "c.pt", values, layout)
    with pytest.raises(DataError, match="obs must be a tensor, got a TensorDict of several"):
        describe(path)
