"""Running commands in child processes, so many at once, and passing signals on to them.

Imports nothing heavy: the process that waits for the runs of a Slurm job needs no torch.
"""

from __future__ import annotations

import math
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from pwm_fast.run.interrupt import HANGUP, SIGNALS

STOPPING = tuple(s for s in (*SIGNALS, HANGUP) if s is not None)
POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Command:
    """A command to run.

    Attributes:
        arguments: of the process, the program first.
        log: file that its stdout and stderr are appended to; its directory exists.
    """

    arguments: Sequence[str]
    log: Path


@dataclass
class Outcome:
    """How commands ended.

    Attributes:
        statuses: exit status of each command, the negative number of the signal that killed it,
            or None if it was never started.
        signals: the stopping signals that this process got, in order.
    """

    statuses: list[int | None]
    signals: list[int] = field(default_factory=list)


def run(
    commands: Sequence[Command],
    slots: Sequence[Mapping[str, str]],
    on_start: Callable[[int, int], None] = lambda index, slot: None,
    on_end: Callable[[int, int], None] = lambda index, status: None,
    together: float | None = None,
) -> Outcome:
    """Run commands, at most one in each slot, in order; a failure does not stop the others.

    SIGINT, SIGTERM, SIGHUP, SIGUSR1 or SIGUSR2 stops them: no further command is started, those
    that run get SIGINT for SIGINT and SIGTERM for the others, and are waited for. A second SIGINT
    is passed on, too; other repetitions are not. A signal that is ignored (nohup) stays so.

    Args:
        commands: what to run.
        slots: for each place the variables that it adds to the environment.
        on_start: is told the command's index and the slot's.
        on_end: is told the command's index and its exit status.
        together: none of them is of use without the others: when one fails, those that run get
            SIGTERM, and SIGKILL where that does not end them within so many seconds. None is each
            for itself.
    """
    outcome = Outcome([None] * len(commands))
    running: dict[int, tuple[int, subprocess.Popen[bytes]]] = {}  # slot: (index, process)
    waiting = list(range(len(commands)))

    def stop(signum: int, frame: FrameType | None) -> None:
        first = not outcome.signals
        outcome.signals.append(signum)
        if first or signum == signal.SIGINT:
            for _, process in list(running.values()):
                pass_on(process, signum)

    def end_all() -> None:
        waiting.clear()
        for _, process in running.values():
            process.terminate()

    deadline = math.inf
    before = _install(stop)
    try:
        while running or (waiting and not outcome.signals):
            for slot, variables in enumerate(slots):
                if slot not in running and waiting and not outcome.signals:
                    index = waiting.pop(0)
                    on_start(index, slot)
                    process = _start(commands[index], variables)
                    running[slot] = (index, process)
                    if outcome.signals:  # it came while the process was being made
                        pass_on(process, outcome.signals[0])
            time.sleep(POLL_SECONDS)
            for slot, (index, process) in list(running.items()):
                status = process.poll()
                if status is not None:
                    del running[slot]
                    outcome.statuses[index] = status
                    on_end(index, status)
                    if status and together is not None and deadline == math.inf:
                        deadline = time.monotonic() + together
                        end_all()
            if time.monotonic() > deadline:
                deadline = math.inf
                for _, process in running.values():
                    process.kill()
    finally:
        for _, process in running.values():  # none but after an error of ours
            pass_on(process, signal.SIGTERM)
            process.wait()
        for s, handler in before.items():
            signal.signal(s, handler)
    return outcome


def pass_on(process: subprocess.Popen[bytes], signum: int) -> None:
    """Tell a run to stop because this process got ``signum``."""
    process.send_signal(signal.SIGINT if signum == signal.SIGINT else signal.SIGTERM)


def _start(command: Command, variables: Mapping[str, str]) -> subprocess.Popen[bytes]:
    with command.log.open("ab") as log:
        return subprocess.Popen(
            list(command.arguments),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **variables},
            # A terminal's Ctrl-C comes here alone and is passed on: twice would stop at once.
            start_new_session=True,
        )


def _install(handler: Callable[[int, FrameType | None], None]) -> dict[int, Any]:
    if threading.current_thread() is not threading.main_thread():
        return {}
    taken = [s for s in STOPPING if signal.getsignal(s) != signal.SIG_IGN]
    return {s: signal.signal(s, handler) for s in taken}
