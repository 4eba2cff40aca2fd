"""All that is measured, in one list."""

from __future__ import annotations

import torch

from bench import agent, data, esnr, ops, optimizer, planning, rollouts, stacks, tdmpc2
from bench.cases import Case

PARTS = (
    *(rollouts.cases, planning.cases, tdmpc2.cases, agent.cases, agent.epochs, optimizer.cases),
    *(ops.cases, stacks.cases, esnr.cases, data.cases),
)


def all_cases(device: torch.device) -> list[Case]:
    """Every case for that kind of device."""
    return [case for cases in PARTS for case in cases(device)]
