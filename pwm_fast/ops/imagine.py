"""A policy acting in a world model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pwm_fast.backends.base import Kernels
from pwm_fast.backends.dtypes import at_least_fp32, common_dtype, fp32_dtype
from pwm_fast.backends.select import Choice, declare, for_part, select
from pwm_fast.backends.specs import decode_layers, encode_layers, split_params
from pwm_fast.fused import algebra
from pwm_fast.fused.imagine import imagine_backward, imagine_forward
from pwm_fast.fused.saved import saved_buffers
from pwm_fast.ops import _checks
from pwm_fast.ops.coverage import layer_tensors, unsupported, without_width
from pwm_fast.ops.dynamics import Dynamics
from pwm_fast.ops.flow_policy import FlowPolicy, fused_transport, start_of
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
from pwm_fast.ops.types import ORDERS, Heads, ImaginedRollout, Layer, Policy
from pwm_fast.ops.weights import flat, pack, specs_of

declare("imagine", "gemm")

# Moves noise ``[B, A]`` at latents ``[B, D]`` with embeddings to where a policy's flow ends.
Transport = Callable[[Tensor, Tensor, Tensor | None], Tensor]


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
    policy: Policy | FlowPolicy,
    dynamics: Dynamics,
    heads: Heads,
    *,
    noise: Tensor,
    detach: bool = True,
    last_value_only: bool = False,
    task: Tensor | None = None,
    action_mask: Tensor | None = None,
    backend: str | None = None,
) -> ImaginedRollout:
    """A policy acting in a world model for H macro steps, with rewards, terminations and values.

    ``a_t = tanh(mu(z_t) + std noise_t)``, ``z_{t+1} = F(z_t, a_t)``; only these are sequential. The
    heads run once over all steps. Where the world model's parameters require no gradient, none of
    theirs is computed.

    One operator runs all steps of a policy with one standard deviation for all states, layers in
    the order ``act_norm``, no task input, and no mask or one for all rows. Of any other each
    network is an operator of its own at each step (:func:`pwm_fast.explain` tells which). Of a flow
    policy without mask and gate in the order ``norm_act`` that is its whole flow, else each
    evaluation.

    Args:
        z0: start latents ``[B, D]``.
        policy: the Gaussian policy, or a :class:`FlowPolicy`, for which ``tanh(x_1)`` stands in
            place of the formula's action.
        dynamics: :class:`Flow`, :class:`Shortcut`, :class:`LatentMLP`, :class:`ResidualMLP` or
            others (:class:`Dynamics`).
        heads: reward, termination and value heads.
        noise: standard normal ``[H, B, A]``; zeros act deterministically.
        detach: the policy sees latents without their gradient (the dynamics still carry it), so
            that its own backward pass is one batch.
        last_value_only: value the last latents alone.
        task: task embeddings ``[B, E]``, or None. The value head does not take them.
        action_mask: ``[B, A]``, bool or floating: which components of its action a row has, 1, and
            which are only there because other tasks have more, 0. Actions are multiplied by it.
            Or bool ``[A]``, the same for all rows. None: all of them.
        backend: see :mod:`pwm_fast.backends`.

    Returns:
        :class:`ImaginedRollout`, differentiable in ``z0``, ``task`` and all parameters.

    Raises:
        TypeError: a tensor is not floating (the mask: nor bool).
        ValueError: shapes, devices or options do not fit.
        BackendError: the backend that was asked for cannot run this.

    Source: PWM (arXiv 2407.02466), section 4; SHAC (arXiv 2204.07137); masks and the other kind of
    policy: TD-MPC2 (arXiv 2310.16828).
    """
    check_rows("z0", z0)
    check_steps("noise", noise, z0)
    width = noise.shape[-1]
    dynamics.check(z0, width, task)
    check_policy(policy, z0, width, task)
    mask = checked_mask(action_mask, z0, width)
    z, action = roll_out(z0, policy, dynamics, noise, detach, task, mask, backend)
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
    policy: Policy | FlowPolicy,
    dynamics: Dynamics,
    noise: Tensor,
    detach: bool,
    task: Tensor | None,
    mask: Tensor | None,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """What is sequential: latents ``[H+1, B, D]`` and actions ``[H, B, A]``."""
    step = dynamics.fused()
    whole = algebra.in_force().hoist and _in_one_operator(policy, mask)
    tensors = [z0, noise, *_tensors(policy)]
    if mask is not None and mask.is_floating_point():
        tensors.append(mask)
    call = call_of(dynamics, step, tensors, task)
    if call.unsupported is None:
        reason = unsupported(policy.layers, policy.order)
        call = call._replace(unsupported=reason or without_width([], policy.layers))
    if call.unsupported is None and whole and noise.requires_grad:
        call = call._replace(unsupported="a gradient towards noise is asked for")
    choice = select("imagine", backend, call)
    if choice.is_reference or isinstance(step, str) or noise.shape[0] == 0:
        return _reference(z0, noise, policy, dynamics, task, mask, detach)
    if isinstance(policy, FlowPolicy) or not whole:
        run = partial(fused_mlp, choice)
        transport = _fused_transport(choice, policy, mask)
        return _reference(z0, noise, policy, dynamics, task, mask, detach, run, transport)
    if mask is not None:
        policy, noise = _masked(policy, mask), noise.masked_fill(~mask, 0.0)
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
        encode_layers(specs_of(policy.layers, policy.order)),
        detach,
        choice=choice,
    )


def _fused_transport(
    choice: Choice, policy: Policy | FlowPolicy, mask: Tensor | None
) -> Transport | None:
    """A policy's whole flow in one operator; None where it has none, or each evaluation is one."""
    if not isinstance(policy, FlowPolicy) or mask is not None or not algebra.in_force().hoist:
        return None
    step = policy.fused()
    if isinstance(step, str):
        return None

    return partial(fused_transport, choice, step)


