"""Latent rollouts step by step."""

from __future__ import annotations

import torch
from torch import Tensor

from pwm_fast.ops.reference.integration import flow_step
from pwm_fast.ops.reference.layers import act_norm_mlp, mlp, project_simplex
from pwm_fast.ops.types import Dynamics, Flow, Policy


def macro_step(z: Tensor, a: Tensor, dynamics: Dynamics, task: Tensor | None) -> Tensor:
    if not isinstance(dynamics, Flow):
        return mlp((z, a) if task is None else (z, task, a), dynamics.net)
    z = flow_step(z, a, dynamics.net, dynamics.substeps, dynamics.method, task)
    return project_simplex(z, 8) if dynamics.project else z


def latent_rollout(z: Tensor, action: Tensor, dynamics: Dynamics, task: Tensor | None) -> Tensor:
    latents = [z]
    for a in action.unbind(0):
        z = macro_step(z, a, dynamics, task)
        latents.append(z)
    return torch.stack(latents)


def imagine(
    z: Tensor,
    noise: Tensor,
    policy: Policy,
    dynamics: Dynamics,
    task: Tensor | None,
    detach: bool,
) -> tuple[Tensor, Tensor]:
    latents, actions = [z], []
    for eps in noise.unbind(0):
        mu = act_norm_mlp((z.detach() if detach else z,), policy.layers)
        a = torch.tanh(mu + policy.std * eps)
        z = macro_step(z, a, dynamics, task)
        actions.append(a)
        latents.append(z)
    return torch.stack(latents), torch.stack(actions) if actions else torch.empty_like(noise)
