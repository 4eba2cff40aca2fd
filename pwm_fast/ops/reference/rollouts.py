"""Latent rollouts step by step."""

from __future__ import annotations

import torch
from torch import Tensor

from pwm_fast.backends.dtypes import common_dtype, wide_dtype, widen
from pwm_fast.ops.mlp import RunNet
from pwm_fast.ops.mlp import reference_mlp as run_net
from pwm_fast.ops.reference.integration import flow_step
from pwm_fast.ops.simnorm import project_simplex
from pwm_fast.ops.types import Dynamics, Flow, Policy


def macro_step(
    z: Tensor,
    a: Tensor,
    dynamics: Dynamics,
    task: Tensor | None,
    dtype: torch.dtype,
    run: RunNet = run_net,
) -> Tensor:
    """The next latents; a flow's in the dtype of ``z``, which may be wider than ``dtype``."""
    if not isinstance(dynamics, Flow):
        x = z.to(dtype)
        return run((x, a) if task is None else (x, task, a), dynamics.net, "norm_act")
    z = flow_step(z, a, dynamics.net, dynamics.substeps, dynamics.method, task, run, dtype)
    return project_simplex(z, 8) if dynamics.project else z


def latent_rollout(
    z: Tensor, action: Tensor, dynamics: Dynamics, task: Tensor | None, run: RunNet = run_net
) -> Tensor:
    # What a flow carries from step to step is not rounded to 16 bits; what is handed out is.
    latents, state = [z], widen(z)
    for a in action.unbind(0):
        state = macro_step(state, a, dynamics, task, z.dtype, run)
        latents.append(state.to(z.dtype))
    return torch.stack(latents)


def imagine(
    z: Tensor,
    noise: Tensor,
    policy: Policy,
    dynamics: Dynamics,
    task: Tensor | None,
    detach: bool,
    run: RunNet = run_net,
) -> tuple[Tensor, Tensor]:
    latents, actions, state = [z], [], widen(z)
    for eps in noise.unbind(0):
        seen = latents[-1]
        mu = run((seen.detach() if detach else seen,), policy.layers, "act_norm")
        a = squashed(mu, policy.std, eps)
        state = macro_step(state, a, dynamics, task, z.dtype, run)
        actions.append(a)
        latents.append(state.to(z.dtype))
    return torch.stack(latents), torch.stack(actions) if actions else torch.empty_like(noise)


def squashed(mu: Tensor, std: Tensor, eps: Tensor) -> Tensor:
    """A Gaussian policy's action, ``tanh(mu + std eps)``."""
    wide = wide_dtype(mu, std, eps)
    action = torch.tanh(mu.to(wide) + std.to(wide) * eps.to(wide))
    return action.to(common_dtype(mu, std, eps))
