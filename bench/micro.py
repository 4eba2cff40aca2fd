"""What the cost model assumes of a GPU, measured (:mod:`bench.predictions`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import gpu_rollout, micro_cuda, published
from bench.measure import Effort, settled
from bench.providers import Absent, compiled, eager, tf32
from bench.readings import Reading, median, reading, seconds
from bench.sizes import ACTION, alg_config, make_agent

Benchmark = Callable[[torch.device, bool], Iterator[Reading]]
MANY = Effort(seconds=0.02, min_rounds=3, max_rounds=5, sample=0.001)  # of 200 products
DTYPES = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


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
    from bench import micro_kernels

    return micro_kernels


def launches(device: torch.device, dry: bool) -> Iterator[Reading]:
    """Nodes of a graph, and eager operations, that do next to nothing."""
    x = torch.zeros(64, device=device)
    count = 10 if dry else 1000
    yield reading("eager operation", 1e6 * median(lambda: x.add_(1.0), device), "µs")
    if device.type == "cuda":
        node = partial(_kernels(device).start_nothing, x)
        yield reading("graph node", 1e6 * seconds(node, device, count), "µs")
    yield reading("graph node, add of 64", 1e6 * seconds(lambda: x.add_(1.0), device, count), "µs")
    a, b = (torch.randn(64, 64, device=device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    small = partial(torch.mm, a, b, out=out)
    yield reading("small product", 1e6 * seconds(small, device, count // 10), "µs")


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
    """Reading and copying device memory; bench/cuda/l2.cu reads L2."""
    large = 2**20 if dry else 2**30
    source = torch.randn(large, device=device)
    target = torch.empty_like(source)
    rate = 2 * 4 * large / median(partial(target.copy_, source), device)
    yield reading("HBM copy", rate / 1e12, "TB/s")
    rate = 4 * large / median(source.sum, device)
    yield reading("HBM read by torch.sum", rate / 1e12, "TB/s")
    kernels = _kernels(device)
    del target
    programs = 2 * torch.cuda.get_device_properties(device).multi_processor_count
    out = torch.empty(programs, device=device)
    call = partial(kernels.start_read, source, out)
    call()
    found, wanted = float(out.double().sum()), float(source.double().sum())
    if abs(found - wanted) > 1e-3 * float(source.double().norm()):
        yield reading("HBM read", None, "", f"failed: the sum is {found}, not {wanted}")
        return
    yield reading("HBM read", 4e-12 * large / median(call, device), "TB/s")


def products(device: torch.device, dry: bool) -> Iterator[Reading]:
    """cuBLAS at the shapes of an evaluation, as they are and padded; and at its best."""
    shapes = [("8192", 8192, 8192, 8192)]
    for batch in (64, 128, 512, 2048, 16384):
        for units, latent in ((510, 512), (512, 512), (1788, 768), (1792, 768), (4096, 1376)):
            shapes.append((f"{batch}x{units}x{units}", batch, units, units))
            shapes.append((f"{batch}x{units}x{latent}", batch, units, latent))
    if dry:
        shapes = [("7x9x9", 7, 9, 9)]
    for name, m, k, n in dict.fromkeys(shapes):
        for kind, dtype in DTYPES.items():
            x = torch.randn(m, k, device=device).to(dtype)
            w = torch.randn(n, k, device=device).to(dtype)
            calls = max(1, min(20, int(2e11 / (2 * m * k * n))))
            with tf32() if kind == "tf32" else nullcontext():
                time = seconds(partial(F.linear, x, w), device, calls, MANY)
            yield reading(f"product {kind} {name}", 2e-12 * m * k * n / time, "TF/s")


def mish(device: torch.device, dry: bool) -> Iterator[Reading]:
    """The project's Mish in registers, and the clock; bench/cuda/mish.cu has the limit."""
    kernels = _kernels(device)
    sms = torch.cuda.get_device_properties(device).multi_processor_count
    pair = torch.zeros(2, dtype=torch.int64, device=device)
    kernels.start_clock(pair)
    cycles, nanoseconds = pair.tolist()
    yield reading("SM clock", cycles / nanoseconds, "GHz")
    x = torch.randn(8 * sms * kernels.MISH_BLOCK, device=device)
    out = torch.empty_like(x)
    call = partial(kernels.start_mish, x, out)
    time = median(call, device)
    wanted = x.double()
    for _ in range(100):  # it converges long before
        wanted = 0.5 * F.mish(wanted) + x
    name, worst = "Mish in Triton", float((out - wanted).abs().max())
    if not worst < 1e-4:
        yield reading(name, None, "", f"failed: its error is {worst:.3g}")
        return
    rate = x.numel() * kernels.MISH_ROUNDS / time / sms / (cycles / nanoseconds * 1e9)
    yield reading(name, rate, "/clk/SM")


