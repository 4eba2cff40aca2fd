"""Everything that is to be checked and measured with a GPU, in one command under 8 minutes.

python -m bench.gpu                                   # all stages, at most 480 s
python -m bench.gpu --out DIR --resume bench/results  # files to DIR; goes on from an earlier result
python -m bench.gpu --stage tests --stage micro       # these alone, and again where they have ended
python -m bench.gpu --device cpu --quick --out /tmp/dry          # does the command itself run?

Stages: first (one rollout: right, repeatable, replayed), headline (the actor's loss and gradient,
5M, batch 128, K 4, against torch.compile and eager), profile (every layout of the rollout,
torch.profiler, ncu), epoch (an epoch's updates), micro (constants of the cost model), build (the
extension loads, or is built), smoke (of every test marked gpu the first case, and one of every
operation and precision), tests (the other cases), quick (5M and 48M, batch 128, 512 and 16384),
esnr, sanitize (compute-sanitizer), matrix (all models, batches, K and providers).

What was built before (make gpu-kit) is unpacked first. Tests that fail are printed as they come. A
run that its budget or a signal ends is gone on with by the same command, or elsewhere from its
result (--resume), at the same commit on the same kind of machine; what has been measured is not
measured again. It needs a checkout, torch, triton and, for tests, pytest; neither Hydra nor MuJoCo.

Exit status: 0 nothing failed (a table says what is still missing), 1 a stage or a provider failed,
2 there is no GPU, or the file cannot be gone on with, 130 it was interrupted or terminated.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from bench import environment, gpu_checks, gpu_kit, gpu_out, gpu_tests, matrix
from bench.gpu_out import Output
from bench.gpu_report import short
from bench.matrix import MEASURED, READ, Job, cases, jobs
from bench.results import ResultError, Row, row_from_json
from bench.stages import ENOUGH, Deadline, Outcome, Record, Stage, terminable
from bench.stages import run as run_stages
from bench.worker import Message, Worker

BUDGET = 480.0
DRY = 5.0  # a dry run takes as much longer, on whatever CPU it runs
BUDGETS = {  # seconds of each stage; the last takes what is left
    "first": 50.0,
    "headline": 150.0,  # torch.compile takes about 100 of them
    "profile": 70.0,
    "epoch": 45.0,
    "micro": 25.0,
    "build": 75.0,
    "smoke": 60.0,
    "tests": 80.0,
    "quick": 150.0,
    "esnr": 20.0,
    "sanitize": 40.0,
    "matrix": float("inf"),
}
NO_KIT = "no kit: kernels are compiled where they are launched first"
MICRO_JOB = 15.0  # seconds of one microbenchmark, at most


def measure(
    left: Deadline,
    stage: str,
    record: Record,
    worker: Worker,
    dry: bool,
    texts: Callable[[str], None] = lambda text: None,
) -> Outcome:
    """Do what is missing of a measuring stage; ``texts`` takes the texts of readings."""
    found = cases(stage, dry) if stage in MEASURED else []
    by_name = {case.name: case for case in found}
    wanted = list(jobs(stage, found, dry))
    holding = False
    for job in wanted:
        while (todo := _missing(job, record)) is not None:  # again where a process was lost
            jax = not set(matrix.JAX).isdisjoint(todo.providers)
            if holding and not jax:
                worker.stop()
            holding = jax
            if left.over or not record.fits(_key(todo), left.left):
                break
            if not _one(todo, left, record, worker, by_name, texts):
                break
        if left.over:
            break
    if holding:
        worker.stop()  # JAX gives no memory back, which others would be out of
    return _outcome(stage, wanted, record)


def _missing(job: Job, record: Record) -> Job | None:
    if job.kind == "micro":
        return None if job.name in record.result.gpu["micro"] else job
    names = record.missing(job.name, job.providers)
    return job._replace(providers=tuple(names)) if names else None


def _key(job: Job) -> str:
    return f"{job.name} {job.providers[0]}" if job.providers else job.name


def _one(
    job: Job,
    left: Deadline,
    record: Record,
    worker: Worker,
    by_name: dict[str, object],
    texts: Callable[[str], None],
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
        elif message[0] == "compiled":
            record.compiled(*message[1:])
        else:
            if text := message[1].pop("text", None):
                texts(text)
            readings.append(message[1])

    capped = job.stage == "micro" and not job.dry  # one that hangs leaves the others their time
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
        enough = MICRO_JOB if job.stage == "micro" else None
        if rest is not None and record.attempt(_key(rest), ended.seconds, enough):
            reason = f"it did not end within {ended.seconds:.0f} s"
            if rest.kind == "case":
                keep(Row(rest.providers[0], "failed", reason))
            else:
                micro[job.name] = [*readings, {**failure, "reason": f"failed: {reason}"}]
    record.save()
    return ended.how != "time"


def _outcome(stage: str, wanted: Sequence[Job], record: Record) -> Outcome:
    if stage in READ:
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


def profile(left: Deadline, output: Output, record: Record, worker: Worker, dry: bool) -> Outcome:
    """Layouts and the profiler's tables, then ncu."""
    texts = partial(output.append, gpu_out.PROFILE)
    found = measure(left, "profile", record, worker, dry, texts)
    if found.status == "partial":
        return found
    worker.stop()  # ncu measures alone
    counters = gpu_checks.ncu(left, output, worker.device.type)
    worst = next(s for s in ("failed", "partial", "ok") if s in (found.status, counters.status))
    return Outcome(worst, f"{found.detail}; {counters.detail}")


