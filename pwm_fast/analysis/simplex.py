"""How far imagined latents leave the product of simplices that encoded ones lie on."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def simplex_drift(z: Tensor, group: int = 8) -> dict[str, Tensor]:
    """Departure of latents from the simplices: groups that are non-negative and sum to 1.

    Args:
        z: latents ``[H+1, B, D]``, time first.
        group: width of the simplices.

    Returns:
        float64 tensors ``[H+1]``, without unit, each 0 on the simplices:

        - ``negative_mass``: mean over groups and batch of ``sum_i max(0, -z_i)``;
        - ``negative_share``: share of the entries that are below 0;
        - ``sum_error``: mean of ``|sum_i z_i - 1|``, and ``sum_error_max``: its maximum.
    """
    groups = z.double().unflatten(-1, (-1, group))
    off = (groups.sum(-1) - 1.0).abs().flatten(1)
    return {
        "negative_mass": groups.clamp_max(0.0).neg().sum(-1).flatten(1).mean(1),
        "negative_share": (groups < 0).double().flatten(1).mean(1),
        "sum_error": off.mean(1),
        "sum_error_max": off.amax(1),
    }
