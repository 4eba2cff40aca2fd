"""Products in which a weight of 0 leaves out what it multiplies, finite or not; lambda returns."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from pwm_fast.backends.transforms import functionalized, hidden


def _lost(weight: Tensor, x: Tensor) -> Tensor:
    """Where a product with a weight of 0 is NaN; elsewhere it is right, and so is its gradient."""
    return (weight == 0.0) & ~torch.isfinite(x)


def discounted(weight: Tensor | float, x: Tensor) -> Tensor:
    """``weight x``, and 0 where the weight is 0, even of a NaN or an infinite ``x``.

    NaN and infinity pass any other weight. Nothing flows back to what a weight of 0 has left out,
    and from there to the weight only what is finite.
    """
    if not isinstance(weight, Tensor):
        return weight * (x.nan_to_num(0.0, 0.0, 0.0) if weight == 0.0 else x)
    differentiated = torch.is_grad_enabled() and weight.requires_grad
    if not differentiated and not hidden():  # the same in fewer steps
        return (weight * x).masked_fill(weight == 0.0, 0.0)
    return weight * torch.where(_lost(weight, x), 0.0, x)


def _zero_wins(a: Tensor, b: Tensor) -> Tensor:
    """``a b``, and 0 where either is 0."""
    if not torch.is_grad_enabled() and not hidden():
        return (a * b).masked_fill((a == 0.0) | (b == 0.0), 0.0)
    return torch.where(_lost(b, a), 0.0, a) * torch.where(_lost(a, b), 0.0, b)


def lambda_returns(
    rewards: Tensor, values: Tensor, discounts: Tensor | float, lam: float
) -> Tensor:
    """``G_t = r_t + d_t ((1 - lam) V_{t+1} + lam G_{t+1})``, ``G_H = V_H``, of one dtype.

    What has a weight of 0 is left out: all behind a step with a discount of 0, values where lambda
    is 1, later targets where it is 0. Gradients towards what a loss does not look at are 0,
    whatever stands there.

    Args:
        rewards: ``[H, ...]``, H at least 1.
        values: ``[H+1, ...]``; with ``lam = 1`` the last ones ``[1, ...]`` will do.
        discounts: ``[H, ...]``, or one for all steps.
        lam: lambda.
    """
    # The function has no forward-mode rule: torch.compile would take none that has. It is for
    # reverse mode that plain steps do not do: they give 0 * NaN towards weights behind an end.
    if isinstance(discounts, Tensor) and _in_reverse(rewards, values, discounts):
        return _LambdaReturns.apply(rewards, values, discounts, lam)
    return _recursion(rewards, values, discounts, lam)


def _in_reverse(*tensors: Tensor) -> bool:
    if forward_ad._current_level >= 0 or not torch.is_grad_enabled() or functionalized():
        return False
    return hidden() or any(x.requires_grad for x in tensors)


def _recursion(rewards: Tensor, values: Tensor, discounts: Tensor | float, lam: float) -> Tensor:
    target = values[-1]
    targets = []
    for t in range(rewards.shape[0] - 1, -1, -1):
        discount = discounts[t] if isinstance(discounts, Tensor) else discounts
        bootstrap = target if lam == 1.0 else _mixed(values[t + 1], target, lam)
        target = rewards[t] + discounted(discount, bootstrap)
        targets.append(target)
    return torch.stack(targets[::-1])


def _mixed(values: Tensor, targets: Tensor, lam: float) -> Tensor:
    if lam == 0.0 or lam == 1.0:
        return targets if lam else values
    return (1.0 - lam) * values + lam * targets


class _LambdaReturns(torch.autograd.Function):
    """The recursion, and its gradient in as few steps; any number of times."""

    generate_vmap_rule = True

    @staticmethod
    def forward(rewards: Tensor, values: Tensor, discounts: Tensor, lam: float) -> Tensor:
        return _recursion(rewards, values, discounts, lam)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, values, discounts, ctx.lam = inputs
        ctx.save_for_backward(values, discounts, output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        values, discounts, targets = ctx.saved_tensors
        lam, horizon = ctx.lam, discounts.shape[0]
        adjoints = [grad[0]]  # of targets
        for t in range(horizon - 1):
            adjoints.append(grad[t + 1] + lam * _zero_wins(discounts[t], adjoints[t]))
        adjoint = torch.stack(adjoints)
        passed = _zero_wins(discounts, adjoint)  # to the bootstraps
        later = torch.cat((targets[1:], values[-1:]))
        bootstraps = later if lam == 1.0 else _mixed(values[1:], later, lam)
        # Towards a discount of 0 the derivative is the bootstrap, as long as that is a number.
        unseen = _lost(adjoint, bootstraps) | _lost(discounts, bootstraps)
        to_discounts = adjoint * torch.where(unseen, 0.0, bootstraps)
        if values.shape[0] == 1:
            return adjoint, passed[-1:], to_discounts, None
        # The last step bootstraps from its value alone.
        to_values = (torch.zeros_like(values[:1]), (1.0 - lam) * passed[:-1], passed[-1:])
        return adjoint, torch.cat(to_values), to_discounts, None
