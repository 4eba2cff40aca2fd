"""Latents under given actions, and what every rollout needs."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from pwm_fast.backends.base import Call, Kernels
from pwm_fast.backends.dtypes import at_least_fp32
from pwm_fast.backends.select import Choice, declare, select
from pwm_fast.backends.specs import LayerSpec, decode_dynamics, encode_layers
from pwm_fast.fused import algebra
from pwm_fast.fused.dynamics import dynamics_weights, saved_by_dynamics
from pwm_fast.fused.rollout import rollout_backward, rollout_forward
from pwm_fast.ops import _checks
from pwm_fast.ops.coverage import layer_tensors, unsupported_dynamics, without_width
from pwm_fast.ops.dynamics import Dynamics
from pwm_fast.ops.mlp import RunNet, fused_mlp, reference_mlp, run_mlp
from pwm_fast.ops.operator import Operator, as_rows
from pwm_fast.ops.types import FusedStep
from pwm_fast.ops.weights import Packed, pack

declare("latent_rollout", "gemm")


class _Rollout(Operator):
    name, family, outputs = "rollout", "gemm", ("z", "saved")
    grads = ("z0", "c", "w_z", "w_tau", "params")
    flags = {"wgrad": ("w_z", "w_tau", "params")}  # noqa: RUF012
    contiguous = ("z0",)
    rows, row_axes = {"z0": 0, "c": 1}, (1,)

    forward, backward = staticmethod(rollout_forward), staticmethod(rollout_backward)

    @classmethod
    def fake(cls, k: Kernels, a: Any) -> tuple[Tensor, list[Tensor]]:
        horizon, batch = a.c.shape[:2]
        return a.z0.new_empty(horizon + 1, *a.z0.shape), saved_by_rollout(k, a, horizon, batch)

    @classmethod
    def fake_backward(cls, k: Kernels, a: Any) -> Any:
        steps, batch = a.dz.shape[:2]
        a.c = a.dz.new_empty(steps - 1, batch, a.w_z.shape[0])
        return super().fake_backward(k, a)


_rollout = _Rollout()


def saved_by_rollout(k: Kernels, a: Any, horizon: int, batch: int) -> list[Tensor]:
    """What an operator of arguments ``a`` keeps of its dynamics, in shapes alone."""
    spec = decode_dynamics(a.spec)
    weights = dynamics_weights(spec, a.w_z, a.w_tau, a.params)
    return saved_by_dynamics(k, spec, weights, horizon, batch, save=a.save, wgrad=a.wgrad)


def latent_rollout(
    z0: Tensor,
    action: Tensor,
    dynamics: Dynamics,
    *,
    task: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Latents under given actions: H macro steps of the dynamics.

    Args:
        z0: start latents ``[B, D]``.
        action: actions ``[H, B, A]``, time first.
        dynamics: :class:`Flow`, :class:`Shortcut`, :class:`LatentMLP`, :class:`ResidualMLP` or
            others (:class:`Dynamics`).
        task: task embeddings ``[B, E]``, or None.
        backend: see :mod:`pwm_fast.backends`.

    Returns:
        ``[H+1, B, D]``, the first being ``z0``; differentiable in ``z0``, ``action``, ``task`` and
        all parameters. Weight gradients are formed once, over all steps and evaluations.

    Raises:
        TypeError: a tensor is not floating.
        ValueError: shapes, devices or options do not fit.
        BackendError: the backend that was asked for cannot run this.
    """
    check_rows("z0", z0)
    check_steps("action", action, z0)
    dynamics.check(z0, action.shape[-1], task)
    step = dynamics.fused()
    choice = select("latent_rollout", backend, call_of(dynamics, step, [z0, action], task))
    if choice.is_reference or isinstance(step, str):
        return _reference(z0, action, dynamics, task)
    if not algebra.in_force().hoist:
        return _reference(z0, action, dynamics, task, partial(fused_mlp, choice))
    rows = action.shape[:-1].numel()
    packed = pack(choice, step, z0.shape[-1], action.shape[-1], task, rows=rows)
    return fused_rollout(choice, packed, z0, action, task)


def _reference(
    z: Tensor,
    action: Tensor,
    dynamics: Dynamics,
    task: Tensor | None,
    run: RunNet = reference_mlp,
) -> Tensor:
    # What a flow carries from step to step is not rounded to 16 bits; what is handed out is.
    latents, state = [z], at_least_fp32(z)
    for a in action.unbind(0):
        state = dynamics.step(state, a, task, z.dtype, run)
        latents.append(state.to(z.dtype))
    return torch.stack(latents)


_LINEAR = encode_layers([LayerSpec("norm_act", "none", False, False, 8, 1e-5)])


def _linear(choice: Choice, x: Tensor, weight: Tensor) -> Tensor:
    """``x W^T`` of rows ``x``; through the operator, for its care with 16-bit weight gradients."""
    return run_mlp([as_rows(x)], [weight], [], _LINEAR, choice=choice)


def constant_term(choice: Choice, packed: Packed, task: Tensor | None) -> Tensor:
    """What the first GEMM has beside latent, action and flow time, ``[1 or B, U]``."""
    base = packed.bias
    if task is not None and packed.w_task is not None:
        h = _linear(choice, task, packed.w_task)
        return h if base is None else h + base
    if base is None:
        base = packed.w_z.new_zeros(packed.w_z.shape[0])
    return base.unsqueeze(0)


def fused_rollout(
    choice: Choice, packed: Packed, z0: Tensor, action: Tensor, task: Tensor | None
) -> Tensor:
    """Latents ``[H+1, B, D]`` from ``z0 [B, D]`` under actions ``[H, B, A]``; task ``[B, E]``."""
    base = constant_term(choice, packed, task)
    hoisted = _linear(choice, action, packed.w_a)
    c = hoisted.view(*action.shape[:2], packed.w_a.shape[0]) + base
    return _rollout(z0, c, packed.w_z, packed.w_tau, packed.params, packed.spec, choice=choice)


def call_of(
    dynamics: Dynamics, step: FusedStep | str, tensors: list[Tensor], task: Tensor | None
) -> Call:
    """A rollout's call; ``tensors`` begin with latents and actions."""
    reason: str | None
    if isinstance(step, str):
        reason = step
    else:
        reason = unsupported_dynamics(step.net)
        if reason is None:
            inputs = tensors[:2] if task is None else [*tensors[:2], task]
            reason = without_width(inputs, step.net)
    tensors = [*tensors, *layer_tensors(dynamics.net)]
    return Call(tensors if task is None else [*tensors, task], reason)


def check_rows(name: str, z: Tensor) -> None:
    """Latents are ``[B, D]``."""
    _checks.vectors(name, z)
    if z.dim() != 2:
        raise ValueError(f"{name} must be [B, D], got {tuple(z.shape)}")


def check_steps(name: str, x: Tensor, z: Tensor) -> None:
    """Actions or their noise are ``[H, B, A]`` for latents ``[B, D]``."""
    _checks.floating(name, x)
    if x.dim() != 3 or x.shape[1] != z.shape[0]:
        raise ValueError(f"{name} must be [H, {z.shape[0]}, A], got {tuple(x.shape)}")
    _checks.same_device(name, x, "z0", z.device)
