"""Gymnasium's environments behind the protocol."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch

from pwm_fast import optional, seeding
from pwm_fast.envs import _checks, _host
from pwm_fast.envs.protocol import StateNotSupported

# What Gymnasium's MuJoCo tasks read besides the integration state: it lags that state by a substep.
_DERIVED = (
    "cfrc_ext",
    "cinert",
    "cvel",
    "qfrc_actuator",
    "qfrc_constraint",
    "site_xpos",
    "subtree_com",
    "ten_length",
    "ten_velocity",
    "xipos",
    "xmat",
    "xpos",
    "xquat",
)


class GymnasiumEnv(_host.HostEnv):
    """A Gymnasium vector environment with Box observations (flattened) and bounded Box actions.

    Only worlds of Gymnasium's own MuJoCo tasks can be saved and restored; for others
    ``get_state`` raises :class:`~pwm_fast.envs.protocol.StateNotSupported`.

    Args:
        envs: a ``gymnasium.vector.VectorEnv`` that resets in the same step.
        seed: of the start states, in [0, 2^63); see :func:`seeding.world_seeds`.
        max_episode_steps: time limit that ``envs`` already enforces; its spec's by default.

    Raises:
        ImportError: Gymnasium is missing or too old.
        ValueError: unsupported spaces or autoreset mode, or no time limit.
    """

    def __init__(self, envs: Any, *, seed: int = 0, max_episode_steps: int | None = None) -> None:
        gymnasium = _gymnasium()
        mode = envs.metadata.get("autoreset_mode")
        if mode != gymnasium.vector.AutoresetMode.SAME_STEP:
            raise ValueError(
                f"the autoreset mode must be SAME_STEP, got {mode}: make the vector environment "
                "with autoreset_mode=gymnasium.vector.AutoresetMode.SAME_STEP"
            )
        observations, actions = envs.single_observation_space, envs.single_action_space
        for name, space in (("observation", observations), ("action", actions)):
            if not isinstance(space, gymnasium.spaces.Box):
                raise ValueError(f"the {name} space must be a Box, got {space}")
        if max_episode_steps is None:
            max_episode_steps = getattr(envs.spec, "max_episode_steps", None)
        if max_episode_steps is None:
            raise ValueError("the environment has no time limit: set env.max_episode_steps")
        _checks.positive(max_episode_steps=max_episode_steps)

        super().__init__(
            envs.num_envs,
            int(np.prod(observations.shape)),
            actions.low,
            actions.high,
            max_episode_steps,
            can_terminate=True,
        )
        self._envs = envs
        self._action_shape = (envs.num_envs, *actions.shape)
        self._action_dtype = actions.dtype
        self.reset(seed=seed)

    @classmethod
    def from_id(
        cls,
        id: str,
        num_envs: int,
        *,
        seed: int = 0,
        max_episode_steps: int | None = None,
        kwargs: dict[str, Any] | None = None,
    ) -> GymnasiumEnv:
        """Make N worlds of a registered environment, stepped one after another.

        Args:
            id: its name, such as ``"Hopper-v5"``.
            num_envs: N.
            seed: of the start states, in [0, 2^63); see :func:`seeding.world_seeds`.
            max_episode_steps: time limit; the registered one by default.
            kwargs: the environment's own arguments.

        Raises:
            ImportError: Gymnasium, or what the environment needs, is missing.
            ValueError: unknown id or unsupported environment.
        """
        gymnasium = _gymnasium()
        _checks.positive(num_envs=num_envs)
        if max_episode_steps is not None:
            _checks.positive(max_episode_steps=max_episode_steps)
        make = partial(
            gymnasium.make,
            id,
            max_episode_steps=max_episode_steps,
            disable_env_checker=True,
            **(kwargs or {}),
        )
        try:
            envs = gymnasium.vector.SyncVectorEnv(
                [make] * num_envs, autoreset_mode=gymnasium.vector.AutoresetMode.SAME_STEP
            )
        except gymnasium.error.DependencyNotInstalled as error:
            raise ImportError(f"{error}; or pip install 'pwm-fast[gym]'") from error
        except (gymnasium.error.Error, TypeError) as error:
            raise ValueError(f"Gymnasium cannot make env.id={id!r}: {error}") from error
        try:
            if max_episode_steps is None:
                max_episode_steps = envs.envs[0].spec.max_episode_steps
            return cls(envs, seed=seed, max_episode_steps=max_episode_steps)
        except BaseException:
            envs.close()
            raise

    def close(self) -> None:
        """Close the worlds."""
        self._envs.close()

    def _reset_worlds(self, mask: np.ndarray, seed: int | None) -> np.ndarray:
        seeds = None if seed is None else self._seeds(seed)
        obs, _ = self._envs.reset(seed=seeds, options={"reset_mask": mask.copy()})
        return np.asarray(obs).reshape(self.num_envs, -1)

    def _seeds(self, seed: int) -> list[int] | int:
        """What Gymnasium's ``reset`` takes: a seed for each world, where it has them apart."""
        vector = _gymnasium().vector
        apart = isinstance(self._envs.unwrapped, (vector.SyncVectorEnv, vector.AsyncVectorEnv))
        return seeding.world_seeds(seed, self.num_envs if apart else 1)[slice(None) if apart else 0]

    def _step_worlds(self, action: np.ndarray) -> _host.Outcome:
        action = action.reshape(self._action_shape).astype(self._action_dtype)
        batch, reward, terminated, truncated, info = self._envs.step(action)
        obs = np.asarray(batch).reshape(self.num_envs, -1)
        final_obs = obs.copy()
        for i in np.flatnonzero(terminated | truncated):
            final_obs[i] = np.asarray(info["final_obs"][i]).reshape(-1)
        return _host.Outcome(obs, final_obs, reward, terminated, truncated)

    def _world_state(self, index: int) -> dict[str, Any]:
        world, limit = self._mujoco_world(index)
        derived = {name: torch.tensor(getattr(world.data, name)) for name in _DERIVED}
        return {
            "physics": _host.physics_state(world.model, world.data),
            "derived": derived,
            "elapsed": None if limit is None else limit._elapsed_steps,
            "random": _host.dump_random(world.np_random.bit_generator.state),
        }

    def _restore_world(self, index: int, state: dict[str, Any]) -> None:
        world, limit = self._mujoco_world(index)
        _host.restore_physics(world.model, world.data, state["physics"])
        for name, value in state["derived"].items():
            getattr(world.data, name)[...] = value.numpy()
        if limit is not None:
            limit._elapsed_steps = state["elapsed"]
        world.np_random.bit_generator.state = _host.load_random(state["random"])

    def _mujoco_world(self, index: int) -> tuple[Any, Any]:
        """World ``index`` without its wrappers, and its TimeLimit or None."""
        from gymnasium.wrappers import OrderEnforcing, PassiveEnvChecker, TimeLimit

        envs = getattr(self._envs, "envs", None)
        if envs is None:
            raise StateNotSupported(f"worlds of {type(self._envs).__name__} cannot be saved")
        env, limit = envs[index], None
        while env is not env.unwrapped:
            if type(env) not in (OrderEnforcing, PassiveEnvChecker, TimeLimit):
                raise StateNotSupported(f"the wrapper {type(env).__name__} cannot be saved")
            if type(env) is TimeLimit:
                limit = env
            env = env.env
        if not type(env).__module__.startswith("gymnasium.envs.mujoco."):
            raise StateNotSupported(
                f"{type(env).__name__} cannot be saved: it is not one of Gymnasium's MuJoCo tasks"
            )
        return env, limit


def _gymnasium() -> Any:
    try:
        import gymnasium
        from gymnasium.vector import AutoresetMode  # noqa: F401 - new in 1.1
    except ImportError as error:
        needed = "env=gym needs Gymnasium 1.1 or newer: pip install 'pwm-fast[gym]'"
        raise ImportError(optional.reason(error, "gymnasium", needed)) from error
    return gymnasium