def _in_one_operator(policy: Policy | FlowPolicy, mask: Tensor | None) -> bool:
    """Whether the operator of whole rollouts covers the kind of policy and of mask."""
    if isinstance(policy, FlowPolicy):
        return False
    if policy.std is None or policy.order != "act_norm" or policy.task_input:
        return False
    # A LayerNorm at the end would make something of the zeros that the mask leaves.
    return mask is None or (mask.dim() == 1 and policy.layers[-1].ln_weight is None)


def _masked(policy: Policy, mask: Tensor) -> Policy:
    """A policy whose means are 0 where ``mask [A]`` is False: without noise, so are its actions."""
    *layers, last = policy.layers
    bias = None if last.bias is None else last.bias.masked_fill(~mask, 0.0)
    last = last._replace(weight=last.weight.masked_fill(~mask[:, None], 0.0), bias=bias)
    return policy._replace(layers=[*layers, last])


def _tensors(policy: Policy | FlowPolicy) -> list[Tensor]:
    own = layer_tensors(policy.layers)
    return own if policy.std is None else [policy.std, *own]


def _reference(
    z: Tensor,
    noise: Tensor,
    policy: Policy | FlowPolicy,
    dynamics: Dynamics,
    task: Tensor | None,
    mask: Tensor | None,
    detach: bool,
    run: RunNet = reference_mlp,
    transport: Transport | None = None,
) -> tuple[Tensor, Tensor]:
    latents, actions, state = [z], [], at_least_fp32(z)
    for eps in noise.unbind(0):
        seen = latents[-1]
        a = act(policy, seen.detach() if detach else seen, eps, task, mask, run, transport)
        state = dynamics.step(state, a, task, z.dtype, run)
        actions.append(a)
        latents.append(state.to(z.dtype))
    return torch.stack(latents), torch.stack(actions) if actions else torch.empty_like(noise)