def _steps(
    model: str, batch: int, device: torch.device
) -> tuple[dict[str, Callable[[Tensor], Tensor]], Tensor]:
    """One velocity evaluation and one macro step of K = 4 by label, and their latents."""
    agent = make_agent(alg_config(f"{model}_flow", 4), device)
    dynamics = agent.world_model.dynamics()
    z = torch.rand(batch, agent.config.world_model.latent_dim, device=device)
    a = torch.rand(batch, ACTION, device=device)

    def velocity(z: Tensor) -> Tensor:
        return published.velocity(dynamics.net, z, a, 0.5)

    def macro(z: Tensor) -> Tensor:
        return published.next_latent(dynamics, z, a)

    size = f"{model} B{batch}"
    return {f"evaluation, {size}": velocity, f"macro step, K 4, {size}": macro}, z


SIZES = (("5M", 128), ("48M", 512))


def evaluations(device: torch.device, dry: bool) -> Iterator[Reading]:
    """Evaluations and macro steps, forward, as eager PyTorch and captured."""
    for model, batch in (("tiny", 7),) if dry else SIZES:
        steps, z = _steps(model, batch, device)
        for label, function in steps.items():
            call = partial(function, z)
            for way, name in (("fp32", "published"), ("tf32", "tf32"), ("bf16", "autocast")):
                with eager(name, device):
                    if way != "tf32":
                        time = median(call, device)
                        yield reading(f"{label}, eager {way}", 1e6 * time, "µs")
                    if device.type == "cuda":
                        time = seconds(call, device, 4)
                        yield reading(f"{label}, {way} graph", 1e6 * time, "µs")


def compilations(
    device: torch.device, dry: bool, model: str = "5M", batch: int = 128
) -> Iterator[Reading]:
    """The same through torch.compile, which takes its time."""
    if dry or device.type != "cuda":
        raise Absent("only a GPU's compiled code is measured here")
    steps, z = _steps(model, batch, device)
    for label, function in steps.items():
        call = partial(compiled(function), z)
        with eager("compile_bf16", device):
            time = median(call, device)
            yield reading(f"{label}, compiled bf16", 1e6 * time, "µs")
            time = seconds(call, device, 4)
        yield reading(f"{label}, compiled bf16 graph", 1e6 * time, "µs")


def cuda(name: str, device: torch.device, dry: bool) -> Iterator[Reading]:
    """A program of bench/cuda; ``sanitizer`` runs one under compute-sanitizer."""
    found = micro_cuda.sanitize(device) if name == "sanitizer" else micro_cuda.measure(name, device)
    for figure in found:
        yield reading(*figure)


# In order: what the budget cuts off comes in the next run.
_PROGRAMS = ("l2", "dsmem", *(p for p in micro_cuda.PROGRAMS if p not in ("l2", "dsmem")))
CONSTANTS: dict[str, Benchmark] = {
    "flags": flags,
    **{f"cuda {name}": partial(cuda, name) for name in (*_PROGRAMS, "sanitizer")},
    "launches": launches,
    "bandwidth": bandwidth,
    "mish": mish,
    "evaluations": evaluations,
    "products": products,
    **{f"compiled {m}": partial(compilations, model=m, batch=b) for m, b in SIZES},
}
# By stage of bench.gpu.
STAGES = {"first": gpu_rollout.FIRST, "profile": gpu_rollout.PROFILE, "micro": CONSTANTS}
BENCHMARKS = {name: run for found in STAGES.values() for name, run in found.items()}
