"""Measure the launch choices of the fused kernels on this GPU and keep those that pay.

python -m bench.tune                    # everything, at most 8 minutes; the same command goes on
python -m bench.tune --only act_norm --minutes 2
python -m bench.tune --precision 16 tf32 ieee --rows 64 16384
python -m bench.tune --dry-run          # on any machine: what would be measured

Problems are the GEMMs and rollouts that the shipped agents ask for (bench/products.json). Every
choice that fits, and the plain GEMM with its elementwise kernel (of a rollout: layer by layer), is
run on the same random operands, compared with float64, and captured in a CUDA graph; then the
choices of a problem are timed in turns; several processes have compiled them before. One that is
faster than the kernel's own heuristic by more than 3 % becomes an entry of
``kernels/tuned/<gpu>.json``, which the kernels read (``pwm_fast.kernels.tuning``); all times go to
``bench/results/tune_<gpu>.json``. At the end stands how far the cost model is off. Nothing is tuned
while a program runs.

Exit status: 0 done or the time was over, 1 a choice was wrong or failed, 2 one line says why
nothing could be measured.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench import environment, results, tune_compile, tune_report
from bench.internals import planning, tuning
from bench.measure import Call, CudaClock, Effort, graphed, race
from bench.results import Row
from bench.session import Broken, say
from bench.tune_problems import Options, Problem, Times, problems
from bench.tune_report import medians

Clock = Callable[[Mapping[str, Call]], Mapping[str, Sequence[float]]]

GAIN = 0.03  # less is noise, and the heuristic also serves sizes that nobody measured
CALLS = 10  # of a choice in one graph, so that the graph's own start does not count
EFFORT = Effort(seconds=0.25, min_rounds=5, max_rounds=25, sample=0.001)
COMPILING = 0.5  # of the time, at most
ENDED = "the process ended while it ran"


def measure(problem: Problem, clock: Clock, log: Log) -> Times:
    """Time every choice; one that fails or is wrong says so instead."""
    found: Times = dict(log.failed(problem))
    calls: dict[str, Call] = {}
    make = problem.prepare()
    for name, options in problem.choices.items():
        if name in found:
            continue
        log.begin(problem, name)
        try:
            calls[name] = make(options)
        except Exception as error:
            found[name] = say(error)
            _check(error)
    for name, seconds in clock(calls).items():
        found[name] = [float(f"{1e6 * s:.4g}") for s in seconds]
    return {name: found[name] for name in problem.choices}


def _check(error: Exception) -> None:
    if torch.cuda.is_available():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            raise Broken(say(error)) from error


def on_gpu(calls: Mapping[str, Call]) -> dict[str, list[float]]:
    """Seconds a call, round by round, of each from a CUDA graph of its own."""

    def several(call: Call) -> None:
        for _ in range(CALLS):
            call()

    graphs = {name: graphed(partial(several, call), warmup=1) for name, call in calls.items()}
    rounds = race(graphs, CudaClock(), EFFORT)
    return {name: [s / CALLS for s in seconds] for name, seconds in rounds.items()}


def entry(problem: Problem, times: Times) -> Options | None:
    """The options that pay; None where the heuristic is as good or nothing was measured."""
    measured = medians(times)
    if not measured:
        return None
    best = min(measured, key=lambda name: measured[name])
    if best == problem.heuristic:
        return None
    if problem.heuristic in measured:
        rows = (Row(name, "ok", None, times[name]) for name in (best, problem.heuristic))
        share = results.ratio(*rows)  # round by round
        if share.p50 > 1.0 - GAIN or share.p80 >= 1.0:
            return None
    return problem.choices[best]


class Log:
    """All times measured on a GPU, kept after every problem.

    Args:
        path: the file; what it holds of another commit, machine or version is measured anew.
        facts: of :func:`bench.environment.describe`.
    """

    def __init__(self, path: Path, facts: dict[str, Any]) -> None:
        self.path = path
        self.data: dict[str, Any] = {"schema": results.SCHEMA, **facts, "times": {}, "failed": {}}
        if path.exists():
            before = json.loads(path.read_text("utf-8"))
            same = all(before.get(k) == facts[k] for k in ("machine", "software"))
            if same and before.get("commit", {}).get("id") == facts["commit"]["id"]:
                self.data["times"] = before["times"]
                self.data["failed"] = before["failed"]
                if "begun" in before:
                    name, choice = before["begun"]
                    self.data["failed"].setdefault(name, {})[choice] = ENDED

    @property
    def times(self) -> dict[str, Times]:
        """By name of the problem."""
        found: dict[str, Times] = self.data["times"]
        return found

    def failed(self, problem: Problem) -> dict[str, str]:
        """Choices of a problem that ended a process, which are not tried again."""
        found: dict[str, str] = self.data["failed"].get(problem.name, {})
        return found

    def begin(self, problem: Problem, choice: str) -> None:
        """Note what is at work, should the process end."""
        self.data["begun"] = [problem.name, choice]
        self.save()

    def end(self, problem: Problem, times: Times) -> None:
        """Note a problem's times."""
        self.times[problem.name] = times
        self.data.pop("begun", None)
        self.save()

    def save(self) -> None:
        """Write the file."""
        results.write(self.path, self.data, indent=None)


