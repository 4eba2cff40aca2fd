"""Minari's data sets, written as Minari 0.5 writes them; needs h5py."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pwm_fast.data import DataError, describe, register, verify

LOW, HIGH = [-2.0, 0.0], [2.0, 10.0]
LENGTHS = (4, 6, 3)
OBS = 3


@pytest.fixture
def h5py() -> Any:
    return pytest.importorskip("h5py", reason="needs pip install 'pwm-fast[minari]'")


def box(low: Any, high: Any, **changes: Any) -> str:
    shape = list(np.shape(low))
    said = {"type": "Box", "dtype": "float32", "shape": shape, "low": low, "high": high}
    return json.dumps({**said, **changes})


def metadata(**changes: Any) -> dict[str, Any]:
    values = {
        "total_episodes": len(LENGTHS),
        "total_steps": sum(LENGTHS),
        "data_format": "hdf5",
        "jpeg_encoding": True,
        "observation_space": box([-np.inf] * OBS, [np.inf] * OBS, dtype="float64"),
        "action_space": box(LOW, HIGH),
        "env_spec": json.dumps({"id": "E-v0", "entry_point": "os:abort", "kwargs": {}}),
        "dataset_id": "test/e-v0",
        "minari_version": "0.5.4",
    }
    return {k: v for k, v in {**values, **changes}.items() if v is not None}


def arrays(steps: int, seed: int) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(seed)
    ends = np.arange(1, steps + 1) == steps
    return {
        "observations": draw.normal(size=(steps + 1, OBS)),
        "actions": draw.uniform(LOW, HIGH, (steps, 2)).astype(np.float32),
        "rewards": draw.normal(size=steps),
        "terminations": ends & (seed == 1),
        "truncations": ends & (seed != 1),
    }


def write(
    h5py: Any,
    folder: Path,
    change: Callable[[Any], None] = lambda file: None,
    **changes: Any,
) -> Path:
    """A data set in ``folder``, and the episodes in it; ``change`` is given the file of HDF5."""
    data = folder / "data"
    data.mkdir(parents=True)
    (data / "metadata.json").write_text(json.dumps(metadata(**changes)))
    with h5py.File(data / "main_data.hdf5", "a", track_order=True) as file:
        for i, steps in enumerate(LENGTHS):
            group = file.create_group(f"episode_{i}")
            group.attrs.update({"id": i, "total_steps": steps, "seed": 3})
            group.create_group("infos")
            for key, value in arrays(steps, i).items():
                shape = (None, *value.shape[1:])
                group.create_dataset(key, data=value, chunks=True, maxshape=shape)
        change(file)
    return folder


def test_episodes(h5py: Any, tmp_path: Path) -> None:
    folder = write(h5py, tmp_path / "e-v0")
    data = describe(folder)
    assert (data.obs_dim, data.action_dim) == (OBS, 2)
    assert data.tasks == {0: (3, sum(LENGTHS), 3, 6)}
    for i, (where, episode) in enumerate(data.episodes()):
        assert where == f"{folder / 'data' / 'main_data.hdf5'}: episode_{i}"
        said = arrays(LENGTHS[i], i)
        assert torch.equal(episode.obs, torch.from_numpy(said["observations"]).float())
        assert torch.equal(episode.reward, torch.from_numpy(said["rewards"]).float())
        assert episode.terminated.tolist() == said["terminations"].tolist()
        back = episode.action.double().numpy() * [2.0, 5.0] + [0.0, 5.0]  # to [-2, 2] and [0, 10]
        assert np.allclose(back, said["actions"], atol=1e-6)
        assert episode.action.abs().max() <= 1


def test_several_in_a_folder_with_a_manifest(h5py: Any, tmp_path: Path) -> None:
    for name in ("medium-v0", "expert-v0"):
        write(h5py, tmp_path / "set" / name)
    (tmp_path / "set" / "namespace_metadata.json").write_text('{"description": "two"}')
    registered, _ = register(tmp_path / "set")
    assert len(registered.entries) == 5
    data = describe(tmp_path / "set")
    assert data.whole.episodes == 6 and len(list(data.episodes())) == 6
    assert "2 Minari data sets; obs [3], action [2]" in data.text()
    (tmp_path / "set" / "medium-v0" / "data" / "metadata.json").write_text("{}")
    with pytest.raises(DataError, match=r"changed: medium-v0/data/metadata\.json"):
        verify(tmp_path / "set")


def test_the_file_alone_is_not_enough(h5py: Any, tmp_path: Path) -> None:
    folder = write(h5py, tmp_path / "e-v0")
    with pytest.raises(DataError, match=r"the data set is the folder that holds metadata\.json"):
        describe(folder / "data" / "main_data.hdf5")


def test_boxes_of_more_dimensions_are_flat(h5py: Any, tmp_path: Path) -> None:
    def change(file: Any) -> None:
        for i, steps in enumerate(LENGTHS):
            group = file[f"episode_{i}"]
            for key, shape in (("observations", (steps + 1, 1, OBS)), ("actions", (steps, 2, 1))):
                value = group[key][()].reshape(shape)
                del group[key]
                group[key] = value

    flat = describe(write(h5py, tmp_path / "flat"))
    obs = box([[-1.0] * OBS], [[1.0] * OBS])
    action = box([[low] for low in LOW], [[high] for high in HIGH])
    other = write(h5py, tmp_path / "e", change, observation_space=obs, action_space=action)
    for (_, one), (_, two) in zip(describe(other).episodes(), flat.episodes(), strict=True):
        assert torch.equal(one.obs, two.obs) and torch.equal(one.action, two.action)


def put(name: str, value: Any) -> Callable[[Any], None]:
    def change(file: Any) -> None:
        del file[name]
        if value is not None:
            file[name] = value

    return change


def with_value(key: str, index: tuple[int, ...], value: float) -> Callable[[Any], None]:
    def change(file: Any) -> None:
        file["episode_1"][key][index] = value

    return change


def elsewhere(file: Any) -> None:
    import h5py

    with h5py.File(Path(file.filename).with_name("other.hdf5"), "w") as other:
        other["rewards"] = np.zeros(LENGTHS[0])
    del file["episode_0/rewards"]
    file["episode_0/rewards"] = h5py.ExternalLink("other.hdf5", "rewards")


INFINITE = box([-np.inf, 0.0], [np.inf, 1.0])
DICT = json.dumps({"type": "Dict", "subspaces": {"observation": json.loads(box([0.0], [1.0]))}})
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "arrow": ({"data_format": "arrow"}, "data_format must be hdf5, got arrow"),
    "dict": (
        {"observation_space": DICT},
        r"metadata\.json: observation_space must be a Box of floating numbers, got a Dict",
    ),
    "discrete": (
        {"action_space": json.dumps({"type": "Discrete", "n": 3, "start": 0})},
        "action_space must be a Box of floating numbers, got a Discrete",
    ),
    "pictures": ({"observation_space": box([0], [255], dtype="uint8")}, "got a Box of uint8"),
    "no space": ({"action_space": None}, r"does not say what action_space is \(KeyError\)"),
    "unbounded": (
        {"action_space": INFINITE},
        r"component 0 of action_space has the bounds \[-inf, inf\]: they must be finite",
    ),
    "counts": ({"total_episodes": 4}, "says that there are 4; it holds 3 entries"),
    "gap": ({"change": lambda f: f.move("episode_1", "episode_9")}, "it holds 3 entries"),
    "lacks": ({"change": put("episode_2/rewards", None)}, "episode_2 lacks the array rewards"),
    "linked": ({"change": elsewhere}, "episode_0: rewards is stored in another file"),
    "short": (
        {"change": put("episode_1/observations", np.zeros((LENGTHS[1], OBS)))},
        r"episode_1: obs must be \[T\+1, 3\], here \[7, 3\], got \[6, 3\]",
    ),
    "narrow": (
        {"change": put("episode_1/actions", np.zeros((LENGTHS[1], 1)))},
        r"episode_1: action must be \[T, 2\], here \[6, 2\], got \[6, 1\]",
    ),
    "nan": (
        {"change": with_value("observations", (2, 1), np.nan)},
        r"episode_1: obs\[2, 1\] is nan",
    ),
    "nan action": (
        {"change": with_value("actions", (2, 1), np.nan)},
        r"episode_1: action\[2, 1\] is nan",
    ),
    "range": (
        {"change": with_value("actions", (3, 1), 10.5)},
        r"episode_1: action\[3, 1\] is 10.5, outside of its space's bounds \[0, 10\]",
    ),
    "goes on": (
        {"change": with_value("terminations", (2,), True)},
        r"episode_1: terminated\[2\] is True, but the episode goes on",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_data(case: str, h5py: Any, tmp_path: Path) -> None:
    changes, message = WRONG[case]
    folder = write(h5py, tmp_path / "e-v0", **changes)
    with pytest.raises(DataError, match=message) as error:
        list(describe(folder).episodes())
    assert str(folder) in str(error.value), "names the file"


def test_damaged_files(h5py: Any, tmp_path: Path) -> None:
    folder = write(h5py, tmp_path / "e-v0")
    file = folder / "data" / "main_data.hdf5"
    file.write_bytes(file.read_bytes()[:600])
    with pytest.raises(DataError, match=r"main_data\.hdf5 is no readable HDF5 file"):
        describe(folder)
    file.unlink()
    with pytest.raises(DataError, match=r"there is no file .*main_data\.hdf5"):
        describe(folder)


def test_metadata_of_others_are_left_alone(tmp_path: Path) -> None:
    np.savez(
        tmp_path / "e.npz",
        obs=np.zeros((3, OBS)),
        action=np.zeros((2, 1)),
        reward=np.zeros(2),
        terminated=np.zeros(2, bool),
    )
    for content in ('{"author": "me"}', "[1]", "no JSON"):
        (tmp_path / "metadata.json").write_text(content)
        assert describe(tmp_path).whole.episodes == 1


def test_without_h5py(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "h5py", None)
    (tmp_path / "metadata.json").write_text(json.dumps(metadata()))
    (tmp_path / "main_data.hdf5").write_bytes(b"")
    with pytest.raises(DataError, match=r"needs h5py: pip install 'pwm-fast\[minari\]'"):
        describe(tmp_path)
