"""ESNR on a GPU, in CUDA C++ and in Triton: bits, streams and graphs. Truth is in test_esnr.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from pwm_fast import ops
from pwm_fast.backends import cuda, select
from tests.kernels.test_esnr import BACKENDS, RTOL, SAMPLES, kernels
from tests.native.esnr_cases import DTYPES, SIZES, assert_close, grads, truth

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("samples", SAMPLES)
def test_the_bits_of_the_emulation(samples: int, dtype: torch.dtype) -> None:
    """What the tests without a GPU find true of the emulation is then true here."""
    from tests.native.test_esnr_emulation import Emulated

    ours = kernels("cuda")
    sizes = (*SIZES, 70_001, 5_000_000 // samples)
    given = grads(samples, dtype, sizes)
    there = ours.moments([g.cuda() for g in given], samples)
    for got, expected in zip(there, Emulated().moments(given, samples), strict=True):
        assert torch.equal(got.cpu(), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_always_the_same_bits(backend: str) -> None:
    """Also while another stream keeps parts of the GPU busy."""
    ours = kernels(backend)
    given = grads(4, sizes=(1_000_003, 65_537, 3), device="cuda")
    signal, noise = (x.clone() for x in ours.moments(given, 4))
    other, noisy = torch.cuda.Stream(), torch.randn(2048, 2048, device="cuda")
    for _ in range(50):
        with torch.cuda.stream(other):
            noisy = torch.mm(noisy, noisy).clamp_(-1.0, 1.0)
        for got, expected in zip(ours.moments(given, 4), (signal, noise), strict=True):
            assert torch.equal(got, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_runs_on_the_current_stream(backend: str) -> None:
    """A side stream on which the samples are written late: reading too early would show."""
    ours = kernels(backend)
    given = grads(3, sizes=(50_001, 7), device="cuda")
    wanted = truth(given, 3)
    late = [torch.zeros_like(g) for g in given]
    ours.moments(late, 3)  # compiled before the clock runs
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        for empty, full in zip(late, given, strict=True):
            empty.copy_(full)
        signal, noise = ours.moments(late, 3)
    stream.synchronize()
    assert_close(signal, wanted[0], RTOL[backend])
    assert_close(noise, wanted[1], RTOL[backend])


def replayed(run: Callable[[], Sequence[Tensor]]) -> tuple[torch.cuda.CUDAGraph, Sequence[Tensor]]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = run()
    return graph, made


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("samples", [4, 65])
def test_a_graph_reads_new_values(samples: int, backend: str) -> None:
    ours = kernels(backend)
    given = grads(samples, device="cuda")
    graph, (signal, noise) = replayed(lambda: ours.moments(given, samples))
    trash = [torch.full((4096,), -1, device="cuda") for _ in range(50)]  # reuses freed memory
    del trash
    for scale in (1.0, -3.0, 0.25):
        for g in given:
            g.mul_(scale).add_(0.1 * torch.randn_like(g))
        graph.replay()
        wanted = truth(given, samples)
        assert_close(signal, wanted[0], RTOL[backend])
        assert_close(noise, wanted[1], RTOL[backend])


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_synchronisation(backend: str) -> None:
    kernels(backend)
    given = [[torch.randn(999, device="cuda")] for _ in range(4)]
    accumulator = ops.EsnrAccumulator(backend=backend)

    def run() -> None:
        ops.esnr(given, backend=backend)
        accumulator.reset()
        for sample in given:
            accumulator.update(sample)
        accumulator.result()

    run()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_auto_takes_a_kernel() -> None:
    given = [torch.randn(9, device="cuda") for _ in range(4)]
    chosen = select.select("esnr", "auto", select.Call(given))
    assert chosen == ("cuda" if cuda.why_not(0) is None else "triton")


@pytest.mark.parametrize("backend", BACKENDS)
def test_second_gpu(backend: str) -> None:
    """The launch goes where the tensors are, and the current device stays what it was."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    ours = kernels(backend)
    given = grads(4, device="cuda:1")
    signal, noise = ours.moments(given, 4)
    assert torch.cuda.current_device() == 0
    wanted = truth(given, 4)
    assert_close(signal, wanted[0], RTOL[backend])
    assert_close(noise, wanted[1], RTOL[backend])
