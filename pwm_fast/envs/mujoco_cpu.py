"""Tasks on MuJoCo's native CPU physics: N envs stepped by a pool of threads."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pwm_fast import optional
from pwm_fast.envs import _checks
from pwm_fast.envs._divergence import BEYOND, MAX_COORDINATE, bad_states, warned_of
from pwm_fast.envs._robots import RobotBatch
from pwm_fast.envs.tasks.base import Task


class MujocoEnv(RobotBatch):
    """N envs of one task; implements :class:`pwm_fast.envs.protocol.VectorEnv`.

    An env whose physics diverges (a non-finite coordinate, one beyond 1e6, or what else MuJoCo
    calls bad, such as an acceleration beyond 1e10) terminates; its
    ``final_obs`` is the last sound observation, ``info["diverged"]`` marks it, and a warning says
    so once.

    Args:
        task: the robot and its task.
        num_envs: N, at least 1.
        seed: of the reset states, in [0, 2^63).
        max_episode_steps: time limit; the task's own by default.
        threads: physics threads; 1 is as fast as more for fewer than some hundred envs.

    Raises:
        ImportError: MuJoCo is missing or too old.
        ValueError: a number out of range.
    """

    _engine, _number_bytes = "mujoco", 8

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
        _checks.positive(threads=threads)
        try:
            import mujoco
            import mujoco.batch
        except ImportError as error:
            needed = "the built-in robots need MuJoCo 3.17 or newer: pip install 'pwm-fast[train]'"
            raise ImportError(optional.reason(error, "mujoco", needed)) from error

        super().__init__(task, num_envs, max_episode_steps, "cpu", seed)
        # Else MuJoCo would put a diverged env back to its start within the step, unseen.
        self._compiled.opt.disableflags |= int(mujoco.mjtDisableBit.mjDSBL_AUTORESET)
        self._batch = mujoco.batch.Batch(self._compiled, num_envs, threads)
        self._bad_kinds = list(bad_states())
        self._bad = self._bad_states()
        self._simulation_error = mujoco.batch.SimulationError
        # Live float64 views of the batch's state rows: writes reach the physics.
        self._state = torch.from_numpy(self._batch.state)
        self._qpos, self._qvel, self._ctrl, self._warmstart, self._time = (
            torch.from_numpy(self._batch.bind(name))
            for name in ("qpos", "qvel", "ctrl", "qacc_warmstart", "time")
        )
        self.reset()

    def step(self, action: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Any]]:
        """Advance all envs by one control step; see the protocol for what comes back."""
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
        if diverged is None:
            diverged = torch.zeros_like(done)
        info = self._info(final_obs, done, diverged)
        goal = self.task.goal(final_obs)
        if goal is not None:
            info["goal"] = goal
        self._obs.copy_(final_obs)
        if bool(done.any()):
            self._restart(done, *self._sample_reset())
            self._obs.copy_(torch.where(done.unsqueeze(-1), self._observe(), final_obs))
        return self._obs.clone(), reward, terminated, truncated, info

    def close(self) -> None:
        """Nothing to release before garbage collection."""

    def _physics(self) -> tuple[Tensor]:
        return (self._state,)

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
        except self._simulation_error as error:  # the other envs were stepped all the same
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
            # Counts since the start, which are of this step alone as no env diverged before.
            given = [n for k, n in bad_states().items() if self._batch.warning[i, k, 1]]
            why = message if i in failed else warned_of(given) if given else BEYOND
            self.divergence = f"{self._when(i)}: {why}"
            warnings.warn(
                f"the physics of {self.task.name} diverged in {int(diverged.sum())} of "
                f"{self.num_envs} envs ({self.divergence}); they were restarted (said once)",
                RuntimeWarning,
                stacklevel=3,
            )
        return diverged
