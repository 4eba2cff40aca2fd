"""Signals that stop a run, and what becomes of those that a library had taken before."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from pwm_fast.run import checkpoint
from pwm_fast.run.interrupt import SIGNALS, Interrupt, Interrupted
from tests.run.conftest import (
    Launcher,
    clean_environment,
    command,
    rows,
    tiny_arguments,
    wait_for_change,
)

needs_hangup = pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no SIGHUP here")


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Signal handlers are put back."""
    before = {s: signal.getsignal(s) for s in SIGNALS}
    yield
    for signum, handler in before.items():
        assert signal.getsignal(signum) == handler or signum == signal.SIGUSR2
        signal.signal(signum, handler)


@pytest.mark.parametrize("signum", SIGNALS)
def test_first_signal_is_remembered(signum: int, capfd: pytest.CaptureFixture) -> None:
    with Interrupt() as stop:
        stop.check()
        os.kill(os.getpid(), signum)
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Interrupted):
            stop.check()
    assert stop.exit_status == 128 + signum
    assert capfd.readouterr().err.count("a checkpoint will be written") == 1


def test_second_interrupt_is_at_once() -> None:
    with pytest.raises(KeyboardInterrupt), Interrupt():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("before", [[], [signal.SIGTERM]])
def test_warning_goes_on_to_whom_it_belonged(before: list[int]) -> None:
    """As submitit's requeue, which must come after the checkpoint and does not return."""
    events: list[str] = []

    def requeue(signum: int, frame: object) -> None:
        events.append(signal.Signals(signum).name)
        raise SystemExit(255)

    signal.signal(signal.SIGUSR2, requeue)
    with pytest.raises(SystemExit), Interrupt():
        for signum in (*before, signal.SIGUSR2):
            os.kill(os.getpid(), signum)
        events.append("checkpoint")
    assert events == ["checkpoint", "SIGUSR2"]


def test_what_the_owner_of_a_warning_starts_ignores_sigterm() -> None:
    """Slurm sends it to ``scontrol requeue`` as well, which must not fail by it."""
    events: list[int] = []
    child = ["sh", "-c", "kill -TERM $$"]
    assert subprocess.run(child).returncode == -signal.SIGTERM
    signal.signal(
        signal.SIGUSR2, lambda signum, frame: events.append(subprocess.run(child).returncode)
    )
    before = signal.getsignal(signal.SIGTERM)
    with Interrupt():
        os.kill(os.getpid(), signal.SIGUSR2)
    assert events == [0] and signal.getsignal(signal.SIGTERM) == before


def test_warning_is_not_handed_on_after_an_error() -> None:
    """Without a checkpoint a requeue would lead nowhere."""
    events: list[int] = []
    signal.signal(signal.SIGUSR2, lambda signum, frame: events.append(signum))
    with pytest.raises(OSError, match="full"), Interrupt():
        os.kill(os.getpid(), signal.SIGUSR2)
        raise OSError("the disk is full")
    assert events == []


def test_other_signals_are_not_handed_on() -> None:
    events: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda signum, frame: events.append(signum))
    try:
        with Interrupt() as stop:
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert stop.exit_status == 143 and events == []


# --- a terminal that is closed --------------------------------------------------------------------

HANGS_UP = """
import os, signal
from pwm_fast.agent import PWM
signal.signal(signal.SIGHUP, signal.{before})
observe, calls = PWM.observe, 0
def hangs_up(self, *args):
    global calls
    calls += 1
    if calls == 9:
        os.kill(os.getpid(), signal.SIGHUP)
    observe(self, *args)
PWM.observe = hangs_up
"""


@needs_hangup
def test_hangup_writes_a_checkpoint(starter: Launcher, whole_run: Path, tmp_path: Path) -> None:
    arguments = tiny_arguments(tmp_path / "run")
    outcome = starter.run(tmp_path, *arguments, hook=HANGS_UP.format(before="SIG_DFL"))
    assert outcome.status == 128 + signal.SIGHUP
    assert outcome.err == "\nSIGHUP: stopping; a checkpoint will be written\n"
    assert outcome.out.splitlines()[-1].startswith("interrupted: 2 epochs"), "no terminal: kept"
    saved = checkpoint.load(tmp_path / "run" / "checkpoints" / "latest.pt")
    assert (saved["epoch"], saved["progress"]["done"]) == (2, {"steps": 1})
    assert starter.run(tmp_path, *arguments).status == 0
    assert rows(tmp_path / "run") == rows(whole_run)


@needs_hangup
def test_ignored_hangup_stays_ignored(starter: Launcher, whole_run: Path, tmp_path: Path) -> None:
    """As nohup wants it."""
    arguments = tiny_arguments(tmp_path / "run")
    outcome = starter.run(tmp_path, *arguments, hook=HANGS_UP.format(before="SIG_IGN"))
    assert (outcome.status, outcome.err) == (0, "")
    assert rows(tmp_path / "run") == rows(whole_run)


@needs_hangup
def test_handler_of_hangup_is_put_back() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        with Interrupt() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
        assert stop.exit_status == 128 + signal.SIGHUP
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


@needs_hangup
@pytest.mark.slow
def test_closed_terminal(tmp_path: Path) -> None:
    """The bar can be drawn no more, and still the checkpoint comes before the end."""
    import fcntl
    import pty
    import select
    import struct
    import termios
    import threading

    def take_terminal() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    terminal, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    arguments = tiny_arguments(tmp_path / "run", "epochs=100000", "checkpoint.every=0")
    process = subprocess.Popen(
        command("pwm_fast.train", *arguments),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=clean_environment(),
        start_new_session=True,
        preexec_fn=take_terminal,
    )
    os.close(theirs)
    closing = threading.Event()

    def read() -> None:
        while not closing.is_set():
            if select.select([terminal], [], [], 0.05)[0]:
                os.read(terminal, 4096)

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(3):
        wait_for_change(tmp_path / "run" / "metrics.jsonl")
    closing.set()
    reader.join(timeout=60)
    os.close(terminal)
    assert process.wait(timeout=120) == 128 + signal.SIGHUP
    latest = checkpoint.load(tmp_path / "run" / "checkpoints" / "latest.pt")
    assert latest["epoch"] >= 1
    assert (tmp_path / "run" / "plots" / "summary.png").exists()
