"""Imagined rollouts: the policy acting inside the world model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from torch import Tensor, nn

from pwm_fast import ops
from pwm_fast.models import GaussianActor, LatentModel
from pwm_fast.ops import returns


class Rollout(NamedTuple):
    """An imagined rollout of H macro steps, time first.

    Attributes:
        z: latents ``[H+1, B, D]``.
        action: ``[H, B, A]``.
        reward: ``[H, B]``, in the environment's units (a scalar head: as it was trained).
        continues: ``[H, B]``: probability that step t does not terminate; None without that head.
    """

    z: Tensor
    action: Tensor
    reward: Tensor
    continues: Tensor | None


def imagine(
    model: LatentModel,
    actor: GaussianActor,
    z: Tensor,
    noise: Tensor,
    *,
    detach: bool = True,
    task: Tensor | None = None,
    symlog_rewards: bool = False,
) -> Rollout:
    """Roll the policy out in the world model, differentiably.

    Only policy and dynamics are sequential; reward and termination run once over all steps.

    Args:
        model: the world model.
        actor: the policy.
        z: start latents ``[B, D]``.
        noise: standard normal ``[H, B, A]``.
        detach: the policy sees latents without their gradient.
        task: task numbers ``[B]``, or None.
        symlog_rewards: leave the rewards of a two-hot head in symlog space.
    """
    embedding = model.embed(task, z)
    rollout = ops.imagine(
        z,
        actor.policy(),
        model.dynamics(),
        model.heads(symlog_rewards=symlog_rewards),
        noise=noise,
        detach=detach,
        task=embedding[0] if embedding else None,
    )
    return Rollout(rollout.z, rollout.action, rollout.reward, rollout.continues)


def discounted_return(rollout: Rollout, last_value: Tensor, gamma: float) -> Tensor:
    """``sum_t gamma^t r_t + gamma^H V(z_H)`` of each rollout, ``[B]``.

    With a termination head the product of the steps' continuation probabilities multiplies the
    discount.
    """
    return returns.discounted_return(rollout.reward, last_value, gamma, rollout.continues)


@contextmanager
def frozen(*modules: nn.Module) -> Iterator[None]:
    """Inside, no parameter of the modules requires a gradient, so none is computed or kept."""
    params = [p for m in modules for p in m.parameters() if p.requires_grad]
    for p in params:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in params:
            p.requires_grad_(True)
