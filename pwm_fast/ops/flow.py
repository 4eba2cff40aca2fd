"""Flow dynamics: a velocity field, its integration over tau in [0, 1], the flow-matching path."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from pwm_fast.backends.base import Call
from pwm_fast.backends.dtypes import at_least_fp32, common_dtype, fp32_dtype
from pwm_fast.backends.select import declare, select
from pwm_fast.fused import algebra
from pwm_fast.ops import _checks
from pwm_fast.ops.coverage import can_fold, layer_tensors, unsupported_dynamics, without_width
from pwm_fast.ops.dynamics import (
    Transitions,
    check_fold,
    check_net,
    input_width,
    noisy,
    squared_error,
)
from pwm_fast.ops.mlp import RunNet, fused_mlp, mlp
from pwm_fast.ops.mlp import reference_mlp as run_net
from pwm_fast.ops.rollout import fused_rollout
from pwm_fast.ops.simnorm import project_simplex
from pwm_fast.ops.types import FusedStep, Layer, Method, VelocityFn
from pwm_fast.ops.weights import pack


class Flow(NamedTuple):
    """Flow dynamics: the next latent is a velocity MLP's integral over tau in [0, 1].

    Attributes:
        net: layers of the velocity MLP; input ``[z, a, tau, task]``, output width D.
        substeps: K, at least 1.
        method: ``"heun"`` or ``"euler"``.
        project: after every macro step clamp the latent at 0 and renormalise its groups of 8.
        fold: carry the first layer's pre-activation through the substeps in place of the latent,
            which spares a GEMM an evaluation where the head is linear and the net is narrow;
            None where it pays. The result is the same but for rounding.
        share: of the windows whose flow times are drawn, in [0, 1], rounded up: the first ones of a
            batch, whose order must be random. The others learn at tau = 0, where one Euler step has
            evaluated the velocity already: there the flow-matching error is the latent error of
            what was rolled out, and no noise is added. Below 1 for one such step alone; the loss
            then rolls out all H steps with their gradient, whatever ``start`` and ``start_grad``.
    """

    net: Sequence[Layer]
    substeps: int = 2
    method: Method = "heun"
    project: bool = False
    fold: bool | None = None
    share: float = 1.0

    @property
    def learns_from_starts(self) -> bool:
        """See :class:`pwm_fast.ops.Dynamics`."""
        return self.share == 1.0

    def drawn(self, batch: int) -> int:
        """The number of a batch's windows whose flow times are drawn."""
        return math.ceil(self.share * batch)

    def check(self, z: Tensor, action: int, task: Tensor | None) -> None:
        """See :class:`pwm_fast.ops.Dynamics`."""
        inputs = input_width(z, action, task) + 1
        _checks.positive_int("dynamics.substeps", self.substeps)
        _checks.method(self.method)
        if self.project:
            _checks.simnorm_width("z0", z.shape[-1], "the projection's group width", 8)
        if not 0.0 <= self.share <= 1.0:
            raise ValueError(f"dynamics.share must lie in [0, 1], got {self.share}")
        if self.share < 1.0 and ((self.method, self.substeps) != ("euler", 1) or self.project):
            raise ValueError(
                f"dynamics.share must be 1 but for one Euler step without projection, got "
                f"{self.share}"
            )
        check_fold(self.net, self.fold)
        check_net(self.net, inputs, z)

    def step(
        self, z: Tensor, a: Tensor, task: Tensor | None, dtype: torch.dtype, run: RunNet
    ) -> Tensor:
        """The velocity's integral, in the dtype of ``z``; see :class:`pwm_fast.ops.Dynamics`."""
        z = _reference_step(z, a, self.net, self.substeps, self.method, task, run, dtype)
        return project_simplex(z, 8) if self.project else z

    def error(self, steps: Transitions) -> Tensor:
        """Flow matching on the paths from ``z`` to ``target``.

        At ``z_tau = (1 - tau) z + tau target`` the velocity is compared with ``target - z``; see
        :class:`pwm_fast.ops.Dynamics`. Windows that learn at tau = 0 take no noise on their starts.
        """
        if steps.following is None:
            return self._on_paths(steps)
        if steps.tau is not None:
            _checks.flow_time(steps.tau, "z", steps.z)
        n = self.drawn(steps.z.shape[1])
        rolled, start = steps.following[:, n:], steps.z[:, n:]
        if not steps.target_grad:  # of the velocity alone: what the start adds has no gradient
            rolled = rolled + (start.detach() - start)
        found = squared_error(rolled, steps.target[:, n:], steps.dtype)
        if n == 0:
            return found
        noise = steps.start_noise
        if isinstance(noise, Tensor):
            noise = noise.expand_as(steps.z)[:, :n]
        first = steps._replace(
            z=steps.z[:, :n],
            action=steps.action[:, :n],
            target=steps.target[:, :n],
            task=None if steps.task is None else steps.task[:, :n],
            tau=steps.tau[:, :n] if steps.tau is not None and steps.tau.dim() > 1 else steps.tau,
            start_noise=noise,
        )
        return torch.cat((self._on_paths(first), found), dim=1)

    def _on_paths(self, steps: Transitions) -> Tensor:
        z, target, tau = steps.z, steps.target, steps.tau
        if tau is None:
            tau = torch.rand(z.shape[:2], dtype=z.dtype, device=z.device)
        origin = noisy(z, steps.start_noise)
        z_tau, wanted = flow_interpolate(origin.to(steps.dtype), target.to(steps.dtype), tau)
        velocity = velocity_field(
            z_tau.to(z.dtype),
            steps.action,
            tau,
            self.net,
            task=steps.task,
            backend=steps.backend,
        )
        return squared_error(
            velocity, wanted if steps.target_grad else wanted.detach(), steps.dtype
        )

    def fused(self) -> FusedStep | str:
        """See :class:`pwm_fast.ops.Dynamics`."""
        if self.project:
            return "latents are projected onto the simplices after every macro step"
        return FusedStep(self.net, self.method, self.substeps, fold=self.fold)


