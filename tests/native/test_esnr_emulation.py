"""The arithmetic of the CUDA kernels of ESNR, run on the CPU block after block."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pwm_fast.backends.cuda import CudaEsnr
from pwm_fast.backends.esnr import TorchEsnr
from tests.native.esnr_cases import (
    AGREEING,
    DTYPES,
    SAMPLES,
    assert_close,
    difference_of_totals,
    grads,
    misaligned,
    truth,
)
from tests.native.harness import _C

if not hasattr(_C, "emulated_esnr"):
    pytest.skip("the native extension is of an older version", allow_module_level=True)


class Emulated(CudaEsnr):
    """The kernels on the CPU, their blocks in an order that a number picks."""

    _prefix = "emulated_esnr"

    def __init__(self, order: int = 0) -> None:
        super().__init__()
        self.order = order

    def _where(self, device: torch.device) -> dict[str, Any]:
        assert device.type == "cpu"
        return {"order": self.order}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("samples", SAMPLES)
def test_moments_are_right(samples: int, dtype: torch.dtype) -> None:
    given = grads(samples, dtype)
    signal, noise = Emulated().moments(given, samples)
    wanted = truth(given, samples)
    assert_close(signal, wanted[0])
    if samples == 1:
        assert (noise == 0.0).all()
    else:
        assert_close(noise, wanted[1])
    assert signal[1] == noise[1] == 0.0  # the empty tensor


@pytest.mark.parametrize("samples", [4, 16, 65])
@pytest.mark.parametrize(("spread", "lost"), AGREEING)
def test_samples_that_agree(samples: int, spread: float, lost: float) -> None:
    """The noise keeps its digits where a difference of totals has lost them."""
    given = grads(samples, spread=spread, sizes=(9000, 20_000))
    signal, noise = Emulated().moments(given, samples)
    wanted = truth(given, samples)
    assert_close(signal, wanted[0])
    assert_close(noise, wanted[1], rtol=1e-6)
    exact = wanted[1].sum().item()
    assert abs(difference_of_totals(given, samples) - exact) > lost * exact


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("samples", [2, 4, 16, 65])
def test_no_order_and_no_alignment_changes_a_bit(samples: int, dtype: torch.dtype) -> None:
    given = grads(samples, dtype)
    expected = Emulated().moments(given, samples)
    moved = [misaligned(g) if i % 3 == 0 else g for i, g in enumerate(given)]
    for order in (1, 2, 3):
        for tensors in (given, moved):
            for got, wanted in zip(
                Emulated(order).moments(tensors, samples), expected, strict=True
            ):
                assert torch.equal(got, wanted)


def test_strided_gradients() -> None:
    given = grads(3, sizes=(12, 35))
    shaped = [g.view(3, 4) if g.numel() == 12 else g.view(5, 7) for g in given]
    transposed = [g.t().contiguous().t() for g in shaped]
    for got, wanted in zip(
        Emulated().moments(transposed, 3), Emulated().moments(given, 3), strict=True
    ):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_16_bit_number(dtype: torch.dtype) -> None:
    """Subnormal numbers, infinities and NaNs among them: the square of each, exactly."""
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    signal, _ = Emulated().moments(list(numbers.split(1)), 1)
    assert torch.equal(signal.isnan(), numbers.isnan())
    wanted = numbers.double().square()
    assert torch.equal(signal.nan_to_num(), wanted.nan_to_num())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("samples", [2, 20])
def test_what_is_not_finite_shows(bad: float, samples: int) -> None:
    given = grads(samples, sizes=(9, 10))
    given[2][3] = bad
    signal, noise = Emulated().moments(given, samples)
    assert not signal[0].isfinite() and noise[0].isnan()
    assert signal[1].isfinite() and noise[1].isfinite()


def stream(kernels: Any, given: list[Tensor], samples: int) -> tuple[Tensor, ...]:
    """Signal, noise, squares and running sums of samples taken one after another."""
    count = len(given) // samples
    origins = [g.clone() for g in given[:count]]
    sums = [misaligned(torch.zeros_like(g, dtype=torch.float64)) for g in origins]
    squares = torch.zeros(count, dtype=torch.float64)
    for s in range(1, samples):
        kernels.update(given[s * count : (s + 1) * count], origins, sums, squares)
    return (*kernels.result(origins, sums, squares, samples), squares, *sums)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("samples", [2, 5, 33])
@pytest.mark.parametrize("spread", [1.0, 1e-4])
def test_streamed_samples(samples: int, dtype: torch.dtype, spread: float) -> None:
    given = grads(samples, dtype, spread=spread if dtype == torch.float32 else 1.0)
    first = stream(Emulated(), given, samples)
    wanted = truth(given, samples)
    assert_close(first[0], wanted[0], rtol=1e-6)
    assert_close(first[1], wanted[1], rtol=1e-6)
    plain = stream(TorchEsnr(), given, samples)
    for got, expected in zip(first, plain, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    for got, expected in zip(stream(Emulated(7), given, samples), first, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("samples", [2, 5, 20])
@pytest.mark.parametrize("scale", [1e-44, 1e-30, 1e-19, 1e19, 1e20, 1e37])
def test_no_scale_overflows_or_underflows(scale: float, samples: int) -> None:
    given = [(scale * g.double()).float() for g in grads(samples, spread=0.5)]
    wanted = truth(given, samples)
    found = Emulated().moments(given, samples), stream(Emulated(), given, samples)[:2]
    for signal, noise in found:
        torch.testing.assert_close(signal, wanted[0], rtol=1e-12, atol=0.0)
        torch.testing.assert_close(noise, wanted[1], rtol=1e-9, atol=0.0)


def test_a_larger_list_gets_larger_chunks() -> None:
    """1024 chunks at least, as far as 4096 elements make a chunk."""

    def chunks(*sizes: int) -> int:
        held = torch.tensor(sizes, dtype=torch.int64)
        table = 3 * len(sizes) + 1 + len(sizes)
        return (_C.esnr_workspace_words(held.data_ptr(), len(sizes), 1) - table) // 2

    assert chunks(0) == 0 and chunks(1) == 1 and chunks(4096, 1) == 2
    assert chunks(1_500_000) == -(-1_500_000 // 4096)
    assert chunks(18_700_000) == -(-18_700_000 // 16384)
    assert chunks(150_000_000) == -(-150_000_000 // 65536)


GOOD = {"type": 0, "m": 1, "tensors": 0, "words": 4}
WRONG = {"type": (3, "0 (fp32)"), "m": (0, "at least 1"), "tensors": (-1, "at least 0")}
WRONG |= {"words": (0, "at least 1")}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("call", ["emulated_esnr", "cuda_esnr"])
def test_wrong_arguments_are_named(name: str, call: str) -> None:
    value, expected = WRONG[name]
    where = {"order": 0} if call == "emulated_esnr" else {"device": 0, "stream": 0}
    addresses = dict.fromkeys(("rows", "sizes", "signal", "noise", "workspace"), 0)
    memory = torch.zeros(4, dtype=torch.int64)
    addresses["workspace"] = memory.data_ptr()
    _C.emulated_esnr(**addresses, **GOOD, order=0)  # nothing to do: no error
    with pytest.raises(ValueError, match=name) as error:
        getattr(_C, call)(**addresses, **GOOD | {name: value}, **where)
    assert expected in str(error.value) and str(value) in str(error.value)
