"""Stands for what a process compiles, in the tests; imported by it, so it imports nothing slow."""

from __future__ import annotations

import os
import time
from pathlib import Path


def mark(name: str, folder: str) -> int:
    """Leaves a file of that name; "hang" never ends, "die" takes its process along."""
    while name == "hang":
        time.sleep(0.1)
    if name == "die":
        os._exit(9)
    if name == "raise":
        raise ValueError("of the test")
    (Path(folder) / name).touch()
    return len(name)
