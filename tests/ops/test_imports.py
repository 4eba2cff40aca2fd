"""Importing the operations costs nothing but torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import pwm_fast

SCRIPT = """
import json, sys
import torch
before = set(sys.modules)
import pwm_fast.ops
json.dump([sorted(before), sorted(set(sys.modules) - before)], sys.stdout)
"""


@pytest.fixture(scope="module")
def modules() -> tuple[set[str], set[str]]:
    """Top-level names loaded by torch, and those that ``pwm_fast.ops`` adds, in a fresh process."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=Path(pwm_fast.__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    by_torch, by_ops = json.loads(done.stdout)
    return {m.partition(".")[0] for m in by_torch}, {m.partition(".")[0] for m in by_ops}


@pytest.mark.parametrize(
    "name",
    ["gymnasium", "hydra", "matplotlib", "mujoco", "omegaconf", "triton", "wandb", "warp"],
)
def test_heavy_packages_stay_out(name: str, modules: tuple[set[str], set[str]]) -> None:
    by_torch, by_ops = modules
    assert name not in by_ops
    assert name == "triton" or name not in by_torch  # torch itself may import triton


def test_only_torch_and_the_standard_library(modules: tuple[set[str], set[str]]) -> None:
    """Whatever the list above forgot."""
    by_torch, by_ops = modules
    assert "torch" in by_torch
    assert "pwm_fast" in by_ops
    assert by_ops - by_torch - set(sys.stdlib_module_names) == {"pwm_fast"}


def test_all_names_exist() -> None:
    """``__all__`` is complete and correct: every public name, and nothing else."""
    from pwm_fast import ops

    public = {
        name
        for name, value in vars(ops).items()
        if not name.startswith("_") and not isinstance(value, type(sys))
    }
    assert set(ops.__all__) == public
