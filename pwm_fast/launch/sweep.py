"""The runs of a sweep, and the directory that holds their logs and how they ended.

``sweep.json`` lists the runs. Run 3 of a sweep over seeds writes ``3_seed=3.log`` while it runs and
``3_seed=3.exit``, its exit status, when it ends. Imports nothing heavy.
"""

from __future__ import annotations

import dataclasses
import json
import re
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pwm_fast import files
from pwm_fast.config import ConfigError
from pwm_fast.launch import processes, resources
from pwm_fast.parallel import LOST

GRACE = 30.0  # seconds that the other processes of a run have when one of them is lost


@dataclass(frozen=True)
class Run:
    """One training run of a sweep.

    Attributes:
        index: in the sweep, from 0.
        label: what tells it from the others, as in ``seed=3``.
        arguments: of ``python -m pwm_fast.train``.
        run_dir: where the run is written.
        log: absolute path of the file with its output.
        parallel: it takes all places of its job, with a process in each (``parallel=data``).
    """

    index: int
    label: str
    arguments: list[str]
    run_dir: str
    log: str
    parallel: bool = False

    @property
    def exit_file(self) -> Path:
        """Holds the exit status of the run once it ended."""
        return Path(self.log).with_suffix(".exit")

    def command(self) -> processes.Command:
        """The process that makes the run."""
        program = [sys.executable, "-m", "pwm_fast.train"]
        return processes.Command([*program, *self.arguments], Path(self.log))

    def status(self) -> int | None:
        """The exit status; None if the run has not ended."""
        try:
            return int(self.exit_file.read_text())
        except (OSError, ValueError):
            return None


def log_path(directory: Path, index: int, label: str) -> str:
    """Where a run's output goes."""
    name = re.sub(r"[^\w.=,+-]+", "_", f"{index}_{label}")[:120]
    return str((directory / f"{name}.log").absolute())


def write(directory: Path, runs: Sequence[Run], jobs: dict[str, list[int]]) -> None:
    """Write ``sweep.json``, after the runs of earlier batches where the first is not run 0.

    Args:
        directory: of the sweep; made where it does not exist.
        runs: what is started now.
        jobs: indices of the runs of each Slurm job, by the job's id.
    """
    directory.mkdir(parents=True, exist_ok=True)
    if runs[0].index > 0 and (directory / "sweep.json").exists():
        earlier, their_jobs = read(directory)
        runs = [*(run for run in earlier if run.index < runs[0].index), *runs]
        jobs = {**their_jobs, **jobs}
    content = {"runs": [dataclasses.asdict(run) for run in runs], "jobs": jobs}
    files.write_text(directory / "sweep.json", json.dumps(content, indent=2) + "\n")


def read(directory: Path) -> tuple[list[Run], dict[str, list[int]]]:
    """Runs and jobs, as :func:`write` was given them.

    Raises:
        ConfigError: there is no readable ``sweep.json``.
    """
    try:
        content = json.loads((directory / "sweep.json").read_text("utf-8"))
        return [Run(**run) for run in content["runs"]], content["jobs"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{directory} is no directory of a sweep (as in runs/multirun/DATE_TIME): "
            f"{directory / 'sweep.json'} cannot be read"
        ) from error


def execute(runs: Sequence[Run], shares: Sequence[dict[str, str]]) -> processes.Outcome:
    """Make runs in processes of their own, one in each share of the machine at a time.

    Runs that are ``parallel`` have a process in every share, and follow one another. What happens
    is printed; output and exit statuses go to the sweep's directory.
    """
    for run in runs:
        run.exit_file.unlink(missing_ok=True)

    def on_start(index: int, slot: int) -> None:
        _say_start(runs[index], f"on {resources.describe(shares[slot])}")

    def on_end(index: int, status: int) -> None:
        _say_end(runs[index], status)

    if not any(run.parallel for run in runs):
        return processes.run([run.command() for run in runs], shares, on_start, on_end)
    outcome = processes.Outcome([None] * len(runs))
    for index, run in enumerate(runs):
        if not outcome.signals:
            outcome.statuses[index], signals = _execute_parallel(run, shares)
            outcome.signals += signals
    return outcome


