"""Torch environments of few lines with the interfaces that mjlab and Isaac Lab document.

Mjlab 1.6.0 (``ManagerBasedRlEnv``): the group ``actor``, action spaces without bounds, partial
resets, and ``cfg.auto_reset=False``, which then wants an env restarted before the next step. Isaac
Lab (``ManagerBasedRLEnv``; ``DirectRLEnv`` without ``env_ids``): the group ``policy``, and with
``cfg.compute_final_obs`` the observations before the resets of a step in ``extras``, where they
stay. Both write rewards, flags and observations into the same tensors, keep ``extras``, and seed
and use the process's global generators.
"""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch


class Space(SimpleNamespace):
    """Mjlab's ``Box``: a shape and bounds, which may be one number."""


class Carts:
    """N carts on a line, pushed by actions; it pays to stand at 0, and past 2 is the end.

    Observations are place, velocity and steps.

    Args:
        num_envs: N.
        length: steps of an episode.
        group: of the policy\'s observations; None answers with a tensor.
        cfg: what an environment\'s configuration has.
        low: bounds of the action.
        high: of the same.
        device: of all tensors.
    """

    is_vector_env = True

    def __init__(
        self,
        num_envs: int,
        *,
        length: int = 20,
        group: str | None = "policy",
        low: Any = -float("inf"),
        high: Any = float("inf"),
        device: str = "cpu",
        **cfg: Any,
    ) -> None:
        self.num_envs, self.max_episode_length, self.device = num_envs, length, device
        self.group, self.cfg = group, SimpleNamespace(**cfg)
        self.single_action_space = Space(shape=(1,), low=low, high=high)
        self.extras: dict[str, Any] = {}
        self.reward_buf = torch.zeros(num_envs, device=device)
        self.terminated = torch.zeros(num_envs, dtype=torch.bool, device=device)
        self.time_outs = torch.zeros_like(self.terminated)
        self.pending = torch.zeros_like(self.terminated)
        self.state = torch.zeros(num_envs, 2, device=device)
        self.episode_length_buf = torch.zeros(num_envs, dtype=torch.long, device=device)
        self.obs_buf = torch.zeros(num_envs, 3, device=device)
        self.taken: list[torch.Tensor] = []
        self.seeds: list[int | None] = []
        self.closed = 0

    @property
    def unwrapped(self) -> Carts:
        return self

    def _answer(self, fresh: bool = False) -> Any:
        obs = torch.cat([self.state, self.episode_length_buf[:, None]], 1)
        if not fresh:
            obs = self.obs_buf.copy_(obs)
        if self.group is None:
            return obs
        return {self.group: obs, "critic": torch.zeros(self.num_envs, 7, device=self.device)}

    def _reset_idx(self, ids: torch.Tensor) -> None:
        place = torch.rand(len(ids), device=self.device) - 0.5
        place += random.random() * 1e-3 + np.random.rand() * 1e-3  # of all three generators
        self.state[ids] = torch.stack([place, torch.zeros_like(place)], 1)
        self.episode_length_buf[ids] = 0
        self.pending[ids] = False
        self.extras["log"] = {"mean": 0.5}

    def reset(
        self, seed: int | None = None, env_ids: Any = None, options: Any = None
    ) -> tuple[Any, dict[str, Any]]:
        self.seeds.append(seed)
        if seed is not None:
            random.seed(seed)
            np.random.seed(seed)
            torch.manual_seed(seed)
        self._reset_idx(torch.arange(self.num_envs) if env_ids is None else env_ids)
        return self._answer(), self.extras

    def step(self, action: torch.Tensor) -> tuple[Any, ...]:
        assert not self.pending.any(), "envs must be restarted first"
        self.taken.append(action.clone())
        self.state[:, 1] += 0.3 * action[:, 0].clamp(-2.0, 2.0)
        self.state[:, 1] *= 0.9
        self.state[:, 0] += 0.3 * self.state[:, 1]
        self.episode_length_buf += 1
        self.reward_buf[:] = 1.0 - 0.25 * self.state[:, 0].square()
        self.terminated[:] = self.state[:, 0].abs() > 2.0
        self.time_outs[:] = self.episode_length_buf >= self.max_episode_length
        ended = self.terminated | self.time_outs
        if getattr(self.cfg, "auto_reset", True):
            if bool(ended.any()):
                if getattr(self.cfg, "compute_final_obs", False):
                    self.extras["final_obs"] = self._answer(fresh=True)
                self._reset_idx(ended.nonzero().flatten())
        else:
            self.pending |= ended
        return self._answer(), self.reward_buf, self.terminated, self.time_outs, self.extras

    def close(self) -> None:
        self.closed += 1


class DirectCarts(Carts):
    """Isaac Lab's ``DirectRLEnv``: all envs restart, or none."""

    def reset(  # type: ignore[override]
        self, seed: int | None = None, options: Any = None
    ) -> tuple[Any, dict[str, Any]]:
        return super().reset(seed)


class Wrapper:
    """Gymnasium\'s ``Wrapper``: it has ``unwrapped``, and no attribute of what is within."""

    def __init__(self, env: Any) -> None:
        self.env = env
        self.steps = 0

    @property
    def unwrapped(self) -> Any:
        return self.env.unwrapped

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        return self.env.reset(seed=seed, options=options)

    def step(self, action: torch.Tensor) -> Any:
        self.steps += 1
        return self.env.step(action)

    def close(self) -> None:
        self.env.close()


def make(num_envs: int, seed: int, device: str, **options: Any) -> Carts:
    """What ``env.factory=tests.envs.torch_envs:make`` calls: mjlab\'s kind."""
    torch.manual_seed(seed)
    return Carts(num_envs, device=device, **{"group": "actor", "auto_reset": False, **options})


def wrong_number(num_envs: int, seed: int, device: str) -> Carts:
    return Carts(num_envs + 1, auto_reset=False)


def failing(num_envs: int, seed: int, device: str) -> Carts:
    raise RuntimeError("no simulator here")


def anything(**kwargs: Any) -> Carts:
    raise AssertionError("called")
