"""``python -m pwm_fast.compare RUN_OR_GLOB... --out DIR``: compare runs on one page.

Exit status: 0, or 2 and one line on stderr that says what is wrong.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NoReturn

from pwm_fast import cli, files
from pwm_fast.analysis.comparison import compare, summary
from pwm_fast.analysis.figures import NAMES
from pwm_fast.analysis.options import Options, references_of, steps_of, targets_of
from pwm_fast.analysis.published import of_options
from pwm_fast.analysis.report import outputs
from pwm_fast.analysis.statistics import RESAMPLES
from pwm_fast.config import ConfigError


def parser() -> cli.Arguments:
    """The command line."""
    arguments = cli.Arguments(
        prog="python -m pwm_fast.compare",
        description="Compare training runs: one HTML page, CSV files and PNG figures.",
    )
    arguments.add_argument(
        "runs",
        nargs="+",
        metavar="RUN_OR_GLOB",
        help="run directories, directories that hold some, or quoted patterns such as "
        "'runs/cartpole/*/seed_*'",
    )
    arguments.add_argument("--out", required=True, metavar="DIR", help="where everything goes")
    arguments.add_argument(
        "--target",
        action="append",
        default=[],
        metavar="[ENV=]RETURN",
        help="take the time to this return; for several environments give one each",
    )
    arguments.add_argument(
        "--steps",
        default="",
        metavar="N,N,...",
        help="environment steps at which returns are compared (default: quarters of the budget)",
    )
    arguments.add_argument(
        "--score",
        action="append",
        default=[],
        metavar="ENV=LOW:HIGH",
        help="returns that are a score of 0 and 1; of two environments or more, scores are pooled",
    )
    arguments.add_argument(
        "--reference",
        action="append",
        default=[],
        metavar="[ENV=]FILE.csv",
        help="draw published curves, too: columns name,step,return[,low,high][,seconds]; may be "
        "repeated",
    )
    arguments.add_argument(
        "--statistic",
        choices=sorted(NAMES),
        default="iqm",
        help="of the figures' thick lines (default: iqm, the interquartile mean)",
    )
    arguments.add_argument(
        "--resamples", type=int, default=RESAMPLES, help=f"of the bootstrap (default: {RESAMPLES})"
    )
    arguments.add_argument("--title", default="", help="of the page")
    return arguments


def parse(arguments: list[str]) -> tuple[Options, Path]:
    """The options and the directory that a command line names.

    Raises:
        ConfigError: an option's value cannot be used; the message names it.
    """
    given = parser().parse_args(arguments)
    targets, references = targets_of(given.target), references_of(given.score)
    steps = steps_of(given.steps)
    if given.resamples < 1:
        raise ConfigError(f"--resamples must be positive, got {given.resamples}")
    published = of_options(given.reference)
    out = files.user_path(given.out)
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out} is no directory")
    options = Options(
        given.runs,
        targets,
        steps,
        references,
        given.statistic,
        given.resamples,
        given.title,
        published,
    )
    return options, out


def run(arguments: list[str]) -> int:
    """Do what the command line asks for; return the exit status."""
    options, directory = parse(arguments)
    try:
        report = compare(options, directory)
    except ImportError as error:
        raise ConfigError(f"{error}; {cli.NEEDS_TRAIN}") from error
    print(summary(report))
    paths = outputs(directory)
    print(
        f"\nwritten: {paths['page']}, with {paths['runs'].name}, {paths['groups'].name}, figures/"
    )
    return 0


def main() -> NoReturn:
    """Compare the runs that the command line names."""
    cli.plain(lambda: run(sys.argv[1:]))


if __name__ == "__main__":
    main()
