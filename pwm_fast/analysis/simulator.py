"""Built-in robots in chosen states, as the truth of what actions do."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pwm_fast.analysis.sensitivity import Course, Runs
from pwm_fast.envs import StateNotSupported, VectorEnv
from pwm_fast.run.collection import Act

EPISODES = 64  # of which states are kept, at most


def why_not(env: VectorEnv) -> str | None:
    """Why the envs cannot be put into a chosen state, for people; None where they can."""
    try:
        state = env.get_state()
    except StateNotSupported as error:
        return f"the environment cannot save and restore its state ({error})"
    engine = state.get("engine")
    if engine == "mujoco":
        return None
    if engine is not None:
        return (
            f"the physics engine {engine} keeps float32 states, native MuJoCo float64; device=cpu "
            "takes that one, unless the run's env.engine says otherwise"
        )
    return "states can be set in the built-in robots alone"


class Recording:
    """A policy that keeps the simulator's state at each of its steps.

    Args:
        env: a built-in robot on native MuJoCo.
        act: the policy.
    """

    def __init__(self, env: VectorEnv, act: Act) -> None:
        self._env, self._act = env, act
        self._states: list[Tensor] = []

    def __call__(self, obs: Tensor) -> Tensor:
        """Actions ``[N, A]`` for observations ``[N, O]``."""
        self._states.append(self._env.get_state()["physics"][:EPISODES].clone())
        return self._act(obs)

    def states(self, env: int, steps: int) -> Tensor | None:
        """The first states ``[steps, n]`` of an env; None where they were not kept."""
        if env >= EPISODES:
            return None
        return torch.stack([state[env] for state in self._states[:steps]])


def simulated(env: VectorEnv, physics: Tensor, obs: Tensor, encode: Any) -> Runs:
    """The simulator as :data:`Runs`, from given states.

    Args:
        env: as many envs as there are rows of actions, of the robot that the states are of.
        physics: states ``[P, n]``.
        obs: their observations ``[P, O]``.
        encode: latents of observations.
    """

    def runs(action: Tensor) -> Course:
        copies = env.num_envs // len(physics)
        state = env.get_state()
        state["physics"] = physics.repeat(copies, 1)
        state["obs"] = now = obs.repeat(copies, 1)
        state["steps"] = torch.zeros_like(state["steps"])
        state["returns"] = torch.zeros_like(state["returns"])
        env.set_state(state)
        alive = torch.ones(env.num_envs, dtype=torch.bool)
        rewards, latents, going_on = [], [], []
        for a in action.cpu().unbind(0):
            latents.append(encode(now))
            going_on.append(alive)
            now, reward, terminated, truncated, _ = env.step(a)
            rewards.append(reward)
            alive = alive & ~(terminated | truncated)
        return Course(torch.stack(rewards), torch.stack(latents), torch.stack(going_on))

    return runs
