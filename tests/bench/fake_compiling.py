"""Stands for a process that compiles, in the tests; imported by it, so it imports nothing slow."""

from __future__ import annotations

import time
from pathlib import Path


def mark(names: list[str], folder: str, *args: object) -> None:
    """Leaves a file a name; asked for "hang" it never ends."""
    while "hang" in names:
        time.sleep(0.1)
    for name in names:
        (Path(folder) / name).touch()
