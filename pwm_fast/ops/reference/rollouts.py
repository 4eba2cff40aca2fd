"""Latent rollouts step by step."""

from __future__ import annotations

import torch
from torch import Tensor

from pwm_fast.ops.reference.integration import flow_step
from pwm_fast.ops.reference.layers import RunNet, project_simplex, run_net
from pwm_fast.ops.types import Dynamics, Flow, Policy


def macro_step(
    z: Tensor, a: Tensor, dynamics: Dynamics, task: Tensor | None, run: RunNet = run_net
) -> Tensor:
    if not isinstance(dynamics, Flow):
        return run((z, a) if task is None else (z, task, a), dynamics.net, "norm_act")
    z = flow_step(z, a, dynamics.net, dynamics.substeps, dynamics.method, task, run)
    return project_simplex(z, 8) if dynamics.project else z


def latent_rollout(
    z: Tensor, action: Tensor, dynamics: Dynamics, task: Tensor | None, run: RunNet = run_net
) -> Tensor:
    latents = [z]
    for a in action.unbind(0):
        z = macro_step(z, a, dynamics, task, run)
        latents.append(z)
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
    latents, actions = [z], []
    for eps in noise.unbind(0):
        mu = run((z.detach() if detach else z,), policy.layers, "act_norm")
        a = torch.tanh(mu + policy.std * eps)
        z = macro_step(z, a, dynamics, task, run)
        actions.append(a)
        latents.append(z)
    return torch.stack(latents), torch.stack(actions) if actions else torch.empty_like(noise)
