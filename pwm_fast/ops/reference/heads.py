"""Symlog, two-hot distributional heads, and lambda returns."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


# Both halves are written with one clamp (slope 1 at its bound) and one relu (slope 0 there):
# sign(x) * log1p(|x|) has the right value but the derivative 0 instead of 1 at x = 0.
def symlog(x: Tensor) -> Tensor:
    return torch.log1p(x.clamp_min(0.0)) - torch.log1p(F.relu(-x))


def symexp(x: Tensor) -> Tensor:
    return _expm1(x.clamp_min(0.0)) - _expm1(F.relu(-x))


def _expm1(x: Tensor) -> Tensor:
    # Inductor's vectors on a CPU are exp(x) - 1 (torch 2.13), which is 0 where x is small.
    if torch.compiler.is_compiling() and x.device.type == "cpu":
        half = 0.5 * x.double()
        return (2.0 * torch.sinh(half) * torch.exp(half)).to(x.dtype)
    return torch.expm1(x)


def two_hot_encode(x: Tensor, bins: int, vmin: float, vmax: float, transform: bool) -> Tensor:
    # In 16 bits a compiler may round the position here and not there, and miss by a whole bin.
    dtype = x.dtype
    x = x.to(torch.promote_types(dtype, torch.float32))
    if transform:
        x = symlog(x)
    # Clamped as a position, not as a value: rounding in the product could pass the last bin. The
    # index is clamped as an integer, so that a NaN gives NaN weights and no index out of bounds.
    position = ((x - vmin) * ((bins - 1) / (vmax - vmin))).clamp(0.0, bins - 1)
    lower = position.detach().floor().long().clamp(0, bins - 2)
    upper_weight = (position - lower).unsqueeze(-1)
    index = lower.unsqueeze(-1)
    out = torch.zeros(*x.shape, bins, dtype=x.dtype, device=x.device)
    code = out.scatter(-1, index, 1.0 - upper_weight).scatter(-1, index + 1, upper_weight)
    return code.to(dtype)


def two_hot_decode(logits: Tensor, vmin: float, vmax: float, transform: bool) -> Tensor:
    # In 16 bits linspace itself would lose more than the rounding of its result.
    dtype = torch.promote_types(logits.dtype, torch.float32)
    centres = torch.linspace(vmin, vmax, logits.shape[-1], dtype=dtype, device=logits.device)
    value = torch.softmax(logits, dim=-1) @ centres.to(logits.dtype)
    return symexp(value) if transform else value


def two_hot_cross_entropy(
    logits: Tensor, x: Tensor, vmin: float, vmax: float, transform: bool
) -> Tensor:
    target = two_hot_encode(x, logits.shape[-1], vmin, vmax, transform)
    return -(target * F.log_softmax(logits, dim=-1)).sum(-1)


def td_lambda(
    rewards: Tensor, values: Tensor, continues: Tensor | None, gamma: float, lam: float
) -> Tensor:
    horizon = rewards.shape[0]
    target = values[horizon]
    targets = []
    for t in range(horizon - 1, -1, -1):
        bootstrap = (1.0 - lam) * values[t + 1] + lam * target
        discount = gamma if continues is None else gamma * continues[t]
        target = rewards[t] + discount * bootstrap
        targets.append(target)
    return torch.stack(targets[::-1]) if targets else rewards.clone()


def discounted_return(
    rewards: Tensor, last_value: Tensor, continues: Tensor | None, gamma: float
) -> Tensor:
    total = last_value
    for t in range(rewards.shape[0] - 1, -1, -1):
        discount = gamma if continues is None else gamma * continues[t]
        total = rewards[t] + discount * total
    return total
