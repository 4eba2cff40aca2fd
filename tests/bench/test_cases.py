"""Every case computes the same thing in all of its providers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench import agent, data, esnr, gate, optimizer, planning, sizes, stacks, tdmpc2
from bench import ops as operations
from bench import rollouts as rollout_cases
from bench.cases import Provider, Workload
from bench.catalogue import all_cases
from bench.exercise import small
from bench.providers import LABELS, Absent
from pwm_fast import ops
from pwm_fast.agent import PWM

CPU = torch.device("cpu")
SMALL = operations.Size(16, 17, 14)
PLAN = ops.MPPI(iterations=2, samples=40, elites=5, policy_trajectories=4)
TDMPC2 = tdmpc2.Size(16, 17, 14, 11, batch=30, options=PLAN)  # 8 actions


WORKLOADS: dict[str, Callable[[], Workload]] = {
    "rollout, forward": lambda: rollout_cases.build(small("flow"), 100, "forward", CPU, 4),
    "rollout, backward": lambda: rollout_cases.build(small("flow"), 100, "backward", CPU, 4),
    "rollout of the baseline": lambda: rollout_cases.build(small("mlp"), 100, "backward", CPU, 4),
    "world model": lambda: agent.build_world_model(small("flow"), 20, CPU, 4),
    "world model of the baseline": lambda: agent.build_world_model(small("mlp"), 20, CPU, 4),
    "critic": lambda: agent.build_critic(small("flow"), 50, CPU, 4),
    "epoch": lambda: agent.build_epoch(small("flow"), small("mlp"), CPU, 4, 4),
    "plan": lambda: planning.build(2, CPU, 0, 16, 17, PLAN),
    "TD-MPC2's plan": lambda: tdmpc2.build_plan(TDMPC2, CPU),
    "TD-MPC2's update": lambda: tdmpc2.build_update(TDMPC2, CPU),
    "stack, forward": lambda: stacks.build((7, 33, 5), 9, False, CPU),
    "stack, backward": lambda: stacks.build((7, 33, 29, 5), 9, True, CPU),
    "optimiser": lambda: optimizer.build(small("flow"), "wm", CPU),
    "ESNR": lambda: esnr.build((torch.Size((50, 7)), torch.Size((9,))), CPU),
    "environment": lambda: data.build_env("cartpole", 4, CPU),
    **{
        f"{name}, {mode}": lambda op=op, mode=mode: operations.build(op, SMALL, 50, mode, CPU)
        for name, op in {**operations.OPERATIONS, **operations.VARIANTS}.items()
        for mode in (("forward", "backward") if op.differentiable else ("forward",))
    },
}
# Compilation takes its time, the others need a GPU: the benchmarks themselves check them.
LEFT_OUT = {"compile", "tf32", "graph"}


@pytest.mark.parametrize("name", WORKLOADS)
def test_providers_are_right(name: str) -> None:
    """Also those that PyTorch would only emulate on this machine."""
    workload = WORKLOADS[name]()
    checked = 0
    for provider_name in workload.make:
        if provider_name in LEFT_OUT:
            continue
        try:
            provider = workload.make[provider_name]()
        except Absent:
            continue
        workload.verify(provider_name, provider)
        provider.call()
        checked += 1
    assert checked >= 2


def test_replay_providers_are_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "CAPACITY", 128 * 64)
    monkeypatch.setattr(data, "STEPS", 40)
    for workload in (data.build_sample(5, CPU), data.build_add(CPU)):
        for name, make in workload.make.items():
            provider = make()
            workload.verify(name, provider)
            provider.call()


@pytest.mark.parametrize("name", ["rollout, backward", "world model", "ESNR", "mlp, backward"])
def test_a_wrong_provider_is_refused(name: str) -> None:
    """Half a thousandth off, which no speed makes good."""
    workload = WORKLOADS[name]()
    published = workload.make["published"]().check
    assert published is not None
    outputs = {k: [v * 1.0005 for v in gate.tensors(published() or {}, k)] for k in published()}
    workload.again = None
    with pytest.raises(gate.Mismatch):
        workload.verify("fast", Provider(lambda: None, lambda: outputs))


def test_only_the_published_row_computes_gradients_of_the_world_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    agents = []

    def make_agent(*args: Any) -> PWM:
        agents.append(sizes.make_agent(*args))
        return agents[-1]

    monkeypatch.setattr(rollout_cases, "make_agent", make_agent)
    workload = WORKLOADS["rollout, backward"]()
    parameters = [*agents[0].world_model._velocity.parameters(), *agents[0].critic.parameters()]
    for name in ("frozen", "reference", "published"):
        workload.make[name]().call()
        computed = {p.grad is not None for p in parameters}
        assert computed == {name == "published"}, name
        assert all(p.requires_grad for p in parameters)


@pytest.mark.parametrize("name", ["fast", "fast_edit"])
def test_all_of_tdmpc2s_networks_are_accelerated(name: str) -> None:
    """And with the edit the Q functions that are not used get no call."""
    world = tdmpc2.ready(name, TDMPC2, 0, CPU)
    report: Any = world.acceleration_report
    names = {found.name for found in report.accelerated}
    assert names == {"_encoder", "_dynamics", "_reward", "_pi", "_qs.module", "_target.module"}
    assert not report.left
    z, a, two = torch.rand(3, 16), torch.rand(3, 8), torch.tensor([3, 1])
    logits = world.some(world._qs, z, a, two)
    expected = tdmpc2.make(TDMPC2, 0, CPU).all_q(z, a)[two]
    torch.testing.assert_close(logits, expected)
    assert isinstance(world, tdmpc2.EditedWorld) == (name == "fast_edit")


def test_the_gemms_of_tdmpc2() -> None:
    """What a plan multiplies, counted from the sizes of its layers."""
    dynamics = 24 * 17 + 17 * 17 + 17 * 16
    reward = q = 24 * 17 + 17 * 17 + 17 * 11
    policy = 16 * 17 + 17 * 17 + 17 * 16
    rows = 40 * (3 * (dynamics + reward) + policy + 2 * q) * 2 + 4 * (3 * policy + 2 * dynamics)
    assert sum(p.flops for p in tdmpc2.plan_gemms(TDMPC2)) == 2 * rows


def test_tdmpc2s_update_is_a_step_of_everything_that_learns() -> None:
    learner = tdmpc2.Learner(tdmpc2.make(TDMPC2, 0, CPU))
    learned = [p for p in learner.world.parameters() if not p.is_meta]
    before = [p.detach().clone() for p in learned]
    learner.update(tdmpc2.make_batch(TDMPC2, 0))
    assert all(not torch.equal(p, q) for p, q in zip(learned, before, strict=True))
    assert not learner.world.training
    assert all(p.grad is None for p in learned)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_table_of_cases(device: str) -> None:
    """Names are unique, providers known and made, and there is what the figures need."""
    cases = all_cases(torch.device(device))
    names = [case.name for case in cases]
    assert len(set(names)) == len(names)
    for case in cases:
        assert set(case.providers) <= set(LABELS)
        assert case.marks <= {"figures", "large"}
        assert not (case.quick and "large" in case.marks)
    from bench.report import README_CASES

    if device == "cpu":
        assert {c.name for c in cases if "figures" in c.marks} >= set(README_CASES)
        assert any(c.quick for c in cases)


def test_every_public_operation_has_a_benchmark() -> None:
    """A new one gets a line in ``bench/ops.py``."""
    public = {
        name
        for name in ops.__all__
        if callable(getattr(ops, name)) and not isinstance(getattr(ops, name), type)
    }
    types = {"Dynamics", "Activation", "Consistency", "Method", "Order", "Start", "StartGrad"}
    types |= {"Form", "Reduction"}
    controls = {"algebra", "invalidate"}  # say how to compute, and compute nothing
    assert public - types - controls == set(operations.OPERATIONS) | set(operations.ELSEWHERE)


@pytest.mark.parametrize("free", [2**30, 70 * 2**30])
def test_the_truth_of_large_rollouts_fits_into_a_gpus_memory(
    free: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rollout_cases, "available_memory", lambda device: free)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    gpu = torch.device("cuda")
    for model in ("5M", "48M", "317M"):
        alg = sizes.alg_config(f"{model}_flow", 4)
        rows = rollout_cases.rows_at_once(alg, sizes.HORIZON, True, gpu)
        assert 1 <= rows <= rollout_cases.PART["cuda"]
        assert rows * 8 * rollout_cases.kept(alg, sizes.HORIZON) < 0.5 * free
        assert rollout_cases.rows_at_once(alg, sizes.HORIZON, False, gpu) == 2048


def test_the_truth_is_the_same_however_many_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for rows in (100, 7):
        monkeypatch.setattr(rollout_cases, "rows_at_once", lambda *args, rows=rows: rows)
        found.append(WORKLOADS["rollout, backward"]().outputs("truth"))
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-15)
