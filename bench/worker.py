"""Measurements in a process of their own, which may crash, hang or run out of time."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench import matrix
from bench.matrix import Job
from bench.pool import follow
from bench.results import row_to_json
from bench.session import Broken, one_by_one

Message = tuple[Any, ...]
Serve = Callable[[Job, torch.device, Callable[[Message], None]], None]


class Ended(NamedTuple):
    """How a job ended.

    Attributes:
        how: ``done``, ``time`` (it was stopped) or ``crash``.
        provider: that was at work when it was stopped or crashed.
        reason: of a crash.
        seconds: that this provider had been at work.
    """

    how: str
    provider: str | None = None
    reason: str = ""
    seconds: float = 0.0


class Compilations:
    """Counts kernels of this project as Triton takes them from its cache or compiles them.

    Attributes:
        cached: found in the cache.
        names: of those that were compiled, and ``launcher`` for each C launcher that was built.
    """

    def __init__(self) -> None:
        self.cached, self.names = 0, list[str]()
        try:
            from triton import knobs
            from triton.runtime import build
        except ImportError:
            return
        knobs.compilation.listener = self._listen
        real = build._build

        def launcher(*args: Any, **options: Any) -> Any:
            self.names.append("launcher")
            return real(*args, **options)

        build._build = launcher

    def _listen(self, *, src: Any, cache_hit: bool, **_: Any) -> None:
        module = str(getattr(getattr(src, "fn", None), "module", ""))
        if module.partition(".")[0] not in ("pwm_fast", "bench"):
            return  # torch.compile's
        if cache_hit:
            self.cached += 1
        else:
            self.names.append(src.name)

    def news(self) -> Message:
        """A message with what came since the last call."""
        found = ("compiled", self.cached, self.names)
        self.cached, self.names = 0, []
        return found


_compilations: Compilations | None = None


def do(job: Job, device: torch.device, send: Callable[[Message], None]) -> None:
    """Measure, and send ``("provider", name)``, ``("row", data)`` or ``("micro", data)``.

    At the end of a job, whatever becomes of it, ``("compiled", number cached, names compiled)``.
    """
    global _compilations
    _compilations = _compilations or Compilations()
    try:
        _do(job, device, send)
    finally:
        send(_compilations.news())


def _do(job: Job, device: torch.device, send: Callable[[Message], None]) -> None:
    if job.kind == "micro":
        from bench import micro

        for reading in micro.read(job.name, device, job.dry):
            send(("micro", reading))
        return
    case = next(c for c in matrix.cases(job.stage, job.dry) if c.name == job.name)
    for item in one_by_one(case, job.providers, device):
        send(("provider", item) if isinstance(item, str) else ("row", row_to_json(item)))


def _serve(pipe: Connection, device: str, log: str, serve: Serve) -> None:
    """The worker's life: one job after another, until None comes."""
    with open(log, "a", buffering=1) as file:  # so that the last words of a crash are known
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    threading.Thread(target=follow, daemon=True).start()
    while (job := pipe.recv()) is not None:
        try:
            serve(job, torch.device(device), pipe.send)
            pipe.send(("done",))
        except Broken as error:
            pipe.send(("broken", str(error)))
            os._exit(3)
        except Exception as error:
            pipe.send(("error", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"))


class Worker:
    """Starts a process when there is work, and a new one after a crash.

    Args:
        device: that it computes on.
        log: where what it prints goes.
        serve: what it does.
        scratch: a folder for what torch.compile keeps, emptied for every process: one that was
            killed may have left half a file.
    """

    def __init__(
        self, device: torch.device, log: Path, serve: Serve = do, scratch: Path | None = None
    ) -> None:
        self.device, self.log, self._do, self._scratch = device, log, serve, scratch
        self._process: Any = None
        self._pipe: Any = None

    def run(self, job: Job, seconds: float, take: Callable[[Message], None]) -> Ended:
        """Do a job within ``seconds``; ``take`` gets its rows and readings as they come."""
        pipe = self._connect()
        since = time.monotonic()
        end = since + seconds
        provider = None
        pipe.send(job)
        while True:
            try:
                if not pipe.poll(max(end - time.monotonic(), 0.0)):
                    self.stop(kill=True)
                    return Ended("time", provider, seconds=time.monotonic() - since)
                message = pipe.recv()
            except (EOFError, ConnectionError):
                code = self._wait()
                self.stop(kill=True)
                return Ended("crash", provider, f"the process died ({code}); {self._last_words()}")
            if message[0] == "done":
                return Ended("done")
            if message[0] in ("error", "broken"):
                if message[0] == "broken":
                    self.stop(kill=True)
                return Ended("crash", provider, message[1])
            if message[0] == "provider":
                provider, since = message[1], time.monotonic()
                continue
            if message[0] == "row":
                provider = None
            take(message)

    def stop(self, *, kill: bool = False) -> None:
        """End the process."""
        if self._process is None:
            return
        if not kill:
            with contextlib.suppress(OSError):
                self._pipe.send(None)
            self._process.join(10.0)
        if self._process.is_alive():
            self._process.kill()
        self._process.join()
        self._pipe.close()
        self._process = self._pipe = None

    def _connect(self) -> Any:
        if self._process is None or not self._process.is_alive():
            self.stop(kill=True)
            self.log.parent.mkdir(parents=True, exist_ok=True)
            if self._scratch is not None:
                shutil.rmtree(self._scratch, ignore_errors=True)
                os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(self._scratch)
            context = multiprocessing.get_context("spawn")
            self._pipe, theirs = context.Pipe()
            self._process = context.Process(
                target=_serve,
                args=(theirs, str(self.device), str(self.log), self._do),
                daemon=False,  # torch.compile starts processes of its own
            )
            self._process.start()
            theirs.close()
        return self._pipe

    def _wait(self) -> str:
        self._process.join(10.0)
        code = self._process.exitcode
        return f"signal {-code}" if code is not None and code < 0 else f"status {code}"

    def _last_words(self) -> str:
        try:
            lines = self.log.read_text("utf-8", "replace").strip().splitlines()
        except OSError:
            return ""
        return lines[-1][:200] if lines else "it said nothing"
