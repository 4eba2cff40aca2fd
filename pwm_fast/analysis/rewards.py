"""Open-loop rewards of a world model beside what needs no model: R2 over the horizon."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from pwm_fast.agent.view import ModelView
from pwm_fast.analysis.prediction import HeldOut, Start, cut_windows
from pwm_fast.replay import Episode

MODEL, PERSISTENCE = "model", "persistence"
LINEAR_OBS, LINEAR = "linear_obs", "linear_obs_actions"
BASELINES = (PERSISTENCE, LINEAR_OBS, LINEAR)
RIDGE = 1e-3  # penalty over the number of rows, for features of variance 1
FITTED = 8192  # rows that a regression is fitted to, at most: it has some hundred features
RESAMPLES = 1000
CONFIDENCE = 0.95


@torch.no_grad()
def open_loop_rewards(view: ModelView, windows: HeldOut) -> Tensor:
    """Rewards ``[H, B]`` of steps 1 to H, predicted from the first observation and the actions."""
    z, rewards = view.encode(windows.obs[0]), []
    for i, action in enumerate(windows.action.unbind(0)):
        if i > 0:
            z = view.step(z, windows.action[i - 1])
        rewards.append(view.reward(z, action))
    return torch.stack(rewards)


def reward_report(
    view: ModelView,
    episodes: Sequence[Episode],
    starts: Sequence[Start],
    horizon: int,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, object]:
    """R2 of predicted rewards over the horizon, of a model and of baselines on the same windows.

    At step h of a window the truth is ``r(s_(h-1), a_(h-1))``. The model knows the window's first
    observation and the actions ``a_0 ... a_(h-1)``. The baselines:

    - ``persistence`` carries on the reward of the step *before* the window. The window's own first
      reward would tell something of what is to be predicted, which no other method sees. Windows at
      an episode's first step have no step before and are left out, for all methods.
    - ``linear_obs``: ridge regression on the first observation;
    - ``linear_obs_actions``: ridge regression on it and on ``a_0 ... a_(h-1)``.

    Regressions are fitted for every h on the episodes of one half, drawn at random, and judged on
    those of the other half, then the other way round: each window is predicted by a regression that
    saw no step of its episode. R2 is 1 - (mean squared error) / (variance of the rewards of step h
    over the windows). Episodes are resampled for the 95 % intervals, with the regressions as they
    are; predictions of all methods are resampled together, so that ``advantage`` (the model's R2
    less that of ``linear_obs_actions``) has an interval of its own.

    Args:
        view: the model.
        episodes: held out.
        starts: of the windows, as :func:`pwm_fast.analysis.prediction.draw_starts` draws them.
        horizon: H.
        generator: of the halves, on the CPU.
        device: of the model.

    Returns:
        Lists over h: ``step``, ``windows``, ``NAME``, ``NAME_low``, ``NAME_high`` for ``model`` and
        every baseline, ``advantage`` likewise; and the numbers ``episodes`` and ``fitted`` (rows of
        the smaller fit). NaN where there is no window, where their rewards are all the same, or
        where one episode leaves no other half to fit.
    """
    inner = _inner(starts)
    steps = list(range(1, horizon + 1))
    if not inner:
        nothing = [float("nan")] * horizon
        names = (MODEL, *BASELINES, "advantage")
        empty: dict[str, object] = {"step": steps, "windows": [0.0] * horizon}
        empty.update({f"{n}{end}": list(nothing) for n in names for end in ("", "_low", "_high")})
        return {**empty, "episodes": 0, "fitted": 0}
    windows = cut_windows(episodes, inner, horizon)
    numbers = torch.tensor([e for e, _ in inner])
    before = torch.stack([episodes[e].reward[t - 1] for e, t in inner])
    linear, fitted = _cross_fitted(episodes, windows, numbers, generator)
    predicted = {
        MODEL: open_loop_rewards(view, windows.to(device)),
        PERSISTENCE: before.expand(horizon, -1),
        **linear,
    }
    result = r2_over_episodes(
        predicted, windows.reward, windows.valid, numbers, difference=(MODEL, LINEAR)
    )
    return {"step": steps, **result, "episodes": len(numbers.unique()), "fitted": fitted}


def model_r2(
    view: ModelView,
    episodes: Sequence[Episode],
    starts: Sequence[Start],
    horizon: int,
    device: torch.device | str = "cpu",
) -> list[float]:
    """The ``model`` of :func:`reward_report`, on the same windows."""
    inner = _inner(starts)
    if not inner:
        return [float("nan")] * horizon
    windows = cut_windows(episodes, inner, horizon)
    predicted = {MODEL: open_loop_rewards(view, windows.to(device))}
    numbers = torch.tensor([e for e, _ in inner])
    found = r2_over_episodes(predicted, windows.reward, windows.valid, numbers, resamples=1)[MODEL]
    assert isinstance(found, list)
    return found


def _inner(starts: Sequence[Start]) -> list[Start]:
    """Those with a step before them."""
    return [(e, t) for e, t in starts if t > 0]


def r2_over_episodes(
    predicted: Mapping[str, Tensor],
    real: Tensor,
    valid: Tensor,
    episode: Tensor,
    *,
    difference: tuple[str, str] | None = None,
    resamples: int = RESAMPLES,
) -> dict[str, object]:
    """R2 at every step, with percentile intervals of a bootstrap over episodes.

    The same values give the same intervals: the random numbers have a fixed seed.

    Args:
        predicted: ``[H, B]`` by name.
        real: ``[H, B]``.
        valid: bool ``[H, B]``: what counts.
        episode: integers ``[B]``: which episode a window is of.
        difference: two names; ``advantage`` is R2 of the first less that of the second.
        resamples: how often the episodes are drawn anew.

    Returns:
        Lists of H: ``windows``, and for every name ``NAME``, ``NAME_low`` and ``NAME_high``. The
        interval is NaN where fewer than two episodes have a window.
    """
    _, place = torch.unique(episode, return_inverse=True)
    count = int(place.max()) + 1
    mask = valid.cpu()

    def per_episode(values: Tensor) -> np.ndarray:
        """Sums ``[H, episodes]``."""
        kept = torch.where(mask, values.double().cpu(), 0.0)
        found: np.ndarray = (
            torch.zeros(len(kept), count, dtype=torch.float64).index_add_(1, place, kept).numpy()
        )
        return found

    total = mask.double().sum(1)
    truth = real.double().cpu()
    # Centred first: the variance is a difference of sums.
    centre = torch.where(mask, truth, 0.0).sum(1, keepdim=True) / total[:, None].clamp_min(1.0)
    truth = truth - centre
    sizes, sums = per_episode(torch.ones_like(truth)), per_episode(truth)
    squares = per_episode(truth.square())
    errors = {
        name: per_episode((values.double().cpu() - centre - truth).square())
        for name, values in predicted.items()
    }
    rounding = 1e-12 * (squares.sum(1) + total.numpy() * centre.squeeze(1).square().numpy())

    def scores(weights: np.ndarray) -> dict[str, np.ndarray]:
        """R2 ``[H, resamples]`` of episodes with those weights ``[episodes, resamples]``."""
        with np.errstate(divide="ignore", invalid="ignore"):
            spread = squares @ weights - (sums @ weights) ** 2 / (sizes @ weights)
            spread = np.where(spread > rounding[:, None], spread, np.nan)
            found = {name: 1.0 - error @ weights / spread for name, error in errors.items()}
        if difference is not None:
            found["advantage"] = found[difference[0]] - found[difference[1]]
        return found

    point = scores(np.ones((count, 1)))
    draws = np.random.default_rng(0).multinomial(count, np.full(count, 1.0 / count), resamples)
    drawn = scores(draws.T.astype(float))
    several = (sizes > 0).sum(1) > 1
    tail = 50.0 * (1.0 - CONFIDENCE)
    result: dict[str, object] = {"windows": total.tolist()}
    for name, values in point.items():
        result[name] = values[:, 0].tolist()
        bounds = [
            _percentiles(row, tail) if ok else (np.nan, np.nan)
            for row, ok in zip(drawn[name], several, strict=True)
        ]
        result[f"{name}_low"] = [float(low) for low, _ in bounds]
        result[f"{name}_high"] = [float(high) for _, high in bounds]
    return result


def _percentiles(values: np.ndarray, tail: float) -> tuple[float, float]:
    """Of the resamples that have a value: those of one episode's constant rewards have none."""
    there = values[np.isfinite(values)]
    if not len(there):
        return np.nan, np.nan
    low, high = np.percentile(there, [tail, 100.0 - tail])
    return float(low), float(high)


