"""``python -m pwm_fast.submit``: experiments of several runs, sent to a Slurm cluster.

Three strategies: ``seeds`` (one configuration, several seeds), ``tasks`` (several environments) and
``compare`` (a baseline against its flow model), each over the given seeds. They are sweeps of
``python -m pwm_fast.train -m``, whose overrides all work here. Exit status: 0; 2 and one line on
stderr that says what is wrong, before anything is submitted.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from pwm_fast import cli, train
from pwm_fast.config import ConfigError
from pwm_fast.launch.experiment import status, sweep_arguments

SCRIPTS = ("one_gpu", "four_gpus")
EXAMPLES = """examples:
  python -m pwm_fast.submit seeds --seeds 0-3 env=ant alg=pwm_5M_flow launch.partition=gpu
  python -m pwm_fast.submit tasks --tasks ant,hopper --seeds 0-3 alg=pwm_5M_flow --dry-run
  python -m pwm_fast.submit compare --baseline pwm_5M --seeds 0-3 env=ant --launch slurm_4gpu
  python -m pwm_fast.submit status runs/multirun/2026-11-24_09-00-00
  python -m pwm_fast.submit script one_gpu > one_gpu.sbatch
"""


def main() -> None:
    """Do what the command line says."""
    options, overrides = parser().parse_known_args()
    raise SystemExit(cli.exit_status(lambda: run(options, overrides)))


def run(options: argparse.Namespace, overrides: list[str]) -> int:
    """Do what the command line asks for; return the exit status."""
    for text in overrides:
        if text.startswith("-"):
            raise ConfigError(f"{text}: there is no such option; --help shows them")
    if options.what in ("status", "script") and overrides:
        raise ConfigError(f"{options.what} takes no overrides, got {' '.join(overrides)}")
    if options.what == "status":
        return status(Path(options.directory))
    if options.what == "script":
        print(Path(__file__).parent.joinpath("launch", f"{options.name}.sbatch").read_text())
        return 0
    sys.argv = ["pwm_fast.train", *sweep_arguments(options, overrides)]
    train.main()


def parser() -> argparse.ArgumentParser:
    """The options of the command line."""
    top = argparse.ArgumentParser(
        prog="python -m pwm_fast.submit",
        description="Send an experiment of several training runs to a Slurm cluster.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    common = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    common.add_argument("--seeds", default="0-3", help="as in 0-3 or 0,1,7 (default: 0-3)")
    common.add_argument(
        "--launch", default="slurm", help="slurm (default), slurm_4gpu, local, or a file of yours"
    )
    common.add_argument(
        "--dry-run", action="store_true", help="print what would be submitted, and submit nothing"
    )
    common.add_argument(
        "--wait", action="store_true", help="stay until all has ended, and report failures"
    )
    kinds = top.add_subparsers(dest="what", required=True, metavar="WHAT")

    def add(name: str, text: str) -> argparse.ArgumentParser:
        return kinds.add_parser(
            name,
            help=text,
            description=f"{text}; everything else on the line is an override of pwm_fast.train",
            parents=[common],
            allow_abbrev=False,
        )

    add("seeds", "one configuration with several seeds")
    tasks = add("tasks", "several environments")
    tasks.add_argument("--tasks", required=True, help="environments, as in ant,hopper")
    compare = add("compare", "a baseline against its flow model")
    compare.add_argument("--baseline", required=True, help="its alg, as in pwm_5M")
    compare.add_argument("--flow", help="the other's alg (default: the baseline's with _flow)")
    state = kinds.add_parser("status", help="how the runs of a sweep do")
    state.add_argument("directory", help="of the sweep, as in runs/multirun/DATE_TIME")
    script = kinds.add_parser("script", help="print a batch script for sbatch, to be changed")
    script.add_argument("name", choices=SCRIPTS)
    return top


if __name__ == "__main__":
    main()
