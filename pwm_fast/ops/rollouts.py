"""Public operations on whole latent rollouts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from pwm_fast.backends.base import Call
from pwm_fast.backends.select import Choice, declare, for_part, select
from pwm_fast.fused import algebra
from pwm_fast.ops import _checks, rollout_operators
from pwm_fast.ops.coverage import (
    can_fold,
    layer_tensors,
    unsupported,
    unsupported_dynamics,
    without_width,
)
from pwm_fast.ops.mlp import fused_mlp, mlp
from pwm_fast.ops.reference import rollouts as reference
from pwm_fast.ops.two_hot import two_hot_decode
from pwm_fast.ops.types import Dynamics, Flow, Heads, ImaginedRollout, Layer, Policy
from pwm_fast.ops.weights import Packed, pack

declare("latent_rollout", "gemm")
declare("imagine", "gemm")


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
        dynamics: :class:`Flow` or :class:`LatentMap`.
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
    _check_rows("z0", z0)
    _check_steps("action", action, z0)
    _check_dynamics(dynamics, z0, action.shape[-1], task)
    choice = select("latent_rollout", backend, _call(dynamics, [z0, action], task))
    if choice.is_reference:
        return reference.latent_rollout(z0, action, dynamics, task)
    if not algebra.in_force().hoist:
        return reference.latent_rollout(z0, action, dynamics, task, partial(fused_mlp, choice))
    packed = _pack(choice, dynamics, z0, action.shape[-1], task)
    return rollout_operators.rollout(choice, packed, z0, action, task)


def imagine(
    z0: Tensor,
    policy: Policy,
    dynamics: Dynamics,
    heads: Heads,
    *,
    noise: Tensor,
    detach: bool = True,
    last_value_only: bool = False,
    task: Tensor | None = None,
    backend: str | None = None,
) -> ImaginedRollout:
    """A policy acting in a world model for H macro steps, with rewards, terminations and values.

    ``a_t = tanh(mu(z_t) + std noise_t)``, ``z_{t+1} = F(z_t, a_t)``; only these are sequential. The
    heads run once over all steps. Where the world model's parameters require no gradient, none of
    theirs is computed.

    Args:
        z0: start latents ``[B, D]``.
        policy: the Gaussian policy.
        dynamics: :class:`Flow` or :class:`LatentMap`.
        heads: reward, termination and value heads.
        noise: standard normal ``[H, B, A]``; zeros act deterministically.
        detach: the policy sees latents without their gradient (the dynamics still carry it), so
            that its own backward pass is one batch.
        last_value_only: value the last latents alone.
        task: task embeddings ``[B, E]``, or None.
        backend: see :mod:`pwm_fast.backends`.

    Returns:
        :class:`ImaginedRollout`, differentiable in ``z0``, ``task`` and all parameters.

    Raises:
        TypeError: a tensor is not floating.
        ValueError: shapes, devices or options do not fit.
        BackendError: the backend that was asked for cannot run this.

    Source: PWM (arXiv 2407.02466), section 4; SHAC (arXiv 2204.07137).
    """
    _check_rows("z0", z0)
    _check_steps("noise", noise, z0)
    width = noise.shape[-1]
    _check_dynamics(dynamics, z0, width, task)
    _checks.floating("policy.std", policy.std)
    if tuple(policy.std.shape) != (width,):
        raise ValueError(f"policy.std must be [{width}], got {tuple(policy.std.shape)}")
    outputs = _checks.layers("policy.layers", policy.layers, z0.shape[-1], z0.device)
    if outputs != width:
        raise ValueError(f"policy.layers has output width {outputs}, but noise has {width}")

    call = _call(dynamics, [z0, noise, policy.std, *layer_tensors(policy.layers)], task)
    if call.unsupported is None:
        reason = unsupported(policy.layers, "act_norm")
        call = call._replace(unsupported=reason or without_width([], policy.layers))
    if call.unsupported is None and noise.requires_grad:
        call = call._replace(unsupported="a gradient towards noise is asked for")
    choice = select("imagine", backend, call)
    if choice.is_reference:
        z, action = reference.imagine(z0, noise, policy, dynamics, task, detach)
    elif not algebra.in_force().hoist:
        run = partial(fused_mlp, choice)
        z, action = reference.imagine(z0, noise, policy, dynamics, task, detach, run)
    else:
        packed = _pack(choice, dynamics, z0, width, task)
        z, action = rollout_operators.imagine(
            choice, packed, z0, noise, policy.layers, policy.std, task, detach
        )

    steps = noise.shape[0]
    embedding = () if task is None else (task.expand(steps, *task.shape),)
    inputs = (z[:-1], *embedding, action)

    def on_inputs(layers: Sequence[Layer]) -> Tensor:
        return wide(_over_steps(lambda *x: mlp(x, layers, backend=backend), 0, *inputs))

    def wide(x: Tensor) -> Tensor:  # autocast's products are 16 bits, what follows them is not
        return x.to(torch.promote_types(x.dtype, z0.dtype))

    logits = on_inputs(heads.reward)
    if logits.shape[-1] == 1:
        reward = logits.squeeze(-1)
    else:
        reward = two_hot_decode(
            logits,
            heads.vmin,
            heads.vmax,
            transform=heads.symlog,
            backend=for_part("two_hot_decode", backend),
        )
    continues = value = None
    if heads.termination is not None:
        continues = torch.sigmoid(-on_inputs(heads.termination).squeeze(-1))
    if heads.value is not None:
        critics = heads.value

        def value_of(states: Tensor) -> Tensor:
            return mlp((states,), critics, order="act_norm", backend=backend)

        members = value_of(z[-1]) if last_value_only else _over_steps(value_of, 1, z)
        value = wide(members.squeeze(-1)).amin(0)
    return ImaginedRollout(z, action, reward, continues, value)


def _call(dynamics: Dynamics, tensors: list[Tensor], task: Tensor | None) -> Call:
    reason = unsupported_dynamics(dynamics.net)
    if reason is None:
        inputs = tensors[:2] if task is None else [*tensors[:2], task]
        reason = without_width(inputs, dynamics.net)
    if isinstance(dynamics, Flow) and dynamics.project:
        reason = "latents are projected onto the simplices after every macro step"
    tensors = [*tensors, *layer_tensors(dynamics.net)]
    return Call(tensors if task is None else [*tensors, task], reason)


def _pack(
    choice: Choice, dynamics: Dynamics, z: Tensor, action: int, task: Tensor | None
) -> Packed:
    flow = dynamics if isinstance(dynamics, Flow) else None
    return pack(
        choice,
        dynamics.net,
        "map" if flow is None else flow.method,
        1 if flow is None else flow.substeps,
        z.shape[-1],
        action,
        task=0 if task is None else task.shape[-1],
        task_first=flow is None,
        fold=False if flow is None else flow.fold,
    )


def _over_steps(head: Callable[..., Tensor], axis: int, *inputs: Tensor) -> Tensor:
    """A head on inputs ``[T, B, .]``: on all steps as one batch, unless that is switched off."""
    if algebra.in_force().batch_heads or inputs[0].shape[0] == 0:
        return head(*inputs)
    return torch.stack([head(*step) for step in zip(*inputs, strict=True)], axis)


def _check_rows(name: str, z: Tensor) -> None:
    _checks.vectors(name, z)
    if z.dim() != 2:
        raise ValueError(f"{name} must be [B, D], got {tuple(z.shape)}")


def _check_steps(name: str, x: Tensor, z: Tensor) -> None:
    _checks.floating(name, x)
    if x.dim() != 3 or x.shape[1] != z.shape[0]:
        raise ValueError(f"{name} must be [H, {z.shape[0]}, A], got {tuple(x.shape)}")
    _checks.same_device(name, x, "z0", z.device)


def _check_dynamics(dynamics: Dynamics, z: Tensor, action: int, task: Tensor | None) -> None:
    inputs = z.shape[-1] + action
    if task is not None:
        _checks.same_rows("task", task, "z0", z)
        inputs += task.shape[-1]
    if isinstance(dynamics, Flow):
        inputs += 1
        _checks.positive_int("dynamics.substeps", dynamics.substeps)
        _checks.method(dynamics.method)
        if dynamics.project:
            _checks.simnorm_width("z0", z.shape[-1], "the projection's group width", 8)
        if dynamics.fold and not can_fold(dynamics.net):
            raise ValueError(
                "dynamics.fold needs a linear last layer behind at least one hidden layer"
            )
    outputs = _checks.layers("dynamics.net", dynamics.net, inputs, z.device)
    if outputs != z.shape[-1]:
        raise ValueError(f"dynamics.net has output width {outputs}, but z0 has {z.shape[-1]}")
