"""Gradients through a built-in robot's control step, by finite differences in native MuJoCo.

None of the engines that step these models differentiates them: mujoco-warp 4.0 compiles its
kernels without a backward pass, so that Warp's tape gives zeros. MuJoCo's own ``mjd_transitionFD``
answers for one physics step of one env in a call. Here every env is stepped once more for each of
its ``2 nv + nu`` coordinates, velocities and controls, all in one call of MuJoCo's batch
(``python -m bench.gradients`` measures both).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pwm_fast.envs import MujocoEnv

# Of coordinates in m and rad, velocities in m/s and rad/s, and controls. Where a step meets the
# begin or the end of a contact, what jumps there enters divided by it: the smaller, the rarer. At
# 1e-9 rounding still leaves six digits; at 1e-7 one gradient in some hundred is a thousand times
# too large (python -m bench.gradients).
STEP = 1e-9


class State(NamedTuple):
    """What a task looks at, float64.

    Attributes:
        qpos: positions ``[N, nq]``.
        qvel: velocities ``[N, nv]``.
        action: the last actions ``[N, A]``, zero after a reset.
    """

    qpos: Tensor
    qvel: Tensor
    action: Tensor


class Physics:
    """The control step of N envs as a differentiable function of their states and actions.

    Jacobians are forward differences over the whole control step, its substeps included. They see
    the contacts that there are, not those that would begin or end. Where an action is at its bound
    its derivative is 0.

    Args:
        env: whose states it steps from; it is only read.
        threads: of the physics.
        step: of the differences.
    """

    def __init__(self, env: MujocoEnv, threads: int = 1, step: float = STEP) -> None:
        import mujoco.batch

        self._env, self._step = env, step
        self._substeps = env.task.substeps
        model = env.task.model()
        self.joints = Joints(model)
        self.copies = 2 * model.nv + model.nu + 1  # the first one is not moved
        batch = mujoco.batch.Batch(model, env.num_envs * self.copies, threads)
        self._advance = batch.step
        self._rows = torch.from_numpy(batch.state).view(env.num_envs, self.copies, -1)
        self._qpos, self._qvel, self._ctrl = (
            torch.from_numpy(batch.bind(name)).view(env.num_envs, self.copies, -1)
            for name in ("qpos", "qvel", "ctrl")
        )

    def state(self) -> State:
        """The states that the envs are in."""
        self._load()
        return State(*(x[:, 0].clone() for x in (self._qpos, self._qvel, self._ctrl)))

    def step(self, state: State, action: Tensor) -> State:
        """The states a control step later, before any reset, with gradients.

        Args:
            state: the values must be those of :meth:`state`.
            action: ``[N, A]`` in [-1, 1], of any floating dtype.
        """
        action = action.to(state.qpos.dtype)
        qpos, qvel = _Step.apply(state.qpos, state.qvel, action, self)
        return State(qpos, qvel, action)

    def differences(self, action: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Step from the envs' states.

        Args:
            action: ``[N, nu]``.

        Returns:
            ``qpos`` ``[N, nq]`` and ``qvel`` ``[N, nv]`` after the step; the Jacobian
            ``[N, 2 nv + nu, nq + nv]``, a row for each motion along a degree of freedom, change of
            a velocity and of a control; and the ``qpos`` that motions of unit speed change by
            ``[N, nv, nq]``.
        """
        self._load()
        self._ctrl.copy_(action.unsqueeze(1))
        motions = self.joints.motions(self._qpos[:, 0])
        nv = motions.shape[1]
        self._qpos[:, 1 : 1 + nv] += self._step * motions
        self._qvel[:, 1 + nv : 1 + 2 * nv].diagonal(dim1=1, dim2=2).add_(self._step)
        self._ctrl[:, 1 + 2 * nv :].diagonal(dim1=1, dim2=2).add_(self._step)
        self._advance(nstep=self._substeps)
        after = torch.cat((self._qpos, self._qvel), dim=-1)
        jacobian = (after[:, 1:] - after[:, :1]) / self._step
        return self._qpos[:, 0].clone(), self._qvel[:, 0].clone(), jacobian, motions

    def _load(self) -> None:
        self._rows.copy_(self._env.get_state()["physics"].unsqueeze(1))


class _Step(torch.autograd.Function):
    """The adjoint of a control step; what is normal to the unit quaternions has none."""

    @staticmethod
    def forward(
        ctx: Any, qpos: Tensor, qvel: Tensor, action: Tensor, physics: Physics
    ) -> tuple[Tensor, Tensor]:
        after_qpos, after_qvel, jacobian, motions = physics.differences(action)
        ctx.save_for_backward(jacobian, motions)
        return after_qpos, after_qvel

    @staticmethod
    def backward(ctx: Any, dqpos: Tensor, dqvel: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        jacobian, motions = ctx.saved_tensors
        nv = dqvel.shape[-1]
        back = (jacobian @ torch.cat((dqpos, dqvel), dim=-1).unsqueeze(-1)).squeeze(-1)
        along, dqvel, daction = back.tensor_split((nv, 2 * nv), dim=-1)
        # The gradient among the motions whose products with them are these: they are orthogonal.
        scaled = along / motions.square().sum(-1)
        return (scaled.unsqueeze(1) @ motions).squeeze(1), dqvel, daction, None


class Joints:
    """Which motions a model's joints make."""

    def __init__(self, model: Any) -> None:
        import mujoco

        kinds = mujoco.mjtJoint
        self.nv = model.nv
        self._straight: list[tuple[int, int]] = []  # of degrees of freedom and their coordinates
        self._turning: list[tuple[int, int]] = []  # first ones of three and of four
        for kind, at, dof in zip(model.jnt_type, model.jnt_qposadr, model.jnt_dofadr, strict=True):
            moves = {kinds.mjJNT_FREE: 3, kinds.mjJNT_BALL: 0}.get(kinds(kind), 1)
            self._straight += [(int(dof) + i, int(at) + i) for i in range(moves)]
            if moves != 1:
                self._turning.append((int(dof) + moves, int(at) + moves))

    def motions(self, qpos: Tensor) -> Tensor:
        """How ``qpos`` ``[N, nq]`` changes along each degree of freedom, ``[N, nv, nq]``."""
        found = qpos.new_zeros(qpos.shape[0], self.nv, qpos.shape[1])
        for dof, at in self._straight:
            found[:, dof, at] = 1.0
        for dof, at in self._turning:
            w, x, y, z = (0.5 * qpos[:, at : at + 4]).unbind(-1)
            # Half of the quaternion times i, j and k: turns about the body's own axes.
            for i, turned in enumerate(((-x, w, z, -y), (-y, -z, w, x), (-z, y, -x, w))):
                found[:, dof + i, at : at + 4] = torch.stack(turned, dim=-1)
        return found
