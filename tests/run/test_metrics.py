"""The metrics file: whole rows, each epoch once."""

import errno
import json
import math
from pathlib import Path

import pytest
import torch

from pwm_fast.run import metrics
from pwm_fast.run.metrics import MetricsFile


def test_rows_are_on_disk_at_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsFile(path)
    log.write({"epoch": 0, "reward": 1.5})
    assert metrics.read(path) == [{"epoch": 0, "reward": 1.5}]
    log.close()


def test_resuming_drops_what_is_computed_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"epoch": e, "x": e}) for e in range(6)]
    path.write_text("\n".join(lines) + '\n{"epoch": 6, "x"')
    log = MetricsFile(path, last_epoch=3)
    log.write({"epoch": 4, "x": 40})
    log.close()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(r["epoch"], r["x"]) for r in rows] == [(0, 0), (1, 1), (2, 2), (3, 3), (4, 40)]


def test_starting_anew_empties_the_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"epoch": 0}\n')
    MetricsFile(path).close()
    assert path.read_text() == ""


def test_reads_around_damage(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(
        b'{"epoch": 1, "x": 1}\n[1]\n"epoch"\n\xff\xfe\n{"x": 1}\n{"epoch": 0}\n'
        b'{"epoch": 1, "x": 2}\n{"epoch": 2, "x'
    )
    assert metrics.read(path) == [{"epoch": 0}, {"epoch": 1, "x": 2}]
    assert metrics.read(tmp_path / "none") == []


def test_not_finite_is_null(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsFile(path)
    log.write({"epoch": 0, "a": math.nan, "b": math.inf, "c": -math.inf, "d": 1.0})
    log.close()
    assert path.read_text() == '{"epoch": 0, "a": null, "b": null, "c": null, "d": 1.0}\n'
    assert metrics.finite({"a": [1, math.nan, {"b": (math.inf, "x")}]}) == {
        "a": [1, None, {"b": [None, "x"]}]
    }


def test_numbers() -> None:
    row = metrics.to_numbers({"a": torch.tensor(2.5), "b": torch.tensor(3), "c": None, "d": 0.5})
    assert row == {"a": 2.5, "b": 3, "c": None, "d": 0.5}
    assert isinstance(row["b"], int)


def test_full_disk_names_the_file() -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("needs /dev/full")
    log = MetricsFile.__new__(MetricsFile)
    log.path, log._file = full, full.open("ab", buffering=0)
    with pytest.raises(OSError) as caught:
        log.write({"epoch": 0})
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, "/dev/full")
    log.close()


def test_tasks_of_rows() -> None:
    """In the order in which evaluations name them; those of training alone behind them."""
    rows = [
        {"epoch": 0, "eval_reward": 1.0, "eval_reward_std": 0.0},
        {"epoch": 1, "train_reward/c": None, "eval_reward/b": 1.0, "eval_reward/a": 2.0},
        {"epoch": 2, "eval_reward_r2": 0.0, "train_reward/a": 1.0},
    ]
    assert metrics.tasks_of(rows) == ["b", "a", "c"]
    assert metrics.tasks_of(rows[:1]) == metrics.tasks_of([]) == []
