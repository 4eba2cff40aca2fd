"""An environment whose observations say which episode and step they are of."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np

ID = "pwm_fast/Numbered-v0"


class Numbered(gymnasium.Env):
    """Observations [process, episode, step]; an episode is rewarded 2 in all, at both ends.

    Args:
        longest: most steps of an episode, of 2 or more.
        grow: episodes after which one may have a step more; 0 for never.
    """

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (3,), np.float32)
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (1,), np.float32)
    process = 0  # counts the environments that a run has had, one after another

    def __init__(self, longest: int = 9, grow: int = 0) -> None:
        self.longest, self.grow, self.alive = longest, grow, Numbered.process
        self.count = 0

    def _obs(self) -> Any:
        return np.array([self.alive, self.episode, self.t], np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.episode = int(self.np_random.integers(2**23))
        longest = self.longest + (self.count // self.grow if self.grow else 0)
        self.length = int(self.np_random.integers(2, longest + 1))
        self.count += 1
        self.t = 0
        return self._obs(), {}

    def step(self, action: Any) -> Any:
        reward = float(self.t == 0) + float(self.t == self.length - 1)
        self.t += 1
        ended = self.t >= self.length
        return self._obs(), reward, ended and self.episode % 2 == 0, ended, {}


gymnasium.register(ID, entry_point=Numbered, max_episode_steps=20)