def integrate(
    velocity: VelocityFn, z: Tensor, substeps: int = 2, method: Method = "heun"
) -> Tensor:
    """Integrate ``dz/dtau = velocity(z, tau)`` from tau = 0 to 1 with fixed steps ``dt = 1/K``.

    Euler: ``z += dt v(z, t)``. Heun (the explicit trapezoidal rule, RK2): ``k1 = v(z, t)``,
    ``k2 = v(z + dt k1, t + dt)``, ``z += dt/2 (k1 + k2)``. Orders of convergence 1 and 2.

    Args:
        velocity: any callable ``(z, tau) -> dz/dtau``; ``tau`` is a Python float in [0, 1].
        z: start, any shape and floating dtype; differentiable, as is whatever ``velocity`` uses.
        substeps: K, at least 1.
        method: ``"heun"`` (2K evaluations) or ``"euler"`` (K evaluations).

    Returns:
        The state at tau = 1 in the shape and dtype of ``z``: slopes of another dtype (of a velocity
        under autocast, say) are converted before they are added.

    Raises:
        TypeError: ``z`` is not a floating tensor or ``velocity`` is not callable.
        ValueError: ``substeps`` or ``method`` is out of range.
    """
    if not callable(velocity):
        raise TypeError(f"velocity must be callable, got {type(velocity).__name__}")
    _checks.floating("z", z)
    _checks.positive_int("substeps", substeps)
    _checks.method(method)
    return march(velocity, at_least_fp32(z), substeps, method, z.dtype).to(z.dtype)


