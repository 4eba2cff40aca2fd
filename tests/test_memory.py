"""Running out of memory is told in one line: what was computed, and what to lower."""

from __future__ import annotations

import pytest
import torch

from pwm_fast.memory import OutOfMemory, explained
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
        monkeypatch.setattr(optimizer, "step", full)
    with pytest.raises(
        OutOfMemory,
        match=r"update on 6 windows of 3 steps: lower alg\.model_learning\.batch_size",
    ):
        agent.update_world_model(make_windows())
    with pytest.raises(
        OutOfMemory, match=r"policy's update on 6 rollouts of 3 steps: lower alg\.actor\.batch_size"
    ):
        agent.update_policy(make_obs())
