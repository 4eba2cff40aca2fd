"""``python -m pwm_fast.submit``: experiments of several runs, sent to a Slurm cluster.

Three strategies: ``seeds`` (one configuration, several seeds), ``tasks`` (several environments) and
``compare`` (a baseline against its flow model), each over the given seeds. They are sweeps of
``python -m pwm_fast.train -m``, whose overrides all work here. Exit status: 0; 2 and one line on
stderr that says what is wrong, before anything is submitted.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from pwm_fast import cli
from pwm_fast.config import ConfigError
from pwm_fast.launch import queue, sweep
from pwm_fast.run import metrics

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
    try:
        for text in overrides:
            if text.startswith("-"):
                raise ConfigError(f"{text}: there is no such option; --help shows them")
        if options.what in ("status", "script") and overrides:
            raise ConfigError(f"{options.what} takes no overrides, got {' '.join(overrides)}")
        if options.what == "status":
            raise SystemExit(status(Path(options.directory)))
        if options.what == "script":
            print(Path(__file__).parent.joinpath("launch", f"{options.name}.sbatch").read_text())
            return
        arguments = sweep_arguments(options, overrides)
    except (ConfigError, OSError) as error:
        print(f"error: {cli.message(error)}", file=sys.stderr)
        raise SystemExit(2) from None
    from pwm_fast import train

    sys.argv = ["pwm_fast.train", *arguments]
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


def sweep_arguments(options: argparse.Namespace, overrides: Sequence[str]) -> list[str]:
    """The arguments of ``python -m pwm_fast.train`` for an experiment.

    Raises:
        ConfigError: an option cannot be used, or an override says the same.
    """
    chosen = {"launch": options.launch}
    if options.what == "tasks":
        chosen["env"] = options.tasks
    elif options.what == "compare":
        chosen["alg"] = f"{options.baseline},{options.flow or options.baseline + '_flow'}"
    chosen["seed"] = ",".join(map(str, seeds(options.seeds)))  # last: they go together to a node
    names = {"seed": "seeds", "env": "tasks", "alg": "baseline and --flow", "launch": "launch"}
    for text in overrides:
        key = text.split("=")[0].lstrip("+")
        if key in chosen:
            raise ConfigError(f"{text}: {options.what} takes this from --{names[key]}")
    arguments = ["-m", *(f"{key}={value}" for key, value in chosen.items()), *overrides]
    if options.dry_run:
        arguments.append("launch.dry_run=true")
    if options.launch != "local":  # which always waits
        arguments.append(f"launch.wait={str(options.wait).lower()}")
    return arguments


def seeds(text: str) -> list[int]:
    """Seeds of a list such as ``0-3,7``.

    Raises:
        ConfigError: it is no such list, or names a seed twice.
    """
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise ConfigError(f"--seeds must be like 0-3 or 0,1,7, got {text!r}")
        found += range(int(match[1]), int(match[2] or match[1]) + 1)
    if len(set(found)) < len(found):
        raise ConfigError(f"--seeds={text} names a seed twice")
    return found


def status(directory: Path) -> int:
    """Print how the runs of a sweep do; 1 if one of those that have ended did not finish."""
    runs, jobs = sweep.read(directory)
    known = (queue.states() if jobs else {}) or {}
    job_of = {index: job for job, indices in jobs.items() for index in indices}
    failed = False
    for run in runs:
        job = job_of.get(run.index)
        rows = metrics.read(Path(run.run_dir) / "metrics.jsonl")
        epoch = f", epoch {rows[-1]['epoch']}" if rows else ""
        ended = run.status()
        if job in known:
            state = f"{known[job]} (job {job})"
            if ended is not None:  # in a job whose other runs go on, or that was requeued
                state = f"{sweep.describe(ended)} (job {job} {known[job]})"
        elif ended is not None:
            state = sweep.describe(ended)
        elif job is not None:
            state = f"ended without a status (job {job}: {queue.last_state(job)})"
        else:
            state = "has not ended"
        failed = failed or (job not in known and ended != 0 and state != "has not ended")
        print(f"run {run.index} ({run.label}): {state}{epoch}; log {sweep.shown(run.log)}")
    return 1 if failed else 0


if __name__ == "__main__":
    main()
