"""The world-model loss of replayed windows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pwm_fast.backends.dtypes import common_dtype, fp32_dtype, full_precision
from pwm_fast.backends.select import for_part
from pwm_fast.ops import _checks
from pwm_fast.ops.dynamics import Dynamics, Transitions
from pwm_fast.ops.mlp import mlp
from pwm_fast.ops.rollout import latent_rollout
from pwm_fast.ops.two_hot import two_hot_cross_entropy
from pwm_fast.ops.types import Heads, Layer

Start = Literal["rollout", "teacher"]

StartGrad = Literal["rollout", "encoder", "none"]

STARTS: tuple[Start, ...] = ("rollout", "teacher")
START_GRADS: tuple[StartGrad, ...] = ("rollout", "encoder", "none")


class WindowLoss(NamedTuple):
    """Parts of a world-model loss, unweighted scalars.

    Attributes:
        dynamics: latent error, or flow-matching loss.
        reward: reward loss.
        termination: termination loss; None without that head.
        target: the encoded successors ``[H, B, D]``, without gradient; a view of the observations
            where these are latents.
    """

    dynamics: Tensor
    reward: Tensor
    termination: Tensor | None
    target: Tensor


def world_model_loss(
    obs: Tensor,
    action: Tensor,
    reward: Tensor,
    *,
    encoder: Sequence[Layer],
    dynamics: Dynamics,
    heads: Heads,
    gamma: float = 0.99,
    terminated: Tensor | None = None,
    tau: Tensor | None = None,
    start: Start = "rollout",
    start_grad: StartGrad = "rollout",
    start_noise: float | Tensor = 0.0,
    target_grad: bool = True,
    task: Tensor | None = None,
    backend: str | None = None,
) -> WindowLoss:
    """PWM's loss of windows of H steps; for a flow, flow matching replaces the latent error.

    With ``e_t = stop_gradient(encode(obs_{t+1}))`` and the latent rollout ``z_0 = encode(obs_0)``,
    ``z_{t+1} = F(z_t, a_t)``, every part is ``sum_t gamma^t mean(...) / H``: of
    ``(z_{t+1} - e_t)^2`` for a :class:`LatentMLP` or :class:`ResidualMLP`; of
    ``(v(z_tau, a_t, tau) - (e_t - z_t))^2`` at ``z_tau = (1 - tau) z_t + tau e_t`` for a
    :class:`Flow` (a :class:`Shortcut` says what its network learns beside it); of the reward's
    cross-entropy (a scalar head: squared error) and the termination's binary cross-entropy at
    ``z_t``. Only the latent rollout is sequential; all else runs once over H * B rows, and every
    weight gets its gradient from one GEMM over all steps.

    Args:
        obs: ``[H+1, B, O]``, time first.
        action: ``[H, B, A]``.
        reward: ``[H, B]``.
        encoder: layers on ``[obs, task]``, output width D; none where latents are observations.
        dynamics: :class:`Flow`, :class:`Shortcut`, :class:`LatentMLP`, :class:`ResidualMLP` or
            others (:class:`Dynamics`).
        heads: reward and termination heads (values are not used).
        gamma: discount of later steps.
        terminated: ``[H, B]``, 1 where step t ended in a terminal state; needed with a termination
            head.
        tau: flow times ``[H, B]`` in [0, 1]; drawn uniformly if None. Of ``Flow(share=)`` those of
            the first windows count.
        start: where a flow-matching path starts: ``"rollout"`` (the model's own latent) or
            ``"teacher"`` (the encoded observation; nothing is rolled out).
        start_grad: where the gradient towards a rolled-out start goes: ``"rollout"`` (through the
            rollout to ``z_0``), ``"encoder"`` (to ``encode(obs_t)``, as if that were the start:
            straight through) or ``"none"`` (``z_0`` alone has one). Without ``"rollout"`` nothing
            of the rollout is kept, and no pass goes back through it. Dynamics that learn from what
            they roll out, and teacher starts, have no such choice.
        start_noise: standard deviation of noise on a path's start: a number, or a tensor that
            broadcasts to ``[H, B, D]``.
        target_grad: let the gradient reach ``z_t`` through the velocity target too.
        task: task embeddings ``[B, E]``, or None.
        backend: see :mod:`pwm_fast.backends`.

    Returns:
        :class:`WindowLoss` of unweighted scalars, differentiable in all parameters and ``task``.

    Raises:
        TypeError: a tensor is not floating.
        ValueError: shapes, devices or options do not fit, or ``terminated`` is missing.
        BackendError: the backend that was asked for cannot run this.

    Source: PWM (arXiv 2407.02466), equation 3; Liu et al. 2022 (arXiv 2209.03003), equation 1.
    """
    horizon = check_windows(obs, action, reward, gamma, heads, terminated)
    check_starts(
        start, start_grad, start_noise, (*action.shape[:2], target_width(encoder, obs)), obs
    )

    def repeated(steps: int) -> tuple[Tensor, ...]:
        return () if task is None else (task.expand(steps, *task.shape),)

    def encode(x: Tensor) -> Tensor:
        return mlp((x, *repeated(x.shape[0])), encoder, backend=backend) if encoder else x

    with torch.no_grad():
        target = encode(obs[1:]).detach()  # forward-mode derivatives do not heed no_grad
    if target.shape[-1] == 0:
        of = "encoder has output" if encoder else "obs has"
        raise ValueError(f"{of} width 0: there is no latent to predict")
    following = None
    if dynamics.learns_from_starts and start == "teacher":
        z = encode(obs[:-1])
    else:
        # Where the starts of steps are enough, the last step leads nowhere.
        steps = horizon - 1 if dynamics.learns_from_starts else horizon
        through = start_grad == "rollout" or not dynamics.learns_from_starts
        encoded = encode(obs[:-1] if start_grad == "encoder" and not through else obs[:1])
        with torch.set_grad_enabled(through and torch.is_grad_enabled()):
            first = encoded.squeeze(0) if through else encoded[0].detach()
            latents = latent_rollout(first, action[:steps], dynamics, task=task, backend=backend)
        z = latents[:horizon]
        if not dynamics.learns_from_starts:
            following = latents[1:]
        elif not through:
            z = z.detach()
            if start_grad == "encoder":
                z = z + (encoded - encoded.detach())  # the difference is 0, its gradient is not
            else:
                z = torch.cat((encoded, z[1:]))

    embedding = repeated(horizon)
    result, dtype = common_dtype(obs, action, reward), fp32_dtype(obs, action, reward)
    error = dynamics.error(
        Transitions(
            z,
            action,
            following,
            target,
            embedding[0] if embedding else None,
            dtype,
            tau,
            start_noise,
            target_grad,
            backend,
        )
    )

    logits = mlp((z, *embedding, action), heads.reward, backend=backend).to(dtype)
    ending = None
    if heads.termination is not None:
        ending = mlp((z, *embedding, action), heads.termination, backend=backend)

    with full_precision(obs):
        discount = gamma ** torch.arange(horizon, dtype=dtype, device=error.device)

        def average(values: Tensor) -> Tensor:
            if gamma == 0.0:  # later steps have no weight, and may not be finite
                values = values[:1]
            return ((discount[: len(values)] * values.mean(1)).sum() / horizon).to(result)

        if logits.shape[-1] == 1:
            reward_error = (logits.squeeze(-1) - reward.to(dtype)).square()
        else:
            reward_error = two_hot_cross_entropy(
                logits,
                reward.to(dtype),
                heads.vmin,
                heads.vmax,
                transform=heads.symlog,
                backend=for_part("two_hot_cross_entropy", backend),
            )
        termination = None
        if ending is not None and terminated is not None:
            flags = terminated.to(dtype)
            each = F.binary_cross_entropy_with_logits(
                ending.squeeze(-1).to(dtype), flags, reduction="none"
            )
            termination = average(each)
        return WindowLoss(average(error), average(reward_error), termination, target)


def check_windows(
    obs: Tensor,
    action: Tensor,
    reward: Tensor,
    gamma: float,
    heads: Heads,
    terminated: Tensor | None,
) -> int:
    """Horizon of a window, after a look at what no other operation checks."""
    for name, x, axes in (("obs", obs, 3), ("action", action, 3), ("reward", reward, 2)):
        _checks.floating(name, x)
        if x.dim() != axes:
            raise ValueError(f"{name} must have {axes} axes, time first, got {tuple(x.shape)}")
    horizon, batch = action.shape[:2]
    if horizon == 0:
        raise ValueError("action must hold at least one step, got none")
    if tuple(obs.shape[:2]) != (horizon + 1, batch):
        raise ValueError(
            f"obs must be [{horizon + 1}, {batch}, O] for these actions, got {tuple(obs.shape)}"
        )
    if tuple(reward.shape) != (horizon, batch):
        raise ValueError(
            f"reward must be [{horizon}, {batch}] for these actions, got {tuple(reward.shape)}"
        )
    if not 0.0 <= gamma <= 1.0:
        raise ValueError(f"gamma must lie in [0, 1], got {gamma}")
    if heads.termination is not None and terminated is None:
        raise ValueError("terminated is needed to train the termination head, got None")
    return horizon


def target_width(encoder: Sequence[Layer], obs: Tensor) -> int:
    """D, or -1 of an encoder that is no such, which is told later."""
    if not encoder:
        return obs.shape[-1]
    return encoder[-1].weight.shape[0] if encoder[-1].weight.dim() == 2 else -1


def check_starts(
    start: Start,
    start_grad: StartGrad,
    start_noise: float | Tensor,
    shape: tuple[int, ...],
    obs: Tensor,
) -> None:
    """Raise for options of a path's start that are none, or do not fit starts of that shape."""
    _checks.one_of("start", start, STARTS)
    _checks.one_of("start_grad", start_grad, START_GRADS)
    if isinstance(start_noise, Tensor):
        _checks.floating("start_noise", start_noise)
        _checks.same_device("start_noise", start_noise, "obs", obs.device)
        own = start_noise.shape
        pairs = zip(reversed(own), reversed(shape), strict=False)
        if shape[-1] >= 0 and (len(own) > 3 or any(n not in (1, m) for n, m in pairs)):
            raise ValueError(f"start_noise must broadcast to {shape}, got {tuple(own)}")
    elif isinstance(start_noise, str) or not 0.0 <= start_noise < math.inf:
        raise ValueError(
            f"start_noise must not be negative, but a finite number or a tensor, got "
            f"{start_noise!r}"
        )
