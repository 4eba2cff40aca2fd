"""Symlog, two-hot distributional heads, and lambda returns.

Computed in float32 at least and rounded once, to the dtype that the tensors promote to.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pwm_fast.backends.dtypes import common_dtype, full_precision, wide_dtype, widen
from pwm_fast.backends.transforms import hidden
from pwm_fast.ops.reference.discounting import discounted, lambda_returns


# Both halves are written with one clamp (slope 1 at its bound) and one relu (slope 0 there):
# sign(x) * log1p(|x|) has the right value but the derivative 0 instead of 1 at x = 0.
def symlog(x: Tensor) -> Tensor:
    with full_precision(x):
        y = widen(x)
        return (torch.log1p(y.clamp_min(0.0)) - torch.log1p(F.relu(-y))).to(x.dtype)


def symexp(x: Tensor) -> Tensor:
    with full_precision(x):
        y = widen(x)
        return (_expm1(y.clamp_min(0.0)) - _expm1(F.relu(-y))).to(x.dtype)


def _expm1(x: Tensor) -> Tensor:
    # Inductor's vectors on a CPU are exp(x) - 1 (torch 2.13), which is 0 where x is small.
    if torch.compiler.is_compiling() and x.device.type == "cpu":
        half = 0.5 * x.double()
        return (2.0 * torch.sinh(half) * torch.exp(half)).to(x.dtype)
    return torch.expm1(x)


def _two_hot(
    x: Tensor, bins: int, vmin: float, vmax: float, transform: bool
) -> tuple[Tensor, Tensor]:
    """Lower bin of each value, and the weight of the one above it, both ``[..., 1]``."""
    if transform:
        # Without a gradient, whose value at 0 is what symlog is written for, in half the steps.
        x = symlog(x) if x.requires_grad or hidden() else torch.copysign(x.abs().log1p(), x)
    # Clamped as a position, not as a value: rounding in the product could pass the last bin. The
    # index is clamped as an integer, so that a NaN gives NaN weights and no index out of bounds.
    position = ((x - vmin) * ((bins - 1) / (vmax - vmin))).clamp(0.0, bins - 1)
    lower = position.detach().long().clamp(0, bins - 2)
    return lower.unsqueeze(-1), (position - lower).unsqueeze(-1)


def _exact(x: Tensor) -> Tensor:
    """A weight is what is left of a position: of small ones, float32 would leave few digits."""
    return x.to(torch.float32 if x.device.type == "mps" else torch.float64)


def two_hot_encode(x: Tensor, bins: int, vmin: float, vmax: float, transform: bool) -> Tensor:
    with full_precision(x):
        index, upper = _two_hot(_exact(x), bins, vmin, vmax, transform)
        out = torch.zeros(*x.shape, bins, dtype=x.dtype, device=x.device)
        out = out.scatter(-1, index, (1.0 - upper).to(x.dtype))
        return out.scatter(-1, index + 1, upper.to(x.dtype))


def two_hot_decode(logits: Tensor, vmin: float, vmax: float, transform: bool) -> Tensor:
    with full_precision(logits):
        wide = widen(logits)
        centres = torch.linspace(vmin, vmax, wide.shape[-1], dtype=wide.dtype, device=logits.device)
        value = torch.softmax(wide, dim=-1) @ centres
        return (symexp(value) if transform else value).to(logits.dtype)


def two_hot_cross_entropy(
    logits: Tensor, x: Tensor, vmin: float, vmax: float, transform: bool
) -> Tensor:
    with full_precision(logits):
        wide = wide_dtype(logits, x)
        lower, upper = _two_hot(_exact(x), logits.shape[-1], vmin, vmax, transform)
        log_p = F.log_softmax(logits.to(wide), dim=-1)
        weights = torch.cat((1.0 - upper, upper), -1).to(wide)
        taken = discounted(weights, log_p.gather(-1, torch.cat((lower, lower + 1), -1)))
        # A bin without weight counts nothing, even where its logit is -inf.
        return taken.sum(-1).neg().to(common_dtype(logits, x))


def td_lambda(
    rewards: Tensor, values: Tensor, continues: Tensor | None, gamma: float, lam: float
) -> Tensor:
    result, wide = common_dtype(rewards, values, continues), wide_dtype(rewards, values, continues)
    if rewards.shape[0] == 0:
        return rewards.clone().to(result)
    with full_precision(rewards):
        discounts = gamma if continues is None else gamma * continues.to(wide)
        return lambda_returns(rewards.to(wide), values.to(wide), discounts, lam).to(result)


def discounted_return(
    rewards: Tensor, last_value: Tensor, continues: Tensor | None, gamma: float
) -> Tensor:
    if rewards.shape[0] and continues is not None:
        return td_lambda(rewards, last_value.unsqueeze(0), continues, gamma, 1.0)[0]
    wide = wide_dtype(rewards, last_value)
    with full_precision(rewards):
        total = last_value.to(wide)
        for reward in reversed(rewards.to(wide).unbind(0)):
            total = reward + discounted(gamma, total)
        return total.to(common_dtype(rewards, last_value))
