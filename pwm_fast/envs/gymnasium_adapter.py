"""Gymnasium's environments behind the protocol."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch

from pwm_fast import memory, optional, seeding
from pwm_fast.envs import _answers, _checks, _host, _rendering, _spaces
from pwm_fast.envs._divergence import DIVERGED
from pwm_fast.envs.protocol import CannotRender, EnvironmentFault, StateNotSupported

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

    Observations are vectors or short stacks of them, no images. Actions of integers are rounded,
    each value for an equal share of [-1, 1]. An env of MuJoCo whose state MuJoCo found bad, and
    reset within the step, terminates as diverged.

    Only envs of Gymnasium's own MuJoCo tasks can be saved and restored; for others
    ``get_state`` raises :class:`~pwm_fast.envs.protocol.StateNotSupported`.

    Args:
        envs: a ``gymnasium.vector.VectorEnv`` that resets in the same step; this environment's
            from here on. Each env of a ``SyncVectorEnv`` gets a wrapper; the processes of an
            ``AsyncVectorEnv`` are started anew with one.
        seed: of the start states, in [0, 2^63); see :func:`seeding.env_seeds`.
        max_episode_steps: time limit that ``envs`` already enforces; its spec's by default.

    Raises:
        ImportError: Gymnasium is missing or too old.
        ValueError: unsupported spaces or autoreset mode, or no time limit.
        EnvironmentFault: an env gave a start observation that is not finite, or no observation.
    """

    def __init__(self, envs: Any, *, seed: int = 0, max_episode_steps: int | None = None) -> None:
        gymnasium = _gymnasium()
        mode = envs.metadata.get("autoreset_mode")
        if mode != gymnasium.vector.AutoresetMode.SAME_STEP:
            raise ValueError(
                f"the autoreset mode must be SAME_STEP, got {mode}: make the vector environment "
                "with autoreset_mode=gymnasium.vector.AutoresetMode.SAME_STEP"
            )
        from pwm_fast.envs import _guard

        observations, actions = envs.single_observation_space, envs.single_action_space
        members = getattr(envs.unwrapped, "envs", None)
        known = members[0] if members else envs
        name = _guard.name(known)
        for kind, space in (("observation", observations), ("action", actions)):
            if not isinstance(space, gymnasium.spaces.Box):
                raise ValueError(f"{name}: the {kind} space must be a Box, got {space}")
        _spaces.check_observations(name, observations)
        model = getattr(known.unwrapped, "model", None)
        driven = _spaces.actuators(model, actions.shape)
        _spaces.check_actions(name, actions.low, actions.high, driven)
        if max_episode_steps is None:
            max_episode_steps = getattr(envs.spec, "max_episode_steps", None)
        if max_episode_steps is None:
            raise ValueError("the environment has no time limit: set env.max_episode_steps")
        _checks.positive(max_episode_steps=max_episode_steps)

        super().__init__(
            name,
            envs.num_envs,
            int(np.prod(observations.shape)),
            actions.low,
            actions.high,
            max_episode_steps,
            can_terminate=True,
            integers=actions.dtype.kind in "iub",
        )
        self._envs = envs
        self.name = _guard.guard(envs) or name
        self._action_shape = (envs.num_envs, *actions.shape)
        self._action_dtype = actions.dtype
        self._bounds = (observations.low.reshape(-1), observations.high.reshape(-1))
        self._told_of_bounds = False
        try:
            self.reset(seed=seed)
        except BaseException:
            self.close()
            raise

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
        """Make N envs of a registered environment, stepped one after another.

        Args:
            id: its name, such as ``"Hopper-v5"``.
            num_envs: N.
            seed: of the start states, in [0, 2^63); see :func:`seeding.env_seeds`.
            max_episode_steps: time limit; the registered one by default.
            kwargs: the environment's own arguments.

        Raises:
            ImportError: Gymnasium, or what the environment needs, is missing.
            ValueError: unknown id or arguments, or unsupported environment.
            EnvironmentFault: the environment raised something while it was made or reset.
        """
        gymnasium = _gymnasium()
        _check_kwargs(kwargs)
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
        made: list[Any] = []
        envs = None
        growth = _host.growth(num_envs, id)

        def tracked() -> Any:
            growth.check(len(made))
            made.append(make())
            return made[-1]

        try:
            try:
                envs = gymnasium.vector.SyncVectorEnv(
                    [tracked] * num_envs, autoreset_mode=gymnasium.vector.AutoresetMode.SAME_STEP
                )
            except Exception as error:
                raise _not_made(id, kwargs, error) from error
            if max_episode_steps is None:
                max_episode_steps = made[0].spec.max_episode_steps
            return cls(envs, seed=seed, max_episode_steps=max_episode_steps)
        except BaseException:
            for env in made if envs is None else [envs]:
                env.close()
            raise

    def close(self) -> None:
        """Close the envs, and end their processes."""
        from gymnasium.vector import AsyncVectorEnv
        from gymnasium.vector.async_vector_env import AsyncState

        try:
            self._envs.close()
        except Exception:
            if not isinstance(self._envs.unwrapped, AsyncVectorEnv):
                raise
            # A process was killed, or answered its last step with an error.
            self._envs.unwrapped._state = AsyncState.DEFAULT  # else it waits for that answer again
            self._envs.unwrapped.close(terminate=True)

    def viewer(self, width: int, height: int) -> _rendering.OwnViewer:
        """What ``render()`` of each env gives; ``render_mode`` has to be ``rgb_array``.

        Raises:
            CannotRender: the envs are in processes of their own, or step in a way of their own.
        """
        envs = getattr(self._envs.unwrapped, "envs", None)
        if envs is None:
            kind = type(self._envs.unwrapped).__name__
            raise CannotRender(f"{self.name}: envs of {kind} cannot be rendered one by one")
        rate = envs[0].metadata.get("render_fps") or _rendering.DEFAULT_RATE
        return _rendering.OwnViewer(
            lambda env: envs[env].render(), self.name, 1.0 / rate, width, height
        )

    def _reset_envs(self, mask: np.ndarray, seed: int | None) -> np.ndarray:
        seeds = None if seed is None else self._seeds(seed)
        options = None if mask.all() else {"reset_mask": mask.copy()}
        obs, _ = self._envs.reset(seed=seeds, options=options)
        obs = np.array(obs).reshape(self.num_envs, -1)
        self._mind_bounds(obs, mask)
        return obs

    def _seeds(self, seed: int) -> list[int] | int:
        """What Gymnasium's ``reset`` takes: a seed for each env, where it has them apart."""
        vector = _gymnasium().vector
        apart = isinstance(self._envs.unwrapped, (vector.SyncVectorEnv, vector.AsyncVectorEnv))
        return seeding.env_seeds(seed, self.num_envs if apart else 1)[slice(None) if apart else 0]

    def _step_envs(self, action: np.ndarray) -> _host.Outcome:
        action = action.reshape(self._action_shape).astype(self._action_dtype)
        batch, reward, terminated, truncated, info = self._envs.step(action)
        obs = np.array(batch).reshape(self.num_envs, -1)
        terminated, truncated = (np.array(f, dtype=bool) for f in (terminated, truncated))
        final_obs = obs.copy()
        done = terminated | truncated
        if done.any() and "final_obs" not in info:
            raise EnvironmentFault(
                f"{self.name}: info has no final_obs where episodes ended, got {sorted(info)}"
            )
        for i in np.flatnonzero(done):
            final_obs[i] = np.asarray(info["final_obs"][i]).reshape(-1)
        why: dict[int, str] = {}
        for infos in (info, info.get("final_info", {})):
            if isinstance(infos, dict) and DIVERGED in infos:
                why.update({i: text for i, text in enumerate(infos[DIVERGED]) if text})
        self._mind_bounds(final_obs, np.array([i not in why for i in range(self.num_envs)]))
        return _host.Outcome(obs, final_obs, np.array(reward), terminated, truncated, why)

    def _mind_bounds(self, obs: np.ndarray, mask: np.ndarray) -> None:
        """Warn, once, of finite observations outside of their space by more than rounding."""
        if self._told_of_bounds:
            return
        low, high = self._bounds
        with np.errstate(invalid="ignore"):
            slack = 1e-5 * np.maximum(np.abs(obs), 1.0)
            outside = ((obs < low - slack) | (obs > high + slack)) & np.isfinite(obs)
        outside &= mask[:, None]
        if outside.any():
            self._told_of_bounds = True
            i, k = np.argwhere(outside)[0]
            warnings.warn(
                f"{self.name}, env {i}: entry {k} of the observation is {obs[i, k]:g}, its space "
                f"says [{low[k]:g}, {high[k]:g}]; it is used as it is (said once)",
                RuntimeWarning,
                stacklevel=4,
            )

    def _env_state(self, index: int) -> dict[str, Any]:
        env, limit = self._mujoco_env(index)
        derived = {name: torch.tensor(getattr(env.data, name), device="cpu") for name in _DERIVED}
        return {
            "physics": _host.physics_state(env.model, env.data),
            "derived": derived,
            "elapsed": None if limit is None else limit._elapsed_steps,
            "random": _host.dump_random(env.np_random.bit_generator.state),
        }

    def _restore_env(self, index: int, state: dict[str, Any]) -> None:
        env, limit = self._mujoco_env(index)
        _host.restore_physics(env.model, env.data, state["physics"])
        for name, value in state["derived"].items():
            getattr(env.data, name)[...] = value.numpy()
        if limit is not None:
            limit._elapsed_steps = state["elapsed"]
        env.np_random.bit_generator.state = _host.load_random(state["random"])

    def _mujoco_env(self, index: int) -> tuple[Any, Any]:
        """Env ``index`` without its wrappers, and its TimeLimit or None."""
        from gymnasium.wrappers import OrderEnforcing, PassiveEnvChecker, TimeLimit

        from pwm_fast.envs._guard import GuardedEnv

        envs = getattr(self._envs, "envs", None)
        if envs is None:
            raise StateNotSupported(f"envs of {type(self._envs).__name__} cannot be saved")
        env, limit = envs[index], None
        while env is not env.unwrapped:
            if type(env) not in (GuardedEnv, OrderEnforcing, PassiveEnvChecker, TimeLimit):
                raise StateNotSupported(f"the wrapper {type(env).__name__} cannot be saved")
            if type(env) is TimeLimit:
                limit = env
            env = env.env
        if not type(env).__module__.startswith("gymnasium.envs.mujoco."):
            raise StateNotSupported(
                f"{type(env).__name__} cannot be saved: it is not one of Gymnasium's MuJoCo tasks"
            )
        return env, limit


