"""What the cost model assumes of a GPU (its constants with a ``reading``), measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from bench import gpu_rollout
from bench.measure import Effort, settled
from bench.providers import Absent, tf32
from bench.readings import Reading, median, reading, seconds

Benchmark = Callable[[torch.device, bool], Iterator[Reading]]
MANY = Effort(seconds=0.02, min_rounds=3, max_rounds=5, sample=0.001)
DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16}


def read(name: str, device: torch.device, dry: bool = False) -> Iterator[Reading]:
    """The readings of one of :data:`BENCHMARKS`; what cannot run gives one without a value."""
    try:
        with torch.no_grad(), settled():
            for found in BENCHMARKS[name](device, dry):
                if device.type != "cuda":
                    found.pop("replaces", None)  # a CPU's figure says nothing of the model
                yield found
    except Absent as error:
        yield reading(name, None, "", f"absent: {error}")


def _kernels(device: torch.device) -> Any:
    if device.type != "cuda":
        raise Absent("it is a Triton kernel for a GPU")
    from bench.micro import kernels

    return kernels


def flags(device: torch.device, dry: bool) -> Iterator[Reading]:
    """Two programs hand a number to and fro."""
    kernels = _kernels(device)
    rounds = kernels.ROUNDS
    flag = torch.zeros(128, dtype=torch.int32, device=device)
    out = torch.zeros(2, dtype=torch.int32, device=device)

    def call() -> None:
        flag.zero_()
        kernels.start_flags(flag, out)

    call()
    if out.tolist() != [rounds, rounds]:
        raise Absent(f"the programs did not run at once: {out.tolist()} of {rounds} rounds")
    yield reading("flag round trip", 1e6 * median(call, device) / rounds, "µs")


def bandwidth(device: torch.device, dry: bool) -> Iterator[Reading]:
    """What one multiprocessor and what all of them read from L2, and from device memory."""
    kernels = _kernels(device)
    sms = torch.cuda.get_device_properties(device).multi_processor_count
    source = torch.randn(kernels.LARGE, device=device)
    for name, way in kernels.reads(sms).items():
        part = source[: way.blocks * kernels.READ_BLOCK]
        out = torch.empty(way.programs, device=device)
        call = partial(kernels.start_read, part, out, way.repeats)
        call()
        found, wanted = float(out.double().sum()), way.repeats * float(part.double().sum())
        if abs(found - wanted) > 1e-3 * way.repeats * float(part.double().norm()):
            yield reading(name, None, "", f"failed: the sum is {found}, not {wanted}")
            continue
        rate = 4 * part.numel() * way.repeats / median(call, device)
        unit, size = ("GB/s", 1e9) if way.programs == 1 else ("TB/s", 1e12)
        yield reading(name, rate / size, unit)


def clock(device: torch.device, dry: bool) -> Iterator[Reading]:
    """Cycles of a multiprocessor that has little to do."""
    pair = torch.zeros(2, dtype=torch.int64, device=device)
    _kernels(device).start_clock(pair)
    cycles, nanoseconds = pair.tolist()
    yield reading("SM clock", cycles / nanoseconds, "GHz")


def products(device: torch.device, dry: bool) -> Iterator[Reading]:
    """Products of PyTorch: the start and drain of a small one, and at their best."""
    a, b = (torch.randn(64, 64, device=device, dtype=torch.bfloat16) for _ in range(2))
    small = partial(torch.mm, a, b, out=torch.empty_like(a))
    yield reading("small product", 1e6 * seconds(small, device, 1 if dry else 100), "µs")
    size = 9 if dry else 8192
    for kind, dtype in DTYPES.items():
        x, w = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        with tf32() if kind == "tf32" else nullcontext():
            time = seconds(partial(F.linear, x, w), device, 1, MANY)
        yield reading(f"product {kind} {size}", 2e-12 * size**3 / time, "TF/s")


CONSTANTS: dict[str, Benchmark] = {
    "flags": flags,
    "bandwidth": bandwidth,
    "clock": clock,
    "products": products,
}
# By stage of bench.gpu; what the budget cuts off comes in the next run.
STAGES = {"first": gpu_rollout.FIRST, "profile": gpu_rollout.PROFILE, "micro": CONSTANTS}
BENCHMARKS = {name: run for found in STAGES.values() for name, run in found.items()}
