"""Episodes in files: a round trip, and a clear word for everything that is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pwm_fast.data.episodes import read_episode, write_episode
from pwm_fast.data.errors import DataError
from pwm_fast.replay import Episode

OBS, ACTION, T = 3, 2, 4


def arrays(**changes: Any) -> dict[str, Any]:
    draw = np.random.default_rng(0)
    values: dict[str, Any] = {
        "obs": draw.normal(size=(T + 1, OBS)),
        "action": draw.uniform(-1, 1, (T, ACTION)),
        "reward": draw.normal(size=T).astype(np.float32),
        "terminated": np.array([False, False, False, True]),
    }
    values.update(changes)
    return {k: v for k, v in values.items() if v is not None}


def save(path: Path, values: dict[str, Any]) -> Path:
    if path.suffix == ".npz":
        np.savez(path, **values)
    else:
        torch.save({k: torch.as_tensor(v) for k, v in values.items()}, path)
    return path


@pytest.mark.parametrize("suffix", [".npz", ".pt"])
def test_read(suffix: str, tmp_path: Path) -> None:
    values = arrays(info=np.arange(7))
    episode = read_episode(save(tmp_path / f"e{suffix}", values), OBS, ACTION)
    for key in ("obs", "action", "reward"):
        got = getattr(episode, key)
        assert got.dtype == torch.float32
        assert torch.equal(got, torch.from_numpy(values[key].astype(np.float32)))
    assert episode.terminated.tolist() == [False, False, False, True]


def test_round_trip_to_the_bit(tmp_path: Path) -> None:
    episode = Episode(
        torch.randn(T + 1, OBS), torch.rand(T, ACTION), torch.randn(T), torch.zeros(T).bool()
    )
    write_episode(tmp_path / "a.npz", episode)
    write_episode(tmp_path / "b.npz", episode)
    again = read_episode(tmp_path / "a.npz", OBS, ACTION)
    assert all(torch.equal(x, y) for x, y in zip(episode[:4], again[:4], strict=True))
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def with_value(key: str, index: tuple[int, ...], value: float) -> dict[str, Any]:
    array = np.array(arrays()[key], dtype=np.float64)
    array[index] = value
    return {key: array}


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "missing": ({"reward": None, "action": None}, "lacks action, reward; it holds obs, terminated"),
    "obs short": (
        {"obs": np.zeros((T, OBS))},
        r"obs must be \[T\+1, 3\], here \[5, 3\], got \[4, 3",
    ),
    "obs wide": ({"obs": np.zeros((T + 1, 9))}, r"here \[5, 3\], got \[5, 9\]"),
    "obs flat": ({"obs": np.zeros(T + 1)}, r"got \[5\]"),
    "action": (
        {"action": np.zeros((T, 1))},
        r"action must be \[T, 2\], here \[4, 2\], got \[4, 1\]",
    ),
    "action scalar": ({"action": np.zeros(())}, r"action must be \[T, 2\] with T of 1 or more"),
    "no steps": ({"action": np.zeros((0, ACTION))}, "with T of 1 or more steps"),
    "reward": ({"reward": np.zeros((T, 1))}, r"reward must be \[T\], here \[4\], got \[4, 1\]"),
    "terminated long": ({"terminated": np.zeros(T + 1, bool)}, r"terminated must be \[T\]"),
    "terminated float": ({"terminated": np.zeros(T)}, "terminated must be bool, got .*float64"),
    "integers": ({"reward": np.zeros(T, np.int64)}, "reward must be floating, got .*int64"),
    "complex": ({"obs": np.zeros((T + 1, OBS), complex)}, "obs must be floating, got .*complex128"),
    "nan": (with_value("obs", (2, 1), np.nan), r"obs\[2, 1\] is nan; all values must be finite"),
    "infinite": (with_value("reward", (3,), -np.inf), r"reward\[3\] is -inf"),
    "beyond float32": (
        with_value("reward", (1,), 1e300),
        r"reward\[1\] is 1e\+300, beyond float32",
    ),
    "action range": (with_value("action", (1, 0), 1.01), r"action\[1, 0\] is 1.01, outside of"),
    "two episodes": (
        {"terminated": np.array([False, True, False, False])},
        r"terminated\[1\] is True, but the episode goes on to step 3",
    ),
}


@pytest.mark.parametrize("suffix", [".npz", ".pt"])
@pytest.mark.parametrize("case", WRONG)
def test_wrong_arrays(case: str, suffix: str, tmp_path: Path) -> None:
    changes, message = WRONG[case]
    path = save(tmp_path / f"episode{suffix}", arrays(**changes))
    with pytest.raises(DataError, match=message) as error:
        read_episode(path, OBS, ACTION)
    assert str(path) in str(error.value), "names the file"


def test_rounding_beyond_the_bounds_is_clamped(tmp_path: Path) -> None:
    path = save(tmp_path / "e.npz", arrays(**with_value("action", (0, 0), 1.000001)))
    assert read_episode(path, OBS, ACTION).action[0, 0] == 1.0


def test_files_that_are_none(tmp_path: Path) -> None:
    good = save(tmp_path / "good.npz", arrays()).read_bytes()
    for name, content in {
        "cut.npz": good[: len(good) // 2],
        "text.npz": b"no zip",
        "empty.npz": b"",
        "cut.pt": b"PK\x03\x04",
        "empty.pt": b"",
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=rf"{name} is no readable \.(npz|pt) file"):
            read_episode(tmp_path / name, OBS, ACTION)
    with pytest.raises(DataError, match="there is no file"):
        read_episode(tmp_path / "nothing.npz", OBS, ACTION)


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("evil"),))


def test_no_code_runs_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    np.savez(tmp_path / "e.npz", **{**arrays(), "obs": np.array([Evil()], dtype=object)})
    torch.save({**arrays(), "obs": Evil()}, tmp_path / "e.pt")
    for name in ("e.npz", "e.pt"):
        with pytest.raises(DataError, match="is no readable"):
            read_episode(tmp_path / name, OBS, ACTION)
    assert not (tmp_path / "evil").exists()


def test_a_file_of_something_else(tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(DataError, match="must hold a dict of tensors, got a list"):
        read_episode(tmp_path / "list.pt", OBS, ACTION)
    torch.save(
        {**{k: torch.as_tensor(v) for k, v in arrays().items()}, "obs": 3}, tmp_path / "n.pt"
    )
    with pytest.raises(DataError, match="obs must be a tensor, got a int"):
        read_episode(tmp_path / "n.pt", OBS, ACTION)