def build(left: Deadline, record: Record, worker: Worker, loads_sources: bool) -> Outcome:
    """The extension; processes that did not find it end."""
    found = gpu_checks.build(left, record, loads_sources=loads_sources)
    if found.detail.startswith("built"):
        worker.stop()
    return found


def stages(
    record: Record, worker: Worker, output: Output, dry: bool, loads_sources: bool
) -> list[Stage]:
    """All stages, in order."""
    kind = worker.device.type
    files = ["tests/test_replay.py"] if dry else None
    log = output.path(gpu_out.FAILURES)
    tests = partial(
        gpu_tests.tests, record=record, device=kind, files=files, log=log, tell=output.tell
    )
    own = {"record": record, "worker": worker}
    runs = {
        **{name: partial(measure, stage=name, **own, dry=dry) for name in (*READ, *MEASURED)},
        "profile": partial(profile, output=output, **own, dry=dry),
        "build": partial(build, **own, loads_sources=loads_sources),
        "smoke": partial(tests, first=True),
        "tests": tests,
        "sanitize": partial(gpu_checks.sanitize, device=kind, output=output),
    }
    patience = DRY if dry else 1.0
    return [Stage(name, patience * BUDGETS[name], runs[name]) for name in BUDGETS]


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
    found.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help=f"where result and logs go, at most {gpu_out.FILES} files of "
        f"{gpu_out.BYTES // 2**20} MiB (default: the variable {gpu_out.VARIABLE}, else "
        "bench/results and build/gpu); or the result's FILE.json alone",
    )
    found.add_argument(
        "--resume", type=Path, metavar="FILE", help="go on from this result, or that in this folder"
    )
    found.add_argument("--restart", action="store_true", help="forget what the result holds")
    found.add_argument(
        "--kit", type=Path, metavar="DIR", help="of make gpu-kit (build/gpu-kit, if it is there)"
    )
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
        _check(options)
        output = Output.of(options.out, f"gpu_{environment.slug(device)}.json")
        kit = _unpack(options.kit)
        if options.restart:
            output.result.unlink(missing_ok=True)
        facts, resumed = environment.describe(device), None
        if options.resume is not None:
            resumed = gpu_out.resume(options.resume, output.result, facts)
        record = Record(output.result, facts)
    except (ValueError, RuntimeError) as error:
        print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    record.result.gpu["dry"] = options.quick
    if resumed is not None:
        record.result.gpu["resumed"] = resumed
    if kit and kit["commit"] != record.result.facts["commit"]["id"]:
        text = "another than this checkout's: what has changed since is compiled"
        kit["commit"] = f"{kit['commit']}, {text}"
    record.result.gpu["kit"] = kit
    if any(record.finished(name) for name in options.stage or () if name in ("smoke", "tests")):
        record.result.gpu["tests"].clear()  # asked for by name: once more
    if device.type == "cuda":
        record.result.gpu["device"] = _properties(device)
    with terminable():
        return _visit(options, output, record, device, started)