def tune(
    problems: Iterable[Problem],
    log: Log,
    clock: Clock,
    over: Callable[[], bool],
    tell: Callable[[str], None] = print,
) -> bool:
    """Measure what the log has not, as long as there is time; whether all was right.

    Raises:
        Broken: see there; the log has what was measured, and the choice to leave out.
    """
    right = True
    for problem in problems:
        if problem.name not in log.times:
            if over():
                continue
            log.end(problem, measure(problem, clock, log))
            gc.collect()
        times = log.times[problem.name]
        right &= all(isinstance(t, list) for t in times.values())
        tell(line(problem, times))
    return right


def line(problem: Problem, times: Times) -> str:
    """A problem's outcome in a line."""
    measured = medians(times)
    failed = [f"{name} failed: {t}" for name, t in times.items() if isinstance(t, str)]
    if not measured:
        return f"{problem.name}: nothing ran: {'; '.join(failed) or 'no choice fits'}"
    best = min(measured, key=lambda name: measured[name])
    usual = measured.get(problem.heuristic)
    text = f"{problem.name}: {best} {measured[best]:.3g} µs"
    if best != problem.heuristic and usual is not None:
        text += f", {usual / measured[best]:.2f}x of the heuristic's"
        text += f" {problem.heuristic} {usual:.3g} µs"
    text += ": kept" if entry(problem, times) is not None else ": the heuristic stays"
    return "; ".join([text, *failed])


# --- command line --------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(
        prog="python -m bench.tune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    found.add_argument("--device", default="cuda")
    found.add_argument("--minutes", type=float, default=8.0, metavar="M", help="in all")
    found.add_argument("--only", default="", metavar="TEXT", help="problems with this in the name")
    found.add_argument(
        "--precision", nargs="+", choices=planning.RATES, default=["16"], help="of the GEMMs"
    )
    found.add_argument(
        "--rows", type=int, nargs="+", default=(), help="in place of those that agents have"
    )
    found.add_argument("--dry-run", action="store_true", help="list what would be measured")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """See the module."""
    options = parser().parse_args(argv)
    started = time.monotonic()
    try:
        if options.rows and min(options.rows) < 1:
            raise ValueError(f"--rows must be positive, got {min(options.rows)}")
        device = None if options.dry_run else _device(options.device)
        name, limits = "an H200", planning.Limits(132)
        if device is not None:
            name, limits = planning.device_limits(device)
        everything = problems(device, limits, options.precision, options.rows)
        found = [p for p in everything if options.only in p.name]
        if not found:
            raise ValueError(f"--only {options.only}: no problem has that in its name")
    except (ImportError, ValueError, RuntimeError) as error:
        print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    if device is None:
        for p in found:
            print(f"{p.name}: {', '.join(p.choices)}; heuristic {p.heuristic}")
        count = sum(len(p.choices) for p in found)
        print(f"{len(found)} problems, {count} choices on {name}; not measured")
        return 0

    slug = environment.slug(device)
    facts = environment.describe(device)
    log = Log(results.STORE / f"tune_{slug}.json", facts)
    deadline = started + 60.0 * options.minutes
    right = False
    missing = [p.name for p in found if p.name not in log.times]
    compiled = partial(
        tune_compile.compile_one,
        device=str(device),
        limits=limits,
        rates=tuple(options.precision),
        rows=tuple(options.rows),
    )
    tune_compile.ahead(missing, compiled, COMPILING * 60 * options.minutes)
    try:
        right = tune(found, log, on_gpu, lambda: time.monotonic() > deadline)
    except (Broken, KeyboardInterrupt) as error:
        print(f"stopped ({say(error)}); the same command goes on from here", file=sys.stderr)
    done = [p for p in found if p.name in log.times]
    path, kept = save(name, done, log.times, facts)
    print()
    print(tune_report.summary(done, log.times, tune_report.readings(name)))
    print(f"\n{len(done)} of {len(found)} problems, {kept} entries; {path}")
    return 0 if right else 1


def save(
    gpu: str,
    done: Sequence[Problem],
    times: Mapping[str, Times],
    facts: Mapping[str, Any],
    folder: Path | None = None,
) -> tuple[Path, int]:
    """Write what pays of problems that were measured beside entries of others; file and entries."""
    try:
        before = tuning.load(gpu, folder)
    except ValueError as error:
        print(f"the file is written anew: {error}", file=sys.stderr)
        before = {}
    entries = {kernel: dict(own) for kernel, own in before.items()}
    figures: dict[str, dict[str, dict[str, float]]] = {}
    kept = 0
    for problem in done:
        entries.setdefault(problem.kernel, {}).pop(problem.key, None)
        figures.setdefault(problem.kernel, {})[problem.key] = medians(times[problem.name])
        chosen = entry(problem, times[problem.name])
        if chosen is not None:
            entries[problem.kernel][problem.key] = chosen
            kept += 1
    path = tuning.save(
        gpu, {k: own for k, own in entries.items() if own}, folder, made=facts, times=figures
    )
    return path, kept


def _device(name: str) -> torch.device:
    device = torch.device(name)
    if device.type != "cuda":
        raise ValueError(f"--device must be cuda or cuda:N, got {name}; --dry-run needs none")
    environment.check_gpu(device)
    device = torch.device("cuda", device.index or 0)
    torch.cuda.set_device(device)
    return device


if __name__ == "__main__":
    raise SystemExit(main())
