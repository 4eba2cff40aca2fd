"""What a sweep's directory says, and what its exit statuses mean."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from pwm_fast.config import ConfigError
from pwm_fast.launch import sweep
from pwm_fast.parallel import LOST


def runs(directory: Path, count: int, first: int = 0) -> list[sweep.Run]:
    return [
        sweep.Run(i, f"seed={i}", [f"seed={i}"], f"run_{i}", sweep.log_path(directory, i, "s"))
        for i in range(first, first + count)
    ]


@pytest.mark.parametrize(
    ("statuses", "signals", "status"),
    [
        ([0, 0], [], 0),
        ([0, 2, 1], [], 2),
        ([0, -9], [], 137),
        ([None, 0], [], 0),
        ([143, 0], [signal.SIGTERM], 143),
        ([1, 130], [signal.SIGINT, signal.SIGINT], 130),
    ],
)
def test_exit_status(statuses: list[int | None], signals: list[int], status: int) -> None:
    assert sweep.exit_status(statuses, signals) == status


@pytest.mark.parametrize(
    ("status", "text"),
    [
        (0, "finished"),
        (2, "failed with exit status 2"),
        (143, "stopped by SIGTERM, with a checkpoint"),
        (-9, "killed by SIGKILL"),
        (None, "did not end by itself"),
        (128 + 120, "stopped by signal 120"),
    ],
)
def test_descriptions(status: int | None, text: str) -> None:
    assert sweep.describe(status).startswith(text)


def test_failures(tmp_path: Path) -> None:
    three = runs(tmp_path, 3)
    assert sweep.failures(three, [0, 0, 0]) == ""
    Path(three[1].log).write_text("epoch 1\nerror: it is so\n\n")
    text = sweep.failures(three, [0, 2, None], {2: "job 7: CANCELLED"})
    assert text.splitlines() == [
        "2 of 3 runs did not finish:",
        "  run 1 (seed=1): failed with exit status 2",
        "    error: it is so",
        f"    log {three[1].log}",
        "  run 2 (seed=2): did not end by itself (job 7: CANCELLED)",
    ]


def test_directory(tmp_path: Path) -> None:
    directory = tmp_path / "new"
    sweep.write(directory, runs(directory, 2), {"5": [0, 1]})
    sweep.write(directory, runs(directory, 2, first=2), {"6": [2, 3]})  # a second batch
    assert sweep.read(directory) == (runs(directory, 4), {"5": [0, 1], "6": [2, 3]})
    sweep.write(directory, runs(directory, 1), {})  # a sweep anew
    assert sweep.read(directory) == (runs(directory, 1), {})


def test_no_directory_of_a_sweep(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no directory of a sweep"):
        sweep.read(tmp_path)
    (tmp_path / "sweep.json").write_text('{"runs": [{"index": 0}], "jobs": {}}')
    with pytest.raises(ConfigError, match="is no directory of a sweep"):
        sweep.read(tmp_path)


def test_log_names_are_plain(tmp_path: Path) -> None:
    path = Path(sweep.log_path(tmp_path, 3, "alg.actor.units=[4, 5] run_dir=a/b " + "x" * 300))
    assert path.parent == tmp_path
    assert path.name.startswith("3_alg.actor.units=_4,_5_run_dir=a_b_x")
    assert len(path.name) < 130


def test_execute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: object) -> None:
    two = runs(tmp_path, 2)
    monkeypatch.setattr("sys.executable", "/bin/false")  # -m pwm_fast.train ...
    Path(two[0].exit_file).write_text("0\n")
    outcome = sweep.execute(two, [{"OMP_NUM_THREADS": "1"}])
    assert outcome.statuses == [1, 1]
    assert [run.status() for run in two] == [1, 1]
    out = capsys.readouterr().out  # type: ignore[attr-defined]
    assert f"run 1 (seed=1): on no GPU, 1 CPU thread; log {two[1].log}" in out
    assert "run 1 (seed=1): failed with exit status 1" in out


def test_the_last_line_is_not_of_another_process_s_end(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(f"error: out of memory\nerror: {LOST} (closed by peer)\n\n")
    assert sweep.last_line(log) == "error: out of memory"
    log.write_text(f"error: {LOST} (closed by peer)\n")
    assert LOST in sweep.last_line(log)


def test_a_parallel_run_says_all_its_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    run = sweep.Run(0, "seed=0", [], "run", sweep.log_path(tmp_path, 0, "s"), parallel=True)
    monkeypatch.setattr(
        sweep.processes, "run", lambda commands, *_, **__: sweep.processes.Outcome([0, 0])
    )
    shares = [{"OMP_NUM_THREADS": "2", "CUDA_VISIBLE_DEVICES": gpu} for gpu in ("3", "5")]
    assert sweep.execute([run], shares).statuses == [0]
    said = capsys.readouterr().out
    assert "in 2 processes, on GPU 3, 2 CPU threads; GPU 5, 2 CPU threads; log" in said