def act(
    policy: Policy | FlowPolicy,
    z: Tensor,
    eps: Tensor | None,
    task: Tensor | None,
    mask: Tensor | None,
    run: RunNet,
    transport: Transport | None = None,
) -> Tensor:
    """Actions ``[..., A]`` of a policy.

    Args:
        policy: the policy.
        z: latents ``[..., D]``.
        eps: standard normal ``[..., A]``; None gives the deterministic action ``tanh(mu)``, of a
            flow policy that of noise 0.
        task: embeddings ``[..., E]``, or None.
        mask: what actions are multiplied by, or None.
        run: evaluates the network, ``run(inputs, layers, order)``.
        transport: integrates a flow policy's network; None is step by step, with ``run``.

    Raises:
        ValueError: the policy takes embeddings, and there are none.
    """
    if isinstance(policy, FlowPolicy):
        x = start_of(policy, z, eps)
        if transport is not None:
            x = transport(x, z, task if policy.task_input else None)
        else:
            x = policy.transport(x, z, task, mask, run)
        return torch.tanh(at_least_fp32(x)).to(common_dtype(z, policy.std, eps))
    y = run(policy.inputs(z, task), policy.layers, policy.order)
    mu, std = y, policy.std
    if std is None:
        mu, std = moments(y, policy)
    a = torch.tanh(mu) if eps is None else squashed(mu, std, eps)
    a = a.to(common_dtype(y, policy.std, eps))
    return a if mask is None else a * mask.to(a.dtype)


def moments(outputs: Tensor, policy: Policy) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation ``[..., A]`` by a network's outputs ``[mu, x]``, ``[..., 2A]``.

    For a policy without a ``std``; both are in float32 at least.
    """
    low, high = policy.min_logstd, policy.max_logstd
    mu, x = at_least_fp32(outputs).chunk(2, -1)
    return mu, torch.exp(low + 0.5 * (high - low) * (torch.tanh(x) + 1.0))


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


def check_policy(
    policy: Policy | FlowPolicy, z0: Tensor, width: int, task: Tensor | None, source: str = "noise"
) -> None:
    """Raise ValueError where a policy does not fit ``z0 [B, D]`` and the action width."""
    if isinstance(policy, FlowPolicy):
        return policy.check(z0, width, task, source)
    _checks.one_of("policy.order", policy.order, ORDERS)
    if policy.std is not None:
        _checks.floating("policy.std", policy.std)
        if tuple(policy.std.shape) != (width,):
            raise ValueError(f"policy.std must be [{width}], got {tuple(policy.std.shape)}")
    elif not -math.inf < policy.min_logstd <= policy.max_logstd < math.inf:
        raise ValueError(
            "policy.min_logstd must be a finite number of at most policy.max_logstd, "
            f"got {policy.min_logstd} and {policy.max_logstd}"
        )
    inputs = sum(x.shape[-1] for x in policy.inputs(z0, task))
    outputs = _checks.layers("policy.layers", policy.layers, inputs, z0.device)
    if policy.std is None and outputs != 2 * width:
        raise ValueError(
            f"policy.layers must have 2 * {width} outputs, means and log standard deviations of "
            f"the actions, where policy.std is None, got {outputs}"
        )
    if policy.std is not None and outputs != width:
        raise ValueError(f"policy.layers has output width {outputs}, but {source} has {width}")


def checked_mask(mask: Tensor | None, z0: Tensor, width: int) -> Tensor | None:
    """A mask of rows in the dtype of ``z0 [B, D]``, or a bool one ``[A]`` for all, as it is.

    Raises:
        TypeError: it is no mask.
        ValueError: it does not fit actions of that width.
    """
    if mask is None:
        return None
    kind = mask.dtype if isinstance(mask, Tensor) else None
    if kind is None or not (kind == torch.bool or kind.is_floating_point):
        raise TypeError(
            f"action_mask must be a bool or floating tensor, got {kind or type(mask).__name__}"
        )
    if tuple(mask.shape) not in ((z0.shape[0], width), (width,)):
        wanted = [z0.shape[0], width]
        raise ValueError(
            f"action_mask must be {wanted}, or bool [{width}] for all rows, got {tuple(mask.shape)}"
        )
    if mask.dim() == 1 and kind != torch.bool:
        raise TypeError(f"action_mask for all rows, [{width}], must be bool, got {kind}")
    _checks.same_device("action_mask", mask, "z0", z0.device)
    return mask if mask.dim() == 1 else mask.to(z0.dtype)
