"""What every batch of envs keeps: its spaces, the episodes' counters and the last observations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pwm_fast.envs.protocol import SAME_STEP, Box


class EnvBatch:
    """The attributes of :class:`pwm_fast.envs.protocol.VectorEnv`, and the state of its episodes.

    Args:
        num_envs: N.
        obs_dim: O.
        action_dim: A.
        max_episode_steps: time limit in control steps.
        can_terminate: False where an episode only ends by its time limit.
        device: where the tensors live.
    """

    @torch.inference_mode(False)  # its buffers are written to in any mode
    def __init__(
        self,
        num_envs: int,
        obs_dim: int,
        action_dim: int,
        max_episode_steps: int,
        can_terminate: bool,
        device: torch.device | str = "cpu",
    ) -> None:
        self.num_envs = num_envs
        self.device = torch.device(device)
        self.single_observation_space = Box((obs_dim,))
        self.single_action_space = Box((action_dim,), -1.0, 1.0)
        self.max_episode_steps = max_episode_steps
        self.can_terminate = can_terminate
        self.metadata: dict[str, Any] = {"autoreset_mode": SAME_STEP}
        self.divergence: str | None = None  # why an env diverged first
        self._obs = torch.zeros(num_envs, obs_dim, device=self.device)
        self._steps = torch.zeros(num_envs, dtype=torch.int64, device=self.device)
        self._returns = torch.zeros(num_envs, device=self.device)

    def _when(self, env: int) -> str:
        """Which env and step of its episode, for messages, before the step is counted."""
        return f"env {env}, step {int(self._steps[env]) + 1} of its episode"

    def _info(self, final_obs: Tensor, ended: Tensor, diverged: Tensor) -> dict[str, Any]:
        """The ``info`` of a step, before the counters of ended episodes are cleared."""
        episode = {"return": self._returns.clone(), "length": self._steps.clone(), "mask": ended}
        return {"final_obs": final_obs, "episode": episode, "diverged": diverged}

    def _clear(self, mask: Tensor) -> None:
        """Begin the counters anew where ``mask`` ``[N]`` is True."""
        self._steps.masked_fill_(mask, 0)
        self._returns.masked_fill_(mask, 0.0)

    def _episodes_state(self) -> dict[str, Tensor]:
        """Copies of the last observations and the counters."""
        parts = {"obs": self._obs, "steps": self._steps, "returns": self._returns}
        return {name: part.clone() for name, part in parts.items()}

    def _restore_episodes(self, state: dict[str, Any]) -> None:
        """Undo :meth:`_episodes_state`."""
        self._obs.copy_(state["obs"])
        self._steps.copy_(state["steps"])
        self._returns.copy_(state["returns"])
