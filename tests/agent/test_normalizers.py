"""Running statistics against NumPy over everything seen."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from pwm_fast.agent.normalizers import RunningMeanStd, StartSpread
from tests.models.builders import same


@pytest.mark.parametrize("shape", [(), (3,), (2, 2)])
def test_equals_numpy_over_all_batches(shape: tuple[int, ...]) -> None:
    """Batches of any size and leading shape, one of them empty."""
    rms = RunningMeanStd(shape)
    batches = []
    for lead in ((1,), (7,), (0,), (2, 5), (100,)):
        x = 3.0 + 2.0 * torch.randn(*lead, *shape) + len(batches)
        rms.update(x)
        batches.append(x.double().reshape(-1, *shape).numpy())
    rows = np.concatenate(batches)
    same(rms.mean, torch.as_tensor(rows.mean(0)))
    same(rms.var, torch.as_tensor(rows.var(0)))
    assert rms.count.item() == len(rows) == 118


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_each_group_has_its_own(shape: tuple[int, ...]) -> None:
    """As if each had been alone, whatever the others are; one of no items stays as it was."""
    generator = torch.Generator().manual_seed(0)
    groups, alone = RunningMeanStd(shape, 4), [RunningMeanStd(shape) for _ in range(4)]
    for n in (1, 7, 50):
        group = torch.randint(0, 3, (n, 2), generator=generator)
        x = torch.randn(n, 2, *shape, generator=generator) * 3.0 + 1e3 * group.view(
            n, 2, *([1] * len(shape))
        )
        x.view(n * 2, -1)[0] = float("nan")
        groups.update(x, group)
        for k, one in enumerate(alone):
            one.update(x[group == k])
    for name, value in groups.state_dict().items():
        expected = torch.stack([one.state_dict()[name] for one in alone])
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-9)


def test_summary() -> None:
    """Over what was seen: groups without items, whose mean is 0 and variance 1, do not count."""
    scalars, rows, groups = RunningMeanStd(), RunningMeanStd((3,)), RunningMeanStd((3,), 4)
    assert {k: float(v) for k, v in scalars.summary().items()} == {"mean": 0, "std": 1, "count": 0}
    assert not any(groups.summary()[k].isfinite() for k in ("mean_abs", "std_min", "std_max"))
    x = torch.tensor([[1.0, -30.0, 5.0], [3.0, 30.0, 5.0], [5.0, -90.0, 5.0], [3.0, 30.0, 5.0]])
    scalars.update(x[:, 0])
    assert scalars.summary()["std"].item() == pytest.approx(2.0**0.5)
    rows.update(x)
    deviation = x.double().numpy().std(0)
    expected = {"mean_abs": (3 + 15 + 5) / 3, "std_min": 0.0, "std_max": deviation[1], "count": 4}
    assert {k: float(v) for k, v in rows.summary().items()} == pytest.approx(expected)
    groups.update(x, torch.tensor([0, 0, 2, 2]))
    expected = {"mean_abs": (2 + 0 + 5 + 4 + 30 + 5) / 6, "std_min": 0.0, "std_max": 60, "count": 4}
    assert {k: float(v) for k, v in groups.summary().items()} == pytest.approx(expected)


def test_before_the_first_update() -> None:
    """Mean 0 and variance 1, which one batch replaces rather than averages with."""
    rms = RunningMeanStd((2,))
    x = torch.tensor([[3.0, -4.0]])
    same(rms.normalize(x), x / (1 + 1e-5) ** 0.5, rtol=1e-6)
    rms.update(torch.zeros(0, 2))
    assert rms.mean.tolist() == [0.0, 0.0] and rms.var.tolist() == [1.0, 1.0]
    rms.update(torch.tensor([[1.0, 5.0], [3.0, 5.0]]))
    assert rms.mean.tolist() == [2.0, 5.0] and rms.var.tolist() == [1.0, 0.0]


def test_is_stable_far_from_zero() -> None:
    """A deviation of 1 around 10^6: the difference of two float32 sums would lose it."""
    rms = RunningMeanStd()
    x = 1e6 + torch.randn(20, 500, dtype=torch.float64)
    for batch in x:
        rms.update(batch)
    same(rms.var, x.var(correction=0), rtol=1e-8)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("shape", [(), (3,)])
def test_items_with_a_non_finite_entry_are_left_out(bad: float, shape: tuple[int, ...]) -> None:
    """The whole item, and nothing else; a batch of such items changes nothing."""
    rms, clean = RunningMeanStd(shape), RunningMeanStd(shape)
    x = torch.randn(8, *shape)
    clean.update(x[[0, 1, 3, 4, 6, 7]])
    dirty = x.clone()
    dirty[2].fill_(bad)
    dirty[5].view(-1)[0] = bad
    rms.update(dirty)
    rms.update(torch.full((4, *shape), bad))
    assert rms.count.item() == 6
    same(rms.mean, clean.mean)
    same(rms.var, clean.var)


def test_scale_and_normalize() -> None:
    rms = RunningMeanStd((2,))
    rms.update(torch.tensor([[0.0, 10.0], [2.0, 30.0]]))
    same(rms.scale(), torch.tensor([1.0 + 1e-5, 100.0 + 1e-5]).sqrt(), rtol=1e-6)
    same(rms.scale(eps=3.0), torch.tensor([2.0, 103.0**0.5]), rtol=1e-6)
    x = torch.tensor([[1.0, 25.0], [2.0, 1000.0], [-50.0, 20.0]])
    expected = torch.tensor([[0.0, 0.5], [1.0, 10.0], [-10.0, 0.0]])  # clipped to 10 deviations
    same(rms.normalize(x), expected, rtol=1e-4)
    assert rms.normalize(x).dtype == torch.float32
    assert rms.normalize(x.double()).dtype == torch.float64


@pytest.mark.parametrize("clip", [0.5, 5.0, None])
@pytest.mark.parametrize("centre", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_options_of_normalize(clip: float | None, centre: bool, dtype: torch.dtype) -> None:
    """To the rounding of the input's own type; NaN stays NaN."""
    rms = RunningMeanStd()
    rms.update(torch.tensor([1.0, 4.0, -2.0]))
    x = torch.tensor([1.0, 2.0, -40.0, 60.0, float("nan")], dtype=dtype)
    mean, var = (1.0 if centre else 0.0), 6.0
    expected = (x - mean) / (var + 1e-5) ** 0.5
    if clip is not None:
        expected = expected.clip(-clip, clip)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-14
    same(rms.normalize(x, clip, centre=centre), expected, rtol=tolerance, equal_nan=True)
    assert rms.scale(dtype=dtype).dtype == dtype


