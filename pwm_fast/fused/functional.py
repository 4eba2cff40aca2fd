"""Forward and backward passes of the fused operators as plain functions of tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pwm_fast.backends.base import Kernels
from pwm_fast.backends.specs import DynamicsSpec, LayerParams, LayerSpec, split_params
from pwm_fast.fused.gemm import (
    Gemm,
    adjoint_operand,
    narrow_weight_grad,
    round_together,
    side_by_side,
    takes_narrow,
    weight_grad,
)
from pwm_fast.fused.policy import Policy
from pwm_fast.fused.rollout import Dynamics, DynamicsGrads, DynamicsWeights
from pwm_fast.fused.stack import LayerGrads, Stack, saved_buffers
from pwm_fast.fused.weight_cache import one_call

# --- MLP ----------------------------------------------------------------------------------------


@one_call
def mlp_forward(
    kernels: Kernels,
    specs: Sequence[LayerSpec],
    inputs: Sequence[Tensor],
    params: Sequence[Tensor],
    save: bool,
    wgrad: bool,
) -> tuple[Tensor, list[Tensor]]:
    """``[R, K_i]`` each, to ``[R, N]`` (``[E R, N]`` of an ensemble) and what backward needs."""
    layers = split_params(specs, params)
    stack = _mlp_stack(kernels, specs, layers, inputs[0].shape[0], save, wgrad, None)
    first = [layers[0].weight]
    if not _side_by_side(kernels, first[0], inputs):
        first = _split(first[0], inputs)
    round_together(kernels, [*first, *(p.weight for p in layers[1:])])
    h = _first_product(kernels, layers[0].weight, inputs)
    y = stack.forward(0, h)
    if stack.saved and y.untyped_storage()._cdata == stack.saved[-1].untyped_storage()._cdata:
        y = y.clone()  # an operator's outputs must not share memory
    return y, stack.saved


@one_call
def mlp_backward(
    kernels: Kernels,
    specs: Sequence[LayerSpec],
    dy: Tensor,
    inputs: Sequence[Tensor],
    params: Sequence[Tensor],
    saved: Sequence[Tensor],
    needs: Sequence[bool],
    wgrad: bool,
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Gradients towards the inputs that ``needs`` names, and the parameters' if ``wgrad``."""
    layers = split_params(specs, params)
    stack = _mlp_stack(kernels, specs, layers, inputs[0].shape[0], True, wgrad, saved)
    stack.start_backward(keep_first=False)
    # A layer with a norm writes its adjoint over what comes in.
    dy = dy.contiguous() if specs[-1].plain else dy.clone(memory_format=torch.contiguous_format)
    dh, scale = stack.backward(0, dy)
    weight = layers[0].weight
    members = stack.members
    if takes_narrow(kernels, dh):
        dh, scale = adjoint_operand(kernels, dh, scale)
    dinputs: list[Tensor | None] = []
    for part, x, need in zip(_split(weight, inputs), inputs, needs, strict=True):
        if not need:
            dinputs.append(None)
        elif members:
            each, _ = Gemm(kernels, part).scaled_dgrad(dh, members, scale, wide=True)
            dinputs.append(each.view(members, *x.shape).sum(0))
        else:
            dinputs.append(Gemm(kernels, part).scaled_dgrad(dh, 0, scale, wide=True)[0])
    if not wgrad:
        return dinputs, [None] * len(params)
    grads = stack.param_grads(None)
    grads[0] = grads[0]._replace(weight=_first_weight_grad(stack, dh, inputs, scale))
    return dinputs, flatten_grads(specs, grads)


def _first_weight_grad(
    stack: Stack, dh: Tensor, inputs: Sequence[Tensor], scale: Tensor | None
) -> Tensor:
    """The gradient of the first weight, from its adjoints and what it was multiplied with."""
    kernels, weight, members = stack.kernels, stack.params[0].weight, stack.members
    if members:
        dh = dh.view(members, -1, dh.shape[-1])
        scale = None if scale is None else scale.view(members, -1)
        inputs = [x.expand(members, -1, -1) for x in inputs]
    if takes_narrow(kernels, dh):
        return narrow_weight_grad(kernels, dh, inputs, scale, stack.largest_factor(0))
    found = torch.empty_like(weight)
    for columns, x in zip(_split(found, inputs), inputs, strict=True):
        columns.copy_(weight_grad(kernels, dh, x))
    return found


def _mlp_stack(
    kernels: Kernels,
    specs: Sequence[LayerSpec],
    layers: list[LayerParams],
    rows: int,
    save: bool,
    wgrad: bool,
    saved: Sequence[Tensor] | None,
) -> Stack:
    members = layers[0].weight.shape[0] if layers[0].weight.dim() == 3 else 1
    return Stack(kernels, specs, layers, 1, rows * members, save=save, wgrad=wgrad, saved=saved)


