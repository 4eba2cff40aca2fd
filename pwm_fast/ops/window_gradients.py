"""Loss and gradients of a world model, past autograd where that can be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pwm_fast.backends.base import Call
from pwm_fast.backends.select import Choice, kernels, select
from pwm_fast.backends.specs import decode_dynamics
from pwm_fast.backends.transforms import PLAIN, in_memory
from pwm_fast.fused import algebra
from pwm_fast.fused import window_gradients as fused
from pwm_fast.fused.window_gradients import Net, WindowNets, WindowOptions, WindowSizes
from pwm_fast.ops import _checks
from pwm_fast.ops.coverage import layer_tensors, unsupported, without_width
from pwm_fast.ops.direct import kind_of, situation
from pwm_fast.ops.dynamics import Dynamics, LatentMLP, ResidualMLP
from pwm_fast.ops.flow import Flow
from pwm_fast.ops.rollout import call_of
from pwm_fast.ops.types import Heads, Layer
from pwm_fast.ops.weights import flat, pack, specs_of
from pwm_fast.ops.world_model_loss import (
    Start,
    StartGrad,
    WindowLoss,
    check_starts,
    check_windows,
    target_width,
)

_LIMIT = 64  # kinds of calls


class WindowGradients(NamedTuple):
    """What :func:`window_gradients` finds.

    Attributes:
        loss: the parts, unweighted scalars without gradient.
        total: their weighted sum.
        grads: of the total, towards each tensor of the layers of encoder, dynamics, reward and
            termination, in that order, each layer's weight, bias, ``ln_weight`` and ``ln_bias``.
        precision: of the GEMMs.
    """

    loss: WindowLoss
    total: Tensor
    grads: list[Tensor]
    precision: str


class _Known(NamedTuple):
    run: fused.WindowGradients
    specs: tuple[Any, ...]
    precision: str


_KNOWN: dict[Any, _Known | None] = {}


def window_gradients(
    obs: Tensor,
    action: Tensor,
    reward: Tensor,
    *,
    encoder: Sequence[Layer],
    dynamics: Dynamics,
    heads: Heads,
    weights: tuple[float, float, float],
    gamma: float = 0.99,
    terminated: Tensor | None = None,
    tau: Tensor | None = None,
    start: Start = "rollout",
    start_grad: StartGrad = "rollout",
    start_noise: float | Tensor = 0.0,
    target_grad: bool = True,
) -> WindowGradients | None:
    """:func:`pwm_fast.ops.world_model_loss` and the gradients of its weighted sum, in one go.

    What is checked and chosen for one call holds for those that are like it: same structure and
    sizes, environment variables and contexts. It draws the random numbers that the loss draws.

    Args:
        obs: ``[H+1, B, O]``, time first.
        action: ``[H, B, A]``.
        reward: ``[H, B]``.
        encoder: see :func:`pwm_fast.ops.world_model_loss`, as all that follows.
        dynamics: :class:`pwm_fast.ops.Flow`, :class:`pwm_fast.ops.LatentMLP` or
            :class:`pwm_fast.ops.ResidualMLP`.
        heads: reward and termination heads.
        weights: of the dynamics', the reward's and the termination's loss in the sum, not 0.
        gamma: discount of later steps.
        terminated: ``[H, B]``, needed with a termination head.
        tau: flow times ``[H, B]``; drawn uniformly if None.
        start: where a flow-matching path starts.
        start_grad: where the gradient towards a rolled-out start goes.
        start_noise: standard deviation of noise on a path's start.
        target_grad: let the gradient reach ``z_t`` through the velocity target too.

    Returns:
        Losses and gradients; None where the way through autograd is to be taken: on GPUs, in other
        dtypes than float32, in wide layers, on other backends, where a parameter is frozen or has
        hooks, and where somebody watches operators.

    Raises:
        ValueError: as :func:`pwm_fast.ops.world_model_loss`.
        BackendError: the backend that is asked for cannot run this.
    """
    if type(dynamics) not in (Flow, LatentMLP, ResidualMLP) or not gamma or 0.0 in weights:
        return None
    nets = (encoder, dynamics.net, heads.reward, heads.termination)
    params = [x for net in nets if net is not None for x in layer_tensors(net)]
    noise = start_noise if isinstance(start_noise, Tensor) else None
    given = [x for x in (obs, action, reward, terminated, tau, noise) if x is not None]
    around = situation(obs)
    if around is None or not _plain(given, params):
        return None
    assert isinstance(dynamics, tuple)  # all are named tuples: layers, then options
    own = dynamics[1:]
    amount = start_noise if noise is None else None
    options = (weights, gamma, (start, start_grad, amount), target_grad, heads[1:4], own)
    key = (
        options,
        around,
        tuple([x.shape for x in given]),
        terminated is None,
        tau is None,
        tuple([None if net is None else kind_of(net) for net in nets]),
    )
    if key in _KNOWN:
        known = _KNOWN[key]
    else:
        check_windows(obs, action, reward, gamma, heads, terminated)
        shape = (*action.shape[:2], target_width(encoder, obs))
        check_starts(start, start_grad, start_noise, shape, obs)
        if len(_KNOWN) >= _LIMIT:
            _KNOWN.clear()
        known = _KNOWN[key] = _make(obs, action, terminated, tau, nets, dynamics, heads, options)
    if known is None:
        return None
    tensors = [None if net is None else flat(net) for net in nets]
    made = WindowNets(
        *(None if t is None else Net(s, t) for s, t in zip(known.specs, tensors, strict=True))  # type: ignore[arg-type]
    )
    dense = (None if x is None else x.contiguous() for x in (obs, action, reward, terminated, tau))
    found = known.run(made, *dense, noise=noise)  # type: ignore[arg-type, misc]
    loss = WindowLoss(found.dynamics, found.reward, found.termination, found.target)
    return WindowGradients(loss, found.total, found.grads, known.precision)


def _plain(given: Sequence[Tensor], params: Sequence[Tensor]) -> bool:
    """Whether nobody stands between these tensors and their values, or waits for gradients."""
    if not torch.is_grad_enabled():
        return False
    for x in (*given, *params):
        if type(x) not in PLAIN or x.dtype != torch.float32 or not x.is_cpu or not in_memory(x):
            return False
    if any(x.requires_grad for x in given):
        return False
    return all(
        p.requires_grad and p.is_leaf and p.is_contiguous() and not p._backward_hooks
        for p in params
    )


def _make(
    obs: Tensor,
    action: Tensor,
    terminated: Tensor | None,
    tau: Tensor | None,
    nets: tuple[Sequence[Layer] | None, ...],
    dynamics: Dynamics,
    heads: Heads,
    options: tuple[Any, ...],
) -> _Known | None:
    """Check a kind of calls and make its passes; None where they do not cover it."""
    weights, gamma, (start, start_grad, noise), target_grad, (vmin, vmax, symlog), _ = options
    encoder, net, reward, termination = nets
    assert encoder is not None and net is not None and reward is not None
    horizon, batch, width = action.shape
    latent = target_width(encoder, obs)
    if encoder:
        _checks.layers("encoder", encoder, obs.shape[-1], obs.device)
    z = obs.new_empty(batch, latent)
    dynamics.check(z, width, None)
    for name, layers in (("reward", reward), ("termination", termination)):
        if layers is not None:
            _checks.layers(f"heads.{name}", layers, latent + width, obs.device)
    if tau is not None:
        _checks.flow_time(tau, "action", action)
    bins = reward[-1].weight.shape[0]
    flags = terminated is None or terminated.shape == action.shape[:2]
    times = tau is None or tau.shape == action.shape[:2]
    odd = any(p.drops for each in nets if each is not None for p in each)
    step = dynamics.fused()
    if odd or not flags or not times or isinstance(step, str) or 0 in (horizon, batch, width):
        return None
    if termination is not None and termination[-1].weight.shape[0] != 1:
        return None
    # What each of the operations would take.
    choices: list[Choice] = []
    for layers in nets:
        if layers:
            reason = unsupported(layers) or without_width((obs,), layers)
            choices.append(select("mlp", None, Call([obs, *layer_tensors(layers)], reason)))
    choices.append(select("latent_rollout", None, call_of(dynamics, step, [z, action], None)))
    rows = select("two_hot_cross_entropy", None, Call([obs.new_empty(1, bins), obs.new_empty(1)]))
    names = {(c.name, c.precision.name) for c in choices}
    if len(names) != 1 or any(c.is_reference for c in (*choices, rows)):
        return None
    if algebra.in_force() != algebra.Algebra() or rows.name != choices[0].name:
        return None
    # Where all windows learn from starts no loss needs the last step.
    steps = horizon - 1 if dynamics.learns_from_starts else horizon
    spec = pack(choices[-1], step, latent, width, rows=steps * batch).spec
    if net[0].bias is None:
        return None
    own = kernels("gemm", choices[0].name, choices[0].precision.name)
    specs = tuple(None if layers is None else specs_of(layers) for layers in nets)
    made = WindowNets(
        *(
            None if layers is None or s is None else Net(s, flat(layers))
            for layers, s in zip(nets, specs, strict=True)
        )  # type: ignore[arg-type]
    )
    given = WindowOptions(
        decode_dynamics(spec),
        spec,
        start == "teacher" and dynamics.learns_from_starts,
        start_grad if dynamics.learns_from_starts else "rollout",
        dynamics.drawn(batch) if isinstance(dynamics, Flow) else 0,
        target_grad,
        noise,
        gamma,
        vmin,
        vmax,
        symlog,
        weights,
    )
    sizes = WindowSizes(horizon, batch, obs.shape[-1], width, latent)
    if own.row_program is None or not fused.covers(own, made, given, sizes):
        return None
    cross_entropy = kernels("rows", rows.name, rows.precision.name)
    run = fused.WindowGradients(own, cross_entropy, made, given, sizes)
    return _Known(run, specs, choices[0].precision.name)
