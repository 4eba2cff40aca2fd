"""The world-model loss of the agent: the parts of the operation, weighted as configured."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pwm_fast import ops
from pwm_fast.config import ModelLearningConfig
from pwm_fast.models import LatentModel
from pwm_fast.ops import WindowLoss
from pwm_fast.ops.extend import at_least_fp32, discounted, window_gradients


class WeightedLoss(NamedTuple):
    """Scalars on the device: the total and its unweighted parts, as they stand in the total.

    Attributes:
        total: what is minimised.
        dynamics: dynamics or flow-matching loss.
        reward: reward loss.
        termination: termination loss; 0 without that head.
        latent_std: spread of the target latents over the batch, mean over their entries. Near 0 the
            encoder has collapsed; one that gives up all but a few directions it does not show
            (:func:`pwm_fast.analysis.latents.latent_report` does).
        metrics: the above as they are logged, of the parts that the model has.
    """

    total: Tensor
    dynamics: Tensor
    reward: Tensor
    termination: Tensor
    latent_std: Tensor
    metrics: dict[str, Tensor]


def flow_times(action: Tensor, config: ModelLearningConfig) -> Tensor | None:
    """The flow times ``[H, B]`` that ``config.tau_sampling`` fixes; None where they are drawn."""
    if config.tau_sampling != "midpoint":
        return None
    return torch.full(action.shape[:2], 0.5, dtype=action.dtype, device=action.device)


def weighted_loss(
    model: LatentModel,
    obs: Tensor,
    action: Tensor,
    reward: Tensor,
    terminated: Tensor,
    config: ModelLearningConfig,
    *,
    gamma: float,
    task: Tensor | None = None,
    tau: Tensor | None = None,
    spread: Tensor | None = None,
) -> WeightedLoss:
    """Loss of one batch of windows: the parts of :func:`pwm_fast.ops.world_model_loss`, weighted.

    Args:
        model: the world model.
        obs: ``[H+1, B, O]``, normalised as the model expects them.
        action: ``[H, B, A]``.
        reward: ``[H, B]``.
        terminated: ``[H, B]``.
        config: weights and options.
        gamma: discount.
        task: task numbers ``[B]``, or None.
        tau: flow times ``[H, B]``; drawn as ``config.tau_sampling`` says if None.
        spread: standard deviations ``[H, 1, D]`` of the noise on starts where
            ``config.start_noise`` is ``auto``; there is none if None.

    Returns:
        The losses.
    """
    if tau is None:
        tau = flow_times(action, config)
    loss = ops.world_model_loss(
        obs,
        action,
        reward,
        gamma=gamma,
        terminated=terminated,
        tau=tau,
        **_parts(model, config, spread),
        task=model.task_input(task, obs[0]),
    )
    return _weighted(loss, config, action.shape[0])


def weighted_gradients(
    model: LatentModel,
    obs: Tensor,
    action: Tensor,
    reward: Tensor,
    terminated: Tensor,
    config: ModelLearningConfig,
    *,
    gamma: float,
    tau: Tensor | None = None,
    spread: Tensor | None = None,
) -> tuple[WeightedLoss, dict[int, Tensor], str] | None:
    """:func:`weighted_loss` of a single-task model and its gradients, where one function has both.

    Returns:
        The losses, the gradients of the total by the parameters' ids, and the precision of the
        GEMMs; None where autograd is to be taken (:func:`pwm_fast.ops.extend.window_gradients`).
    """
    parts = _parts(model, config, spread)
    horizon = action.shape[0]
    shares = 1.0 / horizon if config.mean_reward_loss else 1.0
    found = window_gradients(
        obs,
        action,
        reward,
        weights=(config.dynamics_coef, config.reward_coef * shares, config.termination_coef),
        gamma=gamma,
        terminated=terminated,
        tau=tau,
        **parts,
    )
    if found is None:
        return None
    heads = parts["heads"]
    nets = (parts["encoder"], parts["dynamics"].net, heads.reward, heads.termination or ())
    tensors = (x for net in nets for layer in net for x in layer[:4] if x is not None)
    grads: dict[int, Tensor] = {}
    for p, g in zip(tensors, found.grads, strict=True):
        grads[id(p)] = grads[id(p)] + g if id(p) in grads else g  # what layers share
    return _weighted(found.loss, config, horizon, found.total), grads, found.precision


def pieces(steps: int | None, *windows: Tensor) -> tuple[Tensor, ...]:
    """Windows ``obs [H+1, B, ...]`` and others ``[H, B, ...]``, cut to ``steps`` steps each.

    The pieces are windows of their own, ``[steps+1, (H / steps) B, ...]`` and so on, time first.

    Raises:
        ValueError: H is no multiple of ``steps``.
    """
    obs, *others = windows
    horizon = others[0].shape[0]
    if steps is None or steps == horizon:
        return windows
    if horizon % steps:
        raise ValueError(f"windows of {horizon} steps cannot be cut into pieces of {steps}")
    count = horizon // steps

    def cut(x: Tensor, first: int) -> Tensor:
        return x[first : first + horizon].unflatten(0, (count, steps))

    # Piece k begins at step k * steps; its last observation is the next one's first.
    start, end = cut(obs, 0), cut(obs, 1)[:, -1:]
    found = [torch.cat((start, end), dim=1), *(cut(x, 0) for x in others)]
    # A window's pieces stay side by side: the first rows of a batch are whole windows.
    return tuple(x.permute(1, 2, 0, *range(3, x.dim())).flatten(1, 2) for x in found)


def _parts(
    model: LatentModel, config: ModelLearningConfig, spread: Tensor | None
) -> dict[str, Any]:
    """What both ways to the loss are told of the model and of how it learns."""
    noise: float | Tensor = 0.0
    if not isinstance(config.start_noise, str):
        noise = config.start_noise
    elif spread is not None:
        noise = spread
    return {
        "encoder": model.encoder_layers(),
        "dynamics": model.learned_dynamics(config),
        "heads": model.heads(),
        "start": config.flow_start,
        "start_grad": config.start_grad,
        "start_noise": noise,
        "target_grad": config.target_grad,
    }


def _weighted(
    loss: WindowLoss, config: ModelLearningConfig, horizon: int, total: Tensor | None = None
) -> WeightedLoss:
    """The parts' weighted sum, unless it is given, and what is logged."""
    reward_loss = loss.reward / horizon if config.mean_reward_loss else loss.reward
    parts = {"dynamics": loss.dynamics.detach(), "reward": reward_loss.detach()}
    if loss.termination is not None:
        parts["termination"] = loss.termination.detach()
    if total is None:
        total = discounted(config.dynamics_coef, loss.dynamics)
        total = total + discounted(config.reward_coef, reward_loss)
        if loss.termination is not None:
            total = total + discounted(config.termination_coef, loss.termination)
    with torch.no_grad():
        latent_std = at_least_fp32(loss.target).flatten(0, 1).std(0, correction=0).mean()
    metrics = {"wm_loss": total.detach(), **{f"{name}_loss": x for name, x in parts.items()}}
    metrics["latent_std"] = latent_std
    termination = parts.get("termination", torch.zeros_like(parts["reward"]))
    return WeightedLoss(total, parts["dynamics"], parts["reward"], termination, latent_std, metrics)
