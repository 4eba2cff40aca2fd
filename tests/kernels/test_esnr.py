"""ESNR in Triton: in the interpreter against float64, and its table of tensors."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from pwm_fast import ops
from pwm_fast.kernels import table
from pwm_fast.kernels.esnr import TritonEsnr
from tests.native.esnr_cases import (
    AGREEING,
    assert_close,
    difference_of_totals,
    grads,
    misaligned,
    truth,
)

SMALL = (5, 0, 4097, 1)
RTOL = 1e-6  # Welford's recurrence rounds once a sample, and these tensors are small
HALVES = (torch.float32, torch.float16)  # the interpreter rounds bfloat16 wrongly


@pytest.mark.interpreted
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("samples", [1, 2, 17])
def test_moments(samples: int, dtype: torch.dtype) -> None:
    given = grads(samples, dtype, SMALL)
    signal, noise = TritonEsnr().moments(given, samples)
    wanted = truth(given, samples)
    assert_close(signal, wanted[0], RTOL)
    assert_close(noise, wanted[1], RTOL)
    assert signal[1] == noise[1] == 0.0  # the empty tensor
    moved = [misaligned(g) if i % 3 == 0 else g for i, g in enumerate(given)]
    for got, expected in zip(TritonEsnr().moments(moved, samples), (signal, noise), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.interpreted
@pytest.mark.parametrize(("spread", "lost"), AGREEING)
def test_samples_that_agree(spread: float, lost: float) -> None:
    samples = 16
    given = grads(samples, sizes=(2048, 1777), spread=spread)
    signal, noise = TritonEsnr().moments(given, samples)
    wanted = truth(given, samples)
    assert_close(signal, wanted[0], RTOL)
    assert_close(noise, wanted[1], RTOL)
    exact = wanted[1].sum().item()
    assert abs(difference_of_totals(given, samples) - exact) > lost * exact


@pytest.mark.interpreted
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("samples", [2, 5])
def test_streamed_samples(samples: int, dtype: torch.dtype) -> None:
    given, count = grads(samples, dtype, SMALL), len(SMALL)
    accumulator = ops.EsnrAccumulator(backend="triton")
    parts = [given[s * count : (s + 1) * count] for s in range(samples)]
    for part in parts:
        accumulator.update(part)
    result, wanted = accumulator.result(), truth(given, samples)
    assert_close(result.tensor_signal, wanted[0], RTOL)
    assert_close(result.tensor_noise, wanted[1], RTOL)
    mean = [torch.stack(g).double().mean(0) for g in zip(*parts, strict=True)]
    for got, expected in zip(accumulator.mean(), mean, strict=True):
        torch.testing.assert_close(got, expected.to(dtype), rtol=2e-3, atol=1e-6)


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
