"""A full disk stops a run with a message; what was written before stays whole."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from pwm_fast.run import checkpoint, metrics
from tests.run.conftest import Launcher, Outcome, rows, tiny_arguments

# From the n-th call of a function on, files cannot grow beyond a size; calls count where they have
# the given last argument.
LIMIT = """
import resource
from pwm_fast.run import metrics, trainer
original, calls = {owner}.{name}, 0

def limited(*args):
    global calls
    calls += {argument!r} in (None, args[-1])
    if calls == {call}:
        resource.setrlimit(resource.RLIMIT_FSIZE, (600, 600))
    return original(*args)

{owner}.{name} = limited
"""


def assert_stopped(outcome: Outcome, *parts: str) -> None:
    assert outcome.status == 2, outcome
    assert len(outcome.err.splitlines()) == 1, outcome.err
    for part in ("error: ", *parts):
        assert part in outcome.err


@pytest.mark.parametrize(
    ("owner", "name", "argument", "call", "file", "epoch"),
    [
        ("trainer.Trainer", "save", "best", 1, "checkpoints/best.pt", None),
        ("trainer.Trainer", "save", "latest", 2, "checkpoints/latest.pt", 2),
        ("trainer.Trainer", "save", "final", 1, "checkpoints/final.pt", 6),
        ("metrics.MetricsFile", "write", None, 4, "metrics.jsonl", 2),
        ("trainer", "plot_run", None, 1, "plots/", 6),
    ],
)
def test_limited_files(
    owner: str,
    name: str,
    argument: str | None,
    call: int,
    file: str,
    epoch: int | None,
    starter: Launcher,
    whole_run: Path,
    tmp_path: Path,
) -> None:
    code = LIMIT.format(owner=owner, name=name, argument=argument, call=call)
    arguments = tiny_arguments(tmp_path / "run")
    outcome = starter.run(tmp_path, *arguments, hook=code, plots=name == "plot_run")
    assert_stopped(outcome, str(tmp_path / "run" / file), "File too large")
    latest = tmp_path / "run" / "checkpoints" / "latest.pt"
    assert latest.exists() == (epoch is not None)
    if epoch is not None:
        assert checkpoint.load(latest)["epoch"] == epoch
    left = [p for p in (tmp_path / "run").rglob(".*") if p.name != ".lock"]
    assert left == [], "no half files"
    assert starter.run(tmp_path, *arguments).status == 0, "with room again it goes on"
    assert rows(tmp_path / "run") == rows(whole_run)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(disk)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no file system can be mounted here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_full_disk(small_disk: Path, starter: Launcher, whole_run: Path, tmp_path: Path) -> None:
    arguments = tiny_arguments(small_disk / "run")
    filler = (
        "import os, shutil\n"
        "from pwm_fast.run import trainer\n"
        "save, calls = trainer.Trainer.save, 0\n"
        "def full(self, name):\n"
        "    global calls\n"
        "    calls += name == 'latest'\n"
        "    if calls == 2:\n"
        "        free = shutil.disk_usage(self.directory.path).free\n"
        "        with open(self.directory.path.parent / 'filler', 'wb') as file:\n"
        "            file.write(bytes(max(free - 40_000, 0)))\n"
        "    save(self, name)\n"
        "trainer.Trainer.save = full\n"
    )
    outcome = starter.run(tmp_path / "cwd", *arguments, hook=filler)
    assert_stopped(outcome, "latest.pt: No space left on device; the last one is unchanged")
    assert checkpoint.load(small_disk / "run" / "checkpoints" / "latest.pt")["epoch"] == 2
    assert len(metrics.read(small_disk / "run" / "metrics.jsonl")) == 5

    # Still full: it goes on from the checkpoint and stops where that cannot be written.
    again = starter.run(tmp_path / "cwd", *arguments)
    assert_stopped(again, "No space left on device")
    os.remove(small_disk / "filler")
    assert starter.run(tmp_path / "cwd", *arguments).status == 0
    assert rows(small_disk / "run") == rows(whole_run)
