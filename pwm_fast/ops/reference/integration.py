"""Velocity fields and their integration over tau in [0, 1], and the flow-matching path."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pwm_fast.ops.reference.layers import RunNet, run_net
from pwm_fast.ops.types import Layer, Method, VelocityFn


def integrate(velocity: VelocityFn, z: Tensor, substeps: int, method: Method) -> Tensor:
    dt = 1.0 / substeps
    for k in range(substeps):
        tau = k / substeps
        k1 = velocity(z, tau).to(z.dtype)
        if method == "euler":
            z = z + dt * k1
        else:
            # The stage time is (k+1)/K, not tau + dt: the last stage is then at 1 exactly.
            k2 = velocity(z + dt * k1, (k + 1) / substeps).to(z.dtype)
            z = z + (0.5 * dt) * (k1 + k2)
    return z


def velocity_field(
    z: Tensor,
    a: Tensor,
    tau: Tensor,
    net: Sequence[Layer],
    task: Tensor | None,
    run: RunNet = run_net,
) -> Tensor:
    if tau.dim() < z.dim():
        tau = tau.unsqueeze(-1)
    tau = tau.to(z.dtype).expand(*z.shape[:-1], 1)
    return run((z, a, tau) if task is None else (z, a, tau, task), net, "norm_act")


def flow_step(
    z: Tensor,
    a: Tensor,
    net: Sequence[Layer],
    substeps: int,
    method: Method,
    task: Tensor | None,
    run: RunNet = run_net,
) -> Tensor:
    def velocity(state: Tensor, tau: float) -> Tensor:
        time = torch.full((), tau, dtype=z.dtype, device=z.device)
        return velocity_field(state, a, time, net, task, run)

    return integrate(velocity, z, substeps, method)


def flow_interpolate(z0: Tensor, z1: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
    if tau.dim() < z0.dim():
        tau = tau.unsqueeze(-1)
    return (1.0 - tau) * z0 + tau * z1, z1 - z0
