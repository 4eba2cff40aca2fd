"""``python -m pwm_fast.plot RUN_OR_GLOB...``: draw the figures of runs anew, also while they run.

Exit status: 0, or 2 and one line on stderr that says what is wrong.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NoReturn

from pwm_fast import cli, files
from pwm_fast.analysis.runs import LeftOut, Run, find, load
from pwm_fast.config import ConfigError
from pwm_fast.run.charts import plot_run


def plot(paths: list[Path], out: Path | None = None) -> list[Path]:
    """Draw every run's figures into its ``plots/``, or those of one run into ``out``.

    Raises:
        ConfigError: a directory holds no run, or nothing is logged in it yet.
        ImportError: matplotlib is missing.
        OSError: a figure cannot be written; it names the file.
    """
    written = []
    for path in paths:
        loaded = load(path)
        drawn = plot_run(path, _title(loaded), out) if path.is_dir() else []
        if not drawn:
            reason = loaded.reason if isinstance(loaded, LeftOut) else "nothing is logged yet"
            raise ConfigError(f"{path}: {reason}")
        written += drawn
    return written


def _title(loaded: Run | LeftOut) -> str:
    """What was run and how far it is; the directory's name where its configuration is unknown."""
    if isinstance(loaded, LeftOut):
        return loaded.path.resolve().name
    return f"{loaded.config['env.name']}, {loaded.alg}, seed {loaded.seed} ({loaded.progress()})"


def run(arguments: list[str]) -> int:
    """Do what the command line asks for; return the exit status."""
    parser = cli.Arguments(
        prog="python -m pwm_fast.plot",
        description="Draw the figures of runs anew from their metrics.jsonl, also while they run.",
    )
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN_OR_GLOB",
        help="run directories, directories that hold some, or quoted patterns",
    )
    parser.add_argument("--out", metavar="DIR", help="where (default: the run's own plots/)")
    given = parser.parse_args(arguments)
    paths = find(given.runs)
    if given.out is not None and len(paths) != 1:
        raise ConfigError(f"--out takes the figures of one run, but {len(paths)} are named")
    try:
        written = plot(paths, files.user_path(given.out) if given.out else None)
    except ImportError as error:
        raise ConfigError(f"{error}; {cli.NEEDS_TRAIN}") from error
    for path in written:
        print(path)
    return 0


def main() -> NoReturn:
    """Draw what the command line names."""
    cli.plain(lambda: run(sys.argv[1:]))


if __name__ == "__main__":
    main()
