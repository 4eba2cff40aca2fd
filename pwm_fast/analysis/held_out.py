"""Windows of held-out episodes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pwm_fast.replay import Episode


class HeldOut(NamedTuple):
    """B windows of up to H steps, time first; a window ends where its episode does.

    Attributes:
        obs: ``[H+1, B, O]``; behind an episode's end its last observation again.
        action: ``[H, B, A]``; 0 behind the end.
        reward: ``[H, B]``; 0 behind the end.
        terminated: bool ``[H, B]``.
        valid: bool ``[H, B]``: the step was taken.
    """

    obs: Tensor
    action: Tensor
    reward: Tensor
    terminated: Tensor
    valid: Tensor

    def to(self, device: torch.device | str) -> HeldOut:
        """The same on another device."""
        return HeldOut(*(part.to(device) for part in self))


def draw_windows(
    episodes: Sequence[Episode], horizon: int, count: int, generator: torch.Generator | None = None
) -> HeldOut:
    """Windows that start at distinct steps, drawn uniformly among all steps of all episodes.

    Starts near an episode's end belong to them: else no window shorter than H would show what the
    model says of a terminal step. How many windows reach a step is ``valid.sum(1)``.

    Args:
        episodes: at least one, of at least one step.
        horizon: H.
        count: windows; all steps are starts where there are fewer.
        generator: of the draw, on the CPU.
    """
    starts = [(e, t) for e, episode in enumerate(episodes) for t in range(len(episode.action))]
    order = torch.randperm(len(starts), generator=generator)[:count].tolist()
    parts = [_cut(episodes[e], t, horizon) for e, t in (starts[i] for i in order)]
    return HeldOut(*(torch.stack(part, dim=1) for part in zip(*parts, strict=True)))


def _cut(episode: Episode, start: int, horizon: int) -> tuple[Tensor, ...]:
    steps = torch.arange(start, start + horizon)
    last = len(episode.action) - 1
    valid = steps <= last
    inside = steps.clamp_max(last)
    where = torch.arange(start, start + horizon + 1).clamp_max(last + 1)
    return (
        episode.obs[where],
        torch.where(valid[:, None], episode.action[inside], 0.0),
        torch.where(valid, episode.reward[inside], 0.0),
        episode.terminated[inside] & valid,
        valid,
    )
