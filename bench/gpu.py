"""Everything that is to be checked with a GPU, in one command under 8 minutes.

python -m bench.gpu                                   # all stages, at most 480 s
python -m bench.gpu --budget 600 --out bench/results/gpu_h200.json
python -m bench.gpu --stage tests --stage micro       # these alone, and again where they have ended
python -m bench.gpu --device cpu --quick --out /tmp/dry.json     # does the script itself run?

Stages: build (the extension, in place), smoke (of every test marked gpu the first case, and one of
every operation and precision), tests (the other cases), quick (5M and 48M, batch 128, 512 and
16384), micro (the constants of the cost model), esnr, epoch, sanitize (compute-sanitizer), matrix
(all models, batches, K and providers). Tests that fail are printed as they come. A run that its
budget ends is gone on with by the same command; what has been measured is not measured again. It
needs a checkout, torch, triton, nvcc, pytest and pytest-benchmark, and neither Hydra nor MuJoCo.

Exit status: 0 nothing failed (a table says what is still missing), 1 a stage or a provider failed,
2 there is no GPU, or the file cannot be gone on with.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from bench import environment, gpu_checks, gpu_tests, results
from bench.cases import matrix
from bench.gpu_plan import MEASURED, cases, jobs
from bench.gpu_report import short
from bench.results import ResultError, Row, row_from_json
from bench.stages import ENOUGH, Deadline, Outcome, Record, Stage
from bench.stages import run as run_stages
from bench.worker import Job, Message, Worker

BUDGET = 480.0
DRY = 5.0  # a dry run takes as much longer, on whatever CPU it runs
BUDGETS = {  # seconds of each stage; the last takes what is left
    "build": 75.0,
    "smoke": 80.0,
    "tests": 80.0,
    "quick": 150.0,
    "micro": 60.0,
    "esnr": 20.0,
    "epoch": 30.0,
    "sanitize": 40.0,
    "matrix": float("inf"),
}
MICRO_JOB = 40.0  # seconds of one microbenchmark, at most: torch.compile of a macro step


def measure(left: Deadline, stage: str, record: Record, worker: Worker, dry: bool) -> Outcome:
    """Do what is missing of a measuring stage."""
    found = cases(stage, dry) if stage in MEASURED else []
    by_name = {case.name: case for case in found}
    wanted = list(jobs(stage, found, dry))
    postponed = holding = False
    for job in wanted:
        while True:  # again where a provider took the process with it
            todo = _missing(job, record)
            if todo is None:
                break
            jax = not set(matrix.JAX).isdisjoint(todo.providers)
            if holding and not jax:
                worker.stop()
            holding = jax
            if left.over or not record.fits(_key(todo), left.left):
                postponed = True
                break
            if not _one(todo, left, record, worker, by_name):
                postponed = True
                break
        if left.over:
            break
    if holding:
        worker.stop()  # JAX gives no memory back, which others would be out of
    return _outcome(stage, wanted, record, postponed)


def _missing(job: Job, record: Record) -> Job | None:
    if job.kind == "micro":
        return None if job.name in record.result.gpu["micro"] else job
    names = record.missing(job.name, job.providers)
    return job._replace(providers=tuple(names)) if names else None


def _key(job: Job) -> str:
    return f"{job.name} {job.providers[0]}" if job.providers else job.name


def _one(
    job: Job, left: Deadline, record: Record, worker: Worker, by_name: dict[str, object]
) -> bool:
    """Do a job and keep what comes; False if the time was over."""
    readings: list[object] = []
    came: list[str] = []
    case = by_name.get(job.name)

    def keep(row: Row) -> None:
        record.add(job.name, dict(case.axes), row, case.providers)  # type: ignore[attr-defined]

    def take(message: Message) -> None:
        if message[0] == "row":
            keep(row_from_json(message[1]))
            came.append(message[1]["provider"])
        else:
            readings.append(message[1])

    capped = job.kind == "micro" and not job.dry  # one that hangs leaves the others their time
    ended = worker.run(job, min(left.left, MICRO_JOB) if capped else left.left, take)
    micro = record.result.gpu["micro"]
    failure = {"name": job.name, "value": None, "unit": ""}
    if job.kind == "micro" and ended.how in ("done", "crash"):
        if ended.how == "crash":
            readings.append({**failure, "reason": f"failed: {ended.reason}"})
        micro[job.name] = readings
    elif ended.how == "crash":
        # Whoever was at work is to blame; nobody, where a row came and then the context was found
        # lost: that row says so itself; all of the case, where it could not even be made.
        guilty = [ended.provider] if ended.provider else [] if came else list(job.providers)
        for name in record.missing(job.name, guilty):
            keep(Row(name, "failed", ended.reason))
    elif ended.how == "time":
        rest = _missing(job, record)
        enough = MICRO_JOB if job.kind == "micro" else None
        if rest is not None and record.attempt(_key(rest), ended.seconds, enough):
            reason = f"it did not end within {ended.seconds:.0f} s"
            if rest.kind == "case":
                keep(Row(rest.providers[0], "failed", reason))
            else:
                micro[job.name] = [*readings, {**failure, "reason": f"failed: {reason}"}]
    record.save()
    return ended.how != "time"


def _outcome(stage: str, wanted: Sequence[Job], record: Record, postponed: bool) -> Outcome:
    if stage == "micro":
        known = record.result.gpu["micro"]
        done = [r for job in wanted for r in known.get(job.name, ())]
        failed = [r["name"] for r in done if str(r.get("reason", "")).startswith("failed")]
        text = f"{sum(r['value'] is not None for r in done)} figures"
        missing = sum(job.name not in known for job in wanted)
    else:
        rows = [
            row
            for name in dict.fromkeys(job.name for job in wanted)
            if name in record.result.groups
            for row in record.result.groups[name].rows.values()
        ]
        failed = [row.provider for row in rows if row.status == "failed"]
        by_status = {s: sum(r.status == s for r in rows) for s in ("ok", "memory", "absent")}
        text = f"{by_status['ok']} measured, {by_status['memory']} out of memory, "
        text += f"{by_status['absent']} absent"
        missing = sum(len(record.missing(job.name, job.providers)) for job in wanted)
    text += f", {len(failed)} failed" + (f", {missing} missing" if missing else "")
    if missing:
        return Outcome("partial", text)
    return Outcome("failed" if failed else "ok", text)


def stages(record: Record, worker: Worker, dry: bool) -> list[Stage]:
    """All stages, in order."""
    kind = worker.device.type
    files = ["tests/test_replay.py"] if dry else None
    tests = partial(gpu_tests.tests, record=record, device=kind, files=files, tell=_tell)
    runs = {
        "build": partial(gpu_checks.build, record=record),
        "smoke": partial(tests, first=True),
        "tests": tests,
        "sanitize": partial(gpu_checks.sanitize, device=kind),
        **{
            name: partial(measure, stage=name, record=record, worker=worker, dry=dry)
            for name in ("micro", *MEASURED)
        },
    }
    patience = DRY if dry else 1.0
    return [Stage(name, patience * BUDGETS[name], runs[name]) for name in BUDGETS]


def default_path(device: torch.device) -> Path:
    """``bench/results/gpu_<the card's name>.json``."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    slug = re.sub(r"[^a-z0-9]+", "_", name.lower().replace("nvidia", "")).strip("_")
    return results.STORE / f"gpu_{slug}.json"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(
        prog="python -m bench.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    found.add_argument("--device", default="cuda", help="cuda (default), cuda:N, or cpu (--quick)")
    found.add_argument("--budget", type=float, metavar="S", help=f"seconds in all ({BUDGET:.0f})")
    found.add_argument(
        "--stage", action="append", choices=list(BUDGETS), help="this one alone (several times)"
    )
    found.add_argument("--out", type=Path, metavar="FILE.json", help="where the result goes")
    found.add_argument("--restart", action="store_true", help="forget what the file holds")
    found.add_argument(
        "--quick", action="store_true", help="tiny sizes: shows that every stage runs, no more"
    )
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """See the module."""
    options = parser().parse_args(argv)
    started = time.monotonic()
    try:
        device = _device(options.device, options.quick)
        path = options.out or default_path(device)
        if options.quick and options.out is None:
            raise ResultError("--quick measures nothing worth keeping: name a file with --out")
        if options.budget is None:
            options.budget = DRY * BUDGET if options.quick else BUDGET
        if options.budget < ENOUGH:
            raise ResultError(
                f"--budget must be at least {ENOUGH:.0f} seconds, got {options.budget}"
            )
        if options.restart:
            path.unlink(missing_ok=True)
        record = Record(path, environment.describe(device))
    except (ResultError, RuntimeError) as error:
        print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    gpu_checks.WORK.mkdir(parents=True, exist_ok=True)
    # Compiled code is kept for the next run; the extension must not be loaded before it is built.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(gpu_checks.WORK / "inductor"))
    os.environ.setdefault("TRITON_CACHE_DIR", str(gpu_checks.WORK / "triton"))
    record.result.gpu["dry"] = options.quick
    if any(record.finished(name) for name in options.stage or () if name in ("smoke", "tests")):
        record.result.gpu["tests"].clear()  # asked for by name: once more
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        record.result.gpu["device"] = {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
        }
    worker = Worker(device, gpu_checks.WORK / "worker.log")
    chosen = [
        s for s in stages(record, worker, options.quick) if s.name in (options.stage or BUDGETS)
    ]
    try:
        good = run_stages(
            chosen,
            record,
            options.budget - (time.monotonic() - started),
            again=options.stage or (),
            tell=_tell,
        )
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    finally:
        worker.stop(kill=True)
    print()
    print(short(record.result))
    print(f"\n{time.monotonic() - started:.0f} s; {path}")
    rows_failed = any(
        row.status == "failed" for g in record.result.groups.values() for row in g.rows.values()
    )
    return 0 if good and not rows_failed else 1


def _tell(line: str) -> None:
    print(line, flush=True)


def _device(name: str, quick: bool) -> torch.device:
    device = torch.device(name)
    if device.type not in ("cuda", "cpu"):
        raise ResultError(f"--device must be cuda, cuda:N or cpu, got {name}")
    if device.type == "cpu" and not quick:
        raise ResultError("--device cpu shows only that the command runs: it needs --quick")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise ResultError(
                f"--device={name}, but torch {torch.__version__} sees {count} GPUs here"
            )
    return device


if __name__ == "__main__":
    raise SystemExit(main())
