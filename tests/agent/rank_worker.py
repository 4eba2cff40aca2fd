"""Updates of every kind, by one process or by several that share each batch.

``python -m tests.agent.rank_worker FILE`` is one of several processes, which torchrun's variables
tell of the others; the first of them writes what the updates gave.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from pwm_fast import parallel
from pwm_fast.agent import pwm
from pwm_fast.agent.losses import pieces
from pwm_fast.parallel import Ranks
from pwm_fast.replay import Windows
from tests.agent.agents import ACTION, AGENTS, make_agent, make_obs, make_windows

BATCH = 12
# None of those that draw within their loss: step sizes, noise, a share of the windows.
CASES = ("mlp", "flow", "teacher", "pieces", "measured noise", "multi-task", "masked", "entropy")
CASES += ("observations, terminating", "all normalised", "as published")
# Minibatches of whole steps, which parts of a batch cut alike.
IN_STEPS = {"shuffle": False, "minibatches": 3}


def updated(case: str, ranks: Ranks) -> dict[str, Any]:
    """What two rounds of updates give in float64, on this rank's part of every batch."""
    agent = make_agent(double=True, ranks=ranks, **{**AGENTS[case], **IN_STEPS})
    measured = agent.start_spread is not None
    each = BATCH // ranks.size
    own = slice(ranks.rank * each, (ranks.rank + 1) * each)
    norms = []
    for seed in range(2):
        draw = torch.Generator().manual_seed(seed)
        windows = make_windows(BATCH, seed=seed, dtype=torch.float64)
        tau = torch.rand(windows.action.shape[:2], dtype=torch.float64, generator=draw)
        noise = torch.randn(
            agent.config.imagined_steps, BATCH, ACTION, dtype=torch.float64, generator=draw
        )
        starts = make_obs(BATCH, seed=seed, dtype=torch.float64)

        learning = agent.config.model_learning
        times = pieces(learning.rollout_steps, windows.obs[:, own], tau[:, own])[1]
        pwm.flow_times = lambda *_, times=times: times  # type: ignore[misc]  # not drawn ones
        agent._noise = lambda *shape, noise=noise: noise[:, own]  # type: ignore[method-assign]
        obs, action, reward, end, task = windows
        assert task is not None
        rows = (x[:, own] for x in (obs, action, reward, end))
        part = Windows(*rows, task[own])
        agent.observe(starts[own], reward[0, own], part.task)
        agent.measure_start_spread(part)
        if not measured:  # whose noise is drawn within the loss
            norms.append(agent.update_world_model(part)["wm_grad_norm"])
        found = agent.update_policy(starts[own], part.task)
        norms += [found["actor_grad_norm"], found["critic_grad_norm"]]
    return {"state": agent.state_dict(), "norms": torch.stack(norms)}


def main() -> None:
    with parallel.joined(cuda=False) as ranks:
        found = {case: updated(case, ranks) for case in CASES}
        norms = ranks.gather([x["norms"].tolist() for x in found.values()])
        assert ranks.size == 2 and norms[0] == norms[1], "the ranks made other updates"
        if ranks.first:
            torch.save(found, sys.argv[1])


if __name__ == "__main__":
    main()
