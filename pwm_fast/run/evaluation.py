"""Evaluation of a policy on real episodes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pwm_fast.agent import PWM
from pwm_fast.envs import VectorEnv
from pwm_fast.run.acting import PolicyNotFinite, acting

LOOK_EVERY = 32  # steps between looks at a GPU whether all episodes are over
GOAL_STEPS = 60  # a goal counts as held through the last second of an episode, at 60 Hz


@dataclass(frozen=True)
class Evaluation:
    """Results of N episodes.

    Attributes:
        returns: undiscounted returns ``[N]``.
        lengths: steps ``[N]``.
        held: where the task's goal held through the last second, ``[N]``; None without a goal.
        diverged: where the simulation broke down, bool ``[N]``: return and length stop there, and
            no goal was held.
    """

    returns: Tensor
    lengths: Tensor
    held: Tensor | None
    diverged: Tensor

    def row(self) -> dict[str, float]:
        """The figures as numbers."""
        row = {
            "eval_reward": self.returns.mean().item(),
            "eval_reward_std": self.returns.std(correction=0).item(),
            "eval_episode_length": self.lengths.float().mean().item(),
            "eval_diverged": int(self.diverged.sum()),
        }
        if self.held is not None:
            row["eval_success"] = self.held.float().mean().item()
        return row

    def summary(self) -> dict[str, Any]:
        """The figures and every single return, for a JSON file."""
        return {
            "episodes": len(self.returns),
            "reward_mean": self.returns.mean().item(),
            "reward_std": self.returns.std(correction=0).item(),
            "reward_min": self.returns.min().item(),
            "reward_max": self.returns.max().item(),
            "episode_length_mean": self.lengths.float().mean().item(),
            "episode_length_std": self.lengths.float().std(correction=0).item(),
            "success": None if self.held is None else self.held.float().mean().item(),
            "diverged": int(self.diverged.sum()),
            "returns": self.returns.tolist(),
            "lengths": self.lengths.tolist(),
        }


@torch.no_grad()
def evaluate(
    agent: PWM,
    env: VectorEnv,
    seed: int,
    *,
    deterministic: bool = True,
    check: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Run the first episode of every world of ``env`` to its end.

    Args:
        agent: acts; its random numbers are untouched where ``deterministic``.
        env: one world an episode.
        seed: of the start states.
        deterministic: act with the mean of the policy.
        check: called before every step; it may raise to stop.

    Raises:
        PolicyNotFinite: an action of a running episode is not finite.
        RuntimeError: an episode does not end within the environment's time limit.
    """
    obs, _ = env.reset(seed=seed)
    n = env.num_envs
    running = torch.ones(n, dtype=torch.bool, device=env.device)
    returns = torch.zeros(n, device=env.device)
    lengths = torch.zeros(n, dtype=torch.int64, device=env.device)
    streak = torch.zeros(n, dtype=torch.int64, device=env.device)
    diverged = torch.zeros(n, dtype=torch.bool, device=env.device)
    unusable = torch.zeros(n, dtype=torch.bool, device=env.device)
    has_goal = False
    look_every = 1 if env.device.type == "cpu" else LOOK_EVERY
    for i in range(1, env.max_episode_steps + 1):
        check()
        action = agent.act(obs, deterministic=deterministic).to(env.device)
        unusable |= running & ~torch.isfinite(action).all(-1)  # not every environment looks
        before = obs
        with acting(agent, before):
            obs, reward, terminated, truncated, info = env.step(action)
        returns += torch.where(running, reward, 0.0)
        lengths += running
        if "diverged" in info:
            diverged |= running & info["diverged"]
        if "goal" in info:
            has_goal = True
            streak = torch.where(running, (streak + 1) * info["goal"], streak)
        running = running & ~(terminated | truncated)
        if i % look_every == 0 and not bool(running.any()):
            break
    if bool(unusable.any()):
        raise PolicyNotFinite(agent.why_not_finite(before))
    if bool(running.any()):
        raise RuntimeError(
            f"{int(running.sum())} episodes were not over after max_episode_steps="
            f"{env.max_episode_steps} steps"
        )
    held = (streak >= GOAL_STEPS) & ~diverged
    return Evaluation(
        returns.cpu(), lengths.cpu(), held.cpu() if has_goal else None, diverged.cpu()
    )
