"""The process's global random generators, lent to an environment that seeds and uses them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


class Generators:
    """A second state of the generators of ``random``, NumPy and torch, of the CPU and all GPUs.

    At first it is theirs.
    """

    def __init__(self) -> None:
        self._state: tuple[Any, ...] | None = None

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Inside they go on from this state; outside they are as if nothing was drawn."""
        outside = _read()
        if self._state is not None:
            _write(self._state)
        try:
            yield
        finally:
            self._state = _read()
            _write(outside)


def _read() -> tuple[Any, ...]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda


def _write(states: tuple[Any, ...]) -> None:
    python, numpy, cpu, cuda = states
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(cpu)
    for device, state in enumerate(cuda):
        torch.cuda.set_rng_state(state, device)
