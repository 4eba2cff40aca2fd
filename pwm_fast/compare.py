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
from pwm_fast.analysis.report import Options, outputs
from pwm_fast.analysis.scores import Reference
from pwm_fast.analysis.statistics import RESAMPLES
from pwm_fast.config import ConfigError

# --- the command line -----------------------------------------------------------------------------


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
    targets: dict[str | None, float] = {}
    for text in given.target:
        name, equals, value = text.rpartition("=")
        targets[name if equals else None] = _number("--target", text, value)
    references = {}
    for text in given.score:
        name, equals, value = text.rpartition("=")
        low, colon, high = value.partition(":")
        if not (name and equals and colon):
            raise ConfigError(f"--score must be ENV=LOW:HIGH, got {text!r}")
        reference = Reference(_number("--score", text, low), _number("--score", text, high))
        if reference.low == reference.high:
            raise ConfigError(f"--score must have LOW and HIGH apart, got {text!r}")
        references[name] = reference
    steps = [_number("--steps", given.steps, s) for s in given.steps.split(",") if s]
    if any(s < 0 for s in steps):
        raise ConfigError(f"--steps must not be negative, got {given.steps!r}")
    if given.resamples < 1:
        raise ConfigError(f"--resamples must be positive, got {given.resamples}")
    out = files.user_path(given.out)
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out} is no directory")
    options = Options(
        given.runs, targets, steps, references, given.statistic, given.resamples, given.title
    )
    return options, out


def _number(option: str, text: str, part: str) -> float:
    try:
        value = float(part.replace("_", ""))
    except ValueError:
        value = float("nan")
    if value != value or value in (float("inf"), float("-inf")):
        raise ConfigError(f"{option} must hold finite numbers, got {text!r}")
    return value


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
