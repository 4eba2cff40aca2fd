"""Rollouts as operators, and the way that runs their macro steps: candidates, and why not each.

The choice depends on sizes, specification, kernels, precision and device alone, never on values. It
does not change what an operator keeps for its backward pass.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from pwm_fast.backends.base import Kernels
from pwm_fast.backends.specs import DynamicsSpec, LayerParams, LayerSpec, decode_dynamics
from pwm_fast.fused import blocked_rollout, row_program
from pwm_fast.fused.dynamics import (
    Dynamics,
    DynamicsWeights,
    dynamics_weights,
    flat_grads,
)
from pwm_fast.fused.folded import Folded
from pwm_fast.fused.layered import Layered
from pwm_fast.fused.weight_cache import one_call

if TYPE_CHECKING:
    from pwm_fast.kernels.rollout import RolloutLayout

VARIABLE = "PWM_FAST_ARCHITECTURE"
NAMES = ("auto", "cluster", "persistent", "blocks", "layers")


class Candidate(NamedTuple):
    """A way to run macro steps.

    Attributes:
        name: ``"cluster"``: weights in the registers and shared memory of thread-block clusters;
            ``"persistent"``: one launch keeps the weights in shared memory
            (:mod:`pwm_fast.kernels.rollout`); ``"blocks"``: one call, a block of rows after another
            (:mod:`pwm_fast.fused.row_program`); ``"layers"``: layer by layer, GEMMs fused with what
            follows them where that pays, elementwise kernels elsewhere.
        reason: why it does not run, or None if it can.
    """

    name: str
    reason: str | None


class Sizes(NamedTuple):
    """What of a rollout's tensors matters.

    Attributes:
        batch: B.
        hidden: width of the first layer, with padding.
        last: width of the last hidden layer, with padding.
        widest: of the latent and all layers.
    """

    batch: int
    hidden: int
    last: int
    widest: int


def sizes_of(spec: DynamicsSpec, weights: DynamicsWeights, batch: int) -> Sizes:
    """Those of a rollout of ``batch`` rows."""
    last = weights.layers[-1].weight
    return Sizes(
        batch,
        weights.w_z.shape[0],
        last.shape[1] if spec.fold else last.shape[0],
        max(max(p.weight.shape) for p in weights.layers),
    )


def candidates(
    kernels: Kernels, spec: DynamicsSpec, sizes: Sizes, device: torch.device
) -> list[Candidate]:
    """All ways, in the order of preference; the first without a reason is taken.

    Raises:
        ValueError: the environment variable ``PWM_FAST_ARCHITECTURE`` names none of them.
    """
    asked = os.environ.get(VARIABLE) or "auto"
    if asked not in NAMES:
        raise ValueError(f"{VARIABLE} must be one of {', '.join(NAMES)}, got {asked!r}")
    plan = _persistent(kernels, spec, sizes, device)
    found = [
        Candidate("cluster", "not built: this version has no such kernel"),
        Candidate("persistent", plan if isinstance(plan, str) else None),
        Candidate("blocks", _blocks(kernels, spec, sizes)),
        Candidate("layers", None),
    ]
    if asked == "auto":
        return found
    # The last one is never ruled out: it runs everything that the others do not.
    return [
        c._replace(reason=c.reason or f"{VARIABLE} is {asked}")
        if c.name not in (asked, "layers")
        else c
        for c in found
    ]


def _blocks(kernels: Kernels, spec: DynamicsSpec, sizes: Sizes) -> str | None:
    """Why macro steps do not run block by block; None if they do."""
    if kernels.row_program is None:
        return f"it is for backend native, this is {kernels.name}"
    reason = row_program.why_not(kernels, spec.layers, sizes.widest, sizes.batch)
    if reason is None and sizes.batch == 0:
        reason = "there are no rows"
    return reason


def takes_blocks(
    kernels: Kernels,
    spec: DynamicsSpec,
    weights: DynamicsWeights,
    batch: int,
    policy: tuple[Sequence[LayerSpec], Sequence[LayerParams]] | None = None,
) -> bool:
    """Whether macro steps, and the layers of a ``policy`` between them, run block by block."""
    if kernels.row_program is None or weights.w_z.dtype != torch.float32:
        return False
    found = candidates(kernels, spec, sizes_of(spec, weights, batch), weights.w_z.device)
    if next(c.name for c in found if c.reason is None) != "blocks":
        return False
    return policy is None or row_program.runs(
        kernels, [p.weight for p in policy[1]], policy[0], batch
    )


def _persistent(
    kernels: Kernels, spec: DynamicsSpec, sizes: Sizes, device: torch.device
) -> RolloutLayout | str:
    if not kernels.persistent:
        return f"it is for backend triton, this is {kernels.name}"
    if not spec.fold:
        return "the velocity head is not folded into the first layer"
    hidden, head = spec.layers[:-1], spec.layers[-1]
    if len(hidden) != 2 or not head.plain:
        return f"it is for two hidden layers under a linear head, here are {len(hidden)}"
    if any(s.order != "norm_act" or not s.norm or s.act != "mish" for s in hidden):
        return "its hidden layers are Linear, LayerNorm and Mish"
    if not hidden[0].width or not hidden[1].width:
        return "it needs centred weights"
    if sizes.hidden % 64 or sizes.hidden != sizes.last:
        return (
            f"it needs two layers padded to the same multiple of 64 outputs, not to {sizes.hidden} "
            f"and {sizes.last}"
        )
    if kernels.precision.name == "exact":
        return "exact GEMMs of float32 do not run on tensor cores"
    from pwm_fast.kernels.launch import INTERPRETING
    from pwm_fast.kernels.rollout import choose_layout

    if device.type != "cuda" and not INTERPRETING:
        return f"it runs on CUDA, the tensors are on {device}"
    compute = kernels.precision.dtype(torch.float32)
    if device.type != "cuda":
        return choose_layout(sizes.batch, sizes.hidden, compute, 0, 0)
    index = device.index or 0
    return choose_layout(sizes.batch, sizes.hidden, compute, *_limits(index), _tuned(index))


@lru_cache(maxsize=16)
def _tuned(index: int) -> Mapping[str, Mapping[str, int]]:
    """Layouts measured on a GPU."""
    from pwm_fast.kernels import rollout, tuning

    def fits(key: str, entry: Mapping[str, int]) -> None:
        rollout.check_tuned(key, entry, *_limits(index))

    return tuning.entries(torch.cuda.get_device_name(index), "rollout", fits)


def _limits(index: int) -> tuple[int, int]:
    """Multiprocessors of a GPU, and bytes of shared memory that a program may have."""
    from pwm_fast.kernels.plan import device_limits

    return device_limits(torch.device("cuda", index))[1]


def dynamics(
    kernels: Kernels,
    spec: DynamicsSpec,
    weights: DynamicsWeights,
    horizon: int,
    batch: int,
    *,
    save: bool,
    wgrad: bool,
    saved: Sequence[Tensor] | None = None,
) -> Dynamics:
    """Macro steps in the way that is taken; arguments are those of :class:`Dynamics`."""
    like = weights.w_z
    sizes = sizes_of(spec, weights, batch)
    found = candidates(kernels, spec, sizes, like.device)
    # One call runs blocks: what has its macro steps made one by one, layers.
    taken = next(c.name for c in found if c.reason is None and c.name != "blocks")
    shape = (kernels, spec, weights, horizon, batch)
    if taken == "persistent":
        from pwm_fast.fused.persistent import Persistent

        plan = _persistent(kernels, spec, sizes, like.device)
        assert not isinstance(plan, str)
        return Persistent(*shape, save=save, wgrad=wgrad, saved=saved, plan=plan)
    way = Folded if spec.fold else Layered
    return way(*shape, save=save, wgrad=wgrad, saved=saved)


# --- the operator -------------------------------------------------------------------------------


@one_call
def rollout_forward(
    kernels: Kernels,
    z0: Tensor,
    c: Tensor,
    w_z: Tensor,
    w_tau: Tensor | None,
    params: list[Tensor],
    spec: str,
    save: bool,
    wgrad: bool,
) -> tuple[Tensor, list[Tensor]]:
    """Latents ``[H+1, B, D]`` from ``z0 [B, D]`` and hoisted terms ``c [H, B, U]``."""
    what, (horizon, batch) = decode_dynamics(spec), c.shape[:2]
    weights = dynamics_weights(what, w_z, w_tau, params)
    if takes_blocks(kernels, what, weights, batch):
        return blocked_rollout.rollout_forward(kernels, z0, c, what, weights, save, wgrad)
    way = dynamics(kernels, what, weights, horizon, batch, save=save, wgrad=wgrad)
    z = z0.new_empty(horizon + 1, *z0.shape)
    z[0] = z0
    way.rollout(z, c)
    return z, way.saved()


@one_call
def rollout_backward(
    kernels: Kernels,
    dz: Tensor,
    z0: Tensor,
    w_z: Tensor,
    w_tau: Tensor | None,
    params: list[Tensor],
    saved: list[Tensor],
    spec: str,
    wgrad: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, list[Tensor | None]]:
    """Gradients towards ``z0``, ``c``, ``w_z``, ``w_tau``, and the flat parameters."""
    what, horizon, batch = decode_dynamics(spec), dz.shape[0] - 1, dz.shape[1]
    if horizon == 0:  # nothing moved
        dc = dz.new_zeros(0, batch, w_z.shape[0])
        if not wgrad:
            return dz[0].clone(), dc, None, None, [None] * len(params)
        none = [torch.zeros_like(p) for p in params]
        dw_tau = None if w_tau is None else torch.zeros_like(w_tau)
        return dz[0].clone(), dc, torch.zeros_like(w_z), dw_tau, [*none]
    weights = dynamics_weights(what, w_z, w_tau, params)
    if takes_blocks(kernels, what, weights, batch):
        return blocked_rollout.rollout_backward(
            kernels, dz.contiguous(), z0, what, weights, params, saved, wgrad
        )
    way = dynamics(kernels, what, weights, horizon, batch, save=True, wgrad=wgrad, saved=saved)
    way.start_backward()
    grads = way.finish_backward(way.rollout_backward(dz.contiguous()), z0)
    return grads.z0, grads.c, grads.w_z, grads.w_tau, flat_grads(what, grads, len(params))
