"""Settings that every test shares, and how tests are dealt out to processes.

``make test`` runs one process more than there are cores (pytest-xdist), for some tests wait for a
Slurm or for a process that they started. All tests of a file go to one of them, in their order:
they share fixtures, caches, and in ``tests/kernels`` an interpreter. Files with tests marked
``slow`` come first, so that no process is left with one at the end.
"""

from __future__ import annotations

import os
import signal

import pytest

if _workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    # The cores are shared, also by what a test starts. Set before torch is imported.
    _threads = max(1, (os.cpu_count() or 1) // int(_workers))
    os.environ.setdefault("OMP_NUM_THREADS", str(_threads))
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # several threads do not spin for one core
os.environ.setdefault("MPLBACKEND", "Agg")  # before any test imports matplotlib: no display needed

import torch

# nohup, and & in a script, have signals ignored that tests send, which would wait for ever.
for _name, _handler in (("SIGINT", signal.default_int_handler), ("SIGHUP", signal.SIG_DFL)):
    _signal = getattr(signal, _name, None)
    if _signal is not None and signal.getsignal(_signal) == signal.SIG_IGN:
        signal.signal(_signal, _handler)


@pytest.hookimpl(optionalhook=True)  # pytest-xdist's, for -n auto
def pytest_xdist_auto_num_workers() -> int:
    asked = os.environ.get("PYTEST_XDIST_AUTO_NUM_WORKERS")
    has_affinity = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    return int(asked) if asked else cores + 1


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="also tests marked repeats")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--all", default=False) and "repeats" not in config.option.markexpr:
        repeating = [item for item in items if item.get_closest_marker("repeats")]
        if repeating:
            config.hook.pytest_deselected(items=repeating)
            items[:] = [item for item in items if not item.get_closest_marker("repeats")]
    if _workers:
        slow = {item.path for item in items if item.get_closest_marker("slow")}
        items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """Start every test from one seed, whatever ran before it."""
    torch.manual_seed(0)
