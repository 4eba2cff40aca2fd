"""Tasks on MuJoCo's native CPU physics: N worlds stepped by a pool of threads."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pwm_fast import memory, optional, seeding
from pwm_fast.envs import _checks
from pwm_fast.envs._divergence import BEYOND, MAX_COORDINATE, bad_states, warned_of
from pwm_fast.envs.protocol import SAME_STEP, Box
from pwm_fast.envs.tasks.base import Task


class MujocoEnv:
    """N worlds of one task; implements :class:`pwm_fast.envs.protocol.VectorEnv`.

    A world whose physics diverges (a non-finite coordinate, one beyond 1e6, or what else MuJoCo
    calls bad, such as an acceleration beyond 1e10) terminates; its
    ``final_obs`` is the last sound observation, ``info["diverged"]`` marks it, and a warning says
    so once.

    Args:
        task: the robot and its task.
        num_envs: N, at least 1.
        seed: of the reset states, in [0, 2^63).
        max_episode_steps: time limit; the task's own by default.
        threads: physics threads; 1 is as fast as more for fewer than some hundred worlds.

    Raises:
        ImportError: MuJoCo is missing or too old.
        ValueError: a number out of range.
    """

    @torch.inference_mode(False)  # its buffers are written to in any mode
    def __init__(
        self,
        task: Task,
        num_envs: int,
        *,
        seed: int = 0,
        max_episode_steps: int | None = None,
        threads: int = 1,
    ) -> None:
        if max_episode_steps is None:
            max_episode_steps = task.max_episode_steps
        _checks.positive(num_envs=num_envs, max_episode_steps=max_episode_steps, threads=threads)
        try:
            import mujoco
            import mujoco.batch
        except ImportError as error:
            needed = "the built-in robots need MuJoCo 3.17 or newer: pip install 'pwm-fast[train]'"
            raise ImportError(optional.reason(error, "mujoco", needed)) from error

        self.task = task
        self.num_envs = num_envs
        self.device = torch.device("cpu")
        self.single_observation_space = Box((task.obs_dim,))
        self.single_action_space = Box((task.action_dim,), -1.0, 1.0)
        self.max_episode_steps = max_episode_steps
        self.can_terminate = task.can_terminate
        self.metadata: dict[str, Any] = {"autoreset_mode": SAME_STEP}

        model = mujoco.MjModel.from_xml_string(task.mjcf())
        # Else MuJoCo would put a diverged world back to its start within the step, unseen.
        model.opt.disableflags |= int(mujoco.mjtDisableBit.mjDSBL_AUTORESET)
        floats = mujoco.mj_stateSize(model, int(mujoco.mjtState.mjSTATE_FULLPHYSICS))
        memory.require(
            num_envs * (8 * floats + 4 * (4 * task.obs_dim + 2)),
            f"{num_envs} worlds of {task.name}",
            memory.WORLDS,
            self.device,
        )
        self._batch = mujoco.batch.Batch(model, num_envs, threads)
        self._bad_kinds = list(bad_states())
        self._bad = self._bad_states()
        self._simulation_error = mujoco.batch.SimulationError
        # Live float64 views of the batch's state rows: writes reach the physics.
        self._state = torch.from_numpy(self._batch.state)
        self._qpos = torch.from_numpy(self._batch.bind("qpos"))
        self._qvel = torch.from_numpy(self._batch.bind("qvel"))
        self._ctrl = torch.from_numpy(self._batch.bind("ctrl"))  # doubles as the last action
        self._warmstart = torch.from_numpy(self._batch.bind("qacc_warmstart"))
        self._time = torch.from_numpy(self._batch.bind("time"))

        self._generator = torch.Generator().manual_seed(seeding.generator_seed(seed))
        self._steps = torch.zeros(num_envs, dtype=torch.int64, device="cpu")
        self._returns = torch.zeros(num_envs, device="cpu")
        self._obs = torch.zeros(num_envs, task.obs_dim, device="cpu")
        self.divergence: str | None = None  # why a world diverged first
        self.reset()

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Tensor, dict[str, Any]]:
        """Start new episodes in all worlds, or where ``options["reset_mask"]`` ``[N]`` is True."""
        if seed is not None:
            self._generator.manual_seed(seeding.generator_seed(seed))
        mask = _checks.reset_mask(options, self.num_envs)
        self._restart(mask)
        self._obs = torch.where(mask.unsqueeze(-1), self._observe(), self._obs)
        return self._obs.clone(), {}

    def step(self, action: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Any]]:
        """Advance all worlds by one control step; see the protocol for what comes back."""
        action = _checks.unit_action(action, self.num_envs, self.task.action_dim)
        reward = self.task.reward(self._obs, action)
        self._ctrl.copy_(action)
        diverged = self._advance()
        self._steps += 1
        self._returns += reward

        final_obs = self._observe()
        terminated = self.task.terminated(final_obs)
        if diverged is not None:
            final_obs = torch.where(diverged.unsqueeze(-1), self._obs, final_obs)
            terminated = terminated | diverged
        truncated = self._steps >= self.max_episode_steps
        done = terminated | truncated
        info: dict[str, Any] = {
            "final_obs": final_obs,
            "episode": {
                "return": self._returns.clone(),
                "length": self._steps.clone(),
                "mask": done,
            },
            "diverged": torch.zeros_like(done) if diverged is None else diverged,
        }
        goal = self.task.goal(final_obs)
        if goal is not None:
            info["goal"] = goal
        if bool(done.any()):
            self._restart(done)
            self._obs = torch.where(done.unsqueeze(-1), self._observe(), final_obs)
        else:
            self._obs = final_obs.clone()
        return self._obs.clone(), reward, terminated, truncated, info

    def get_state(self) -> dict[str, Any]:
        """Everything that decides the future: physics, counters, last action, random numbers."""
        return {
            "engine": "mujoco",
            "physics": self._state.clone(),
            "obs": self._obs.clone(),
            "steps": self._steps.clone(),
            "returns": self._returns.clone(),
            "generator": self._generator.get_state(),
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue from a state of :meth:`get_state`, to the bit.

        Raises:
            ValueError: the state is of another engine, robot or number of worlds.
        """
        _checks.saved_state(state, "mujoco", tuple(self._state.shape))
        self._state.copy_(state["physics"])
        self._obs = state["obs"].clone()
        self._steps.copy_(state["steps"])
        self._returns.copy_(state["returns"])
        self._generator.set_state(state["generator"].cpu())

    def close(self) -> None:
        """Nothing to release before garbage collection."""

    def _observe(self) -> Tensor:
        return self.task.observation(self._qpos, self._qvel, self._ctrl).float()

    def _restart(self, mask: Tensor) -> None:
        qpos, qvel = self.task.sample_reset(
            self.num_envs, self._generator, self._qpos.dtype, self.device
        )
        rows = mask.unsqueeze(-1)
        self._qpos.copy_(torch.where(rows, qpos, self._qpos))
        self._qvel.copy_(torch.where(rows, qvel, self._qvel))
        # masked_fill, not a product with zero: a diverged world holds NaN.
        self._ctrl.masked_fill_(rows, 0.0)
        self._warmstart.masked_fill_(rows, 0.0)
        self._time.masked_fill_(mask, 0.0)
        self._steps.masked_fill_(mask, 0)
        self._returns.masked_fill_(mask, 0.0)

    def _bad_states(self) -> np.ndarray:
        """How often MuJoCo found a position, velocity, acceleration or control bad so far, [N]."""
        counts: np.ndarray = self._batch.warning[:, self._bad_kinds, 1].sum(-1)
        return counts

    def _advance(self) -> Tensor | None:
        """Step the physics; where it diverged, bool ``[N]``, or None where it did nowhere."""
        failed: list[int] = []
        message = ""
        try:
            self._batch.step(nstep=self.task.substeps)
        except self._simulation_error as error:  # the other worlds were stepped all the same
            failed, message = error.ids.tolist(), " ".join(str(error).split())
        bad = self._bad_states()
        largest = [torch.linalg.vector_norm(x, math.inf) for x in (self._qpos, self._qvel)]
        # NaN compares false, so "not below" catches it too.
        new = bad > self._bad
        self._bad = bad
        if not failed and not new.any() and all(float(x) < MAX_COORDINATE for x in largest):
            return None

        size = torch.maximum(self._qpos.abs().amax(-1), self._qvel.abs().amax(-1))
        diverged = ~(size < MAX_COORDINATE)
        diverged |= torch.from_numpy(new)
        diverged[failed] = True
        if self.divergence is None:
            i = int(diverged.long().argmax())
            # Counts since the start, which are of this step alone as no world diverged before.
            given = [n for k, n in bad_states().items() if self._batch.warning[i, k, 1]]
            why = message if i in failed else warned_of(given) if given else BEYOND
            self.divergence = f"world {i}, step {int(self._steps[i]) + 1} of its episode: {why}"
            warnings.warn(
                f"the physics of {self.task.name} diverged in {int(diverged.sum())} of "
                f"{self.num_envs} worlds ({self.divergence}); they were restarted (said once)",
                RuntimeWarning,
                stacklevel=3,
            )
        return diverged
