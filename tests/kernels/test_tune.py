"""What the tuner runs is right where it can be seen without a GPU: in the interpreter."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from bench import tune, tune_problems, tune_products
from bench.fake_cuda import DEVICE, FakeCuda
from bench.tune_compile import compiling
from bench.tune_products import WORKLOADS, Wrong
from bench.tune_rollout import RolloutWorkload
from pwm_fast.kernels import linear_axpby, plan, rollout, tuning
from pwm_fast.kernels.plan import GemmPlan, GemmShape, Limits, candidates
from tests.bench.synthetic import FACTS

CPU = torch.device("cpu")


def alone(product: GemmShape) -> GemmPlan:
    """A plan that the interpreter can run: its programs do not wait."""
    found = plan.device_plan(product, CPU)
    assert found is not None
    return found


@pytest.mark.interpreted
@pytest.mark.parametrize("element", [2, 4])
@pytest.mark.parametrize("kernel", WORKLOADS)
def test_every_choice_is_checked_against_float64(kernel: str, element: int) -> None:
    members = 2 if "act_norm" in kernel[7:] and element == 2 else 1
    product = GemmShape(kernel, 5, 48, 16, members, element, "ieee")
    workload = WORKLOADS[kernel](product, CPU)
    workload.call(alone(product))()
    workload.call(None)()


@pytest.mark.interpreted
def test_a_wrong_choice_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    workload = WORKLOADS["linear_axpby"](GemmShape("linear_axpby", 5, 48, 16), CPU)
    right = workload.fused

    def wrong(chosen: GemmPlan):  # type: ignore[no-untyped-def]
        call = right(chosen)

        def called() -> None:
            call()
            workload.out[3, 5] += 1.0

        return called

    monkeypatch.setattr(workload, "fused", wrong)
    with pytest.raises(Wrong, match="relative error"):
        workload.call(alone(workload.shape))
    monkeypatch.setattr(workload, "fused", lambda plan: lambda: None)
    with pytest.raises(Wrong, match="relative error nan"):
        workload.call(alone(workload.shape))


@pytest.mark.interpreted
def test_a_rollout_is_checked_layer_by_layer_and_in_one_launch() -> None:
    workload = RolloutWorkload(5, 64, "16", CPU, horizon=1)
    workload.call(rollout.RolloutLayout(8, 64, 4, 2))()
    workload.call(None)()
    workload.z0 += 1.0  # what was true of others
    with pytest.raises(Wrong, match="of z exceeds"):
        workload.call(None)


@pytest.mark.interpreted
def test_problems_are_measured_from_their_operands_on(tmp_path: Path) -> None:
    """All of the tuner but its clock and the GPU."""
    limits = Limits(1)
    product = GemmShape("linear_act_norm_bwd", 5, 48, 16, 2)
    problem = tune_problems.product_problem(product, CPU, limits)
    assert set(problem.choices) == {"32x256", "unfused"}

    def clock(calls):  # type: ignore[no-untyped-def]
        for call in calls.values():
            call()
        return {name: [1e-6 if name == "32x256" else 2e-6] * 5 for name in calls}

    log = tune.Log(tmp_path / "log.json", copy.deepcopy(FACTS))
    assert tune.tune([problem], log, clock, lambda: False)
    _, kept = tune.save("Some GPU", [problem], log.times, FACTS, tmp_path)
    assert kept == (problem.heuristic != "32x256")
    tuned = tuning.load("Some GPU", tmp_path).get(product.kernel, {})
    found = plan.plan(product, limits, tuned)
    assert found is not None and found.name == "32x256"


# --- on CUDA tensors without data -----------------------------------------------------------------


@pytest.mark.parametrize("rate", tune_products.PRECISIONS)
@pytest.mark.parametrize("kernel", WORKLOADS)
def test_choices_launch_what_they_stand_for(kernel: str, rate: str) -> None:
    element, precision = (2, "tf32") if rate == "16" else (4, rate)
    members, n = (3, 400) if "act_norm" in kernel[7:] else (1, 512)
    product = GemmShape(kernel, 200, n, 512, members, element, precision)
    with FakeCuda() as cuda:
        workload = WORKLOADS[kernel](product, DEVICE)
        fused = [workload.fused(p) for p in candidates(product, Limits(132))]
        plain = workload.plain
        plain()  # makes the weight's copies
        for call in fused:
            cuda.launches.clear()
            call()
            assert cuda.launches.pop(f"triton {kernel}_kernel") == 1
            assert cuda.total == ("act_norm_bwd" in kernel[7:])  # the sums of row blocks
        cuda.launches.clear()
        plain()
        assert not any("linear" in name for name in cuda.launches)
        assert cuda.launches["bmm" if members > 1 else "mm"] == 1
        assert any(name.startswith("triton") for name in cuda.launches)
    assert bool(fused) == (rate != "ieee")


def test_a_rollout_is_one_launch_a_direction_or_layer_by_layer() -> None:
    with FakeCuda() as cuda:
        workload = RolloutWorkload(128, 512, "16", DEVICE, horizon=2)
        words = rollout.LAYOUTS[0]._replace(exchange="words")
        for layout in (rollout.LAYOUTS[0], words, None):
            cuda.launches.clear()
            workload._run(layout)
            seen = cuda.launches["triton rollout_forward_kernel"]
            assert seen == cuda.launches["triton rollout_backward_kernel"] == (layout is not None)
    assert cuda.launches["triton linear_norm_act_fwd_kernel"] > 0


def test_what_is_only_compiled_is_not_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.jit import JITFunction

    seen = []

    def run(kernel, *args, grid, warmup, **options):  # type: ignore[no-untyped-def]
        seen.append((grid, warmup))

    monkeypatch.setattr(JITFunction, "run", run)
    with compiling():
        linear_axpby.linear_axpby_kernel[(1,)]()
    linear_axpby.linear_axpby_kernel[(2,)]()
    assert seen == [((1,), True), ((2,), False)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("rate", tune_products.PRECISIONS)
@pytest.mark.parametrize("kernel", WORKLOADS)
def test_every_choice_computes_the_same(kernel: str, rate: str) -> None:
    properties = torch.cuda.get_device_properties(0)
    limits = Limits(properties.multi_processor_count, int(properties.shared_memory_per_block_optin))
    element = 2 if rate == "16" else 4
    members, n = (3, 400) if "act_norm" in kernel[7:] else (1, 512)
    precision = "tf32" if rate == "16" else rate
    product = GemmShape(kernel, 200, n, 512, members, element, precision)
    workload = WORKLOADS[kernel](product, torch.device("cuda:0"))
    for choice in (*candidates(product, limits), None):
        workload.call(choice)  # raises where it is wrong
