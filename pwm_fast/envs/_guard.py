"""One Gymnasium env within a vector environment, in its process: copies, checks, divergence."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import gymnasium
import numpy as np

from pwm_fast.envs import _answers, _physics_search
from pwm_fast.envs._divergence import DIVERGED, PhysicsWatch
from pwm_fast.envs.protocol import EnvironmentFault


class GuardedEnv(gymnasium.Wrapper):
    """Makes an env's answers safe to keep, before the vector environment resets it.

    Observations are copied: an env may answer with one array again and again, and the vector
    environment hands out the last observation of an episode after the reset. What an env may not
    answer raises :class:`EnvironmentFault`. A step in which MuJoCo found the state bad terminates,
    with why as :data:`DIVERGED` in its info.

    Args:
        env: the env with its wrappers.
        index: of the env.
    """

    def __init__(self, env: gymnasium.Env, index: int) -> None:
        super().__init__(env)
        self.env_name = name(env)
        self._index = index
        self._base = env.unwrapped
        self._space = env.observation_space
        self._episode = 0
        self._steps = 0
        self._main: tuple[Any, PhysicsWatch] | None = None
        self._others: list[tuple[Any, PhysicsWatch]] = []

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Start an episode; ``options`` without entries are None."""
        self._episode += 1
        self._steps = 0
        try:
            answer = self.env.reset(seed=seed, options=options or None)
        except Exception as error:
            _answers.blame(self._where(), error)
        if not isinstance(answer, tuple) or len(answer) != 2:
            raise EnvironmentFault(
                f"{self._where()}: reset must return (observation, info), got "
                f"{_answers.shown(answer)}"
            )
        obs, info = answer
        self._look()
        return self._copied(obs), self._checked(info)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Advance by one step."""
        self._steps += 1
        watched = self._watched()
        for data, watch in watched:
            watch.begin(data)
        try:
            answer = self.env.step(action)
        except Exception as error:
            if _is_divergence(error):
                said = " ".join(str(error).split())
                return self._space_zeros(), 0.0, True, False, {DIVERGED: said}
            _answers.blame(self._where(), error)
        # Each puts the counts of its data back.
        reasons = [watch.end() for _, watch in watched]
        why = next((reason for reason in reasons if reason is not None), None)
        if not isinstance(answer, tuple) or len(answer) != 5:
            raise EnvironmentFault(
                f"{self._where()}: step must return (observation, reward, terminated, truncated, "
                f"info), got {_answers.shown(answer)}"
            )
        obs, reward, terminated, truncated, info = answer
        info = self._checked(info)
        return (
            self._copied(obs),
            _answers.number(reward, "reward", self._where),
            _answers.flag(terminated, "terminated", self._where) or why is not None,
            _answers.flag(truncated, "truncated", self._where),
            info if why is None else {**info, DIVERGED: why},
        )

    def _copied(self, obs: Any) -> Any:
        space = self._space
        if not isinstance(space, gymnasium.spaces.Box):
            return obs  # refused by the adapter
        return _answers.observation(obs, space.shape, np.dtype(space.dtype), self._where)

    def _checked(self, info: Any) -> dict[str, Any]:
        if not isinstance(info, dict):
            raise EnvironmentFault(
                f"{self._where()}: info must be a dict, got {_answers.shown(info)}"
            )
        return info

    def _look(self) -> None:
        """Find MuJoCo's data in an env that steps it."""
        found = _physics_search.find(self.env) if self._own() is None else []
        # The time of one of several may go back in an ordinary step: plans are made in copies.
        self._others = [(data, PhysicsWatch(len(found) == 1)) for data in found]

    def _own(self) -> Any:
        """What Gymnasium's own tasks have as ``data``; else None."""
        mujoco = sys.modules.get("mujoco")
        data = getattr(self._base, "data", None)
        return data if mujoco is not None and isinstance(data, mujoco.MjData) else None

    def _watched(self) -> list[tuple[Any, PhysicsWatch]]:
        """MuJoCo's data and who watches each."""
        own = self._own()
        if own is None:
            if not self._others and self._steps <= 2:  # it may have been made in the first step
                self._look()
            return self._others
        if self._main is None or self._main[0] is not own:
            self._main = own, PhysicsWatch()
        return [self._main]  # others are copies, in which a planner may do what it likes

    def _space_zeros(self) -> Any:
        """An observation that nobody looks at."""
        space = self._space
        if not isinstance(space, gymnasium.spaces.Box):
            return space.sample()
        return np.zeros(space.shape, space.dtype)

    def _where(self) -> str:
        when = f"step {self._steps}" if self._steps else "reset"
        return f"{self.env_name}, env {self._index}, {when} of episode {self._episode}"


def _is_divergence(error: Exception) -> bool:
    """Whether dm_control says that MuJoCo found the state bad."""
    control = sys.modules.get("dm_control.rl.control")
    return control is not None and isinstance(error, control.PhysicsError)


def make_guarded(make: Callable[[], gymnasium.Env], index: int) -> GuardedEnv:
    """An env of what ``make`` makes."""
    return GuardedEnv(make(), index)


def guard(envs: Any) -> str | None:
    """Put a :class:`GuardedEnv` around every env of a vector environment of Gymnasium's, in place.

    The processes of an ``AsyncVectorEnv`` are started anew, since only there the last observation
    of an episode can be seen. Vector environments that step in their own way are left alone.

    Returns:
        What an env is called; None where none was guarded.
    """
    base = envs.unwrapped
    if isinstance(base, gymnasium.vector.SyncVectorEnv):
        base.envs = [
            env if isinstance(env, GuardedEnv) else GuardedEnv(env, i)
            for i, env in enumerate(base.envs)
        ]
    elif isinstance(base, gymnasium.vector.AsyncVectorEnv):
        if not all(isinstance(fn, partial) and fn.func is make_guarded for fn in base.env_fns):
            _start_anew(base)
    else:
        return None
    return str(base.get_attr("env_name")[0])


def _start_anew(base: Any) -> None:
    """Make an ``AsyncVectorEnv`` what its constructor would, of guarded envs."""
    kind = gymnasium.vector.AsyncVectorEnv
    settings = {
        key: getattr(base, key)
        for key in inspect.signature(kind.__init__).parameters
        if key not in ("self", "env_fns") and hasattr(base, key)
    }
    makers = [partial(make_guarded, fn, i) for i, fn in enumerate(base.env_fns)]
    base.close()
    base.closed = False  # the constructor asks the processes
    kind.__init__(base, makers, **settings)


def name(env: Any) -> str:
    """What an environment is called: its registered id, or its class."""
    spec = getattr(env.unwrapped, "spec", None)
    return str(spec.id) if spec is not None else type(env.unwrapped).__name__
