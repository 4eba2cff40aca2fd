"""Rollouts as operators: under given actions, and with a policy in the loop."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pwm_fast.backends.base import Kernels
from pwm_fast.backends.select import Choice
from pwm_fast.backends.specs import (
    DynamicsSpec,
    LayerSpec,
    decode_dynamics,
    decode_layers,
    encode_layers,
)
from pwm_fast.fused import functional
from pwm_fast.fused.architecture import Sizes
from pwm_fast.fused.gemm import takes_narrow
from pwm_fast.fused.rollout import dynamics_saved_buffers
from pwm_fast.fused.stack import saved_buffers
from pwm_fast.ops.mlp import run_mlp, widths_of
from pwm_fast.ops.operator import Operator, as_rows, empty, filled
from pwm_fast.ops.types import Layer
from pwm_fast.ops.weights import Packed, flat, specs_of


class _Rollout(Operator):
    name, family, outputs = "rollout", "gemm", ("z", "saved")
    grads = ("z0", "c", "w_z", "w_tau", "params")
    flags = {"wgrad": ("w_z", "w_tau", "params")}  # noqa: RUF012
    contiguous = ("z0",)
    rows, row_axes = {"z0": 0, "c": 1}, (1,)

    @staticmethod
    def forward(
        k: Kernels,
        z0: Tensor,
        c: Tensor,
        w_z: Tensor,
        w_tau: Tensor | None,
        params: list[Tensor],
        spec: str,
        save: bool,
        wgrad: bool,
    ) -> tuple[Tensor, list[Tensor]]:
        return functional.rollout_forward(
            k, decode_dynamics(spec), z0, c, w_z, w_tau, params, save, wgrad
        )

    @staticmethod
    def backward(
        k: Kernels,
        dz: Tensor,
        z0: Tensor,
        w_z: Tensor,
        w_tau: Tensor | None,
        params: list[Tensor],
        saved: list[Tensor],
        spec: str,
        wgrad: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
        grads, dparams = functional.rollout_backward(
            k, decode_dynamics(spec), dz.contiguous(), z0, w_z, w_tau, params, saved, wgrad
        )
        dw_z, dw_tau = filled((grads.w_z, grads.w_tau), dz)
        return grads.z0, grads.c, dw_z, dw_tau, filled(dparams, dz)

    @classmethod
    def fake(
        cls,
        k: Kernels,
        z0: Tensor,
        c: Tensor,
        w_z: Tensor,
        w_tau: Tensor | None,
        params: list[Tensor],
        spec: str,
        save: bool,
        wgrad: bool,
    ) -> tuple[Tensor, list[Tensor]]:
        horizon, batch = c.shape[:2]
        buffers = _buffers(k, decode_dynamics(spec), w_z, params, horizon, batch, save, wgrad)
        return z0.new_empty(horizon + 1, *z0.shape), empty(z0, buffers)

    @classmethod
    def fake_backward(
        cls,
        k: Kernels,
        dz: Tensor,
        z0: Tensor,
        w_z: Tensor,
        w_tau: Tensor | None,
        params: list[Tensor],
        saved: list[Tensor],
        spec: str,
        wgrad: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
        none = (0,)
        return (
            torch.empty_like(z0),
            z0.new_empty(dz.shape[0] - 1, dz.shape[1], w_z.shape[0]),
            z0.new_empty(w_z.shape if wgrad else none),
            z0.new_empty(w_tau.shape if wgrad and w_tau is not None else none),
            [z0.new_empty(p.shape if wgrad else none) for p in params],
        )


class _Imagine(Operator):
    name, family, outputs, results = "imagine", "gemm", ("z", "action", "saved"), 2
    grads = ("z0", "base", "w_a", "w_z", "w_tau", "params", "std", "actor")
    refused = ("noise",)
    flags = {"wgrad": ("w_z", "w_tau", "params"), "actor_wgrad": ("actor",)}  # noqa: RUF012
    contiguous = ("z0", "noise")
    rows, row_axes, broadcast = {"z0": 0, "noise": 1, "base": 0}, (1, 1), "base"

    @staticmethod
    def forward(
        k: Kernels,
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
        return functional.imagine_forward(
            k,
            decode_dynamics(spec),
            decode_layers(actor_spec),
            z0,
            noise,
            base,
            w_a,
            w_z,
            w_tau,
            params,
            std,
            actor,
            save,
            wgrad,
            actor_wgrad,
        )

    @staticmethod
    def backward(
        k: Kernels,
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
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, list[Tensor], Tensor, list[Tensor]]:
        grads, dparams, dw_a, dstd, dactor = functional.imagine_backward(
            k,
            decode_dynamics(spec),
            decode_layers(actor_spec),
            dz.contiguous(),
            daction.contiguous(),
            z,
            action,
            noise,
            w_a,
            w_z,
            w_tau,
            params,
            std,
            actor,
            saved,
            detach,
            wgrad,
            actor_wgrad,
        )
        dbase = grads.c.sum(0)
        if base.shape[0] == 1:
            dbase = dbase.sum(0, keepdim=True)
        dw_z, dw_tau = filled((grads.w_z, grads.w_tau), dz)
        actors = filled(dactor, dz)
        return grads.z0, dbase, dw_a, dw_z, dw_tau, filled(dparams, dz), dstd, actors

    @classmethod
    def fake(
        cls,
        k: Kernels,
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
        horizon, batch = noise.shape[:2]
        buffers = _buffers(k, decode_dynamics(spec), w_z, params, horizon, batch, save, wgrad)
        specs = decode_layers(actor_spec)
        operand, widths = k.precision.dtype(z0.dtype), widths_of(specs, actor)
        buffers += saved_buffers(
            specs, widths, horizon, batch, save, actor_wgrad, operand, z0.dtype
        )
        z = z0.new_empty(horizon + 1, *z0.shape)
        return z, z0.new_empty(noise.shape), empty(z0, buffers)

    @classmethod
    def fake_backward(
        cls,
        k: Kernels,
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
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, list[Tensor], Tensor, list[Tensor]]:
        none = (0,)
        return (
            z.new_empty(z.shape[1:]),
            z.new_empty(base.shape),
            z.new_empty(w_a.shape),
            z.new_empty(w_z.shape if wgrad else none),
            z.new_empty(w_tau.shape if wgrad and w_tau is not None else none),
            [z.new_empty(p.shape if wgrad else none) for p in params],
            z.new_empty(std.shape),
            [z.new_empty(p.shape if actor_wgrad else none) for p in actor],
        )


_rollout, _imagine = _Rollout(), _Imagine()


def _buffers(
    k: Kernels,
    spec: DynamicsSpec,
    w_z: Tensor,
    params: Sequence[Tensor],
    horizon: int,
    batch: int,
    save: bool,
    wgrad: bool,
) -> list[tuple[tuple[int, ...], torch.dtype]]:
    operand, narrow = k.precision.dtype(w_z.dtype), takes_narrow(k, w_z)
    widths = _widths(spec, w_z, params)
    return dynamics_saved_buffers(
        spec, widths, w_z.shape[1], horizon, batch, save, wgrad, operand, w_z.dtype, narrow
    )


def _widths(spec: DynamicsSpec, w_z: Tensor, params: Sequence[Tensor]) -> list[int]:
    first, *others = spec.layers
    return [w_z.shape[0], *widths_of(others, params[2 if first.norm else 0 :])]


def dynamics_sizes(spec: DynamicsSpec, w_z: Tensor, params: Sequence[Tensor], batch: int) -> Sizes:
    """What the choice of an architecture looks at, from an operator's arguments."""
    widths = _widths(spec, w_z, params)
    return Sizes(batch, widths[0], widths[-2] if spec.fold else widths[-1])


