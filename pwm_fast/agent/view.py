"""The world model of an agent as plain functions, in the environment's units."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from pwm_fast.agent.pwm import PWM


class ModelView(NamedTuple):
    """Functions of a world model, in the environment's units.

    Attributes:
        encode: latents ``[..., D]`` of observations ``[..., O]``.
        step: next latents of latents ``[..., D]`` and actions ``[..., A]``: the macro step F.
        reward: rewards ``[...]`` of latents and actions.
        termination: logits ``[...]`` that the step ends the episode; None for a model without that
            head.
    """

    encode: Callable[[Tensor], Tensor]
    step: Callable[[Tensor, Tensor], Tensor]
    reward: Callable[[Tensor, Tensor], Tensor]
    termination: Callable[[Tensor, Tensor], Tensor] | None


def view_of(agent: PWM, task: Tensor | None = None) -> ModelView:
    """The world model of an agent.

    Args:
        agent: whose.
        task: int64, the number of the task that all rows are of, or ``[B]`` of each row, where the
            model has several.

    Observations are normalised as the agent does it; rewards that were normalised for a scalar head
    are put back (what was clipped stays within its bounds).
    """
    model = agent.world_model
    task = agent.task_numbers((), task)
    scale = agent.reward_rms.scale() if agent.config.normalize_rewards else None
    centre = agent.reward_rms.mean if agent.config.centre_rewards else 0.0

    def encode(obs: Tensor) -> Tensor:
        return agent.encode(obs, task)

    def reward(z: Tensor, a: Tensor) -> Tensor:
        value = model.decode_reward(model.reward(z, a, task))
        return value if scale is None else value * scale.to(value.dtype) + centre

    def termination(z: Tensor, a: Tensor) -> Tensor:
        logits = model.termination(z, a, task)
        assert logits is not None
        return logits

    ends = model.num_parameters().get("termination", 0) > 0
    return ModelView(
        encode, lambda z, a: model.next(z, a, task), reward, termination if ends else None
    )
