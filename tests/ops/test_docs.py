"""The examples of docs/ops.md run, one after another."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest

from pwm_fast.acceleration import AccelerationWarning
from pwm_fast.backends.native import why_missing

PAGE = Path(__file__).parents[2] / "docs" / "ops.md"


def test_examples(capsys: pytest.CaptureFixture) -> None:
    text = PAGE.read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) == 6
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
