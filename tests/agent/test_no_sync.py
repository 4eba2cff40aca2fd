"""Acting and learning never wait for the device; ``no_sync`` says why the check stands for it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pwm_fast import ops
from pwm_fast.replay import Replay
from tests.agent.agents import (
    ACTION,
    AGENTS,
    OBS,
    make_agent,
    make_obs,
    make_task,
    make_windows,
)
from tests.agent.no_sync import HostSyncError, no_sync

PLAN = ops.MPPI(iterations=2, samples=8, elites=3, policy_trajectories=2)


class WaitsInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * grad.item()


WAITS = {
    "item": lambda x: x.sum().item(),
    "float": lambda x: float(x.sum()),
    "tolist": lambda x: x[0].tolist(),
    "if": lambda x: 1 if (x > 0).all() else 0,
    "range": lambda x: range(x.sum().long()),
    "equal": lambda x: torch.equal(x, x + 1),
    "nonzero": lambda x: (x > 0).nonzero(),
    "where": lambda x: torch.where(x > 0),
    "boolean index": lambda x: x[x > 0],
    "boolean assignment": lambda x: x.clone().__setitem__(x > 0, 0.0),
    "masked_select": lambda x: x.masked_select(x > 0),
    "unique": lambda x: x.unique(),
    "repeat_interleave": lambda x: x[0].repeat_interleave(torch.tensor([1, 2, 3, 4])),
    "numpy": lambda x: x.numpy(),
    "asarray": lambda x: np.asarray(x),
    "cpu": lambda x: x.cpu(),
    "backward": lambda x: WaitsInBackward.apply(x.sum().requires_grad_()).backward(),
    "embedding with max_norm": lambda x: torch.nn.Embedding(4, 4, max_norm=1.0)(
        torch.tensor([1, 2])
    ),
    "number of windows": lambda x: Replay(40, 2, OBS, ACTION, 3).num_windows(),
    "norm that raises": lambda x: torch.nn.utils.get_total_norm([x], error_if_nonfinite=True),
}


@pytest.mark.parametrize("name", WAITS)
def test_the_check_sees(name: str) -> None:
    """What makes a host wait on a GPU is caught on the CPU."""
    x = torch.rand(3, 4)
    WAITS[name](x)
    with pytest.raises(HostSyncError), no_sync():
        WAITS[name](x)


def test_the_check_lets_pass_what_does_not_wait() -> None:
    x, i = torch.rand(3, 4), torch.tensor([0, 2])
    with no_sync() as mode:
        y = torch.where(x > 0.5, x, 0.0).cumsum(0)[i]
        y[i[:1] * 0] = x[i[:1]].masked_fill(x[i[:1]] > 0.5, 1.0)
        torch.searchsorted(y.flatten(), torch.rand(3))
    assert mode.operators > 8


def learn_without_waiting(name: str, device: str) -> None:
    agent = make_agent(device=device, **AGENTS[name])
    obs, windows = make_obs(device=device), make_windows(device=device)
    task = make_task(device=device)
    reward = windows.reward[0]
    bad = make_windows(device=device)
    bad.reward[0, 0] = float("nan")
    if device != "cpu":  # libraries start up, kernels compile
        agent.update_world_model(windows)
        agent.update_policy(obs, task)
        agent.actor_esnr(obs, 2, task=task)
    with no_sync(device) as mode:
        agent.act(obs, task=task)
        agent.act(obs, task=task, deterministic=True)
        planned = agent.plan(obs, PLAN, task=task)
        agent.plan(obs, PLAN, task=task, previous=planned.mean, first=obs[:, 0] > 0.0)
        agent.observe(obs, reward, task)
        agent.set_progress(0.3)
        for data in (windows, bad, windows):
            agent.update_world_model(data)
        agent.update_policy(obs, task)
        agent.actor_esnr(obs, 2, task=task)
        agent.skipped_updates()
        agent.normalizer_metrics()
    assert mode.operators > 1000
    assert int(agent.skipped_updates()["skipped_updates"]) == 1


@pytest.mark.parametrize("name", AGENTS)
def test_the_agent_never_waits(name: str) -> None:
    """From the first update on, with Adam's state still to be made."""
    learn_without_waiting(name, "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("name", AGENTS)
def test_the_agent_never_waits_for_the_gpu(name: str) -> None:
    """The same under ``torch.cuda.set_sync_debug_mode("error")``."""
    learn_without_waiting(name, "cuda")
