"""What a model's latents hold of the observations that they encode."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pwm_fast.analysis.rewards import RIDGE
from pwm_fast.replay import Episode


@torch.no_grad()
def latent_report(
    encode: Callable[[Tensor], Tensor],
    episodes: Sequence[Episode],
    device: torch.device | str = "cpu",
) -> dict[str, object]:
    """How much of an observation is left in its latent, and over how many directions it spreads.

    An encoder that learns from rewards and from its own predictions may give up what these do not
    ask for, and a spread over all entries does not show it. Two numbers do:

    - R2 of a ridge regression of each entry of the observation on the latent, fitted to the first
      half of the episodes' observations and judged on the second. The penalty is on latents that
      are divided by one number, their root mean square spread: what a direction of little spread
      holds counts for as little as it does in a network that reads the latent.
    - the effective number of dimensions ``(sum v)^2 / sum v^2`` of the variances v of the latents'
      principal directions (their participation ratio): from 1 to D.

    Args:
        encode: latents ``[N, D]`` of observations ``[N, O]``.
        episodes: held out.
        device: of the model.

    Returns:
        ``obs_r2``: a list of O (NaN for an entry that does not vary), ``obs_r2_median`` and
        ``obs_r2_min`` of it; ``dimensions`` of the latents, ``obs_dimensions`` of the observations
        (each entry divided by its standard deviation); ``width`` D and ``obs_width`` O.
    """
    obs = torch.cat([episode.obs for episode in episodes])
    z = encode(obs.to(device)).cpu().double()
    x = obs.cpu().double()
    half = len(x) // 2
    scale = (z - z.mean(0)).square().mean().sqrt()
    features = (z - z[:half].mean(0)) / scale.clamp_min(torch.finfo(z.dtype).tiny)
    fitted, wanted = features[:half], x[:half] - x[:half].mean(0)
    gram = fitted.T @ fitted + half * RIDGE * torch.eye(z.shape[1], dtype=z.dtype)
    error = (
        x[half:] - x[:half].mean(0) - features[half:] @ torch.linalg.solve(gram, fitted.T @ wanted)
    )
    variance = x[half:].var(0, correction=0)
    varies = (variance > 0) & (x[:half].var(0, correction=0) > 0)
    r2 = torch.where(varies, 1.0 - error.square().mean(0) / variance, torch.nan).tolist()
    known = [value for value in r2 if value == value]
    standard = (x - x.mean(0)) / x.std(0, correction=0).clamp_min(1e-12)
    return {
        "width": z.shape[1],
        "obs_width": x.shape[1],
        "obs_r2": r2,
        "obs_r2_median": statistics.median(known) if known else float("nan"),
        "obs_r2_min": min(known, default=float("nan")),
        "dimensions": effective_dimensions(z),
        "obs_dimensions": effective_dimensions(standard),
    }


def effective_dimensions(x: Tensor) -> float:
    """Over how many directions rows ``[N, D]`` spread: D if alike over all, 1 along a line.

    NaN where they do not vary beyond what float32 rounds.
    """
    x = x.double()
    spread = x - x.mean(0)
    if not spread.abs().max() > torch.finfo(torch.float32).eps * x.abs().max():
        return float("nan")
    variances = torch.linalg.svdvals(spread).square()
    return float(variances.sum() ** 2 / variances.square().sum())
