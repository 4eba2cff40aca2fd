"""What a run measures of its world model at an evaluation, on the evaluation's episodes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pwm_fast.agent import PWM
from pwm_fast.agent.view import view_of
from pwm_fast.envs import Tasks
from pwm_fast.ops import extend

EPISODES = 16  # of an evaluation that are kept, at most, but one of each task
WINDOWS = 256  # that are predicted, at most


class Held:
    """The first steps of an evaluation's episodes; nothing is learned from them.

    Nothing here draws random numbers or waits for the device.

    Args:
        tasks: of the environment, where it says of any.
    """

    def __init__(self, tasks: Tasks | None = None) -> None:
        self._kept = EPISODES if tasks is None else max(EPISODES, len(tasks.names))
        self._task = None if tasks is None else tasks.of_env[: self._kept]
        self._steps: list[tuple[Tensor, ...]] = []

    def add(self, obs: Tensor, action: Tensor, reward: Tensor, running: Tensor) -> None:
        """Keep a step of the first envs.

        Args:
            obs: ``[N, O]`` that was acted on.
            action: ``[N, A]``.
            reward: ``[N]``.
            running: bool ``[N]``: the step is of an env's first episode.
        """
        # Clones: an environment may hand out its own buffers.
        self._steps.append(tuple(x[: self._kept].clone() for x in (obs, action, reward, running)))

    def metrics(self, agent: PWM) -> dict[str, Tensor]:
        """How well the agent's model predicts them; see :func:`open_loop`."""
        steps, horizon = len(self._steps), agent.config.horizon
        if steps <= horizon:
            return {}
        obs, action, reward, running = (
            torch.stack(part).to(agent.device) for part in zip(*self._steps, strict=True)
        )
        # Evenly spaced, so that no random number is drawn; those that an end cuts do not count.
        every = math.ceil((steps - horizon) * obs.shape[1] / WINDOWS)
        starts = torch.arange(0, steps - horizon, every, device=agent.device)
        rows = starts + torch.arange(horizon + 1, device=agent.device)[:, None]  # [H+1, starts]
        whole = running[rows[-1]].flatten()  # the last observation is of the same episode
        return open_loop(
            agent,
            obs[rows].flatten(1, 2),
            action[rows].flatten(1, 2),
            reward[rows].flatten(1),
            whole,
            None if self._task is None else self._task.repeat(len(starts)),
        )


@torch.no_grad()
def open_loop(
    agent: PWM,
    obs: Tensor,
    action: Tensor,
    reward: Tensor,
    whole: Tensor,
    task: Tensor | None = None,
) -> dict[str, Tensor]:
    """One-step latent error over the displacement, and R2 of the reward of step H, open loop.

    Args:
        agent: of which the model is looked at.
        obs: ``[H+1, B, O]``.
        action: ``[H+1, B, A]``; the last is not looked at.
        reward: ``[H+1, B]``; likewise.
        whole: bool ``[B]``: the windows that count.
        task: int64 ``[B]``, the numbers of their tasks, where there are several.

    Returns:
        Scalars on the device, NaN where no window counts or nothing differs:

        - ``eval_latent_error``: ``sqrt(mean |zh_1 - z_1|^2 / mean |z_1 - z_0|^2)``;
        - ``eval_reward_r2``: 1 - (mean squared error) / (variance) of the reward of step H, from
          ``encode(o_0)`` and the actions alone.
    """
    view = view_of(agent, task)
    count = whole.sum()

    def mean(values: Tensor) -> Tensor:
        return torch.where(whole, values.double(), 0.0).sum() / count

    with extend.precision(agent.precision), agent.keeping():
        z, after = view.encode(obs[:2])
        latent = z
        error = moved = z.new_zeros(())
        for h, a in enumerate(action[:-1]):
            if h == len(action) - 2:
                predicted = view.reward(latent, a).double()
            latent = view.step(latent, a)
            if h == 0:
                error = mean((latent - after).double().square().sum(-1))
                moved = mean((after - z).double().square().sum(-1))
    real = reward[-2].double()
    spread = mean((real - mean(real)).square())
    nothing = spread <= 1e-12 * mean(real.square())
    score = 1.0 - mean((predicted - real).square()) / spread
    return {
        "eval_latent_error": (error / moved).sqrt(),
        "eval_reward_r2": torch.where(nothing, torch.nan, score),
    }
