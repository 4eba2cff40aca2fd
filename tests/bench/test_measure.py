"""Times are taken in turns, and memory is what a call really touches."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch

from bench import floor, measure
from bench.measure import Effort
from pwm_fast.ops import Flow, LatentMap, Layer

CPU = torch.device("cpu")


class Recorder:
    """A clock that notes which function it was given, and takes what it says."""

    def __init__(self, seconds: dict[Any, float]) -> None:
        self.seconds = seconds
        self.order: list[Any] = []

    def __call__(self, call: Callable[[], Any], calls: int) -> float:
        name = call()
        self.order.append((name, calls))
        return self.seconds[name] * calls


def test_rounds_measure_every_provider_in_changing_order() -> None:
    clock = Recorder({"a": 0.01, "b": 0.02, "c": 0.03})
    calls = {name: (lambda name=name: name) for name in "abc"}
    samples = measure.race(calls, clock, Effort(seconds=1000.0, max_rounds=4, sample=0.0))
    assert samples == {"a": [0.01] * 4, "b": [0.02] * 4, "c": [0.03] * 4}
    rounds = [name for name, _ in clock.order[6:]]
    assert ["".join(rounds[i : i + 3]) for i in range(0, 12, 3)] == ["abc", "acb", "cab", "cba"]


def test_a_fast_function_is_called_often_in_a_sample() -> None:
    clock = Recorder({"a": 1e-4})
    samples = measure.race({"a": lambda: "a"}, clock, Effort(1000.0, 2, 2, sample=0.005))
    assert samples["a"] == pytest.approx([1e-4] * 2)
    assert clock.order[-1] == ("a", 50)


def test_a_very_slow_provider_leaves_the_time_to_the_others() -> None:
    clock = Recorder({"a": 0.01, "b": 900.0})
    calls = {name: (lambda name=name: name) for name in "ab"}
    samples = measure.race(calls, clock, Effort(seconds=1000.0, min_rounds=5, max_rounds=7))
    assert (len(samples["a"]), len(samples["b"])) == (7, 2)


def test_old_objects_are_not_looked_through_while_times_are_taken() -> None:
    frozen = []
    few = 1000  # Python 3.12's collector itself keeps some hundreds frozen

    def call() -> str:
        frozen.append(gc.get_freeze_count())
        return "a"

    assert gc.get_freeze_count() < few
    clock = Recorder({"a": 0.01})
    measure.race({"a": call}, clock, Effort(seconds=1000.0, max_rounds=2, sample=0.0))
    assert frozen[0] < few < 10 * few < min(frozen[2:])
    assert gc.get_freeze_count() < few and gc.isenabled()
    with measure.settled():
        measure.race({"a": call}, clock, Effort(seconds=1000.0, max_rounds=2, sample=0.0))
        assert gc.get_freeze_count() > 10 * few
    assert gc.get_freeze_count() < few


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets a process reset its peak")
def test_peak_memory_counts_temporaries_and_what_is_returned() -> None:
    mib = 2**20

    def call() -> torch.Tensor:
        big = torch.ones(64 * mib // 4)
        kept = torch.ones(16 * mib // 4)
        del big
        return kept

    call()
    peak = measure.peak_memory(call, CPU)
    if peak is None:
        pytest.skip("/proc/self/clear_refs cannot be written here")
    assert 76 * mib < peak < 100 * mib
    small = measure.peak_memory(lambda: torch.ones(4), CPU)
    assert small is not None and small < 8 * mib


# --- the floor ----------------------------------------------------------------------------------

D, U, A, B, H = 64, 30, 3, 5, 7


def layers(*sizes: int, members: int = 0) -> list[Layer]:
    lead = (members,) if members else ()
    return [Layer(torch.empty(*lead, n, k)) for k, n in pairwise(sizes)]


def flops(gemms: list[floor.Gemm]) -> int:
    return sum(p.flops for p in gemms)


def test_the_fold_is_taken_where_it_saves_products() -> None:
    wide = Flow(layers(D + A + 1, U, U, D))
    folded = floor.dynamics_gemms(wide, D, B, H)
    evaluations = 4 * H  # Heun, K = 2
    assert flops(folded) == 2 * B * (evaluations * 2 * U * U + H * U * D)
    narrow = Flow(layers(8 + A + 1, U, U, 8))
    plain = floor.dynamics_gemms(narrow, 8, B, H)
    assert flops(plain) == 2 * B * evaluations * (8 * U + U * U + U * 8)


def test_a_rollout_has_the_products_of_its_formula() -> None:
    actor, dynamics = layers(D, 20, A), LatentMap(layers(D + A, U, D))
    reward, value = layers(D + A, 11, 1), layers(D, 9, 1, members=3)
    forward = floor.rollout_gemms(actor, dynamics, reward, value, B, H, gradient=False)
    policy, heads = D * 20 + 20 * A, (D + A) * 11 + 11
    critics = 3 * (D * 9 + 9)
    step = A * U + D * U + U * D
    assert flops(forward) == 2 * B * (H * (policy + step + heads) + critics)
    both = floor.rollout_gemms(actor, dynamics, reward, value, B, H, gradient=True)
    # Backward: dynamics, heads and critics towards their inputs, the actor towards its hidden
    # layer (its input is detached) and its weights; no other weight gradient.
    extra = H * (step + heads) + critics + H * (20 * A + policy)
    assert flops(both) == flops(forward) + 2 * B * extra


def test_weight_gradients_take_all_rows_at_once() -> None:
    forward = [p._replace(uses=6) for p in floor.stack(B, [D, U])]
    assert floor.weight_gradients(forward) == [floor.Gemm(U, 6 * B, D, weight=False)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_floor_runs(dtype: torch.dtype) -> None:
    gemms = [
        *floor.stack(B, [D, U]),
        *floor.stack(B, [D, U], members=3),
        floor.Gemm(U, B, D, weight=False),
    ]
    floor.floor(gemms, dtype, CPU)()


def test_a_prepacked_product_is_the_product() -> None:
    x, weight = torch.randn(B, D), torch.randn(U, D)
    run = floor.prepacked(x, weight)
    if run is None:
        pytest.skip("this PyTorch has no oneDNN products on packed weights")
    torch.testing.assert_close(run(), x @ weight.t())
