"""A policy acting in a world model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pwm_fast.backends.base import Kernels
from pwm_fast.backends.dtypes import at_least_fp32, common_dtype, fp32_dtype
from pwm_fast.backends.select import declare, for_part, select
from pwm_fast.backends.specs import decode_layers, encode_layers, split_params
from pwm_fast.fused import algebra
from pwm_fast.fused.imagine import imagine_backward, imagine_forward
from pwm_fast.fused.saved import saved_buffers
from pwm_fast.ops import _checks
from pwm_fast.ops.coverage import layer_tensors, unsupported, without_width
from pwm_fast.ops.dynamics import Dynamics
from pwm_fast.ops.mlp import RunNet, fused_mlp, mlp, reference_mlp
from pwm_fast.ops.operator import Operator
from pwm_fast.ops.rollout import (
    call_of,
    check_rows,
    check_steps,
    constant_term,
    saved_by_rollout,
)
from pwm_fast.ops.two_hot import two_hot_decode
from pwm_fast.ops.types import Heads, ImaginedRollout, Layer, Policy
from pwm_fast.ops.weights import flat, pack, specs_of

declare("imagine", "gemm")


class _Imagine(Operator):
    name, family, outputs, results = "imagine", "gemm", ("z", "action", "saved"), 2
    grads = ("z0", "base", "w_a", "w_z", "w_tau", "params", "std", "actor")
    refused = ("noise",)
    flags = {"wgrad": ("w_z", "w_tau", "params"), "actor_wgrad": ("actor",)}  # noqa: RUF012
    contiguous = ("z0", "noise")
    rows, row_axes, broadcast = {"z0": 0, "noise": 1, "base": 0}, (1, 1), "base"

    forward, backward = staticmethod(imagine_forward), staticmethod(imagine_backward)

    @classmethod
    def fake(cls, k: Kernels, a: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
        horizon, batch = a.noise.shape[:2]
        saved = saved_by_rollout(k, a, horizon, batch)
        specs = decode_layers(a.actor_spec)
        actor = split_params(specs, a.actor)
        saved += saved_buffers(k, specs, actor, horizon, batch, a.save, a.actor_wgrad)
        return a.z0.new_empty(horizon + 1, *a.z0.shape), a.z0.new_empty(a.noise.shape), saved

    @classmethod
    def fake_backward(cls, k: Kernels, a: Any) -> Any:
        a.z0 = a.z[0]
        return super().fake_backward(k, a)


_imagine = _Imagine()


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
        dynamics: :class:`Flow`, :class:`Shortcut`, :class:`LatentMLP`, :class:`ResidualMLP` or
            others (:class:`Dynamics`).
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
    check_rows("z0", z0)
    check_steps("noise", noise, z0)
    width = noise.shape[-1]
    dynamics.check(z0, width, task)
    check_policy(policy, z0, width)
    z, action = roll_out(z0, policy, dynamics, noise, detach, task, backend)
    reward, continues = read_heads(z[:-1], action, heads, task, backend)
    value = None
    if heads.value is not None:
        critics = heads.value

        def value_of(states: Tensor) -> Tensor:
            return mlp((states,), critics, order="act_norm", backend=backend)

        members = value_of(z[-1]) if last_value_only else _over_steps(value_of, 1, z)
        value = in_dtype_of(z0, members.squeeze(-1)).amin(0)
    return ImaginedRollout(z, action, reward, continues, value)


def roll_out(
    z0: Tensor,
    policy: Policy,
    dynamics: Dynamics,
    noise: Tensor,
    detach: bool,
    task: Tensor | None,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """What is sequential: latents ``[H+1, B, D]`` and actions ``[H, B, A]``."""
    step = dynamics.fused()
    tensors = [z0, noise, policy.std, *layer_tensors(policy.layers)]
    call = call_of(dynamics, step, tensors, task)
    if call.unsupported is None:
        reason = unsupported(policy.layers, "act_norm")
        call = call._replace(unsupported=reason or without_width([], policy.layers))
    if call.unsupported is None and noise.requires_grad:
        call = call._replace(unsupported="a gradient towards noise is asked for")
    choice = select("imagine", backend, call)
    if choice.is_reference or isinstance(step, str):
        return _reference(z0, noise, policy, dynamics, task, detach)
    if not algebra.in_force().hoist:
        run = partial(fused_mlp, choice)
        return _reference(z0, noise, policy, dynamics, task, detach, run)
    rows = noise.shape[:-1].numel()
    packed = pack(choice, step, z0.shape[-1], noise.shape[-1], task, rows=rows)
    return _imagine(
        z0,
        noise,
        constant_term(choice, packed, task),
        packed.w_a,
        packed.w_z,
        packed.w_tau,
        packed.params,
        policy.std,
        flat(policy.layers),
        packed.spec,
        encode_layers(specs_of(policy.layers, "act_norm")),
        detach,
        choice=choice,
    )


def _reference(
    z: Tensor,
    noise: Tensor,
    policy: Policy,
    dynamics: Dynamics,
    task: Tensor | None,
    detach: bool,
    run: RunNet = reference_mlp,
) -> tuple[Tensor, Tensor]:
    latents, actions, state = [z], [], at_least_fp32(z)
    for eps in noise.unbind(0):
        seen = latents[-1]
        mu = run((seen.detach() if detach else seen,), policy.layers, "act_norm")
        a = squashed(mu, policy.std, eps)
        state = dynamics.step(state, a, task, z.dtype, run)
        actions.append(a)
        latents.append(state.to(z.dtype))
    return torch.stack(latents), torch.stack(actions) if actions else torch.empty_like(noise)


def read_heads(
    z: Tensor, action: Tensor, heads: Heads, task: Tensor | None, backend: str | None
) -> tuple[Tensor, Tensor | None]:
    """Rewards of actions ``[H, B, A]`` in latents ``[H, B, D]`` with task embeddings ``[B, E]``.

    Returns:
        Rewards ``[H, B]``; probabilities ``[H, B]`` that steps do not terminate, or None.
    """
    embedding = () if task is None else (task.expand(z.shape[0], *task.shape),)
    inputs = (z, *embedding, action)

    def on_inputs(layers: Sequence[Layer]) -> Tensor:
        return in_dtype_of(z, _over_steps(lambda *x: mlp(x, layers, backend=backend), 0, *inputs))

    reward = decoded(on_inputs(heads.reward), heads.vmin, heads.vmax, heads.symlog, backend)
    if heads.termination is None:
        return reward, None
    return reward, torch.sigmoid(-on_inputs(heads.termination).squeeze(-1))


def decoded(outputs: Tensor, vmin: float, vmax: float, symlog: bool, backend: str | None) -> Tensor:
    """What a head says: its one output, or the expectation of its two-hot logits."""
    if outputs.shape[-1] == 1:
        return outputs.squeeze(-1)
    part = for_part("two_hot_decode", backend)
    return two_hot_decode(outputs, vmin, vmax, transform=symlog, backend=part)


def in_dtype_of(z: Tensor, x: Tensor) -> Tensor:
    """Autocast's GEMMs are 16 bits, what follows them is not."""
    return x.to(torch.promote_types(x.dtype, z.dtype))