def _visit(
    options: argparse.Namespace,
    output: Output,
    record: Record,
    device: torch.device,
    started: float,
) -> int:
    """Run the stages and print the summary; the exit status."""
    kit = record.result.gpu["kit"]
    worker = Worker(
        device, output.path(gpu_out.WORKER), scratch=(gpu_out.WORK / "inductor").resolve()
    )
    loads_sources = "unpacked" in str(kit.get(gpu_kit.NATIVE))
    every = stages(record, worker, output, options.quick, loads_sources)
    try:
        with output.watched():
            output.tell("; ".join(f"{name}: {text}" for name, text in kit.items()) or NO_KIT)
            good = run_stages(
                [s for s in every if s.name in (options.stage or BUDGETS)],
                record,
                options.budget - (time.monotonic() - started),
                again=options.stage or (),
                tell=output.tell,
            )
    except KeyboardInterrupt:
        record.save()
        output.tell("stopped; the same command goes on from here")
        return 130
    finally:
        worker.stop(kill=True)
    output.tell(f"\n{short(record.result)}")
    output.tell(f"\n{time.monotonic() - started:.0f} s; {output.result}")
    rows_failed = any(
        row.status == "failed" for g in record.result.groups.values() for row in g.rows.values()
    )
    return 0 if good and not rows_failed else 1


def _check(options: argparse.Namespace) -> None:
    if options.quick and options.out is None and not os.environ.get(gpu_out.VARIABLE):
        raise ResultError("--quick measures nothing worth keeping: name a folder with --out")
    if options.budget is None:
        options.budget = DRY * BUDGET if options.quick else BUDGET
    if options.budget < ENOUGH:
        raise ResultError(f"--budget must be at least {ENOUGH:.0f} seconds, got {options.budget}")
    if options.restart and options.resume is not None:
        raise ResultError("--restart forgets what --resume goes on from: name one of them")


def _unpack(named: Path | None) -> dict[str, Any]:
    """Put in place what was built before, and say what became of it; empty without a kit."""
    gpu_out.WORK.mkdir(parents=True, exist_ok=True)
    # Kernels are kept for the next run; the extension must not be loaded before it is there.
    cache = os.environ.setdefault("TRITON_CACHE_DIR", str(gpu_out.WORK / "triton"))
    if named is None and not (gpu_kit.KIT / gpu_kit.MANIFEST).exists():
        return {}
    package, tools = environment.ROOT / "pwm_fast", (gpu_out.WORK / "tools").resolve()
    said = gpu_kit.unpack(named or gpu_kit.KIT, Path(cache).resolve(), package, tools)
    builds = all(find_spec(name) is not None for name in gpu_checks.BUILD_TOOLS)
    if tools.is_dir() and not (builds and gpu_tests.missing() is None):
        sys.path.append(str(tools))  # behind all others; in processes before what is installed
        for variable, folder in (("PYTHONPATH", tools), ("PATH", tools / "bin")):
            paths = [os.environ[variable]] if os.environ.get(variable) else []
            os.environ[variable] = os.pathsep.join([*paths, str(folder)])
    return said


def _properties(device: torch.device) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
    }


def _device(name: str, quick: bool) -> torch.device:
    device = torch.device(name)
    if device.type not in ("cuda", "cpu"):
        raise ResultError(f"--device must be cuda, cuda:N or cpu, got {name}")
    if device.type == "cpu" and not quick:
        raise ResultError("--device cpu shows only that the command runs: it needs --quick")
    if device.type == "cuda":
        environment.check_gpu(device)
    return device


if __name__ == "__main__":
    raise SystemExit(main())
