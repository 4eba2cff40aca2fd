"""Sweeps: many runs side by side on this machine, or as jobs of a Slurm cluster.

``configs/launch/*.yaml`` picks the launcher of ``python -m pwm_fast.train -m``.
"""

from __future__ import annotations

import sys
from pathlib import Path


class JobFailed(RuntimeError):
    """A job of a sweep ended with an exit status other than 0."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


def register() -> None:
    """Let Hydra find the launchers; before its first use of plugins."""
    place = str(Path(__file__).with_name("plugins"))
    if place not in sys.path:
        sys.path.append(place)
