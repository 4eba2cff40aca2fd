"""The whole loop learns: a flow world model finds how to swing the cart-pole's pole up."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch

from pwm_fast import envs
from pwm_fast.run import metrics
from pwm_fast.run.start import train
from tests.models.builders import compose

EPISODES = 12


def mean_return(action: torch.Tensor | None) -> float:
    """Mean return of a fixed action, or of uniform random ones."""
    env = envs.make("cartpole", EPISODES, seed=0)
    env.reset(seed=1)
    generator = torch.Generator().manual_seed(2)
    total = torch.zeros(EPISODES)
    for _ in range(env.max_episode_steps):
        drawn = torch.rand(EPISODES, 1, generator=generator) * 2.0 - 1.0
        total += env.step(drawn if action is None else action.expand(EPISODES, 1))[1]
    return total.mean().item()


@pytest.mark.slow
def test_flow_world_model_learns_the_cart_pole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within a third of the quickstart it beats random and motionless policies by far.

    Without a useful gradient the policy stays random (about -2,000), saturates (below -3,000) or
    learns to keep still, which the reward makes a local optimum (about -1,600). The run is stopped
    as soon as it has got there.
    """
    wanted = max(mean_return(torch.zeros(1)), mean_return(None)) + 150.0
    write = metrics.MetricsFile.write

    def written(self: metrics.MetricsFile, row: metrics.Row) -> None:
        write(self, row)
        if row.get("eval_reward", wanted) > wanted:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(metrics.MetricsFile, "write", written)
    changes = ("epochs=150", "threads=1", "esnr.every=0", "eval.every=20")
    summary, status = train(compose(*changes, f"run_dir={tmp_path / 'run'}"))
    assert status in (0, 128 + signal.SIGTERM)
    assert summary["best"]["reward"] > wanted
