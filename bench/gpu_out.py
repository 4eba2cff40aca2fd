"""Where a run's files go, and that they are few and small enough to be brought back.

A machine that is lent for minutes gives back some files of limited size: a run writes at most
:data:`FILES`, none above :data:`BYTES`. They are written as the run goes on, so that one that is
killed leaves what it has.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench import results
from bench.environment import ROOT
from bench.results import ResultError
from bench.stages import Record
from pwm_fast import files

WORK = ROOT / "build" / "gpu"  # caches, and logs where no folder was named
VARIABLE = "OUT"  # names the folder where --out does not
FILES, BYTES = 8, 16 * 2**20
RUN, WORKER, FAILURES = "run.log", "worker.log", "failures.log"
PROFILE, NCU, NCU_REPORT = "profile.txt", "ncu.txt", "rollout.ncu-rep"
# Beside them the result and, at the moment of its replacement, its successor.
LOGS = (RUN, WORKER, FAILURES, PROFILE, NCU, NCU_REPORT)
_CUT = "\n[... {} bytes left out ...]\n"


class Output:
    """The files of a run.

    Args:
        result: the JSON file.
        folder: of the logs.
    """

    def __init__(self, result: Path, folder: Path) -> None:
        self.result, self.folder = result, folder

    @classmethod
    def of(cls, named: Path | None, name: str) -> Output:
        """Where ``--out`` says, else OUT.

        A folder takes everything; a file ``.json`` is the result, with logs in ``build/gpu``; by
        default the result is ``bench/results/<name>``.

        Args:
            named: by the command line.
            name: of the result in a folder.

        Raises:
            ResultError: it cannot be written there, or the folder holds too much else.
        """
        named = named or (Path(os.environ[VARIABLE]) if os.environ.get(VARIABLE) else None)
        if named is None:
            found = cls(results.STORE / name, WORK)
        elif named.suffix == ".json":
            found = cls(named, WORK)
        else:
            found = cls(named / name, named)
        try:
            for folder in (found.folder, found.result.parent):
                folder.mkdir(parents=True, exist_ok=True)
                if not os.access(folder, os.W_OK):
                    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), folder)
        except OSError as error:
            raise ResultError(f"cannot write to {error.filename}: {error.strerror}") from error
        if found.folder == named:
            others = {p.name for p in named.iterdir()} - {*LOGS, name, f".{name}.tmp"}
            if len(others) + len(LOGS) + 2 > FILES:
                raise ResultError(
                    f"{named} holds {', '.join(sorted(others)[:3])}: name a folder of the run's "
                    f"own, at most {FILES} files are to be in it"
                )
        return found

    def path(self, name: str) -> Path:
        """A log, one of :data:`LOGS`."""
        return self.folder / LOGS[LOGS.index(name)]

    def tell(self, line: str) -> None:
        """Print a line, and keep it."""
        print(line, flush=True)
        self.append(RUN, line + "\n")

    def append(self, name: str, text: str) -> None:
        """Add to a log."""
        with self.path(name).open("a", encoding="utf-8") as file:
            file.write(text)

    def keep(self, name: str, source: Path) -> bool:
        """Take a file as it is; False where it is too large."""
        if source.stat().st_size > BYTES:
            return False
        shutil.copyfile(source, self.path(name))
        return True

    def shorten(self) -> None:
        """Take out the middle of logs that have grown beyond the limit."""
        for name in LOGS:
            if name != NCU_REPORT:
                shorten(self.path(name))

    @contextmanager
    def watched(self, seconds: float = 2.0) -> Iterator[None]:
        """Inside, logs are shortened again and again: processes write to them on their own."""
        done = threading.Event()

        def watch() -> None:
            while not done.wait(seconds):
                self.shorten()

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            self.shorten()


def shorten(path: Path, limit: int = BYTES) -> None:
    """Keep the first quarter of what a file may hold, and the last half, if it exceeds the limit.

    It is written in place: a process that appends to it goes on at its new end.
    """
    try:
        size = path.stat().st_size
    except OSError:
        return
    if size <= limit:
        return
    with path.open("r+b") as file:
        head = file.read(limit // 4)
        file.seek(size - limit // 2)
        tail = file.read()
        file.seek(len(head))
        file.write(_CUT.format(size - len(head) - len(tail)).encode() + tail)
        file.truncate()


def resume(named: Path, result: Path, facts: dict[str, Any]) -> str:
    """Go on from a result that was brought along: put it in the place of this run's.

    Args:
        named: the file, or a folder with a file of this name or with one ``gpu_*.json`` alone.
        result: this run's.
        facts: of this run, as :class:`bench.stages.Record` has them.

    Returns:
        Its digest, to be kept as ``gpu.resumed``: what has gone on from it may do so again.

    Raises:
        ResultError: there is none, it cannot be gone on with, or this run's is there already and is
            another.
    """
    source = named
    if named.is_dir():
        found = sorted(named.glob(results.GPU_PATTERN))
        source = named / result.name
        if source not in found and len(found) == 1:
            source = found[0]
        if source not in found:
            there = ", ".join(p.name for p in found) or f"no {results.GPU_PATTERN}"
            raise ResultError(f"--resume: {named} holds {there}; name the file")
    if not source.exists():
        raise ResultError(f"--resume: there is no {source}")
    Record(source, facts)
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    if not result.exists():
        files.write_text(result, source.read_text("utf-8"))
        return digest
    gone_on = result.read_bytes() == source.read_bytes()
    if not gone_on and results.load(result).gpu.get("resumed") != digest:
        raise ResultError(f"--resume: {result} is there already, and is not {source}")
    return digest
