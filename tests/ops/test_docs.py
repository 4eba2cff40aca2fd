"""The examples of README, docs/ops.md and the guides run, one after another."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from pwm_fast.acceleration import AccelerationWarning
from pwm_fast.backends.native import why_missing

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "ops.md"


def test_the_readme_example() -> None:
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(block, "README.md", "exec"), names)
    assert names["z_next"].shape == (256, 64)
    assert names["weight"].grad.isfinite().all()


def test_examples(capsys: pytest.CaptureFixture) -> None:
    text = PAGE.read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) == 8
    names: dict[str, object] = {"__name__": "docs"}
    with warnings.catch_warnings():
        warnings.simplefilter("error", AccelerationWarning)
        for block in blocks:
            exec(compile(block, str(PAGE), "exec"), names)
    printed = capsys.readouterr().out
    (explained,) = re.findall(r"```text\n(.*?)```", text, flags=re.DOTALL)
    if why_missing() is None:
        assert explained in printed
    assert "left alone: none" in printed
    assert names["actor"][0].weight.grad is not None  # type: ignore[index]
    assert not names["masked"].action[:, ~names["mask"]].any()  # type: ignore[attr-defined, index]


def run_guide(name: str) -> dict[str, Any]:
    """The names that the Python blocks of a guide leave, run one after another."""
    path = ROOT / "docs" / "guides" / name
    names: dict[str, Any] = {"__name__": "guide"}
    for block in re.findall(r"```python\n(.*?)```", path.read_text(), flags=re.DOTALL):
        exec(compile(block, str(path), "exec"), names)
    return names


def test_the_guide_to_own_code_learns(capsys: pytest.CaptureFixture) -> None:
    """Both worked examples hold the point near 0, where the reward is up to 1."""
    state = torch.random.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error", AccelerationWarning)
        names = run_guide("own_code.md")
    torch.random.set_rng_state(state)
    assert names["before"] < 0.0
    assert names["after"] > 0.5
    assert names["planned_return"] > 0.5
    assert names["whole"].shape == (names["H"] + 1, names["B"], names["D"])
    assert "left alone: none" in capsys.readouterr().out


def test_the_guide_to_the_implementation_runs() -> None:
    pytest.importorskip("hydra")
    names = run_guide("implementation.md")
    assert names["run"].alg.world_model.kind == "flow"
    assert names["rollout"].shape == (17, 4, 512)
