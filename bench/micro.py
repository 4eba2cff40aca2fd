"""What the cost model assumes of a GPU, measured (:mod:`bench.predictions`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import micro_cuda, published
from bench.measure import CpuClock, CudaClock, Effort, graphed, race, settled
from bench.predictions import ASSUMPTIONS
from bench.providers import Absent, compiled, eager, tf32
from bench.results import Spread
from bench.sizes import ACTION, alg_config, make_agent

Reading = dict[str, Any]
EFFORT = Effort(seconds=0.15, min_rounds=5, max_rounds=20, sample=0.002)
MANY = Effort(seconds=0.02, min_rounds=3, max_rounds=5, sample=0.001)  # of 200 products
DTYPES = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


def reading(name: str, value: float | None, unit: str, reason: str | None = None) -> Reading:
    """One figure; with what it replaces where the cost model has one of that name."""
    found: Reading = {"name": name, "value": None if value is None else float(f"{value:.5g}")}
    found["unit"] = unit
    if reason is not None:
        found["reason"] = reason
    if name in ASSUMPTIONS:
        found["replaces"] = {
            "text": ASSUMPTIONS[name].text,
            "value": ASSUMPTIONS[name].value,
            "source": ASSUMPTIONS[name].source,
        }
    return found


def seconds(
    call: Callable[[], Any], device: torch.device, calls: int = 1, effort: Effort = EFFORT
) -> float:
    """Median time of a call; on a GPU of ``calls`` of them in one CUDA graph, a call."""
    if device.type != "cuda":
        return _median(call, device, effort)

    def several() -> None:
        for _ in range(calls):
            call()

    several()
    return _median(graphed(several, 1), device, effort) / calls


def _median(call: Callable[[], Any], device: torch.device, effort: Effort = EFFORT) -> float:
    call()
    clock = CudaClock() if device.type == "cuda" else CpuClock()
    return Spread.of(race({"": call}, clock, effort)[""]).p50


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
    yield reading("eager operation", 1e6 * _median(lambda: x.add_(1.0), device), "µs")
    if device.type == "cuda":
        node = _kernels(device).nothing
        yield reading(
            "graph node", 1e6 * seconds(lambda: node[(1,)](x, num_warps=1), device, count), "µs"
        )
    yield reading("graph node, add of 64", 1e6 * seconds(lambda: x.add_(1.0), device, count), "µs")
    a, b = (torch.randn(64, 64, device=device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    small = partial(torch.mm, a, b, out=out)
    yield reading("small product", 1e6 * seconds(small, device, count // 10), "µs")


def flags(device: torch.device, dry: bool) -> Iterator[Reading]:
    """Two programs hand a number to and fro."""
    kernels, rounds = _kernels(device), 2000
    flag = torch.zeros(128, dtype=torch.int32, device=device)
    out = torch.zeros(2, dtype=torch.int32, device=device)

    def call() -> None:
        flag.zero_()
        kernels.flags[(2,)](flag, out, rounds, LIMIT=100_000, num_warps=1)

    call()
    if out.tolist() != [rounds, rounds]:
        raise Absent(f"the programs did not run at once: {out.tolist()} of {rounds} rounds")
    yield reading("flag round trip", 1e6 * _median(call, device) / rounds, "µs")


def bandwidth(device: torch.device, dry: bool) -> Iterator[Reading]:
    """Reading and copying device memory; bench/cuda/l2.cu reads L2."""
    large = (2**22 if dry else 2**32) // 4
    source = torch.randn(large, device=device)
    target = torch.empty_like(source)
    rate = 2 * 4 * large / _median(partial(target.copy_, source), device)
    yield reading("HBM copy", rate / 1e12, "TB/s")
    rate = 4 * large / _median(source.sum, device)
    yield reading("HBM read by torch.sum", rate / 1e12, "TB/s")
    kernels = _kernels(device)
    del target
    programs = 2 * torch.cuda.get_device_properties(device).multi_processor_count
    out = torch.empty(programs, device=device)
    call = partial(
        kernels.read[(programs,)],
        source,
        out,
        large // kernels.READ_BLOCK,
        BLOCK=kernels.READ_BLOCK,
        PROGRAMS=programs,
        AHEAD=kernels.READ_AHEAD,
        num_warps=kernels.READ_WARPS,
    )
    call()
    found, wanted = float(out.double().sum()), float(source.double().sum())
    if abs(found - wanted) > 1e-3 * float(source.double().norm()):
        yield reading("HBM read", None, "", f"failed: the sum is {found}, not {wanted}")
        return
    yield reading("HBM read", 4e-12 * large / _median(call, device), "TB/s")


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
    kernels.clock[(1,)](pair, 20_000_000, num_warps=1)
    cycles, nanoseconds = pair.tolist()
    yield reading("SM clock", cycles / nanoseconds, "GHz")
    programs, rounds = 8 * sms, 4000
    x = torch.randn(programs * kernels.MISH_BLOCK, device=device)
    out = torch.empty_like(x)
    call = partial(
        kernels.mish[(programs,)],
        x,
        out,
        rounds,
        BLOCK=kernels.MISH_BLOCK,
        num_warps=kernels.MISH_WARPS,
    )
    time = _median(call, device)
    wanted = x.double()
    for _ in range(100):  # it converges long before
        wanted = 0.5 * F.mish(wanted) + x
    name, worst = "Mish in Triton", float((out - wanted).abs().max())
    if not worst < 1e-4:
        yield reading(name, None, "", f"failed: its error is {worst:.3g}")
        return
    rate = x.numel() * rounds / time / sms / (cycles / nanoseconds * 1e9)
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
                        time = _median(call, device)
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
            time = _median(call, device)
            yield reading(f"{label}, compiled bf16", 1e6 * time, "µs")
            time = seconds(call, device, 4)
        yield reading(f"{label}, compiled bf16 graph", 1e6 * time, "µs")


def cuda(name: str, device: torch.device, dry: bool) -> Iterator[Reading]:
    """A program of bench/cuda; ``sanitizer`` runs one under compute-sanitizer."""
    found = micro_cuda.sanitize(device) if name == "sanitizer" else micro_cuda.measure(name, device)
    for figure in found:
        yield reading(*figure)


# In order: what the budget cuts off comes in the next run.
BENCHMARKS: dict[str, Callable[[torch.device, bool], Iterator[Reading]]] = {
    "launches": launches,
    "flags": flags,
    "bandwidth": bandwidth,
    "mish": mish,
    **{f"cuda {name}": partial(cuda, name) for name in (*micro_cuda.PROGRAMS, "sanitizer")},
    "evaluations": evaluations,
    "products": products,
    **{f"compiled {m}": partial(compilations, model=m, batch=b) for m, b in SIZES},
}
