"""What a run says where there is no terminal: now and then a line, however long its epochs are."""

from __future__ import annotations

from pathlib import Path

import pytest

from pwm_fast.run import logger as logging
from pwm_fast.run import trainer
from pwm_fast.run.start import train
from tests.run.conftest import tiny_config


def lines_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], **changes
) -> list[str]:
    monkeypatch.setattr(trainer, "plot_run", lambda *_: [])
    train(tiny_config(tmp_path / "run", **changes))
    return capsys.readouterr().out.splitlines()


def test_a_long_bootstrap_and_long_epochs_speak(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(logging, "SILENCE", 0.0)
    changes = {"alg.model_learning.bootstrap_updates": 25, "eval.every": 0}
    said = lines_of(tmp_path, monkeypatch, capsys, **changes)
    for i in (0, 10, 20):
        assert f"bootstrap: {i} of 25 world-model updates" in said
    epochs = [line.split()[1] for line in said if line.startswith("epoch ")]
    assert epochs == [f"{k}/6" for k in range(7)]


def test_short_ones_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = lines_of(tmp_path, monkeypatch, capsys, **{"eval.every": 0})
    assert not [line for line in said if line.startswith("bootstrap:") and " of " in line]
    assert [line.split()[1] for line in said if line.startswith("epoch ")] == ["0/6"]