def _split(weight: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
    """The columns of the first weight that each input meets."""
    return list(weight.split([x.shape[-1] for x in inputs], -1))


def _side_by_side(kernels: Kernels, weight: Tensor, inputs: Sequence[Tensor]) -> bool:
    """The first product takes all inputs as one, and its weight whole."""
    return len(inputs) > 1 and weight.dim() == 2 and takes_narrow(kernels, weight)


def _first_product(kernels: Kernels, weight: Tensor, inputs: Sequence[Tensor]) -> Tensor:
    members = weight.shape[0] if weight.dim() == 3 else 0
    operand = kernels.precision.operand
    if operand is not None and _side_by_side(kernels, weight, inputs):
        x, parts = side_by_side(inputs, operand)
        for each, out in zip(inputs, parts, strict=True):
            kernels.to_operand(each, out, None)
        return Gemm(kernels, weight)(x)
    h: Tensor | None = None
    for x, part in zip(inputs, _split(weight, inputs), strict=True):
        if h is None:
            h = Gemm(kernels, part).shared(x, members)
        elif kernels.precision.operand is None and not h.is_cuda:
            if members:
                shared = x.expand(members, -1, -1)
                h.view(members, -1, h.shape[-1]).baddbmm_(shared, part.transpose(1, 2))
            else:
                h.addmm_(x, part.t())
        else:
            h += Gemm(kernels, part).shared(x, members)
    if h is None:
        raise ValueError("an MLP needs an input")
    return h


def flatten_grads(
    specs: Sequence[LayerSpec], grads: Sequence[LayerGrads], *, first: bool = True
) -> list[Tensor | None]:
    """Gradients in the order of an op's flat parameter list.

    ``first=False`` leaves out the first layer's weight and bias, which are not in a rollout's list.
    """
    flat: list[Tensor | None] = []
    for i, (spec, grad) in enumerate(zip(specs, grads, strict=True)):
        if i or first:
            flat.append(grad.weight)
            if spec.bias:
                flat.append(grad.bias)
        if spec.norm:
            flat += [grad.gamma, grad.beta]
    return flat


# --- rollouts -----------------------------------------------------------------------------------


def dynamics_weights(
    spec: DynamicsSpec, w_z: Tensor, w_tau: Tensor | None, params: Sequence[Tensor]
) -> DynamicsWeights:
    """Sort an op's flat list: the first layer's ``gamma, beta``, the others, then fold's head."""
    first, *others = spec.layers
    n = 2 if first.norm else 0
    gamma, beta = (params[0], params[1]) if n else (None, None)
    rest = sum(s.fields for s in others)
    layers = [
        LayerParams(w_z, None, gamma, beta),
        *split_params(others, params[n : n + rest]),
    ]
    head = None
    if spec.fold:
        tail = list(params[n + rest :])
        head = (tail[0], tail[1] if len(tail) > 1 else None)
    return DynamicsWeights(w_z, w_tau, layers, head)


def _dynamics_flat(spec: DynamicsSpec, grads: DynamicsGrads, count: int) -> list[Tensor | None]:
    if grads.layers is None:
        return [None] * count
    flat = flatten_grads(spec.layers, grads.layers, first=False)
    if spec.fold:
        flat.append(grads.head_weight)
        if grads.head_bias is not None:
            flat.append(grads.head_bias)
    return flat


@one_call
def rollout_forward(
    kernels: Kernels,
    spec: DynamicsSpec,
    z0: Tensor,
    c: Tensor,
    w_z: Tensor,
    w_tau: Tensor | None,
    params: Sequence[Tensor],
    save: bool,
    wgrad: bool,
) -> tuple[Tensor, list[Tensor]]:
    """Latents ``[H+1, B, D]`` from ``z0 [B, D]`` and hoisted terms ``c [H, B, U]``."""
    horizon, batch = c.shape[:2]
    weights = dynamics_weights(spec, w_z, w_tau, params)
    dynamics = Dynamics(kernels, spec, weights, horizon, batch, save=save, wgrad=wgrad)
    z = z0.new_empty(horizon + 1, *z0.shape)
    z[0] = z0
    dynamics.rollout(z, c)
    return z, dynamics.saved()


@one_call
def rollout_backward(
    kernels: Kernels,
    spec: DynamicsSpec,
    dz: Tensor,
    z0: Tensor,
    w_z: Tensor,
    w_tau: Tensor | None,
    params: Sequence[Tensor],
    saved: Sequence[Tensor],
    wgrad: bool,
) -> tuple[DynamicsGrads, list[Tensor | None]]:
    """Gradients towards ``z0``, ``c``, ``w_z``, ``w_tau``, and the flat parameters."""
    horizon, batch = dz.shape[0] - 1, dz.shape[1]
    weights = dynamics_weights(spec, w_z, w_tau, params)
    dynamics = Dynamics(kernels, spec, weights, horizon, batch, save=True, wgrad=wgrad, saved=saved)
    dynamics.start_backward()
    grads = dynamics.finish_backward(dynamics.rollout_backward(dz), z0)
    return grads, _dynamics_flat(spec, grads, len(params))


@one_call
def imagine_forward(
    kernels: Kernels,
    spec: DynamicsSpec,
    actor_specs: Sequence[LayerSpec],
    z0: Tensor,
    noise: Tensor,
    base: Tensor,
    w_a: Tensor,
    w_z: Tensor,
    w_tau: Tensor | None,
    params: Sequence[Tensor],
    std: Tensor,
    actor: Sequence[Tensor],
    save: bool,
    wgrad: bool,
    actor_wgrad: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Latents ``[H+1, B, D]`` and actions ``[H, B, A]`` of a policy acting in the dynamics.

    ``base [1 or B, U]`` is what the first product has beside latent, action and flow time.
    """
    horizon, batch, width = noise.shape
    weights = dynamics_weights(spec, w_z, w_tau, params)
    dynamics = Dynamics(kernels, spec, weights, horizon, batch, save=save, wgrad=wgrad)
    carries = dynamics.persistent is not None
    policy = Policy(
        kernels,
        actor_specs,
        split_params(actor_specs, actor),
        std=std,
        noise=noise,
        base=base,
        w_a=w_a,
        head=weights.head if carries else None,
        save=save,
        wgrad=actor_wgrad,
    )
    z = z0.new_empty(horizon + 1, *z0.shape)
    action = z0.new_empty(horizon, batch, width)
    z[0] = z0
    if not carries:
        for t in range(horizon):
            h = policy.first(dynamics.operand(t, z[t]))
            dynamics.step(t, z[t], policy.act(t, h, action[t]), z[t + 1])
    elif horizon:
        h = policy.first(z0)
        for t in range(horizon):
            total = dynamics.hidden_step(t, z0, policy.act(t, h, action[t]))
            if t < horizon - 1:
                h = policy.follow(total, h)
        dynamics.latents(z)
    return z, action, [*dynamics.saved(), *policy.stack.saved] if save else []


@one_call
def imagine_backward(
    kernels: Kernels,
    spec: DynamicsSpec,
    actor_specs: Sequence[LayerSpec],
    dz: Tensor,
    daction: Tensor,
    z: Tensor,
    action: Tensor,
    noise: Tensor,
    w_a: Tensor,
    w_z: Tensor,
    w_tau: Tensor | None,
    params: Sequence[Tensor],
    std: Tensor,
    actor: Sequence[Tensor],
    saved: Sequence[Tensor],
    detach: bool,
    wgrad: bool,
    actor_wgrad: bool,
) -> tuple[DynamicsGrads, list[Tensor | None], Tensor, Tensor, list[Tensor | None]]:
    """Gradients: dynamics', its flat parameters', ``w_a``'s, ``std``'s, and the actor's."""
    horizon, batch = noise.shape[:2]
    weights = dynamics_weights(spec, w_z, w_tau, params)
    layers = split_params(actor_specs, actor)
    own = _count_actor_buffers(actor_specs, actor_wgrad)
    dynamics_saved, actor_saved = saved[: len(saved) - own], saved[len(saved) - own :]
    dynamics = Dynamics(
        kernels, spec, weights, horizon, batch, save=True, wgrad=wgrad, saved=dynamics_saved
    )
    dynamics.start_backward()
    # A detached policy passes nothing on to the latents: all its steps are one batch.
    evals, rows = (1, horizon * batch) if detach else (horizon, batch)
    policy = Stack(
        kernels,
        actor_specs,
        layers,
        evals,
        rows,
        save=True,
        wgrad=actor_wgrad,
        saved=[b.view(evals, rows, *b.shape[2:]) for b in actor_saved],
    )
    policy.start_backward(keep_first=False)
    first = Gemm(kernels, layers[0].weight, rows)
    slope = 1.0 - action * action
    dmu = torch.empty_like(action)
    if detach:
        adjoint = dynamics.rollout_backward(dz)
    else:
        adjoint = dz[horizon]
        for t in range(horizon - 1, -1, -1):
            adjoint = dynamics.step_backward(t, adjoint) + dz[t]
            da = torch.addmm(daction[t], dynamics.c_grad(t), w_a)
            torch.mul(da, slope[t], out=dmu[t])
            dh, scale = policy.backward(t, dmu[t].clone())
            adjoint += first.scaled_dgrad(dh, 0, scale, wide=True)[0]
    grads = dynamics.finish_backward(adjoint, z[0])
    if detach:
        flat = grads.c.flatten(0, 1)
        da = torch.addmm(daction.flatten(0, 1), flat, w_a)
        torch.mul(da, slope.flatten(0, 1), out=dmu.flatten(0, 1))
        policy.backward(0, dmu.flatten(0, 1).clone())
    dstd = (dmu * noise).sum((0, 1))
    dw_a = weight_grad(kernels, grads.c.flatten(0, 1), action.flatten(0, 1))
    dactor: list[Tensor | None] = [None] * len(actor)
    if actor_wgrad:
        states = z[:-1].reshape(evals, rows, z.shape[-1])
        dactor = flatten_grads(actor_specs, policy.param_grads(states))
    return grads, _dynamics_flat(spec, grads, len(params)), dw_a, dstd, dactor


def _count_actor_buffers(specs: Sequence[LayerSpec], wgrad: bool) -> int:
    f32 = torch.float32
    return len(saved_buffers(specs, [1] * len(specs), 1, 1, True, wgrad, f32, f32))