def squashed(mu: Tensor, std: Tensor, eps: Tensor) -> Tensor:
    """A Gaussian policy's action, ``tanh(mu + std eps)``."""
    dtype = fp32_dtype(mu, std, eps)
    action = torch.tanh(mu.to(dtype) + std.to(dtype) * eps.to(dtype))
    return action.to(common_dtype(mu, std, eps))


def _over_steps(head: Callable[..., Tensor], axis: int, *inputs: Tensor) -> Tensor:
    """A head on inputs ``[T, B, .]``: on all steps as one batch, unless that is switched off."""
    if algebra.in_force().batch_heads or inputs[0].shape[0] == 0:
        return head(*inputs)
    return torch.stack([head(*step) for step in zip(*inputs, strict=True)], axis)


def check_policy(policy: Policy, z0: Tensor, width: int, source: str = "noise") -> None:
    """Raise ValueError where a policy does not fit ``z0 [B, D]`` and the action width."""
    _checks.floating("policy.std", policy.std)
    if tuple(policy.std.shape) != (width,):
        raise ValueError(f"policy.std must be [{width}], got {tuple(policy.std.shape)}")
    outputs = _checks.layers("policy.layers", policy.layers, z0.shape[-1], z0.device)
    if outputs != width:
        raise ValueError(f"policy.layers has output width {outputs}, but {source} has {width}")
