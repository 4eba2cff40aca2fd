"""Imagination: a Gaussian policy acting in the dynamics, and the gradients of both."""

from __future__ import annotations

import torch
from torch import Tensor

from pwm_fast.backends.base import Kernels
from pwm_fast.backends.specs import decode_dynamics, decode_layers, split_params
from pwm_fast.fused import blocked_rollout
from pwm_fast.fused.dynamics import dynamics_weights, flat_grads
from pwm_fast.fused.gemm import Gemm
from pwm_fast.fused.mlp import FusedMLP
from pwm_fast.fused.mlp_backward import MLPBackward, flatten_grads
from pwm_fast.fused.policy import Policy
from pwm_fast.fused.rollout import dynamics, takes_blocks
from pwm_fast.fused.saved import count_saved
from pwm_fast.fused.weight_cache import one_call
from pwm_fast.fused.wgrad import weight_grad


@one_call
def imagine_forward(
    kernels: Kernels,
    z0: Tensor,
    noise: Tensor,
    base: Tensor,
    w_a: Tensor,
    w_z: Tensor,
    w_tau: Tensor | None,
    params: list[Tensor],
    std: Tensor,
    actor: list[Tensor],
    spec: str,
    actor_spec: str,
    detach: bool,
    save: bool,
    wgrad: bool,
    actor_wgrad: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Latents ``[H+1, B, D]`` and actions ``[H, B, A]`` of a policy acting in the dynamics.

    ``base [1 or B, U]`` is what the first GEMM has beside latent, action and flow time.
    """
    horizon, batch, width = noise.shape
    what, actor_specs = decode_dynamics(spec), decode_layers(actor_spec)
    weights = dynamics_weights(what, w_z, w_tau, params)
    layers = split_params(actor_specs, actor)
    if takes_blocks(kernels, what, weights, batch, (actor_specs, layers)):
        return blocked_rollout.imagine_forward(
            kernels,
            z0,
            noise,
            base,
            w_a,
            what,
            weights,
            std,
            actor_specs,
            layers,
            save,
            wgrad,
            actor_wgrad,
        )
    way = dynamics(kernels, what, weights, horizon, batch, save=save, wgrad=wgrad)
    policy = Policy(
        kernels,
        actor_specs,
        layers,
        std=std,
        noise=noise,
        base=base,
        w_a=w_a,
        head=weights.head if way.carries_policy else None,
        save=save,
        wgrad=actor_wgrad,
    )
    z = z0.new_empty(horizon + 1, *z0.shape)
    action = z0.new_empty(horizon, batch, width)
    z[0] = z0
    way.imagine(policy, z, action)
    return z, action, [*way.saved(), *policy.mlp.saved] if save else []


@one_call
def imagine_backward(
    kernels: Kernels,
    dz: Tensor,
    daction: Tensor,
    z: Tensor,
    action: Tensor,
    noise: Tensor,
    base: Tensor,
    w_a: Tensor,
    w_z: Tensor,
    w_tau: Tensor | None,
    params: list[Tensor],
    std: Tensor,
    actor: list[Tensor],
    saved: list[Tensor],
    spec: str,
    actor_spec: str,
    detach: bool,
    wgrad: bool,
    actor_wgrad: bool,
) -> tuple[
    Tensor,
    Tensor,
    Tensor,
    Tensor | None,
    Tensor | None,
    list[Tensor | None],
    Tensor,
    list[Tensor | None],
]:
    """Gradients towards the arguments of :func:`imagine_forward` but ``noise``, in their order."""
    horizon, batch = noise.shape[:2]
    dz, daction = dz.contiguous(), daction.contiguous()
    what, actor_specs = decode_dynamics(spec), decode_layers(actor_spec)
    weights = dynamics_weights(what, w_z, w_tau, params)
    layers = split_params(actor_specs, actor)
    if takes_blocks(kernels, what, weights, batch, (actor_specs, layers)):
        return blocked_rollout.imagine_backward(
            kernels,
            dz,
            daction,
            z,
            action,
            noise,
            base,
            w_a,
            what,
            weights,
            params,
            std,
            actor_specs,
            layers,
            actor,
            saved,
            detach,
            wgrad,
            actor_wgrad,
        )
    own = count_saved(actor_specs, actor_wgrad)
    kept, actor_kept = saved[: len(saved) - own], saved[len(saved) - own :]
    way = dynamics(kernels, what, weights, horizon, batch, save=True, wgrad=wgrad, saved=kept)
    way.start_backward()
    # A detached policy passes nothing on to the latents: all its steps are one batch.
    evals, rows = (1, horizon * batch) if detach else (horizon, batch)
    mlp = FusedMLP(
        kernels,
        actor_specs,
        layers,
        evals,
        rows,
        save=True,
        wgrad=actor_wgrad,
        saved=[b.view(evals, rows, *b.shape[2:]) for b in actor_kept],
    )
    policy = MLPBackward(mlp, keep_first=False)
    first = Gemm(kernels, layers[0].weight, rows)
    slope = 1.0 - action * action
    dmu = torch.empty_like(action)
    if detach:
        grad = way.rollout_backward(dz)
    else:
        grad = dz[horizon]
        for t in range(horizon - 1, -1, -1):
            grad = way.step_backward(t, grad) + dz[t]
            da = torch.addmm(daction[t], way.c_grad(t), w_a)
            torch.mul(da, slope[t], out=dmu[t])
            dh, scale = policy.backward(t, dmu[t].clone())
            grad += first.scaled_dgrad(dh, 0, scale, fp32=True)[0]
    grads = way.finish_backward(grad, z[0])
    if detach:
        da = torch.addmm(daction.flatten(0, 1), grads.c.flatten(0, 1), w_a)
        torch.mul(da, slope.flatten(0, 1), out=dmu.flatten(0, 1))
        policy.backward(0, dmu.flatten(0, 1).clone())
    dstd = (dmu * noise).sum((0, 1))
    dw_a = weight_grad(kernels, grads.c.flatten(0, 1), action.flatten(0, 1))
    dactor: list[Tensor | None] = [None] * len(actor)
    if actor_wgrad:
        states = z[:-1].reshape(evals, rows, z.shape[-1])
        dactor = flatten_grads(actor_specs, policy.param_grads(states))
    dbase = grads.c.sum(0)
    if base.shape[0] == 1:
        dbase = dbase.sum(0, keepdim=True)
    dparams = flat_grads(what, grads, len(params))
    return grads.z0, dbase, dw_a, grads.w_z, grads.w_tau, dparams, dstd, dactor
