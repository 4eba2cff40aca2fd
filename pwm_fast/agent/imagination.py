"""Imagined rollouts: the policy acting inside the world model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from pwm_fast import ops
from pwm_fast.models import Actor, LatentModel


def imagine(
    model: LatentModel,
    actor: Actor,
    z: Tensor,
    noise: Tensor,
    *,
    detach: bool = True,
    task: Tensor | None = None,
    action_mask: Tensor | None = None,
    symlog_rewards: bool = False,
) -> ops.ImaginedRollout:
    """Roll the policy out in the world model, differentiably.

    Only policy and dynamics are sequential; reward and termination run once over all steps.

    Args:
        model: the world model.
        actor: the policy.
        z: start latents ``[B, D]``.
        noise: standard normal ``[H, B, A]``.
        detach: the policy sees latents without their gradient.
        task: task numbers ``[B]``, or None.
        action_mask: ``[B, A]``, 1.0 for components that tasks read, bool ``[A]`` for all rows, or
            None.
        symlog_rewards: leave the rewards of a two-hot head in symlog space.

    Returns:
        The rollout, without values; rewards are in the environment's units (a scalar head: as it
        was trained).
    """
    return ops.imagine(
        z,
        actor.policy(),
        model.dynamics(),
        model.heads(symlog_rewards=symlog_rewards),
        noise=noise,
        detach=detach,
        task=model.task_input(task, z),
        action_mask=action_mask,
    )


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
