"""Stopping a run in good order on a signal.

SIGINT, SIGTERM, Slurm's warnings SIGUSR1 and SIGUSR2, and SIGHUP where the terminal is closed.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from types import FrameType
from typing import Any

from pwm_fast.parallel import ALONE, Ranks

# What Slurm sends some time before it ends a job, as `sbatch --signal=USR1@120` asks it to.
WARNINGS = tuple(getattr(signal, name) for name in ("SIGUSR1", "SIGUSR2") if hasattr(signal, name))
SIGNALS = (signal.SIGINT, signal.SIGTERM, *WARNINGS)
HANGUP = getattr(signal, "SIGHUP", None)
AGREE_EVERY = 4  # checks of a rank between those at which all of them hear of a signal


class Interrupted(Exception):
    """A signal asked to stop; raised by :meth:`Interrupt.check` where the run's state is whole."""


class Interrupt:
    """Remembers the first signal, so that the run can stop where its state is whole.

    A second SIGINT raises KeyboardInterrupt at once. Outside the main thread, where Python allows
    no signal handlers, it never triggers. SIGHUP stays ignored where it is (nohup); after it, what
    goes to a terminal goes nowhere.

    A warning (SIGUSR1, SIGUSR2) that a library had taken before, as submitit takes SIGUSR2 to
    requeue its job, is handed on to it when the context ends well: after the checkpoint.

    Args:
        ranks: that stop together, at the same check, whichever gets the signal.
    """

    def __init__(self, ranks: Ranks = ALONE) -> None:
        self.signum: int | None = None
        self._ranks = ranks
        self._checks = 0
        self._warning: int | None = None
        self._before: dict[int, Any] = {}
        self._terminals: list[int] = []  # descriptors; of one that is gone this cannot be asked

    def check(self) -> None:
        """Raise :class:`Interrupted` if a signal has come: on all ranks, at the same check."""
        self._checks += 1
        if self._ranks.size == 1:
            self.check_alone()
        elif self._checks % AGREE_EVERY == 0 and self.agree():
            raise Interrupted

    def check_alone(self) -> None:
        """Raise :class:`Interrupted` if a signal has come to this process."""
        if self.signum is not None:
            raise Interrupted

    def agree(self) -> bool:
        """Whether a signal has come to any rank, of which all hear; all of them call this."""
        found = self._ranks.highest(self.signum or 0)
        if found:
            self.signum = found  # one status for all
        return found != 0

    @property
    def exit_status(self) -> int:
        """128 + the signal's number, as a shell reports a process that a signal ended; else 0."""
        return 0 if self.signum is None else 128 + self.signum

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            for s in SIGNALS:
                self._before[s] = signal.signal(s, self._handle)
            if HANGUP is not None and signal.getsignal(HANGUP) != signal.SIG_IGN:
                self._terminals = [n for n in (1, 2) if os.isatty(n)]
                self._before[HANGUP] = signal.signal(HANGUP, self._handle)
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        for s, handler in self._before.items():
            signal.signal(s, handler)
        if kind is None and self._warning is not None and callable(self._before[self._warning]):
            hand_on(self._warning, self._before[self._warning])

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if signum in WARNINGS:  # also after a SIGTERM: some clusters send both
            self._warning = signum
        if self.signum is not None:
            if signum == signal.SIGINT:
                raise KeyboardInterrupt
            if signum == HANGUP:
                silence(self._terminals)
            return
        self.signum = signum
        text = f"\n{signal.Signals(signum).name}: stopping; a checkpoint will be written\n"
        with suppress(OSError, ValueError):  # print is not safe within a handler
            os.write(sys.stderr.fileno(), text.encode())
        if signum == HANGUP:
            silence(self._terminals)


def hand_on(signum: int, handler: Callable[[int, None], Any]) -> None:
    """Call a library's handler of a warning, as submitit's, which requeues its job.

    Slurm then ends all processes of the job by SIGTERM, ``scontrol requeue`` too if that has not
    returned yet, which submitit would take for a failure. So what the handler starts ignores it.
    """
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        handler(signum, None)
    finally:
        signal.signal(signal.SIGTERM, before)


def silence(descriptors: Iterable[int]) -> None:
    """Write to nowhere in place of a terminal or a pipe that is closed.

    An error of such a write would end the run before its checkpoint.
    """
    with suppress(OSError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for descriptor in descriptors:
            os.dup2(nowhere, descriptor)
        os.close(nowhere)
