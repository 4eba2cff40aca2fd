"""Commands side by side: slots, exit statuses, and what signals do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pwm_fast.launch import processes
from tests.launch.slurm import wait_until

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals and shells of POSIX")

WAITS = """
trap 'echo INT; exit 130' INT
trap 'echo TERM; exit 143' TERM
echo ready
while :; do sleep 0.05; done
"""


def shell(script: str, log: Path) -> processes.Command:
    return processes.Command(["/bin/sh", "-c", script], log)


def read(log: Path) -> str:
    return log.read_text() if log.exists() else ""


def test_a_slot_takes_one_command_at_a_time(tmp_path: Path) -> None:
    commands = [
        # Fails if another command holds its slot.
        shell("mkdir slot$SLOT && echo $SLOT; s=$?; rmdir slot$SLOT; exit $s", tmp_path / f"{i}")
        for i in range(6)
    ]
    before = os.getcwd()
    os.chdir(tmp_path)
    try:
        seen: list[tuple] = []
        outcome = processes.run(
            commands,
            [{"SLOT": "a"}, {"SLOT": "b"}],
            lambda i, slot: seen.append(("start", i, slot)),
            lambda i, status: seen.append(("end", i, status)),
        )
    finally:
        os.chdir(before)
    assert outcome.statuses == [0] * 6 and outcome.signals == []
    assert [event[1] for event in seen if event[0] == "start"] == list(range(6))
    assert {event[1] for event in seen if event[0] == "end"} == set(range(6))
    starts = {event[1]: event[2] for event in seen if event[0] == "start"}
    for i in range(6):
        assert read(tmp_path / f"{i}").split() == ["ab"[starts[i]]]
    assert {"ab"[slot] for slot in starts.values()} == {"a", "b"}


def test_a_failure_does_not_stop_the_others(tmp_path: Path) -> None:
    scripts = ("echo to stderr >&2; exit 3", "kill -KILL $$", "exit 0")
    commands = [shell(s, tmp_path / f"{i}") for i, s in enumerate(scripts)]
    outcome = processes.run(commands, [{}])
    assert outcome.statuses == [3, -signal.SIGKILL, 0]
    assert read(tmp_path / "0") == "to stderr\n"


def test_logs_are_appended_to(tmp_path: Path) -> None:
    for _ in range(2):
        processes.run([shell("echo again", tmp_path / "log")], [{}])
    assert read(tmp_path / "log") == "again\n" * 2


@pytest.mark.parametrize(
    ("signum", "theirs"),
    [("SIGINT", "INT"), ("SIGTERM", "TERM"), ("SIGHUP", "TERM"), ("SIGUSR1", "TERM")],
)
def test_signals_are_passed_on(signum: str, theirs: str, tmp_path: Path) -> None:
    number = getattr(signal, signum)
    before = signal.getsignal(number)
    commands = [shell(WAITS, tmp_path / f"{i}") for i in range(3)]

    def send() -> None:
        wait_until(lambda: all(read(tmp_path / f"{i}") == "ready\n" for i in (0, 1)), "ready")
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=send)
    thread.start()
    outcome = processes.run(commands, [{}, {}])
    thread.join()
    status = 130 if theirs == "INT" else 143
    assert outcome.statuses == [status, status, None], "the third is not started any more"
    assert outcome.signals == [number]
    assert read(tmp_path / "0") == f"ready\n{theirs}\n"
    assert signal.getsignal(number) == before


def test_second_interrupt_is_passed_on_too(tmp_path: Path) -> None:
    stubborn = """
trap 'n=x$n; echo INT; [ $n = xx ] && exit 7' INT
trap 'echo TERM' TERM
n=
echo ready
while :; do sleep 0.05; done
"""
    log = tmp_path / "log"

    def send() -> None:
        for signum, shown in (
            (None, "ready\n"),
            (signal.SIGINT, "ready\nINT\n"),
            (signal.SIGTERM, "ready\nINT\n"),  # a repetition of another kind is not
        ):
            if signum is not None:
                os.kill(os.getpid(), signum)
            wait_until(lambda shown=shown: read(log) == shown, shown)  # type: ignore[misc]
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=send)
    thread.start()
    outcome = processes.run([shell(stubborn, log)], [{}])
    thread.join()
    assert outcome.statuses == [7]
    assert read(log) == "ready\nINT\nINT\n"


def test_terminal_interrupts_reach_runs_once(tmp_path: Path) -> None:
    """Ctrl-C goes to a terminal's whole process group; runs are in groups of their own."""
    code = (
        "from pathlib import Path\n"
        "from pwm_fast.launch import processes\n"
        f"script = {WAITS!r}\n"
        f"command = processes.Command(['/bin/sh', '-c', script], Path({str(tmp_path / 'log')!r}))\n"
        "print(processes.run([command], [{}]).statuses)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code], start_new_session=True, stdout=subprocess.PIPE, text=True
    )
    wait_until(lambda: read(tmp_path / "log") == "ready\n", "ready")
    os.killpg(parent.pid, signal.SIGINT)
    out, _ = parent.communicate(timeout=60)
    assert out == "[130]\n"
    assert read(tmp_path / "log") == "ready\nINT\n"


def test_nohup_is_heeded(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        commands = [shell(f"kill -HUP {os.getpid()}; exit 0", tmp_path / f"{i}") for i in (0, 1)]
        outcome = processes.run(commands, [{}])
    finally:
        signal.signal(signal.SIGHUP, before)
    assert outcome.statuses == [0, 0] and outcome.signals == []


def test_an_error_of_ours_leaves_nothing_running(tmp_path: Path) -> None:
    log = tmp_path / "log"

    def on_start(index: int, slot: int) -> None:
        if index == 1:
            wait_until(lambda: read(log) == "ready\n", "ready")
            raise OSError("the disk is full")

    commands = [shell(WAITS, log), shell("exit 0", tmp_path / "other")]
    with pytest.raises(OSError, match="full"):
        processes.run(commands, [{}, {}], on_start)
    assert read(log) == "ready\nTERM\n"


def test_outside_the_main_thread(tmp_path: Path) -> None:
    outcomes: list[processes.Outcome] = []
    commands = [shell("exit 4", tmp_path / "log")]
    thread = threading.Thread(target=lambda: outcomes.append(processes.run(commands, [{}])))
    thread.start()
    thread.join()
    assert outcomes[0].statuses == [4]


def test_imports_nothing_heavy() -> None:
    """The process that waits in a Slurm job should start at once, and hold no memory."""
    code = (
        "import sys, pwm_fast.launch.slurm_job\n"
        "print([m for m in ('torch', 'hydra', 'mujoco') if m in sys.modules])"
    )
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n", time.monotonic() - started


@pytest.mark.parametrize("polite", [True, False])
def test_together_the_others_end_when_one_fails(polite: bool, tmp_path: Path) -> None:
    waits = WAITS if polite else "trap '' TERM; echo ready; while :; do sleep 0.05; done"
    fails = "until grep -q ready $OTHER; do sleep 0.05; done; exit 3"
    commands = [shell(waits, tmp_path / "0"), shell(fails, tmp_path / "1")]
    slots = [{}, {"OTHER": str(tmp_path / "0")}]
    ended: list[int] = []
    before = time.monotonic()
    outcome = processes.run(
        commands, slots, on_end=lambda i, status: ended.append(status), together=1.0
    )
    assert outcome.statuses == [143 if polite else -signal.SIGKILL, 3] and outcome.signals == []
    assert ended[0] == 3 and (polite or time.monotonic() - before > 1.0)