def velocity_field(
    z: Tensor,
    a: Tensor,
    tau: Tensor,
    net: Sequence[Layer],
    *,
    task: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Evaluate a velocity MLP on the logical concatenation ``[z, a, tau, task]``.

    Args:
        z: latents ``[..., D]``.
        a: actions ``[..., A]``.
        tau: flow times in [0, 1]: a scalar, ``[...]`` or ``[..., 1]``.
        net: layers of the MLP; input width ``D + A + 1 (+ E)``, output width D.
        task: task embeddings ``[..., E]``, or None.
        backend: see :mod:`pwm_fast.backends`.

    Returns:
        Velocities ``[..., D]``.

    Raises:
        TypeError: a tensor is not floating.
        ValueError: shapes, devices or options do not fit.
        BackendError: the backend that was asked for cannot run this.
    """
    _check_field(z, a, net, task)
    _checks.flow_time(tau, "z", z)
    column = tau if tau.dim() == z.dim() else tau.unsqueeze(-1)
    column = column.to(z.dtype).expand(*z.shape[:-1], 1)
    return mlp((z, a, column) if task is None else (z, a, column, task), net, backend=backend)


declare("flow_step", "gemm")


def flow_step(
    z: Tensor,
    a: Tensor,
    net: Sequence[Layer],
    substeps: int = 2,
    method: Method = "heun",
    *,
    task: Tensor | None = None,
    fold: bool | None = None,
    backend: str | None = None,
) -> Tensor:
    """One macro step of flow dynamics: integrate the velocity MLP over tau at a fixed action.

    Args:
        z: latents ``[..., D]``.
        a: actions ``[..., A]``.
        net: layers of the velocity MLP; input ``[z, a, tau, task]``, output width D.
        substeps: K, at least 1.
        method: ``"heun"`` or ``"euler"``.
        task: task embeddings ``[..., E]``, or None.
        fold: see :class:`Flow`.
        backend: see :mod:`pwm_fast.backends`.

    Returns:
        Next latents ``[..., D]``; differentiable in ``z``, ``a``, ``task`` and all parameters.

    Raises:
        TypeError: a tensor is not floating.
        ValueError: shapes, devices or options do not fit.
        BackendError: the backend that was asked for cannot run this.
    """
    _check_field(z, a, net, task)
    _checks.positive_int("substeps", substeps)
    _checks.method(method)
    if fold and not can_fold(net):
        raise ValueError("fold needs a linear last layer behind at least one hidden layer")
    inputs = [z, a, *(() if task is None else (task,))]
    reason = unsupported_dynamics(net) or without_width(inputs, net)
    call = Call([*inputs, *layer_tensors(net)], reason)
    choice = select("flow_step", backend, call)
    if choice.is_reference:
        return _reference_step(z, a, net, substeps, method, task)
    if not algebra.in_force().hoist:
        return _reference_step(z, a, net, substeps, method, task, partial(fused_mlp, choice))
    width, action = z.shape[-1], a.shape[-1]
    n = z.numel() // width
    step = FusedStep(net, method, substeps, fold=fold)
    packed = pack(choice, step, width, action, task, rows=n)
    embedding = None if task is None else task.reshape(n, task.shape[-1])
    following = fused_rollout(
        choice, packed, z.reshape(n, width), a.reshape(1, n, action), embedding
    )
    return following[1].view(z.shape)


def flow_interpolate(z0: Tensor, z1: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
    """Point and target of rectified flow on the straight path from ``z0`` to ``z1``.

    Args:
        z0: start latents ``[..., D]``.
        z1: end latents ``[..., D]``.
        tau: flow times in [0, 1]: a scalar, ``[...]`` or ``[..., 1]``.

    Returns:
        ``z_tau = (1 - tau) z0 + tau z1`` and the velocity target ``z1 - z0``, both ``[..., D]``.

    Raises:
        TypeError: a tensor is not floating.
        ValueError: the shapes differ, or ``tau`` does not fit them.

    Source: Liu et al. 2022 (arXiv 2209.03003), equation 1; Lipman et al. 2022 (arXiv 2210.02747).
    """
    _checks.vectors("z0", z0)
    _checks.floating("z1", z1)
    if z0.shape != z1.shape:
        raise ValueError(f"z1 must be shaped as z0 {tuple(z0.shape)}, got {tuple(z1.shape)}")
    _checks.flow_time(tau, "z0", z0)
    if tau.dim() < z0.dim():
        tau = tau.unsqueeze(-1)
    result, dtype = common_dtype(z0, z1), fp32_dtype(z0, z1)
    start, end, time = z0.to(dtype), z1.to(dtype), tau.to(dtype)
    return ((1.0 - time) * start + time * end).to(result), (end - start).to(result)


def _check_field(z: Tensor, a: Tensor, net: Sequence[Layer], task: Tensor | None) -> None:
    _checks.vectors("z", z)
    _checks.same_rows("a", a, "z", z)
    inputs = z.shape[-1] + a.shape[-1] + 1
    if task is not None:
        _checks.same_rows("task", task, "z", z)
        inputs += task.shape[-1]
    outputs = _checks.layers("net", net, inputs, z.device)
    if outputs != z.shape[-1]:
        raise ValueError(f"net has output width {outputs}, but the latent z has {z.shape[-1]}")


def march(
    velocity: VelocityFn, state: Tensor, substeps: int, method: Method, dtype: torch.dtype
) -> Tensor:
    """The state in its own dtype, float32 at least; the velocity sees it in ``dtype``."""
    dt = 1.0 / substeps
    for k in range(substeps):
        tau = k / substeps
        k1 = velocity(state.to(dtype), tau).to(state.dtype)
        if method == "euler":
            state = state + dt * k1
        else:
            # The stage time is (k+1)/K, not tau + dt: the last stage is then at 1 exactly.
            stage = (state + dt * k1).to(dtype)
            k2 = velocity(stage, (k + 1) / substeps).to(state.dtype)
            state = state + (0.5 * dt) * (k1 + k2)
    return state


def _reference_step(
    z: Tensor,
    a: Tensor,
    net: Sequence[Layer],
    substeps: int,
    method: Method,
    task: Tensor | None,
    run: RunNet = run_net,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """``z`` may be fp32 where ``dtype``, of the network's inputs, is 16-bit; it keeps its dtype."""
    inputs = z.dtype if dtype is None else dtype

    def velocity(state: Tensor, tau: float) -> Tensor:
        time = torch.full((), tau, dtype=inputs, device=z.device)
        column = time.expand(*state.shape[:-1], 1)
        return run(
            (state, a, column) if task is None else (state, a, column, task), net, "norm_act"
        )

    return march(velocity, at_least_fp32(z), substeps, method, inputs).to(z.dtype)
