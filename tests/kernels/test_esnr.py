"""ESNR in Triton: in the interpreter against float64, and its table of tensors."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from pwm_fast import ops
from pwm_fast.backends import cuda
from pwm_fast.backends.cuda import CudaEsnr
from pwm_fast.backends.esnr import EsnrReduction
from pwm_fast.kernels import table
from pwm_fast.kernels.esnr import TritonEsnr
from tests.kernels.harness import on_devices
from tests.native.esnr_cases import (
    AGREEING,
    DTYPES,
    SIZES,
    assert_close,
    difference_of_totals,
    grads,
    misaligned,
    truth,
)

BACKENDS = ("cuda", "triton")
SAMPLES = (1, 2, 4, 16, 64, 65)
SMALL = (5, 0, 4097, 1)
HALVES = (torch.float32, torch.float16)  # the interpreter rounds bfloat16 wrongly
# In CUDA C++ means are sums; in Triton Welford's recurrence rounds once a sample.
RTOL = {"cuda": 2e-7, "triton": 2e-6}


def kernels(backend: str) -> EsnrReduction:
    if backend == "triton":
        return TritonEsnr()
    if (reason := cuda.why_not(0)) is not None:
        pytest.skip(reason)
    return CudaEsnr()


def tolerance(backend: str, device: str) -> float:
    return 1e-6 if device == "cpu" else RTOL[backend]  # the CPU's tensors are small


@pytest.mark.parametrize(
    ("device", "backend", "dtype", "samples"),
    on_devices(
        [("triton", dtype, samples) for dtype in HALVES for samples in (1, 2, 17)],
        [(b, dtype, samples) for b in BACKENDS for dtype in DTYPES for samples in SAMPLES],
    ),
)
def test_moments(device: str, backend: str, dtype: torch.dtype, samples: int) -> None:
    given = grads(samples, dtype, SMALL if device == "cpu" else SIZES, device=device)
    moved = [misaligned(g) if i % 3 == 0 else g for i, g in enumerate(given)]
    ours, wanted = kernels(backend), truth(given, samples)
    signal, noise = ours.moments(given, samples)
    assert_close(signal, wanted[0], tolerance(backend, device))
    assert_close(noise, wanted[1], tolerance(backend, device))
    assert signal[1] == noise[1] == 0.0  # the empty tensor
    for tensors in (given, moved, given):
        for got, expected in zip(ours.moments(tensors, samples), (signal, noise), strict=True):
            assert torch.equal(got, expected)


@pytest.mark.parametrize(
    ("device", "backend", "spread", "lost"),
    on_devices(
        [("triton", *pair) for pair in AGREEING],
        [(backend, *pair) for backend in BACKENDS for pair in AGREEING],
    ),
)
def test_samples_that_agree(device: str, backend: str, spread: float, lost: float) -> None:
    samples = 16
    sizes = (2048, 1777) if device == "cpu" else (100_003, 20_000)
    given = grads(samples, sizes=sizes, spread=spread, device=device)
    signal, noise = kernels(backend).moments(given, samples)
    wanted = truth(given, samples)
    assert_close(signal, wanted[0], tolerance(backend, device))
    assert_close(noise, wanted[1], 1e-6 if device == "cpu" else 2e-6)
    exact = wanted[1].sum().item()
    assert abs(difference_of_totals(given, samples) - exact) > lost * exact


@pytest.mark.parametrize(
    ("device", "backend", "dtype", "samples"),
    on_devices(
        [("triton", dtype, samples) for dtype in HALVES for samples in (2, 5)],
        [(backend, dtype, 5) for backend in BACKENDS for dtype in DTYPES],
    ),
)
def test_streamed_samples(device: str, backend: str, dtype: torch.dtype, samples: int) -> None:
    kernels(backend)
    sizes = SMALL if device == "cpu" else SIZES
    given, count = grads(samples, dtype, sizes, device=device), len(sizes)
    accumulator = ops.EsnrAccumulator(backend=backend)
    parts = [given[s * count : (s + 1) * count] for s in range(samples)]
    for part in parts:
        accumulator.update(part)
    result, wanted = accumulator.result(), truth(given, samples)
    assert_close(result.tensor_signal, wanted[0], 1e-6)
    assert_close(result.tensor_noise, wanted[1], 1e-6)
    mean = [torch.stack(g).double().mean(0) for g in zip(*parts, strict=True)]
    for got, expected in zip(accumulator.mean(), mean, strict=True):
        torch.testing.assert_close(got, expected.to(dtype), rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("device", "backend", "scale"),
    on_devices(
        [("triton", scale) for scale in (1e-44, 1e-19, 1e20, 1e37)],
        [(b, s) for b in BACKENDS for s in (1e-44, 1e-30, 1e-19, 1e19, 1e20, 1e37)],
    ),
)
def test_no_scale_overflows_or_underflows(device: str, backend: str, scale: float) -> None:
    """All at once and streamed."""
    ours, sizes, samples = kernels(backend), (777, 5), 5
    given = [(scale * g.double()).float() for g in grads(samples, spread=0.5, sizes=sizes)]
    wanted = truth(given, samples)
    there = [g.to(device) for g in given]
    accumulator = ops.EsnrAccumulator(backend=backend)
    for s in range(samples):
        accumulator.update(there[s * len(sizes) : (s + 1) * len(sizes)])
    streamed = accumulator.result()
    for signal, noise in (
        ours.moments(there, samples),
        (streamed.tensor_signal, streamed.tensor_noise),
    ):
        assert_close(signal, wanted[0], 1e-12)
        assert_close(noise, wanted[1], 1e-9)


@pytest.mark.interpreted
def test_nothing_but_empty_tensors() -> None:
    signal, noise = TritonEsnr().moments([torch.zeros(0)] * 4, 2)
    assert signal.tolist() == noise.tolist() == [0.0, 0.0]


@pytest.mark.interpreted
def test_the_public_operation_takes_it() -> None:
    given = [[torch.randn(7, 3), torch.randn(11)] for _ in range(4)]
    ours, reference = (ops.esnr(given, backend=name) for name in ("triton", "reference"))
    torch.testing.assert_close(ours, reference, rtol=1e-6, atol=0.0)


def test_words_of_a_table() -> None:
    rows: Sequence[Sequence[Tensor]] = [
        [torch.zeros(n) for n in (5000, 0, 3)],
        [torch.zeros(n) for n in (5000, 0, 3)],
    ]
    made = table.make(rows)
    assert (made.tensors, made.rows, made.chunk, made.chunks) == (3, 2, 4096, 3)
    addresses = [row[t].data_ptr() for t in range(3) for row in rows]
    assert made.words.tolist() == [0, 2, 2, 3, 5000, 0, 3, *addresses]
    moved = [[misaligned(x) for x in rows[0]], rows[1]]
    assert not table.make(moved).aligned


def test_words_within_launches_are_exact() -> None:
    """As a captured graph takes them: any 64-bit word, also beyond what a double holds."""
    words = [2**63 - 1, -(2**63), 0, 1, 0x7F12_3456_789A_BCDE, 2**53 + 1]
    assert table.constants(words, torch.device("cpu")).tolist() == words


def test_chunks_are_those_of_the_extension() -> None:
    assert [table.chunk_of(n) for n in (0, 1_500_000, 18_700_000, 150_000_000, 10**10)] == [
        4096,
        4096,
        16384,
        65536,
        65536,
    ]
