"""Velocity fields and their integration over tau in [0, 1], and the flow-matching path."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pwm_fast.backends.dtypes import common_dtype, wide_dtype, widen
from pwm_fast.ops.mlp import RunNet
from pwm_fast.ops.mlp import reference_mlp as run_net
from pwm_fast.ops.types import Layer, Method, VelocityFn


def integrate(velocity: VelocityFn, z: Tensor, substeps: int, method: Method) -> Tensor:
    return _march(velocity, widen(z), substeps, method, z.dtype).to(z.dtype)


def _march(
    velocity: VelocityFn, state: Tensor, substeps: int, method: Method, dtype: torch.dtype
) -> Tensor:
    """The state in its own dtype, float32 at least; the velocity sees it in ``dtype``."""
    dt = 1.0 / substeps
    for k in range(substeps):
        tau = k / substeps
        k1 = velocity(state.to(dtype), tau).to(state.dtype)
        if method == "euler":
            state = state + dt * k1
        else:
            # The stage time is (k+1)/K, not tau + dt: the last stage is then at 1 exactly.
            stage = (state + dt * k1).to(dtype)
            k2 = velocity(stage, (k + 1) / substeps).to(state.dtype)
            state = state + (0.5 * dt) * (k1 + k2)
    return state


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
    dtype: torch.dtype | None = None,
) -> Tensor:
    """``z`` may be wider than ``dtype``, that of the network's inputs; the result is as wide."""
    inputs = z.dtype if dtype is None else dtype

    def velocity(state: Tensor, tau: float) -> Tensor:
        time = torch.full((), tau, dtype=inputs, device=z.device)
        return velocity_field(state, a, time, net, task, run)

    return _march(velocity, widen(z), substeps, method, inputs).to(z.dtype)


def flow_interpolate(z0: Tensor, z1: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
    if tau.dim() < z0.dim():
        tau = tau.unsqueeze(-1)
    result, wide = common_dtype(z0, z1), wide_dtype(z0, z1)
    start, end, time = z0.to(wide), z1.to(wide), tau.to(wide)
    return ((1.0 - time) * start + time * end).to(result), (end - start).to(result)
