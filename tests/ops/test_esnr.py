"""Gradient signal-to-noise ratio against numpy, above all where the samples nearly agree."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from pwm_fast import ops

SHAPES = [(7, 5), (5,), (), (3, 2, 1)]
NATIVE = 2e-7  # relative error of the native backend, which centres in float32 and sums in float64


def np_esnr(samples: np.ndarray, eps: float = 1e-10) -> tuple[float, float, float]:
    """Return signal, noise and ratio of ``[M, P]`` samples, in float64 whatever they come in."""
    g = samples.astype(np.float64)
    mean = g.sum(axis=0) / len(g)
    signal = float((mean**2).sum())
    noise = float(sum(((row - mean) ** 2).sum() for row in g) / len(g))
    return signal, noise, signal / max(noise, eps)


def difference_of_totals(samples: Tensor, eps: float = 1e-10) -> float:
    """Compute the ratio the published way: ``|mu|^2 / (mean |g|^2 - |mu|^2)``."""
    signal = samples.mean(0).square().sum()
    noise = samples.square().sum(1).mean() - signal
    return (signal / noise.clamp_min(eps)).item()


def gradients(samples: int, dtype: torch.dtype = torch.float64) -> list[list[Tensor]]:
    """Draw samples as ``torch.autograd.grad`` returns them: a list of tensors each."""
    centres = [torch.randn(shape, dtype=torch.float64) for shape in SHAPES]
    return [
        [(c + 0.5 * torch.randn(c.shape, dtype=torch.float64)).to(dtype) for c in centres]
        for _ in range(samples)
    ]


def flat(samples: list[list[Tensor]]) -> Tensor:
    return torch.stack([torch.cat([g.reshape(-1) for g in sample]) for sample in samples])


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
@pytest.mark.parametrize("samples", [2, 5, 16])
def test_lists_and_stacked_tensors_equal_the_formula(samples: int, dtype: torch.dtype) -> None:
    """All results are float64, and exact for the given numbers on the reference."""
    grads = gradients(samples, dtype)
    stacked = flat(grads)
    signal, noise, ratio = np_esnr(stacked.double().numpy())
    for backend in ("reference", "auto"):
        tolerance = 1e-12 if backend == "reference" or dtype != torch.float32 else NATIVE
        for given in (grads, stacked, stacked[:, None, :]):
            result = ops.esnr(given, backend=backend)
            assert all(x.dtype == torch.float64 for x in result)
            assert math.isclose(result.signal.item(), signal, rel_tol=tolerance)
            assert math.isclose(result.noise.item(), noise, rel_tol=tolerance)
            assert math.isclose(result.ratio.item(), ratio, rel_tol=tolerance)
            db = 10.0 * math.log10(ratio)
            assert math.isclose(result.db.item(), db, rel_tol=tolerance, abs_tol=5 * tolerance)


def test_a_case_by_hand() -> None:
    """Samples (1, 0) and (3, 0): mean (2, 0), signal 4, noise 1, 6.02 dB."""
    result = ops.esnr(torch.tensor([[1.0, 0.0], [3.0, 0.0]]))
    assert (result.signal, result.noise, result.ratio) == (4.0, 1.0, 4.0)
    assert math.isclose(result.db.item(), 10.0 * math.log10(4.0), rel_tol=1e-15)
    assert result.tensor_ratio.tolist() == [4.0]


@pytest.mark.parametrize("spread", [1e-4, 1e-6])
def test_nearly_equal_samples(spread: float) -> None:
    """float32 samples that nearly agree: ours is exact, the difference of float32 totals is not."""
    centre = 1.0 + torch.rand(20_000)
    stacked = centre * (1.0 + spread * torch.randn(32, 20_000))
    assert stacked.dtype == torch.float32
    _, noise, truth = np_esnr(stacked.numpy())
    assert noise > 1e-9  # the floor of the denominator plays no part here
    parts = [list(row.split([7_000, 12_000, 1_000])) for row in stacked]
    for backend, tolerance in (("reference", 1e-9), ("auto", NATIVE)):
        for given in (stacked, parts):
            value = ops.esnr(given, backend=backend).ratio.item()
            assert abs(value - truth) / truth < tolerance
    accumulator = ops.EsnrAccumulator()
    for sample in parts:
        accumulator.update(sample)
    assert abs(accumulator.result().ratio.item() - truth) / truth < 1e-5
    assert abs(difference_of_totals(stacked) - truth) / truth > 0.05


def test_nearly_equal_float64_samples() -> None:
    """The difference of totals would fail in float64 as well: the samples must be centred."""
    centre = 1.0 + torch.rand(20_000, dtype=torch.float64)
    stacked = centre * (1.0 + 1e-7 * torch.randn(32, 20_000, dtype=torch.float64))
    truth = np_esnr(stacked.numpy())[2]
    assert abs(ops.esnr(stacked).ratio.item() - truth) / truth < 1e-9
    assert abs(difference_of_totals(stacked) - truth) / truth > 1e-6


@pytest.mark.parametrize("debias", [False, True])
def test_ratio_per_tensor(debias: bool) -> None:
    """Entry j is the ESNR of the j-th parameter tensor alone."""
    grads = gradients(6)
    ratios = ops.esnr(grads, debias=debias).tensor_ratio
    assert ratios.shape == (len(SHAPES),)
    for j, ratio in enumerate(ratios):
        alone = ops.esnr([[sample[j]] for sample in grads], debias=debias)
        assert math.isclose(ratio.item(), alone.ratio.item(), rel_tol=1e-12)


def test_debias_subtracts_the_noise_of_the_mean() -> None:
    grads = gradients(6)
    biased, debiased = ops.esnr(grads), ops.esnr(grads, debias=True)
    signal = biased.signal - biased.noise / 6
    assert 0.0 < signal < biased.signal
    torch.testing.assert_close(debiased.signal, signal, rtol=1e-12, atol=0.0)
    torch.testing.assert_close(debiased.noise, biased.noise, rtol=0.0, atol=0.0)
    torch.testing.assert_close(debiased.ratio, signal / biased.noise, rtol=1e-12, atol=0.0)


def test_debias_of_the_total_is_not_the_sum_over_tensors() -> None:
    """A tensor of noise alone is cut at 0 in its own ratio, not in the total of all tensors."""
    noise = torch.tensor([1.0, -1.0], dtype=torch.float64)
    grads = [[torch.tensor([2.0 + s]), torch.tensor([8.0 * s])] for s in noise.tolist()]
    result = ops.esnr(grads, debias=True)
    assert result.tensor_ratio.tolist() == [3.5, 0.0]  # (4 - 1/2) / 1 and max(0 - 64/2, 0) / 64
    for total in (result, ops.esnr(flat(grads), debias=True)):
        assert (total.signal, total.noise, total.ratio) == (0.0, 65.0, 0.0)
        assert total.db == -math.inf


@pytest.mark.parametrize("eps", [1e-10, 0.25])
def test_eps_bounds_the_noise_of_identical_samples(eps: float) -> None:
    result = ops.esnr(torch.full((3, 4), 0.5), eps=eps)
    assert (result.signal, result.noise) == (1.0, 0.0)
    assert math.isclose(result.ratio.item(), 1.0 / eps, rel_tol=1e-12)
    assert math.isclose(result.tensor_ratio.item(), 1.0 / eps, rel_tol=1e-12)
    assert math.isclose(result.db.item(), -10.0 * math.log10(eps), rel_tol=1e-12)


def test_eps_defaults_to_1e_10() -> None:
    identical = torch.ones(2, 3)
    assert torch.equal(ops.esnr(identical).ratio, ops.esnr(identical, eps=1e-10).ratio)


def test_scale_and_order_do_not_matter() -> None:
    stacked = flat(gradients(5))
    expected = ops.esnr(stacked).ratio
    for other in (-3.0 * stacked, stacked.flip(0), stacked.flip(1)):
        torch.testing.assert_close(ops.esnr(other).ratio, expected, rtol=1e-12, atol=0.0)


def test_any_strides() -> None:
    stacked = flat(gradients(5))
    expected = ops.esnr(stacked)
    wide = stacked.repeat_interleave(2, dim=1)[:, ::2]
    tall = stacked.T.contiguous().T
    mixed = stacked.T.contiguous().T[:, 1:].expand(5, -1)
    for view in (wide, tall):
        torch.testing.assert_close(ops.esnr(view), expected, rtol=1e-12, atol=0.0)
    torch.testing.assert_close(ops.esnr(mixed), ops.esnr(stacked[:, 1:]), rtol=1e-12, atol=0.0)
    repeated = stacked[:1].expand(5, -1)  # the same sample five times
    assert ops.esnr(repeated).noise < 1e-28


def test_mixed_dtypes_within_a_sample() -> None:
    grads = [[a.bfloat16(), b, c, d.float()] for a, b, c, d in gradients(4)]
    expected = ops.esnr([[g.double() for g in sample] for sample in grads])
    torch.testing.assert_close(ops.esnr(grads), expected, rtol=0.0, atol=0.0)


@pytest.mark.parametrize("debias", [False, True])
def test_derivatives(debias: bool) -> None:
    """In every sample, of every result."""
    inputs = [(2.0 + torch.randn(3, n, dtype=torch.float64)).requires_grad_() for n in (2, 5)]

    def call(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        return tuple(ops.esnr([list(pair) for pair in zip(a, b, strict=True)], debias=debias))

    assert (call(*inputs)[-1] > 0.0).all()  # away from the kink of the debiased signal
    assert gradcheck(call, inputs)
    assert gradgradcheck(call, inputs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("debias", [False, True])
def test_accumulator_equals_all_samples_at_once(dtype: torch.dtype, debias: bool) -> None:
    grads = gradients(7, dtype)
    accumulator = ops.EsnrAccumulator()
    for sample in grads:
        accumulator.update(sample)
    whole = ops.esnr(grads, debias=debias, backend="reference")
    streamed = accumulator.result(debias=debias)
    torch.testing.assert_close(
        streamed, whole, rtol=1e-12 if dtype == torch.float64 else 1e-5, atol=1e-12
    )
    expected = [torch.stack(tensors).mean(0) for tensors in zip(*grads, strict=True)]
    torch.testing.assert_close(accumulator.mean(), expected)
    accumulator.reset()
    with pytest.raises(ValueError, match="at least 2 samples, got 0"):
        accumulator.result()


def test_accumulator_refuses_other_shapes() -> None:
    accumulator = ops.EsnrAccumulator()
    accumulator.update([torch.ones(3)])
    with pytest.raises(ValueError, match=r"first sample's shapes \[\(3,\)\], got \[\(4,\)\]"):
        accumulator.update([torch.ones(4)])
    assert accumulator.samples == 1


def test_running_esnr_averages_signal_and_noise() -> None:
    """The first result is the estimate itself; then both parts are averaged, not their ratio."""
    first, second = ops.esnr(gradients(5)), ops.esnr(gradients(5))
    running = ops.RunningEsnr(decay=0.75)
    torch.testing.assert_close(running.update(first).ratio, first.ratio)
    after = running.update(second)
    weights = 0.75 * 0.25, 0.25
    signal = (weights[0] * first.signal + weights[1] * second.signal) / sum(weights)
    noise = (weights[0] * first.noise + weights[1] * second.noise) / sum(weights)
    torch.testing.assert_close(after.ratio, signal / noise)
    with pytest.raises(ValueError, match="decay must lie in"):
        ops.RunningEsnr(decay=1.0)


SCALES = (1e-44, 1e-38, 1e-30, 1e-19, 1.0, 1e10, 1e19, 1e20, 1e30, 5e37)


@pytest.mark.parametrize("debias", [False, True])
@pytest.mark.parametrize("samples", [2, 5, 16, 17, 40])
@pytest.mark.parametrize("scale", SCALES)
def test_no_scale_overflows_or_underflows(scale: float, samples: int, debias: bool) -> None:
    """float32 gradients from the smallest to the largest; ``eps=0``, as it is an absolute bound."""
    grads = [
        [(g * (scale / 8.0)).float() for g in sample] for sample in gradients(samples)
    ]  # some are 8 times their scale
    stacked = flat(grads)
    wanted = ops.esnr(stacked.double(), eps=0.0, debias=debias, backend="reference")
    _, _, ratio = np_esnr(stacked.numpy(), eps=0.0)
    if not debias:
        assert math.isclose(wanted.ratio.item(), ratio, rel_tol=1e-12)
    accumulator = ops.EsnrAccumulator(eps=0.0)
    for sample in grads:
        accumulator.update(sample)
    running = ops.RunningEsnr(0.5, eps=0.0)
    smoothed = running.update(accumulator.result(debias=debias))
    for found in (
        *(ops.esnr(grads, eps=0.0, debias=debias, backend=b) for b in ("auto", "reference")),
        accumulator.result(debias=debias),
    ):
        torch.testing.assert_close(found.ratio, wanted.ratio, rtol=1e-10, atol=1e-14)
        torch.testing.assert_close(found.db, wanted.db, rtol=1e-10, atol=1e-9)
        per_tensor = ops.esnr(
            [[g.double() for g in sample] for sample in grads],
            eps=0.0,
            debias=debias,
            backend="reference",
        ).tensor_ratio
        torch.testing.assert_close(found.tensor_ratio, per_tensor, rtol=1e-10, atol=1e-14)
    assert smoothed.ratio.isfinite()


def test_a_float64_scale_whose_squares_float64_holds() -> None:
    stacked = flat(gradients(5))
    wanted = ops.esnr(stacked, eps=0.0).ratio
    for scale in (1e-150, 1e150):
        torch.testing.assert_close(ops.esnr(scale * stacked, eps=0.0).ratio, wanted)


def test_eps_is_an_absolute_bound() -> None:
    """By definition: of gradients whose noise is below it, the ratio falls with their square."""
    stacked = flat(gradients(5)).float()
    wanted = ops.esnr(stacked, eps=0.0)
    small = ops.esnr(1e-9 * stacked)
    torch.testing.assert_close(small.ratio, 1e-18 * wanted.signal / 1e-10, rtol=1e-5, atol=0.0)


def test_an_outlier_as_the_first_sample_costs_the_stream_no_digits() -> None:
    """Distances from it are all large: in float32 their sum would lose what tells them apart."""
    stacked = flat(gradients(9)).float()
    stacked[0] = 1e5
    accumulator = ops.EsnrAccumulator()
    for row in stacked:
        accumulator.update([row])
    wanted = ops.esnr(stacked, backend="reference")
    torch.testing.assert_close(accumulator.result().ratio, wanted.ratio, rtol=1e-9, atol=0.0)
