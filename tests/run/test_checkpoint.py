"""Checkpoint files: what goes in comes out, and what is no checkpoint is refused by name."""

from __future__ import annotations

import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pwm_fast.run import checkpoint, provenance
from pwm_fast.run.checkpoint import CheckpointError


def content(epoch: int = 3) -> dict[str, Any]:
    values: dict[str, Any] = dict.fromkeys(checkpoint.KEYS)
    return {**values, "epoch": epoch, "agent": {"w": torch.arange(5.0)}, "best": {"reward": 0.1}}


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    checkpoint.save(path, content())
    loaded = checkpoint.load(path)
    assert torch.equal(loaded["agent"]["w"], torch.arange(5.0))
    assert loaded["epoch"] == 3 and loaded["best"] == {"reward": 0.1}


def test_keeps_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "latest.pt"
    for epoch in (1, 2, 3):
        checkpoint.save(path, content(epoch), keep_previous=True)
    assert checkpoint.load(path)["epoch"] == 3
    assert checkpoint.load(tmp_path / "latest.previous.pt")["epoch"] == 2


def test_random_numbers_go_on() -> None:
    def draw() -> tuple[Any, ...]:
        return (
            torch.rand(3).tolist(),
            torch.randn(3).tolist(),
            np.random.rand(),
            np.random.randn(),
            random.random(),
            random.gauss(0, 1),
        )

    np.random.randn()  # leaves a cached second normal number behind, as does gauss
    random.gauss(0, 1)
    state = checkpoint.rng_state()
    expected = draw()
    draw()
    checkpoint.set_rng_state(state)
    assert draw() == expected


@pytest.mark.parametrize("size", [0, 1, 100, 700, -1])
def test_cut_short(tmp_path: Path, size: int) -> None:
    path = tmp_path / "latest.pt"
    checkpoint.save(path, content(1), keep_previous=True)
    checkpoint.save(path, content(2), keep_previous=True)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=r"latest\.pt is no readable.*latest\.previous\.pt"):
        checkpoint.load(path)
    assert checkpoint.load(tmp_path / "latest.previous.pt")["epoch"] == 1


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("evil"),))


def test_runs_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"format": checkpoint.FORMAT, "x": Evil()}, tmp_path / "a.pt")
    (tmp_path / "b.pt").write_bytes(pickle.dumps(Evil()))
    for name in ("a.pt", "b.pt"):
        with pytest.raises(CheckpointError, match=name):
            checkpoint.load(tmp_path / name)
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize(
    ("foreign", "message"),
    [
        ({"state_dict": {}}, "not a pwm_fast checkpoint: it holds the keys state_dict"),
        ([1, 2], "not a pwm_fast checkpoint: it holds a list"),
        ({"format": checkpoint.FORMAT, "version": 99}, "checkpoint version 99, this program reads"),
        ({"format": checkpoint.FORMAT, "version": checkpoint.VERSION}, "lacks agent, best"),
    ],
)
def test_foreign(tmp_path: Path, foreign: Any, message: str) -> None:
    path = tmp_path / "a.pt"
    torch.save(foreign, path)
    with pytest.raises(CheckpointError, match=message) as caught:
        checkpoint.load(path)
    assert str(path) in str(caught.value)


def test_missing(tmp_path: Path) -> None:
    for path in (tmp_path / "none.pt", tmp_path):
        with pytest.raises(CheckpointError, match=f"no checkpoint file {path}"):
            checkpoint.load(path)


def test_failed_write_leaves_the_last_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.pt"
    checkpoint.save(path, content(1))

    def fail(*_: object) -> None:
        raise RuntimeError("torch wraps it") from OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(CheckpointError, match=r"a\.pt: No space left on device; the last one is"):
        checkpoint.save(path, content(2))
    monkeypatch.undo()
    assert checkpoint.load(path)["epoch"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]


def test_marks_of_files_stay() -> None:
    """They name the package, not a module: files of older versions carry them."""
    marks = (checkpoint.FORMAT, provenance.FORMAT)
    assert [mark.split(".") for mark in marks] == [
        ["pwm_fast", "checkpoint"],
        ["pwm_fast", "provenance"],
    ]
