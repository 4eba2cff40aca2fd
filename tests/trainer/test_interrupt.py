"""Signals that stop a run, and what becomes of those that a library had taken before."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from pwm_fast.interrupt import SIGNALS, Interrupt, Interrupted


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
