"""Runs that an older version stopped in the middle go on as that version would have gone on.

``tests/data/old_runs/make.py`` made them. Each is a run directory with what a continuation needs.
Beside it lies the end that the old version came to: ``.npz`` holds the agent, the env and the
states of random generators, ``.json`` the rows and where they were computed. On that processor,
torch and MuJoCo the end is the same to the bit. Elsewhere sums are rounded in another order.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mujoco
import numpy as np
import pytest
import torch

from pwm_fast.run import checkpoint, installation
from tests.data.old_runs.make import COMPARED, tensors
from tests.run.conftest import VOLATILE, Launcher, rows

OLD = Path(__file__).parents[1] / "data" / "old_runs"
# Measured with kernels of plain x86-64 and with the reference: 1e-6 at most.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.mark.parametrize("kind", ["flow", "mlp"])
def test_continued(kind: str, launcher: Launcher, tmp_path: Path) -> None:
    end = json.loads((OLD / f"{kind}.json").read_text())
    shutil.copytree(OLD / kind, tmp_path / kind)
    env = {"PWM_FAST_BACKEND": "torch" if installation.native_isa() is None else "native"}
    outcome = launcher.run(tmp_path, *end["overrides"], env=env)
    assert outcome.status == 0, outcome.err
    assert "after epoch 3" in outcome.out
    found = checkpoint.load(tmp_path / kind / "checkpoints" / "final.pt")
    ours = tensors({key: found[key] for key in COMPARED})
    with np.load(OLD / f"{kind}.npz") as saved:
        theirs = dict(saved)
    assert ours.keys() == theirs.keys()
    same = _is_as_recorded(end)
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype and ours[name].shape == value.shape, name
        if same or value.dtype.kind != "f":
            np.testing.assert_array_equal(ours[name], value, name)
        else:
            np.testing.assert_allclose(ours[name], value, err_msg=name, **TOLERANCE)
    _compare_rows(rows(tmp_path / kind), end["rows"], same)
    _compare_values(found["best"], end["best"], same, "best")


def _is_as_recorded(end: dict[str, Any]) -> bool:
    """Whether kernels compute here, and libraries round, as where the end was written down."""
    here = (torch.__version__, mujoco.__version__, torch.backends.cpu.get_cpu_capability())
    there = (end["versions"]["torch"], end["versions"]["mujoco"], end["cpu_capability"])
    return here == there and installation.native_isa() == end["native_extension"]


def _compare_rows(ours: list[Any], theirs: list[dict[str, Any]], same: bool) -> None:
    assert len(ours) == len(theirs)
    for own, old in zip(ours, theirs, strict=True):
        kept = {k: v for k, v in old.items() if k not in VOLATILE}
        _compare_values(own, kept, same, f"epoch {old['epoch']}")


def _compare_values(ours: dict[str, Any], theirs: dict[str, Any], same: bool, where: str) -> None:
    assert ours.keys() == theirs.keys(), where
    for name, value in theirs.items():
        if same or not isinstance(value, float):
            assert ours[name] == value, (where, name)
        else:
            assert ours[name] == pytest.approx(value, rel=1e-3, abs=1e-6), (where, name)
