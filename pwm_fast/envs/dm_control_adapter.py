"""Tasks of the dm_control suite behind the protocol."""

from __future__ import annotations

import copy
import hashlib
import math
import traceback
import warnings
from typing import Any

import numpy as np
import torch

from pwm_fast import optional, seeding
from pwm_fast.envs import _answers, _checks, _host, _rendering, _spaces
from pwm_fast.envs._divergence import PhysicsWatch
from pwm_fast.envs.protocol import StateNotSupported

MAX_REPEAT = 1024  # no task of the suite lasts for more than a few thousand steps


class DMControlEnv(_host.HostEnv):
    """N envs of a task of the dm_control suite, stepped one after another.

    Observations are the task's, flattened in its order. The reward of a step is the sum over its
    repeats.

    Args:
        domain: such as ``"cheetah"``.
        task: such as ``"run"``.
        num_envs: N.
        seed: of the start states, in [0, 2^63); env i gets ``seeding.words(seed, i)``.
        max_episode_steps: time limit in control steps of this environment, repeats not counted
            apart; the task's own by default.
        action_repeat: how often an action is applied in a step, at most :data:`MAX_REPEAT`.

    Raises:
        ImportError: dm_control is missing, or does not work with the installed MuJoCo.
        ValueError: unknown task, unbounded actions (those of ``lqr``, which dm_control bounds by
            1e10), no time limit, or a number out of range.
        EnvironmentFault: dm_control raised something while an env was made or reset.
    """

    def __init__(
        self,
        domain: str,
        task: str,
        num_envs: int,
        *,
        seed: int = 0,
        max_episode_steps: int | None = None,
        action_repeat: int = 2,
    ) -> None:
        _checks.positive(num_envs=num_envs, action_repeat=action_repeat)
        _checks.at_most(MAX_REPEAT, action_repeat=action_repeat)
        suite, control = _dm_control()
        if (domain, task) not in suite.ALL_TASKS:
            tasks = [t for d, t in suite.ALL_TASKS if d == domain]
            domains = sorted({d for d, _ in suite.ALL_TASKS})
            known = f"env.task is one of {tasks}" if tasks else f"env.domain is one of {domains}"
            raise ValueError(f"dm_control has no task {domain} {task}: {known}")
        name = f"{domain} {task}"
        growth = _host.growth(num_envs, name)
        self._envs: list[Any] = []
        try:
            for i in range(num_envs):
                growth.check(i)
                random = {"random": np.random.RandomState(seeding.words(seed, i))}
                try:
                    self._envs.append(suite.load(domain, task, task_kwargs=random))
                except AttributeError as error:  # it mirrors MuJoCo's structs, version by version
                    raise ImportError(
                        "this dm-control does not work with the installed MuJoCo "
                        f"({error}): pip install 'pwm-fast[dmc]'"
                    ) from error
                except Exception as error:
                    _answers.blame(f"dm_control cannot make {name}", error)
            self._set_up(name, control, max_episode_steps, action_repeat)
        except BaseException:
            self.close()
            raise

    def _set_up(
        self, name: str, control: Any, max_episode_steps: int | None, action_repeat: int
    ) -> None:
        """Everything of the construction that follows the envs."""
        actions = self._envs[0].action_spec()
        low = np.broadcast_to(actions.minimum, actions.shape)
        high = np.broadcast_to(actions.maximum, actions.shape)
        driven = _spaces.actuators(self._envs[0].physics.model.ptr, actions.shape)
        _spaces.check_actions(name, low, high, driven)
        # The time limit is kept here; in the loop it would hide whether the task has terminated.
        limit = self._envs[0]._step_limit
        for env in self._envs:
            env._step_limit = math.inf
        if max_episode_steps is None:
            if not math.isfinite(limit):
                raise ValueError(f"{name} has no time limit: set env.max_episode_steps")
            max_episode_steps = -(-round(limit) // action_repeat)
        _checks.positive(max_episode_steps=max_episode_steps)

        self.action_repeat = action_repeat
        self._physics_error = control.PhysicsError
        self._pristine = [copy.copy(env.physics.model.ptr) for env in self._envs]
        self._model_arrays = [
            name
            for name in dir(self._pristine[0])
            if isinstance(getattr(self._pristine[0], name), np.ndarray)
        ]
        self._fingerprints = [self._fingerprint(model) for model in self._pristine]
        self._action_dtype = actions.dtype
        self._watch = PhysicsWatch()
        sizes = [int(np.prod(spec.shape)) for spec in self._envs[0].observation_spec().values()]
        terminates = type(self._envs[0].task).get_termination is not control.Task.get_termination
        super().__init__(
            name,
            len(self._envs),
            sum(sizes),
            low,
            high,
            max_episode_steps,
            can_terminate=terminates,
        )
        self.reset()

    def close(self) -> None:
        """Close the envs."""
        for env in self._envs:
            env.close()

    def viewer(self, width: int, height: int) -> _rendering.MujocoViewer:
        """Pictures by the model's first camera, or from afar where it has none.

        Raises:
            CannotRender: there is no OpenGL.
        """
        import mujoco

        camera = mujoco.MjvCamera()
        model = self._envs[0].physics.model.ptr
        if model.ncam:
            camera.type, camera.fixedcamid = mujoco.mjtCamera.mjCAMERA_FIXED, 0
        else:
            mujoco.mjv_defaultFreeCamera(model, camera)

        def look(env: int) -> tuple[Any, Any, Any]:
            physics = self._envs[env].physics
            return physics.model.ptr, physics.data.ptr, camera

        seconds = self._envs[0].control_timestep() * self.action_repeat
        return _rendering.MujocoViewer(look, seconds, width, height)

    def _reset_envs(self, mask: np.ndarray, seed: int | None) -> np.ndarray:
        obs = np.zeros((self.num_envs, *self.single_observation_space.shape))
        for i in np.flatnonzero(mask):
            if seed is not None:
                self._envs[i].task.random.seed(seeding.words(seed, int(i)))
            try:
                obs[i] = _flat(self._envs[i].reset().observation)
            except Exception as error:
                _forget_renderer(error)
                where = f"{self.name}, env {i}, reset of episode {self._episodes[i] + 1}"
                _answers.blame(where, error)
        return obs

    def _step_envs(self, action: np.ndarray) -> _host.Outcome:
        obs = np.zeros((self.num_envs, *self.single_observation_space.shape))
        reward = np.zeros(self.num_envs)
        terminated = np.zeros(self.num_envs, dtype=bool)
        diverged: dict[int, str] = {}
        for i, env in enumerate(self._envs):
            self._watch.begin(env.physics.data.ptr)

            def where(i: int = i) -> str:
                return f"{self.name}, {self._when(i)}"

            try:
                for _ in range(self.action_repeat):
                    step = env.step(action[i].astype(self._action_dtype))
                    reward[i] += _answers.number(step.reward, "reward", where)
                    if step.last():
                        terminated[i] = True
                        break
                obs[i] = _flat(step.observation)
                why = self._watch.end()
            except self._physics_error as error:
                why = " ".join(str(error).split())
            except Exception as error:
                _answers.blame(where(), error)
            if why is not None:
                diverged[i] = why
        truncated = self._steps.numpy() + 1 >= self.max_episode_steps
        final_obs = obs.copy()
        done = terminated | truncated
        if done.any():
            obs[done] = self._reset_envs(done, None)[done]
        return _host.Outcome(obs, final_obs, reward, terminated, truncated, diverged)

    def _env_state(self, index: int) -> dict[str, Any]:
        env = self._envs[index]
        model = env.physics.model.ptr
        # Some tasks move their target by writing into the model.
        changed = {
            name: torch.tensor(getattr(model, name), device="cpu")
            for name in self._changed_arrays(index)
        }
        return {
            "physics": _host.physics_state(model, env.physics.data.ptr),
            "fingerprint": self._fingerprints[index],
            "model": changed,
            "random": _host.dump_random(env.task.random.get_state(legacy=False)),
        }

    def _restore_env(self, index: int, state: dict[str, Any]) -> None:
        import mujoco

        if state["fingerprint"] != self._fingerprints[index]:  # the lqr tasks draw their model
            raise StateNotSupported(
                "the saved env has another model: make the environment with the seed it had"
            )
        env = self._envs[index]
        model, data = env.physics.model.ptr, env.physics.data.ptr
        for name in self._changed_arrays(index):
            getattr(model, name)[...] = getattr(self._pristine[index], name)
        for name, value in state["model"].items():
            getattr(model, name)[...] = value.numpy()
        _host.restore_physics(model, data, state["physics"])
        # Between steps dm_control keeps what follows from position and velocity up to date.
        mujoco.mj_step1(model, data)
        env.task.random.set_state(_host.load_random(state["random"]))

    def _fingerprint(self, model: Any) -> str:
        arrays = b"".join(getattr(model, name).tobytes() for name in self._model_arrays)
        return hashlib.sha256(arrays).hexdigest()

    def _changed_arrays(self, index: int) -> list[str]:
        """The arrays of an env's model that differ from what was compiled."""
        model, pristine = self._envs[index].physics.model.ptr, self._pristine[index]
        return [
            name
            for name in self._model_arrays
            if getattr(model, name).tobytes() != getattr(pristine, name).tobytes()
        ]


def _forget_renderer(error: BaseException) -> None:
    """Keep a renderer that could not be made from raising again, and aloud, in its ``__del__``."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        made: Any = frame.f_locals.get("self")
        if type(made).__name__ == "MjrContext" and not hasattr(made, "_ptr"):
            made._gl_context = None


def _flat(observation: dict[str, Any]) -> np.ndarray:
    return np.concatenate([np.ravel(value) for value in observation.values()])


def _dm_control() -> tuple[Any, Any]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a machine without a display
            from dm_control import suite
            from dm_control.rl import control
    except ImportError as error:
        needed = "env=dmc needs dm-control: pip install 'pwm-fast[dmc]'"
        raise ImportError(optional.reason(error, "dm_control", needed)) from error
    return suite, control