def _cross_fitted(
    episodes: Sequence[Episode],
    windows: HeldOut,
    numbers: Tensor,
    generator: torch.Generator | None,
) -> tuple[dict[str, Tensor], int]:
    """Predictions ``[H, B]`` of both regressions, and the rows of the smaller fit."""
    horizon, batch = windows.reward.shape
    missing = torch.full((horizon, batch), torch.nan, dtype=torch.float64)
    found = {LINEAR_OBS: missing, LINEAR: missing.clone()}
    if len(episodes) < 2:
        return found, 0
    order = torch.randperm(len(episodes), generator=generator)
    sizes = []
    for half in (order[: len(order) // 2], order[len(order) // 2 :]):
        judged = ~torch.isin(numbers, half)
        rows = _rows([episodes[e] for e in half.tolist()], horizon, generator)
        sizes.append(len(rows[0]))
        if not bool(judged.any()):
            continue
        obs, action = windows.obs[0, judged].double(), windows.action[:, judged].double()
        obs_only = _regressions(*rows, 0, obs, action)
        found[LINEAR_OBS][:, judged] = obs_only
        found[LINEAR][:, judged] = _regressions(*rows, action.shape[-1], obs, action)
    return found, min(sizes)


def _rows(
    episodes: Sequence[Episode], horizon: int, generator: torch.Generator | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What a regression is fitted to, float64: every step of these episodes, or some, as a start.

    Returns:
        Observations ``[n, O]``, actions ``[n, H, A]``, rewards ``[n, H]`` and validity ``[n, H]``.
    """
    parts = []
    for episode in episodes:
        length = len(episode.action)
        steps = torch.arange(length)[:, None] + torch.arange(horizon)
        valid = steps < length
        steps = steps.clamp_max(length - 1)
        action = torch.where(valid[..., None], episode.action[steps], 0.0)
        parts.append((episode.obs[:-1], action, episode.reward[steps], valid))
    total = sum(len(part[0]) for part in parts)
    chosen = torch.randperm(total, generator=generator)[:FITTED]
    obs, action, reward, valid = (torch.cat(column)[chosen] for column in zip(*parts, strict=True))
    return obs.double(), action.double(), reward.double(), valid


def _regressions(
    obs: Tensor,
    action: Tensor,
    reward: Tensor,
    valid: Tensor,
    width: int,
    new_obs: Tensor,
    new_action: Tensor,
) -> Tensor:
    """Ridge regressions for every step: predictions ``[H, B]``.

    Args:
        obs: ``[n, O]``; with ``action [n, H, A]``, ``reward [n, H]`` and ``valid [n, H]`` the fit.
        action: likewise.
        reward: likewise.
        valid: likewise.
        width: A, or 0 to leave the actions out.
        new_obs: ``[B, O]`` to predict from.
        new_action: ``[H, B, A]`` to predict from.
    """
    known = torch.cat([obs, action.flatten(1)], dim=1)
    new = torch.cat([new_obs, new_action.transpose(0, 1).flatten(1)], dim=1)
    result = torch.full((reward.shape[1], len(new)), torch.nan, dtype=torch.float64)
    for h in range(reward.shape[1]):
        there = valid[:, h]
        if int(there.sum()) < 2:
            continue
        columns = obs.shape[1] + width * (h + 1)
        result[h] = ridge(known[there, :columns], reward[there, h], new[:, :columns])
    return result


def ridge(x: Tensor, y: Tensor, new: Tensor) -> Tensor:
    """Predictions of a ridge regression with an intercept.

    Features are brought to mean 0 and variance 1 over ``x``; the penalty on the squared weights is
    :data:`RIDGE` times the number of rows. A feature that is constant in ``x`` has no weight.

    Args:
        x: features ``[n, F]``.
        y: targets ``[n]``.
        new: features ``[B, F]`` to predict from.
    """
    mean, std = x.mean(0), x.std(0, correction=0)
    varies = std > 1e-9 * (mean.abs() + 1e-9)
    scale = torch.where(varies, std, torch.inf)
    x, new = (x - mean) / scale, (new - mean) / scale
    gram = x.T @ x + RIDGE * len(x) * torch.eye(x.shape[1], dtype=x.dtype)
    weights = torch.linalg.solve(gram, x.T @ (y - y.mean()))
    return new @ weights + y.mean()
