"""Work in several processes: one that dies costs its own item, and none is left behind."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures import TimeoutError as Over
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

T = TypeVar("T")


def each(
    work: Callable[[str], T], items: Sequence[str], jobs: int, seconds: float = float("inf")
) -> Iterator[tuple[str, T | Exception]]:
    """What became of each item, as it comes; items are begun in order.

    Args:
        work: what a process does with one; it is pickled.
        items: all of them.
        jobs: processes.
        seconds: after which processes are killed, and the rest is left out.
    """
    end = time.monotonic() + seconds
    before = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(
        min(jobs, len(items)) or 1, multiprocessing.get_context("spawn"), _start
    )
    again = []
    done = False
    try:
        futures = {pool.submit(work, item): item for item in items}
        for future in as_completed(futures, None if seconds == float("inf") else seconds):
            error = future.exception()
            if isinstance(error, BrokenProcessPool):
                again.append(futures[future])  # one of them is to blame
            else:
                yield futures[future], error or future.result()  # type: ignore[misc]
        done = True
    except Over:
        pass
    finally:
        if not done:
            for process in set(multiprocessing.active_children()) - before:
                process.kill()
        pool.shutdown(cancel_futures=True)
    if len(items) == 1 and again:
        yield again[0], RuntimeError("its process died")
    else:
        for item in again:
            yield from each(work, [item], 1, end - time.monotonic())


def _start() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: who started it ends it
    threading.Thread(target=follow, daemon=True).start()


def follow() -> None:
    """End with the process that asks: one that is killed would leave a GPU at work."""
    parent: Any = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(4)
