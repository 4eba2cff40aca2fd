"""World-model losses over a window of replayed steps."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pwm_fast import ops
from pwm_fast.config import ModelLearningConfig
from pwm_fast.models import FlowWorldModel, LatentModel


class WorldModelLoss(NamedTuple):
    """Scalars on the device: the total and its unweighted parts, each divided by H as in the total.

    Attributes:
        total: what is minimised.
        dynamics: dynamics or flow-matching loss.
        reward: reward loss.
        termination: termination loss; 0 without that head.
        latent_std: spread of the target latents over the batch, mean over their entries. Near 0 the
            encoder has collapsed.
    """

    total: Tensor
    dynamics: Tensor
    reward: Tensor
    termination: Tensor
    latent_std: Tensor


def world_model_loss(
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
) -> WorldModelLoss:
    """Loss of one batch of windows: PWM's; for a flow, flow matching replaces the latent error.

    Every part is ``sum_t gamma^t mean(...) / H``. Only the latent rollout is sequential: the heads
    and the flow-matching term, which feed nothing forward, run once over all H * B rows.

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

    Returns:
        The losses.
    """
    horizon, batch = action.shape[:2]
    with torch.no_grad():
        target = model.encode(obs[1:], task)
    flow = model if isinstance(model, FlowWorldModel) else None
    if flow is not None and config.flow_start == "teacher":
        start = model.encode(obs[:-1], task)
        following = None
    else:
        # A flow model learns from the starts of its steps alone: its last step leads nowhere.
        steps = horizon - 1 if flow is not None else horizon
        latents = model.rollout(model.encode(obs[0], task), action[:steps], task)
        start = latents[:horizon]
        following = None if flow is not None else latents[1:]

    if flow is None:
        assert following is not None
        error = (following - target).square().mean(-1)
    else:
        if tau is None:
            if config.tau_sampling == "midpoint":
                tau = torch.full((horizon, batch), 0.5, dtype=start.dtype, device=start.device)
            else:
                tau = torch.rand(horizon, batch, dtype=start.dtype, device=start.device)
        origin = start
        if config.start_noise:
            origin = start + config.start_noise * torch.randn_like(start)
        z_tau, velocity = ops.flow_interpolate(origin, target, tau)
        if not config.target_grad:
            velocity = velocity.detach()
        error = (flow.velocity(z_tau, action, tau, task) - velocity).square().mean(-1)

    discount = gamma ** torch.arange(horizon, dtype=error.dtype, device=error.device)

    def average(values: Tensor) -> Tensor:
        return (discount * values.mean(1)).sum() / horizon

    dynamics = average(error)
    logits = model.reward(start, action, task)
    if model.config.num_bins == 1:
        reward_error = (logits.squeeze(-1) - reward).square()
    else:
        reward_error = ops.two_hot_cross_entropy(
            logits, reward, model.config.vmin, model.config.vmax
        )
    reward_loss = average(reward_error)
    total = config.dynamics_coef * dynamics + config.reward_coef * reward_loss
    ending = model.termination(start, action, task)
    if ending is None:
        termination = torch.zeros_like(total)
    else:
        termination = average(
            F.binary_cross_entropy_with_logits(ending, terminated, reduction="none")
        )
        total = total + config.termination_coef * termination
    with torch.no_grad():
        latent_std = target.flatten(0, 1).std(0, correction=0).mean()
    return WorldModelLoss(
        total, dynamics.detach(), reward_loss.detach(), termination.detach(), latent_std
    )
