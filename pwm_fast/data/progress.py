"""A progress bar for reading large files, on a terminal only."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pwm_fast.data.manifest import Progress, data_files, default_manifest

DELAY = 1.0  # seconds of reading before a bar shows


@contextmanager
def reading_bar(path: Path, manifest: Path | None, label: str) -> Iterator[Progress]:
    """A callback that draws how much of the data set's bytes has been read.

    Nothing is drawn where stderr is no terminal, or the reading is over within a second.
    """
    if not sys.stderr.isatty():
        yield lambda n: None
        return
    try:
        from tqdm import tqdm
    except ImportError:  # the bar is all that is missing then
        yield lambda n: None
        return
    found = data_files(path, manifest or default_manifest(path))
    with tqdm(
        total=sum(file.stat().st_size for file in found.values()),
        desc=label,
        unit="B",
        unit_scale=True,
        unit_divisor=1024,
        dynamic_ncols=True,
        delay=DELAY,
        leave=False,
    ) as bar:
        yield bar.update
