"""What the adapters to other libraries share: worlds of NumPy arrays behind the torch protocol."""

from __future__ import annotations

import json
import warnings
from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pwm_fast.envs import _checks
from pwm_fast.envs._answers import first_unsound
from pwm_fast.envs._divergence import sound
from pwm_fast.envs.protocol import SAME_STEP, Box, EnvironmentFault

LEAST_BYTES = 2048  # no world of another library takes less memory


class Outcome(NamedTuple):
    """What one control step of all worlds came to.

    Attributes:
        obs: ``[N, O]`` observations to act on next, after the resets.
        final_obs: ``[N, O]`` observations before them; anything in a world that diverged.
        reward: ``[N]``; anything in a world that diverged.
        terminated: bool ``[N]``.
        truncated: bool ``[N]``.
        diverged: why, by world, where the library or its physics says so; what is not finite, or
            beyond :data:`pwm_fast.envs._divergence.MAX_VALUE`, shows by itself.
    """

    obs: np.ndarray
    final_obs: np.ndarray
    reward: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    diverged: dict[int, str]


class HostEnv(ABC):
    """N worlds of another library; implements :class:`pwm_fast.envs.protocol.VectorEnv`.

    Actions in [-1, 1] are stretched to the library's own bounds. A world that diverged, or whose
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

    @torch.inference_mode(False)  # its buffers are written to in any mode
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
        self.num_envs = num_envs
        self.device = torch.device("cpu")
        self.single_observation_space = Box((obs_dim,))
        self.single_action_space = Box(self._low.shape, -1.0, 1.0)
        self.max_episode_steps = max_episode_steps
        self.can_terminate = can_terminate
        self.metadata: dict[str, Any] = {"autoreset_mode": SAME_STEP}
        self._obs = torch.zeros(num_envs, obs_dim, device="cpu")
        self._steps = torch.zeros(num_envs, dtype=torch.int64, device="cpu")
        self._returns = torch.zeros(num_envs, device="cpu")
        self._episodes = np.zeros(num_envs, dtype=np.int64)  # begun so far, for messages
        self.divergence: str | None = None  # why a world diverged first

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Tensor, dict[str, Any]]:
        """Start new episodes in all worlds, or where ``options["reset_mask"]`` ``[N]`` is True."""
        mask = _checks.reset_mask(options, self.num_envs)
        if bool(mask.any()):
            obs = self._start(mask.numpy(), seed)
            self._obs = torch.where(mask.unsqueeze(-1), torch.from_numpy(obs), self._obs)
            self._steps.masked_fill_(mask, 0)
            self._returns.masked_fill_(mask, 0.0)
        return self._obs.clone(), {}

    def step(self, action: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Any]]:
        """Advance all worlds by one control step; see the protocol for what comes back."""
        unit = _checks.unit_action(action, self.num_envs, self._low.size).double().numpy()
        outcome = self._step_worlds(self._stretched(unit))
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
        info = {
            "final_obs": torch.from_numpy(final_obs),
            "episode": {
                "return": self._returns.clone(),
                "length": self._steps.clone(),
                "mask": ended,
            },
            "diverged": torch.from_numpy(unsound),
        }
        self._steps.masked_fill_(ended, 0)
        self._returns.masked_fill_(ended, 0.0)
        self._obs = torch.from_numpy(obs)
        return (
            self._obs.clone(),
            rewards,
            torch.from_numpy(terminated),
            torch.from_numpy(truncated),
            info,
        )

    def get_state(self) -> dict[str, Any]:
        """Everything that decides the future: physics, counters and random numbers.

        Raises:
            StateNotSupported: the worlds cannot be saved to the bit.
        """
        return {
            "worlds": [self._world_state(i) for i in range(self.num_envs)],
            "obs": self._obs.clone(),
            "steps": self._steps.clone(),
            "returns": self._returns.clone(),
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue from a state of :meth:`get_state`, to the bit.

        Raises:
            StateNotSupported: the worlds cannot be restored to the bit.
            ValueError: the state is of another environment or number of worlds.
        """
        if tuple(state["obs"].shape) != tuple(self._obs.shape):
            raise ValueError(
                f"the saved state holds observations {tuple(state['obs'].shape)}, this environment "
                f"has {tuple(self._obs.shape)}"
            )
        for i, world in enumerate(state["worlds"]):
            self._restore_world(i, world)
        self._obs = state["obs"].clone()
        self._steps.copy_(state["steps"])
        self._returns.copy_(state["returns"])

    @abstractmethod
    def close(self) -> None:
        """Release what the worlds hold."""

    @abstractmethod
    def _reset_worlds(self, mask: np.ndarray, seed: int | None) -> np.ndarray:
        """Restart where ``mask`` ``[N]``, each world from a stream of its own; ``[N, O]``."""

    @abstractmethod
    def _step_worlds(self, action: np.ndarray) -> Outcome:
        """Advance all worlds with actions ``[N, A]`` in the library's own units."""

    @abstractmethod
    def _world_state(self, index: int) -> dict[str, Any]:
        """What decides the future of one world: tensors, numbers and strings."""

    @abstractmethod
    def _restore_world(self, index: int, state: dict[str, Any]) -> None:
        """Undo :meth:`_world_state`."""

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
        obs = _float32(self._reset_worlds(mask, seed))
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
                f"{self.name}, world {i}, reset of episode {self._episodes[i]}: an episode must "
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
        self.divergence = f"world {i}, step {int(self._steps[i]) + 1} of its episode: {reason}"
        warnings.warn(
            f"{self.name}: {int(unsound.sum())} of {self.num_envs} worlds diverged "
            f"({self.divergence}); they were restarted (said once)",
            RuntimeWarning,
            stacklevel=3,
        )


def physics_state(model: Any, data: Any) -> Tensor:
    """MuJoCo's whole integration state of one world, float64."""
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
            f"the saved physics state has {state.numel()} numbers, this world's has {size}"
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