# Arguments of gymnasium.make that are no environment's own, and what says them here.
_TAKEN = {
    "id": "env.id",
    "max_episode_steps": "env.max_episode_steps",
    "disable_env_checker": "the adapter, which checks by itself",
}


def _check_kwargs(kwargs: Any) -> None:
    """Raise ValueError for what cannot be an environment's own arguments."""
    if kwargs is not None and not (
        isinstance(kwargs, Mapping) and all(isinstance(name, str) for name in kwargs)
    ):
        raise ValueError(
            f"env.kwargs must be a mapping of the environment's own arguments, got {kwargs!r}"
        )
    for name in sorted({*(kwargs or {})} & {*_TAKEN}):
        raise ValueError(
            f"env.kwargs.{name} must not be given, got {(kwargs or {})[name]!r}: that is said by "
            f"{_TAKEN[name]}"
        )


def _not_made(id: str, kwargs: dict[str, Any] | None, error: Exception) -> Exception:
    """What to raise where a registered environment cannot be made."""
    gymnasium = _gymnasium()
    if memory.is_out_of_memory(error) or isinstance(error, memory.OutOfMemory):
        return error
    if isinstance(error, gymnasium.error.DependencyNotInstalled):
        return ImportError(f"{error}; or pip install 'pwm-fast[gym]'")
    given = f" with env.kwargs={dict(kwargs)}" if kwargs else ""
    text = f"Gymnasium cannot make env.id={id!r}{given}: {_answers.said(error)}"
    usual = (gymnasium.error.Error, ValueError, TypeError, ImportError)
    return ValueError(text) if isinstance(error, usual) else EnvironmentFault(text)


def _gymnasium() -> Any:
    try:
        import gymnasium
        from gymnasium.vector import AutoresetMode  # noqa: F401 - new in 1.1
    except ImportError as error:
        needed = "env=gym needs Gymnasium 1.1 or newer: pip install 'pwm-fast[gym]'"
        raise ImportError(optional.reason(error, "gymnasium", needed)) from error
    return gymnasium
