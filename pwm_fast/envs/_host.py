"""What the adapters to other libraries share: envs of NumPy arrays behind the torch protocol."""

from __future__ import annotations

import json
import warnings
from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pwm_fast import memory
from pwm_fast.envs import _checks
from pwm_fast.envs._answers import first_unsound
from pwm_fast.envs._batch import EnvBatch
from pwm_fast.envs._divergence import sound
from pwm_fast.envs.protocol import EnvironmentFault

LEAST_BYTES = 2048  # no env of another library takes less memory


class Outcome(NamedTuple):
    """What one control step of all envs came to.

    Attributes:
        obs: ``[N, O]`` observations to act on next, after the resets.
        final_obs: ``[N, O]`` observations before them; anything in an env that diverged.
        reward: ``[N]``; anything in an env that diverged.
        terminated: bool ``[N]``.
        truncated: bool ``[N]``.
        diverged: why, by env, where the library or its physics says so; what is not finite, or
            beyond :data:`pwm_fast.envs._divergence.MAX_VALUE`, shows by itself.
    """

    obs: np.ndarray
    final_obs: np.ndarray
    reward: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    diverged: dict[int, str]


class HostEnv(EnvBatch, ABC):
    """N envs of another library; implements :class:`pwm_fast.envs.protocol.VectorEnv`.

    Actions in [-1, 1] are stretched to the library's own bounds. An env that diverged, or whose
    observation or reward is not finite or beyond 1e10, terminates with its last sound observation
    and reward 0; ``info["diverged"]`` marks it, and a warning says so once, with why, which
    ``divergence`` keeps. A start observation like that raises
    :class:`~pwm_fast.envs.protocol.EnvironmentFault`.

    Args:
        name: of the environment, for messages.
        num_envs: N, at least 1.
        obs_dim: O, the size of a flattened observation.
        low: lowest actions ``[A]``, as :func:`pwm_fast.envs._spaces.check_actions` wants them.
        high: highest actions ``[A]``.
        max_episode_steps: time limit in control steps.
        can_terminate: False where an episode only ends by its time limit.
        integers: actions are whole numbers; each gets an equal share of [-1, 1].
    """

    def __init__(
        self,
        name: str,
        num_envs: int,
        obs_dim: int,
        low: np.ndarray,
        high: np.ndarray,
        max_episode_steps: int,
        can_terminate: bool,
        integers: bool = False,
    ) -> None:
        self.name = name
        self._integers = integers
        self._low = np.asarray(low, dtype=np.float64).reshape(-1)
        self._high = np.asarray(high, dtype=np.float64).reshape(-1)
        super().__init__(num_envs, obs_dim, self._low.size, max_episode_steps, can_terminate)
        self._episodes = np.zeros(num_envs, dtype=np.int64)  # begun so far, for messages

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Tensor, dict[str, Any]]:
        """Start new episodes in all envs, or where ``options["reset_mask"]`` ``[N]`` is True."""
        mask = _checks.reset_mask(options, self.num_envs)
        if bool(mask.any()):
            obs = self._start(mask.numpy(), seed)
            self._obs.copy_(torch.where(mask.unsqueeze(-1), torch.from_numpy(obs), self._obs))
            self._clear(mask)
        return self._obs.clone(), {}

    def step(self, action: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Any]]:
        """Advance all envs by one control step; see the protocol for what comes back."""
        unit = _checks.unit_action(action, self.num_envs, self._low.size).double().numpy()
        outcome = self._step_envs(self._stretched(unit))
        obs, final_obs = _float32(outcome.obs), _float32(outcome.final_obs)
        reward = _float32(outcome.reward)
        terminated, truncated = outcome.terminated.copy(), outcome.truncated.copy()

        done = terminated | truncated
        unsound = ~(sound(final_obs).all(axis=1) & sound(reward))
        unsound[list(outcome.diverged)] = True
        self._check_start(obs, done)
        if unsound.any():
            self._warn(unsound, outcome.diverged, final_obs, reward)
            final_obs[unsound] = self._obs.numpy()[unsound]
            reward[unsound] = 0.0
            restart = unsound & ~done
            if restart.any():
                obs[restart] = self._start(restart, None)[restart]
            terminated |= unsound

        rewards = torch.from_numpy(reward)
        ended = torch.from_numpy(terminated | truncated)
        self._steps += 1
        self._returns += rewards
        info = self._info(torch.from_numpy(final_obs), ended, torch.from_numpy(unsound))
        self._clear(ended)
        next_obs = torch.from_numpy(obs)
        self._obs.copy_(next_obs)
        flags = torch.from_numpy(terminated), torch.from_numpy(truncated)
        return next_obs, rewards, *flags, info

    def get_state(self) -> dict[str, Any]:
        """Everything that decides the future: physics, counters and random numbers.

        Raises:
            StateNotSupported: the envs cannot be saved to the bit.
        """
        return {
            "worlds": [self._env_state(i) for i in range(self.num_envs)],
            **self._episodes_state(),
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue from a state of :meth:`get_state`, to the bit.

        Raises:
            StateNotSupported: the envs cannot be restored to the bit.
            ValueError: the state is of another environment or number of envs.
        """
        if tuple(state["obs"].shape) != tuple(self._obs.shape):
            raise ValueError(
                f"the saved state holds observations {tuple(state['obs'].shape)}, this environment "
                f"has {tuple(self._obs.shape)}"
            )
        for i, env in enumerate(state["worlds"]):
            self._restore_env(i, env)
        self._restore_episodes(state)

    @abstractmethod
    def close(self) -> None:
        """Release what the envs hold."""

    @abstractmethod
    def _reset_envs(self, mask: np.ndarray, seed: int | None) -> np.ndarray:
        """Restart where ``mask`` ``[N]``, each env from a stream of its own; ``[N, O]``."""

    @abstractmethod
    def _step_envs(self, action: np.ndarray) -> Outcome:
        """Advance all envs with actions ``[N, A]`` in the library's own units."""

    @abstractmethod
    def _env_state(self, index: int) -> dict[str, Any]:
        """What decides the future of one env: tensors, numbers and strings."""

    @abstractmethod
    def _restore_env(self, index: int, state: dict[str, Any]) -> None:
        """Undo :meth:`_env_state`."""

    def _stretched(self, unit: np.ndarray) -> np.ndarray:
        """Actions ``[N, A]`` in [-1, 1] in the library's own units."""
        low, high = self._low, self._high
        if self._integers:  # the outermost values would get half a share each
            low, high = low - 0.5, high + 0.5
        action = low + 0.5 * (unit + 1.0) * (high - low)
        if self._integers:
            action = np.floor(action + 0.5)
        return np.clip(action, self._low, self._high)

    def _start(self, mask: np.ndarray, seed: int | None) -> np.ndarray:
        """Restart where ``mask`` is True; float32 observations, sound there."""
        obs = _float32(self._reset_envs(mask, seed))
        self._check_start(obs, mask)
        return obs

    def _check_start(self, obs: np.ndarray, mask: np.ndarray) -> None:
        """Count the episodes that begin where ``mask`` is True, and check how they do.

        Raises:
            EnvironmentFault: an observation after a reset is not finite, or huge.
        """
        self._episodes += mask
        good = sound(obs)
        for i in np.flatnonzero(mask & ~good.all(axis=1)):
            raise EnvironmentFault(
                f"{self.name}, env {i}, reset of episode {self._episodes[i]}: an episode must "
                f"start with finite numbers below 1e10, {first_unsound(obs[i], good[i])} of the "
                "observation"
            )

    def _warn(
        self, unsound: np.ndarray, why: dict[int, str], obs: np.ndarray, reward: np.ndarray
    ) -> None:
        if self.divergence is not None:
            return
        i = int(np.flatnonzero(unsound)[0])
        if i in why:
            reason = why[i]
        elif not sound(reward)[i]:
            reason = f"the reward is {reward[i]:g}"
        else:
            reason = f"{first_unsound(obs[i], sound(obs[i]))} of the observation"
        self.divergence = f"{self._when(i)}: {reason}"
        warnings.warn(
            f"{self.name}: {int(unsound.sum())} of {self.num_envs} envs diverged "
            f"({self.divergence}); they were restarted (said once)",
            RuntimeWarning,
            stacklevel=3,
        )


def growth(num_envs: int, name: str) -> memory.Growth:
    """Watches the memory while the envs are made; raises where they certainly do not fit."""
    found = memory.Growth(num_envs, f"{num_envs} envs of {name}", memory.ENVS)
    found.require(LEAST_BYTES)
    return found


def physics_state(model: Any, data: Any) -> Tensor:
    """MuJoCo's whole integration state of one env, float64."""
    import mujoco

    state = np.empty(mujoco.mj_stateSize(model, mujoco.mjtState.mjSTATE_INTEGRATION.value))
    mujoco.mj_getState(model, data, state, mujoco.mjtState.mjSTATE_INTEGRATION.value)
    return torch.from_numpy(state)


def restore_physics(model: Any, data: Any, state: Tensor) -> None:
    """Undo :func:`physics_state`.

    Raises:
        ValueError: the state is of another model.
    """
    import mujoco

    size = mujoco.mj_stateSize(model, mujoco.mjtState.mjSTATE_INTEGRATION.value)
    if tuple(state.shape) != (size,):
        raise ValueError(
            f"the saved physics state has {state.numel()} numbers, this env's has {size}"
        )
    mujoco.mj_setState(model, data, state.numpy(), mujoco.mjtState.mjSTATE_INTEGRATION.value)


def dump_random(state: dict[str, Any]) -> str:
    """The state of one of NumPy's bit generators as JSON: its integers have up to 128 bits."""
    return json.dumps(state, default=lambda array: array.tolist())


def load_random(text: str) -> dict[str, Any]:
    """Undo :func:`dump_random`."""
    state: dict[str, Any] = json.loads(text)
    if "key" in state["state"]:  # of the Mersenne Twister
        state["state"]["key"] = np.asarray(state["state"]["key"], dtype=np.uint32)
    return state


def _float32(array: np.ndarray) -> np.ndarray:
    """A copy in float32; numbers beyond its range become infinite."""
    with np.errstate(over="ignore"):
        return np.array(array, dtype=np.float32)
