"""What a process does for the first time takes none of the run's random numbers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Everything twice from the same state of the generators: the first time finds out what works here.
SCRIPT = """
import torch
from tests.agent.agents import make_agent, make_obs, make_windows

agent, batch, obs = make_agent(kind="flow"), make_windows(), make_obs()
calls = {
    "act": lambda: agent.act(obs, deterministic=True),
    "explore": lambda: agent.act(obs),
    "world model": lambda: agent.update_world_model(batch),
    "policy": lambda: agent.update_policy(obs),
}
for name, call in calls.items():
    after = []
    for _ in range(2):
        torch.manual_seed(7)
        before = torch.get_rng_state()
        call()
        after.append(torch.get_rng_state())
    assert torch.equal(*after), name
    assert name != "act" or torch.equal(before, after[0])
"""


@pytest.mark.parametrize("gemm", ["auto", "onednn"])
def test_first_use_draws_nothing(gemm: str) -> None:
    environment = {**os.environ, "PWM_FAST_GEMM": gemm, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
