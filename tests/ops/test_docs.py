"""The examples of README and docs/ops.md run, one after another."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest

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
