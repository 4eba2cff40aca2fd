"""The persistent rollout and the actor's update by themselves: right, repeatable, how fast.

python -m bench.gpu_rollout     # layouts of one tile forward and backward, for a profiler

At the sizes of ``pwm_5M_flow``: 128 rows, K = 4, 16 macro steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.measure import graphed
from bench.providers import Absent
from bench.readings import Reading, median, reading, seconds
from bench.sizes import OBS, alg_config, make_agent

BATCH, WIDTH, SUBSTEPS, HORIZON = 128, 512, 4, 16
RATE = "16"  # of bench.tune_products.PRECISIONS
REPEATED = 20
ROWS = 40  # of the profiler's tables


def layouts(device: torch.device) -> list[Any]:
    """The layouts that fit, the one that the heuristic takes first."""
    from bench.internals import planning
    from bench.internals import rollout_kernels as rollout

    limits = planning.device_limits(device)[1]
    size = torch.float16.itemsize
    found = [p for p in rollout.LAYOUTS if not rollout.why_not(p, BATCH, WIDTH, size, *limits)]
    chosen = rollout.choose_layout(BATCH, WIDTH, torch.float16, *limits)
    return sorted(found, key=lambda plan: plan != chosen)


def title(plan: Any) -> str:
    """``bm 8, bn 64, warps 4, chunks 4``."""
    return ", ".join(f"{name} {value}" for name, value in plan._asdict().items())


def workload(device: torch.device, dry: bool) -> Any:
    """Random operands; on a CPU of a small rollout in plain PyTorch."""
    from bench.internals import EXACT, TorchKernels
    from bench.tune_rollout import RolloutWorkload

    if device.type != "cuda":
        return RolloutWorkload(5, 64, RATE, device, 2, SUBSTEPS, TorchKernels(EXACT))
    return RolloutWorkload(BATCH, WIDTH, RATE, device, 2 if dry else HORIZON, SUBSTEPS)


# --- readings -----------------------------------------------------------------------------------


def first(device: torch.device, dry: bool) -> Iterator[Reading]:
    """One rollout against float64, again and again, and replayed from a CUDA graph."""
    work = workload(device, dry)
    call = work.call(layouts(device)[0] if device.type == "cuda" else None)  # compared
    for name, error in work.errors().items():
        yield reading(f"rollout, relative error of {name}", error, "")
    wanted = [x.clone() for x in work.results]
    worst = 0
    for _ in range(2 if dry else REPEATED):
        call()
        worst = max(worst, _differences(work.results, wanted))
    yield _none("rollout, numbers that differ when repeated", worst)
    if device.type != "cuda":
        raise Absent("a CUDA graph needs a GPU")
    replay = graphed(call)
    for x in work.results:
        x.zero_()
    replay()
    yield _none("rollout, numbers that differ when replayed", _differences(work.results, wanted))


def _differences(found: list[Tensor], wanted: list[Tensor]) -> int:
    return sum(int((a != b).sum()) for a, b in zip(found, wanted, strict=True))


def _none(name: str, count: int) -> Reading:
    return reading(name, count, "", f"failed: {count} of them differ" if count else None)


def times(device: torch.device, dry: bool) -> Iterator[Reading]:
    """Every layout that fits, forward and backward, captured."""
    if device.type != "cuda":
        raise Absent("the layouts are those of a kernel for GPUs")
    work = workload(device, dry)
    for plan in layouts(device):
        try:
            work.call(plan)
            forward, backward = work.halves(plan)
            forward()
            for name, call in (("forward", forward), ("backward", backward)):
                time = 1e6 * seconds(call, device, 4)
                yield reading(f"rollout {name}, {title(plan)}", time, "µs")
        except Exception as error:  # the next layout may work
            torch.cuda.synchronize(device)  # unless the context is lost
            yield reading(f"rollout, {title(plan)}", None, "", f"failed: {error}")


def actor(device: torch.device, dry: bool) -> Iterator[Reading]:
    """The actor's update, eager and replayed from its CUDA graph, in the profiler's tables."""
    on_gpu = device.type == "cuda"
    alg = alg_config("tiny_flow" if dry else "5M_flow", SUBSTEPS)
    for graphs in (False, True) if on_gpu else (False,):
        agent = make_agent(alg, device, graphs=graphs, precision="fast" if on_gpu else "auto")
        obs = torch.randn(7 if dry else BATCH, OBS, device=device)
        update = partial(agent._run, "actor", agent._actor_update, obs)
        way = "replayed" if graphs else "eager"
        with torch.enable_grad():
            for _ in range(1 if dry else 3):  # a graph is recorded meanwhile
                update()
            yield reading(f"actor update, {way}", 1e6 * median(update, device), "µs")
            yield from profiled(f"actor update, {way}", update, device)


def profiled(name: str, call: Callable[[], Any], device: torch.device) -> Iterator[Reading]:
    """Kernels of one call, their time, and the profiler's table as a reading's ``text``."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile, supported_activities

    on_gpu = device.type == "cuda"
    with profile(
        activities=supported_activities() if on_gpu else [ProfilerActivity.CPU], acc_events=True
    ) as profiler:
        call()
        if on_gpu:
            torch.cuda.synchronize(device)
    events = profiler.key_averages()
    order = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
    text = events.table(sort_by=order, row_limit=ROWS, max_name_column_width=70)
    if not on_gpu:
        yield {**reading(f"{name}, operators", len(events), ""), "text": f"{name}\n{text}\n"}
        return
    kernels = [e for e in events if e.device_type == DeviceType.CUDA]
    busy = sum(e.self_device_time_total for e in kernels)
    count = sum(e.count for e in kernels)
    yield {**reading(f"{name}, kernels", count, ""), "text": f"{name}\n{text}\n"}
    yield reading(f"{name}, time of its kernels", busy, "µs")


# What :mod:`bench.micro` runs of these, by stage of bench.gpu.
FIRST = {"first rollout": first}
PROFILE = {"rollout layouts": times, "actor update": actor}


def main(device: torch.device | None = None) -> None:
    """Each layout of the heuristic's tile once: other warps, other exchanges."""
    device = device or torch.device("cuda", 0)
    first, *others = layouts(device)
    work = workload(device, False)
    same = [p for p in others if (p.bm, p.bn) == (first.bm, first.bn)]
    for i, plan in enumerate((first, *same)):
        forward, backward = work.halves(plan)
        forward()
        backward()
        torch.cuda.synchronize(device)
        print(f"launches {2 * i} and {2 * i + 1}: {title(plan)}", flush=True)


if __name__ == "__main__":
    main()