def test_state_dict_round_trip() -> None:
    rms, other = RunningMeanStd((3,)), RunningMeanStd((3,))
    rms.update(torch.randn(5, 3))
    other.load_state_dict(rms.state_dict())
    x = torch.randn(4, 3)
    rms.update(x)
    other.update(x)
    for name in ("mean", "var", "count"):
        assert torch.equal(getattr(rms, name), getattr(other, name))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_statistics_stay_exact_in_a_module_of_another_dtype(dtype: torch.dtype) -> None:
    """float16 cannot count beyond 65504, bfloat16 not beyond 256."""
    module = nn.Sequential(nn.Linear(2, 2), RunningMeanStd()).to(dtype)
    rms = module[1]
    x = 5.0 + torch.randn(3, 30_000, dtype=torch.float64)
    for batch in x:
        rms.update(batch)
        module.to(dtype)
    assert module[0].weight.dtype == dtype
    assert rms.count.item() == 90_000
    same(rms.mean, x.mean())
    same(rms.var, x.var(correction=0))
    assert module.to("meta")[1].mean.is_meta


def test_start_spread_is_a_moving_average_of_squares() -> None:
    spread = StartSpread(2, 8, decay=0.75)
    assert spread.std().shape == (2, 1, 8) and spread.std().eq(0).all()
    first, second = torch.randn(2, 50, 8), 3.0 * torch.randn(2, 50, 8)
    spread.update(first)
    torch.testing.assert_close(spread.std(), first.square().mean(1, keepdim=True).sqrt())
    spread.update(second)
    mean = (0.75 * first.square() + second.square()).mean(1, keepdim=True) / 1.75
    torch.testing.assert_close(spread.std(), mean.sqrt())
    before = spread.std()
    for bad in (torch.inf, torch.nan):  # a rollout that overflowed
        error = torch.randn(2, 50, 8)
        error[1, 3, 4] = bad
        spread.update(error)
        assert torch.equal(spread.std(), before)
    again = StartSpread(2, 8)
    again.load_state_dict(spread.state_dict())
    assert torch.equal(again.std(), spread.std())
