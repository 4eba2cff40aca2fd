"""Running out of memory is told in one line: what was computed, and what to lower."""

from __future__ import annotations

import pytest
import torch

from pwm_fast import memory
from pwm_fast.memory import Growth, OutOfMemory, explained
from tests.agent.agents import make_agent, make_obs, make_windows


def test_the_cpu_s_own_error() -> None:
    """A real one: 4 EiB."""
    with (
        pytest.raises(OutOfMemory, match=r"^device cpu is out of memory in a test: lower it$") as e,
        explained("a test", "it", "cpu"),
    ):
        torch.empty(2**60)
    assert e.value.__cause__ is not None


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        MemoryError(),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("std::bad_alloc"),
        RuntimeError("engine error: Could not allocate memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_what_means_out_of_memory(error: Exception) -> None:
    with pytest.raises(OutOfMemory), explained("a", "b", "cpu"):
        raise error


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), ValueError("memory")])
def test_other_errors_stay(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, explained("a", "b", "cpu"):
        raise error
    assert caught.value is error


def test_updates_name_their_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    agent = make_agent()

    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    for optimizer in agent.optimizers.values():
        for way in ("step", "apply"):  # of those that go past autograd
            monkeypatch.setattr(optimizer, way, full)
    with pytest.raises(
        OutOfMemory,
        match=r"update on 6 windows of 3 steps: lower alg\.model_learning\.batch_size",
    ):
        agent.update_world_model(make_windows())
    with pytest.raises(
        OutOfMemory, match=r"policy's update on 6 rollouts of 3 steps: lower alg\.actor\.batch_size"
    ):
        agent.update_policy(make_obs())


def test_what_does_not_fit_is_refused_before_it_is_made() -> None:
    memory.require(1, "a byte", "it", "cpu")
    match = r"^8 envs need at least 1073741824.0 GiB of memory, and device cpu has \d+.* left:"
    with pytest.raises(OutOfMemory, match=match):
        memory.require(2**60, "8 envs", "num_envs", "cpu")


def test_room_that_nobody_knows_refuses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_machine", "_control_group"):
        monkeypatch.setattr(memory, name, lambda: None)
    memory.require(2**60, "a", "b", "cpu")


def test_the_smaller_of_two_limits_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_machine", lambda: 1000)
    monkeypatch.setattr(memory, "_control_group", lambda: 10)
    memory.require(10, "a", "b", "cpu")
    with pytest.raises(OutOfMemory):
        memory.require(11, "a", "b", "cpu")


def test_growth_is_foreseen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of 1 MB each, of which 1000 do not fit into 500 MB."""
    used = [0]
    monkeypatch.setattr(memory, "available", lambda device: 500_000_000 - used[0])
    monkeypatch.setattr(memory, "_resident", lambda: used[0])
    for count, fits in ((1000, False), (400, True), (20, True)):
        used[0] = 30_000_000
        growth = Growth(count, f"{count} envs", "num_envs")
        growth.require(1000)
        made = 0
        try:
            for made in range(count):
                growth.check(made)
                used[0] += 1_000_000
        except OutOfMemory as error:
            assert not fits and made == 64
            assert str(error).startswith("1000 envs need at least 0.9 GiB")
        else:
            assert fits
