"""What a run says where there is no terminal: now and then a line, however long its epochs are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

from pwm_fast.run import logger as logging
from pwm_fast.run import trainer
from pwm_fast.run.rundir import RunDirectory
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


class Sink:
    def __init__(self, gradients: bool) -> None:
        self.gradients, self.taken = gradients, []

    def log_gradients(self, gradients: Mapping[str, np.ndarray]) -> None:
        self.taken.append({name: values.tolist() for name, values in gradients.items()})

    def finish(self, *, ok: bool) -> None:
        self.taken.append(ok)


def test_finite_gradients_go_where_they_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gradients = {"w": torch.tensor([1.0, 2.0]), "bad": torch.tensor([1.0, float("nan")])}
    for asked in ((True, False), (False, False)):
        sinks = [Sink(gradients=takes) for takes in asked]
        monkeypatch.setattr(logging, "_sinks", lambda *_, sinks=sinks: sinks)
        with RunDirectory(tmp_path / "run") as directory:
            log = logging.RunLogger(tiny_config(tmp_path / "run"), directory)
            assert log.takes_gradients == any(asked)
            log.log_gradients(gradients)
            log.close(ok=False)
        for sink in sinks:
            assert sink.taken == ([{"w": [1.0, 2.0]}] if sink.gradients else []) + [False]
    assert not logging.Unheard().takes_gradients, "nothing of a rank but the first"
