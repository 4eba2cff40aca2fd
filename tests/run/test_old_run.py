"""Runs that an older version stopped in the middle go on as that version would have gone on.

``tests/data/old_runs/make.py`` made them. Each is a run directory with what a continuation needs.
Beside it lies the end that the old version came to: ``.npz`` holds the agent, the env and the
states of random generators, ``.json`` the rows and how torch and MuJoCo round. If they round here
as they did there, the end is the same to the bit, with PyTorch's Adam, GEMMs, sums and autograd
where that version had them. Elsewhere, and with what stands in their place now, sums are rounded in
another order.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pwm_fast.run import checkpoint, installation
from tests.data.old_runs import make
from tests.data.old_runs.make import COMPARED, SAME_ROUNDING, tensors
from tests.run.conftest import VOLATILE, clean_environment, command, rows

OLD = Path(__file__).parents[1] / "data" / "old_runs"
# Logged since then.
NEW = {
    "action_saturation",
    "random_share",
    "eval_latent_error",
    "eval_reward_r2",
    "train_terminated",
    "train_truncated",
    "return_rms_mean",
    "return_rms_std",
    "return_rms_count",
}
# Measured with kernels of plain x86-64, with the reference and as it is now: 1e-6 at most.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}
# What the shipped configurations had then.
SINCE = {
    "flow": ("alg.world_model.integrator=heun", "alg.model_learning.flow_share=1.0"),
    "mlp": ("alg.model_learning.rollout_steps=null",),
}
AS_THEN = """
import os
os.environ["PWM_FAST_GEMM"] = "torch"
import torch
from pwm_fast import train
from pwm_fast.agent import optim
from pwm_fast.fused import mlp_backward
from pwm_fast.ops import extend
mlp_backward.sum_rows = lambda x, out: torch.sum(x, -2, dtype=torch.float64, out=out)
optim.step_kernels = lambda params: None
extend.regression = lambda layers, x: None
train.main()
"""


@pytest.mark.parametrize(("kind", "way"), [("flow", "then"), ("mlp", "then"), ("flow", "now")])
def test_continued(kind: str, way: str, tmp_path: Path) -> None:
    end = json.loads((OLD / f"{kind}.json").read_text())
    shutil.copytree(OLD / kind, tmp_path / kind)
    # The same command now means other dynamics and windows: it is refused, and told what to give.
    plain = subprocess.run(
        [*command("pwm_fast.train"), *end["overrides"]],
        cwd=tmp_path,
        env=clean_environment(),
        capture_output=True,
        text=True,
    )
    assert plain.returncode == 2
    for override in SINCE[kind]:
        assert f"{override.split('=')[0]} " in plain.stderr, plain.stderr
    # In a process of its own: what chooses how libraries round is read before the first sum.
    start = command("pwm_fast.train") if way == "now" else [sys.executable, "-c", AS_THEN]
    out = _run([*start, *end["overrides"], *SINCE[kind]], tmp_path)
    assert "after epoch 3" in out
    found = checkpoint.load(tmp_path / kind / "checkpoints" / "final.pt")
    ours = tensors({key: found[key] for key in COMPARED})
    with np.load(OLD / f"{kind}.npz") as saved:
        theirs = dict(saved)
    assert ours.keys() == theirs.keys()
    same = way == "then" and _is_as_recorded(end)
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype and ours[name].shape == value.shape, name
        if same or value.dtype.kind != "f":
            np.testing.assert_array_equal(ours[name], value, name)
        else:
            np.testing.assert_allclose(ours[name], value, err_msg=name, **TOLERANCE)
    _compare_rows(rows(tmp_path / kind), end["rows"], same)
    _compare_values(found["best"], end["best"], same, "best")


def _run(arguments: list[str], cwd: Path) -> str:
    env = {**clean_environment(), **SAME_ROUNDING}
    if installation.native_isa() not in ("avx2", "avx512"):
        del env["PWM_FAST_ISA"]
    if installation.native_isa() is None:
        env["PWM_FAST_BACKEND"] = "torch"
    done = subprocess.run(arguments, cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _is_as_recorded(end: dict[str, Any]) -> bool:
    """Whether our kernels are those, and torch and MuJoCo round, as where the end was made."""
    if installation.native_isa() not in ("avx2", "avx512"):
        return False
    return _rounding() == end["rounding"]


@cache
def _rounding() -> str:
    return _run([sys.executable, make.__file__], OLD).strip()


def _compare_rows(ours: list[Any], theirs: list[dict[str, Any]], same: bool) -> None:
    assert len(ours) == len(theirs)
    for own, old in zip(ours, theirs, strict=True):
        kept = {k: v for k, v in old.items() if k not in VOLATILE}
        since = {k: v for k, v in own.items() if k in kept or k not in NEW}
        _compare_values(since, kept, same, f"epoch {old['epoch']}")


def _compare_values(ours: dict[str, Any], theirs: dict[str, Any], same: bool, where: str) -> None:
    assert ours.keys() == theirs.keys(), where
    for name, value in theirs.items():
        if same or not isinstance(value, float):
            assert ours[name] == value, (where, name)
        else:
            assert ours[name] == pytest.approx(value, rel=1e-3, abs=1e-6), (where, name)