def _execute_parallel(run: Run, shares: Sequence[dict[str, str]]) -> tuple[int, list[int]]:
    """Make one run in a process for each share; its exit status, and the signals meanwhile."""
    failed: list[int] = []  # in the order of time: the others fail for the first one's sake

    def on_end(index: int, status: int) -> None:
        if status:
            failed.append(status)

    places = "; ".join(dict.fromkeys(map(resources.describe, shares)))
    _say_start(run, f"in {len(shares)} processes, on {places}")
    commands, ranks = [run.command()] * len(shares), resources.ranks(shares)
    outcome = processes.run(commands, ranks, on_end=on_end, together=GRACE)
    status = failed[0] if failed else 0
    _say_end(run, status)
    return status, outcome.signals


def _say_start(run: Run, place: str) -> None:
    print(f"run {run.index} ({run.label}): {place}; log {shown(run.log)}", flush=True)


def _say_end(run: Run, status: int) -> None:
    print(f"run {run.index} ({run.label}): {describe(status)}", flush=True)
    try:
        files.write_text(run.exit_file, f"{status}\n")
    except OSError as error:  # no reason to stop the others
        print(f"could not record that: {error}", flush=True)


def describe(status: int | None) -> str:
    """What an exit status of the trainer means."""
    if status is None:
        return "did not end by itself"
    if status == 0:
        return "finished"
    number = -status if status < 0 else status - 128
    if number > 0:
        try:
            name = signal.Signals(number).name
        except ValueError:
            name = f"signal {number}"
        if status > 128:
            return f"stopped by {name}, with a checkpoint; the same command goes on from it"
        return f"killed by {name}; the same command goes on from the latest checkpoint"
    return f"failed with exit status {status}"


def exit_status(statuses: Sequence[int | None], signals: Sequence[int] = ()) -> int:
    """Of the whole sweep: 128 + a signal that stopped it, else the first failure's, else 0."""
    if signals:
        return 128 + signals[0]
    for status in statuses:
        if status:
            return status if status > 0 else 128 - status
    return 0


def failures(
    runs: Sequence[Run], statuses: Sequence[int | None], notes: Mapping[int, str] | None = None
) -> str:
    """Which runs did not finish, why, and where their output is; empty if all did.

    Args:
        runs: of the sweep.
        statuses: exit status of each; None if it has none.
        notes: what else is known of a run, by its index.
    """
    bad = [(r, s) for r, s in zip(runs, statuses, strict=True) if s != 0]
    if not bad:
        return ""
    lines = [f"{len(bad)} of {len(runs)} runs did not finish:"]
    for run, status in bad:
        note = (notes or {}).get(run.index)
        more = f" ({note})" if note else ""
        lines.append(f"  run {run.index} ({run.label}): {describe(status)}{more}")
        said = last_line(Path(run.log)) if status is not None else ""
        if said and status is not None and 0 < status < 128:
            lines.append(f"    {said}")
        if status is not None or Path(run.log).exists():
            lines.append(f"    log {shown(run.log)}")
    return "\n".join(lines)


def last_line(log: Path) -> str:
    """The last line of a log that is not empty, and not about another process's end."""
    try:
        text = log.read_text("utf-8", errors="replace")
    except OSError:
        return ""
    lines = [line.strip() for line in reversed(text.splitlines()) if line.strip()]
    return next((line for line in lines if LOST not in line), lines[0] if lines else "")


def shown(path: str) -> str:
    """A path for people: relative where it is below the working directory."""
    try:
        return str(Path(path).relative_to(Path.cwd()))
    except ValueError:
        return path