_LINEAR = encode_layers([LayerSpec("norm_act", "none", False, False, 8, 1e-5)])


def _linear(choice: Choice, x: Tensor, weight: Tensor) -> Tensor:
    """``x W^T`` of rows ``x``; through the operator, for its care with narrow weight gradients."""
    return run_mlp([as_rows(x)], [weight], _LINEAR, choice=choice)


def _constant(choice: Choice, packed: Packed, task: Tensor | None) -> Tensor:
    """What the first product has beside latent, action and flow time, ``[1 or B, U]``."""
    base = packed.bias
    if task is not None and packed.w_task is not None:
        product = _linear(choice, task, packed.w_task)
        return product if base is None else product + base
    if base is None:
        base = packed.w_z.new_zeros(packed.w_z.shape[0])
    return base.unsqueeze(0)


def rollout(
    choice: Choice, packed: Packed, z0: Tensor, action: Tensor, task: Tensor | None
) -> Tensor:
    """Latents ``[H+1, B, D]`` from ``z0 [B, D]`` under actions ``[H, B, A]``; task ``[B, E]``."""
    base = _constant(choice, packed, task)
    hoisted = _linear(choice, action, packed.w_a)
    c = hoisted.view(*action.shape[:2], packed.w_a.shape[0]) + base
    return _rollout(z0, c, packed.w_z, packed.w_tau, packed.params, packed.spec, choice=choice)


def imagine(
    choice: Choice,
    packed: Packed,
    z0: Tensor,
    noise: Tensor,
    actor: Sequence[Layer],
    std: Tensor,
    task: Tensor | None,
    detach: bool,
) -> tuple[Tensor, Tensor]:
    """Latents ``[H+1, B, D]`` and actions ``[H, B, A]`` of a policy acting in the dynamics."""
    return _imagine(
        z0,
        noise,
        _constant(choice, packed, task),
        packed.w_a,
        packed.w_z,
        packed.w_tau,
        packed.params,
        std,
        flat(actor),
        packed.spec,
        encode_layers(specs_of(actor, "act_norm")),
        detach,
        choice=choice,
    )
