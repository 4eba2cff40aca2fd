"""Open-loop prediction error of a world model over the horizon, on held-out episodes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pwm_fast.agent.view import ModelView
from pwm_fast.replay import Episode

QUANTILES = {"p20": 0.2, "p50": 0.5, "p80": 0.8}
Start = tuple[int, int]  # number of an episode, step of it


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
    return cut_windows(episodes, draw_starts(episodes, count, generator), horizon)


def draw_starts(
    episodes: Sequence[Episode], count: int, generator: torch.Generator | None = None
) -> list[Start]:
    """Distinct steps, drawn uniformly among all steps of all episodes; all where there are fewer.

    Args:
        episodes: at least one, of at least one step.
        count: of them.
        generator: of the draw, on the CPU.
    """
    starts = [(e, t) for e, episode in enumerate(episodes) for t in range(len(episode.action))]
    order = torch.randperm(len(starts), generator=generator)[:count].tolist()
    return [starts[i] for i in order]


def cut_windows(episodes: Sequence[Episode], starts: Sequence[Start], horizon: int) -> HeldOut:
    """The windows of up to ``horizon`` steps that begin at these steps, at least one."""
    parts = [_cut(episodes[e], t, horizon) for e, t in starts]
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


@torch.no_grad()
def prediction_errors(view: ModelView, windows: HeldOut) -> dict[str, Tensor]:
    """Errors after 1 to H predicted steps, from the real start with the real actions.

    The model starts at ``zh_0 = encode(o_0)`` and never sees another observation:
    ``zh_h = F(zh_(h-1), a_(h-1))``. The truth is ``z_h = encode(o_h)``. Every mean is over the
    windows whose episode lasts to step h.

    Args:
        view: the model.
        windows: held-out data on the model's device.

    Returns:
        float64 tensors ``[H]``; NaN where no window is left or the reference is 0:

        - ``windows``: how many there are at step h;
        - ``latent_rms``: ``sqrt(mean |zh_h - z_h|^2)``, and quantiles ``latent_p20``, ``_p50``,
          ``_p80`` of ``|zh_h - z_h|`` (latent units);
        - ``displacement``: ``sqrt(mean |z_h - z_0|^2)`` and ``spread``:
          ``sqrt(mean |z_h - mean z_h|^2)`` (latent units);
        - ``latent_per_displacement``, ``latent_per_spread``: the error in their units. 1 is as
          wrong as predicting that nothing moves, or the mean;
        - ``latent_per_displacement_p20``, ``_p50``, ``_p80``: quantiles of the windows' own ratios
          ``|zh_h - z_h| / |z_h - z_0|``, of those whose latent moved. Few windows that move far
          decide the ratio of roots of means; these they do not;
        - ``reward_rmse``, ``reward_mae``: of the reward of step h, from ``zh_(h-1)`` (environment
          units), ``reward_per_spread``: the former over the rewards' standard deviation;
        - ``return_rmse``: of the sum of the first h rewards (environment units);
        - with a termination head ``termination_bce`` (nats), ``termination_brier``,
          ``terminated`` (how many windows terminate in step h), and the mean probability that the
          model gives to those, ``p_terminated``, and to the others, ``p_going_on``.
    """
    valid = windows.valid
    count = valid.double().sum(1)

    def mean(values: Tensor, mask: Tensor = valid) -> Tensor:
        # where, not a product: behind an episode's end a prediction may have grown to infinity.
        total = torch.where(mask, values.double(), 0.0).sum(1)
        return total / mask.double().sum(1)

    z = view.encode(windows.obs)
    predicted = [z[0]]
    for a in windows.action.unbind(0):
        predicted.append(view.step(predicted[-1], a))
    zh = torch.stack(predicted)
    truth = z[1:].double()
    error = (zh[1:].double() - truth).square().sum(-1)
    displacement = (truth - z[0].double()).square().sum(-1)
    centre = torch.where(valid[..., None], truth, 0.0).sum(1) / count[:, None]
    spread = (truth - centre[:, None]).square().sum(-1)
    rms, moved, spreading = (mean(part).sqrt() for part in (error, displacement, spread))
    result = {
        "windows": count,
        "latent_rms": rms,
        **_quantiles("latent", error.sqrt(), valid),
        "displacement": moved,
        "spread": spreading,
        "latent_per_displacement": _ratio(rms, moved),
        **_quantiles(
            "latent_per_displacement",
            _ratio(error, displacement).sqrt(),
            valid & (displacement > 0),
        ),
        "latent_per_spread": _ratio(rms, spreading),
    }

    real = windows.reward.double()
    difference = view.reward(zh[:-1], windows.action).double() - real
    average = mean(real)[:, None]
    deviation = mean((real - average).square()).sqrt()
    total = torch.where(valid, difference, 0.0).cumsum(0)
    result["reward_rmse"] = mean(difference.square()).sqrt()
    result["reward_mae"] = mean(difference.abs())
    result["reward_per_spread"] = _ratio(result["reward_rmse"], deviation)
    result["return_rmse"] = mean(total.square()).sqrt()

    if view.termination is not None:
        logits = view.termination(zh[:-1], windows.action).double()
        p = torch.sigmoid(logits)
        flag = windows.terminated.double()
        ended, others = windows.terminated & valid, ~windows.terminated & valid
        loss = F.binary_cross_entropy_with_logits(logits, flag, reduction="none")
        result["termination_bce"] = mean(loss)
        result["termination_brier"] = mean((p - flag).square())
        result["terminated"] = ended.double().sum(1)
        result["p_terminated"] = mean(p, ended)
        result["p_going_on"] = mean(p, others)
    return result


def _ratio(error: Tensor, reference: Tensor) -> Tensor:
    """NaN, not infinity, where there is nothing to compare with."""
    return torch.where(reference > 0, error / reference, torch.nan)


def _quantiles(name: str, values: Tensor, valid: Tensor) -> dict[str, Tensor]:
    levels = torch.tensor(list(QUANTILES.values()), dtype=values.dtype, device=values.device)
    rows = []
    for row, mask in zip(values, valid, strict=True):
        there = row[mask]
        empty = torch.full_like(levels, torch.nan)
        rows.append(torch.quantile(there, levels) if there.numel() else empty)
    columns = torch.stack(rows).unbind(1)
    return {f"{name}_{key}": column for key, column in zip(QUANTILES, columns, strict=True)}
