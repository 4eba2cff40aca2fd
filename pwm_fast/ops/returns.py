"""Lambda returns, discounted returns, and products in which a weight of 0 leaves out its factor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from pwm_fast.backends.base import Call
from pwm_fast.backends.dtypes import common_dtype, fp32_dtype, full_precision
from pwm_fast.backends.select import Choice, declare, select
from pwm_fast.backends.transforms import functionalized, hidden
from pwm_fast.ops import _checks
from pwm_fast.ops.operator import Operator

declare("td_lambda", "returns")


class _TdLambda(Operator):
    name, family, outputs = "td_lambda", "returns", ("targets",)
    grads, contiguous = ("rewards", "values", "continues"), ("rewards", "values", "continues")
    rows, row_axes = {"rewards": 1, "values": 1, "continues": 1}, (1,)

    @staticmethod
    def forward(
        k: Any,
        rewards: Tensor,
        values: Tensor,
        continues: Tensor | None,
        gamma: float,
        lam: float,
    ) -> Tensor:
        return k.returns_fwd(rewards, values, continues, gamma, lam)

    @staticmethod
    def backward(
        k: Any,
        dtargets: Tensor,
        values: Tensor,
        continues: Tensor | None,
        targets: Tensor,
        gamma: float,
        lam: float,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        return k.returns_bwd(dtargets.contiguous(), values, continues, targets, gamma, lam)

    @classmethod
    def fake(cls, k: Any, a: Any) -> Tensor:
        return torch.empty_like(a.rewards)


_td_lambda = _TdLambda()


def td_lambda(
    rewards: Tensor,
    values: Tensor,
    *,
    gamma: float | Tensor = 0.99,
    lam: float = 0.95,
    continues: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """TD(lambda) targets by the backward recursion.

    ``G_t = r_t + gamma c_t ((1 - lam) V_{t+1} + lam G_{t+1})`` with ``G_H = V_H``.

    Only the products ``gamma c_t`` count. So a discount for each row (each task has its own, as
    TD-MPC2's) is exactly ``gamma=1`` with ``continues`` times the discounts, which is how it runs.

    Args:
        rewards: ``[H, ...]``, time first.
        values: ``[H+1, ...]``: values of the visited states, the last one bootstraps.
        gamma: discount in [0, 1], or one for each row, a floating tensor ``[...]`` (or one that
            broadcasts to it) whose numbers are not looked at.
        lam: lambda in [0, 1]; 0 gives one-step targets, 1 the discounted return.
        continues: ``[H, ...]``: 0 where the episode ended at step t, else 1 (or a probability).
            What is behind an end is left out: it may be NaN or infinite, and no gradient comes from
            there. The last step's own reward counts. Any other probability lets a NaN pass.
        backend: see :mod:`pwm_fast.backends`.

    Returns:
        ``[H, ...]`` targets of ``values[:-1]``.

    Raises:
        TypeError: a tensor is not floating.
        ValueError: shapes differ, or gamma or lam lies outside [0, 1].

    Source: Sutton and Barto, 2nd edition, section 12.1 and equation 12.20.
    """
    _checks.vectors("rewards", rewards)
    _checks.floating("values", values)
    expected = (rewards.shape[0] + 1, *rewards.shape[1:])
    if tuple(values.shape) != expected:
        raise ValueError(f"values must be {expected} for these rewards, got {tuple(values.shape)}")
    _check_continues(rewards, continues)
    if not 0.0 <= lam <= 1.0:
        raise ValueError(f"lam must lie in [0, 1], got {lam}")
    if not isinstance(gamma, Tensor) and not 0.0 <= gamma <= 1.0:
        raise ValueError(f"gamma must lie in [0, 1], got {gamma}")
    gamma, continues = _discounts(gamma, continues, rewards)
    choice = _choose(rewards, values, continues, backend)
    if not choice.is_reference:
        return _run(rewards, values, continues, gamma, lam, choice)
    return _reference(rewards, values, continues, gamma, lam)


def discounted_return(
    rewards: Tensor,
    last_value: Tensor,
    gamma: float | Tensor,
    continues: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """``sum_t gamma^t r_t + gamma^H V`` with the discounts of :func:`td_lambda`.

    Args:
        rewards: ``[H, ...]``, time first.
        last_value: ``[...]``, of the state after the last step.
        gamma: discount, or one for each row, as of :func:`td_lambda`.
        continues: ``[H, ...]`` or None.
        backend: as of :func:`td_lambda`.

    Returns:
        ``[...]``.

    Raises:
        TypeError: a tensor is not floating.
        ValueError: shapes differ.
    """
    _checks.vectors("rewards", rewards)
    _checks.floating("last_value", last_value)
    if last_value.shape != rewards.shape[1:]:
        raise ValueError(
            f"last_value must be {tuple(rewards.shape[1:])} for these rewards, "
            f"got {tuple(last_value.shape)}"
        )
    _check_continues(rewards, continues)
    gamma, continues = _discounts(gamma, continues, rewards)
    choice = _choose(rewards, last_value, continues, backend)
    if not choice.is_reference:
        return _run(rewards, last_value.unsqueeze(0), continues, gamma, 1.0, choice)[0]
    if rewards.shape[0] and continues is not None:
        return _reference(rewards, last_value.unsqueeze(0), continues, gamma, 1.0)[0]
    dtype = fp32_dtype(rewards, last_value)
    with full_precision(rewards):
        total = last_value.to(dtype)
        for reward in reversed(rewards.to(dtype).unbind(0)):
            total = reward + discounted(gamma, total)
        return total.to(common_dtype(rewards, last_value))


def _check_continues(rewards: Tensor, continues: Tensor | None) -> None:
    if continues is None:
        return
    _checks.floating("continues", continues)
    if continues.shape != rewards.shape:
        raise ValueError(
            f"continues must be {tuple(rewards.shape)} as the rewards, got {tuple(continues.shape)}"
        )


def _discounts(
    gamma: float | Tensor, continues: Tensor | None, rewards: Tensor
) -> tuple[float, Tensor | None]:
    """One discount for all rows, with the weights ``[H, ...]`` that it multiplies."""
    if not isinstance(gamma, Tensor):
        return gamma, continues
    _checks.floating("gamma", gamma)
    rows = rewards.shape[1:]
    fits = gamma.dim() <= len(rows) and all(
        n in (1, m) for n, m in zip(reversed(gamma.shape), reversed(rows), strict=False)
    )
    if not fits:
        raise ValueError(
            f"gamma must be a number or broadcast to {tuple(rows)}, got {tuple(gamma.shape)}"
        )
    _checks.same_device("gamma", gamma, "rewards", rewards.device)
    gamma = gamma.to(rewards.dtype)
    return 1.0, gamma.expand(rewards.shape) if continues is None else gamma * continues


def _choose(
    rewards: Tensor, values: Tensor, continues: Tensor | None, backend: str | None
) -> Choice:
    tensors = [rewards, values, *([] if continues is None else [continues])]
    reason = None if rewards.numel() else "there are no rewards"
    return select("td_lambda", backend, Call(tensors, reason))


def _run(
    rewards: Tensor,
    values: Tensor,
    continues: Tensor | None,
    gamma: float,
    lam: float,
    choice: Choice,
) -> Tensor:
    """The operator; with ``lam = 1`` the last values ``[1, ...]`` will do."""
    rows = (None if x is None else x.reshape(x.shape[0], -1) for x in (rewards, values, continues))
    return _td_lambda(*rows, gamma, lam, choice=choice).view(rewards.shape)


def _reference(
    rewards: Tensor, values: Tensor, continues: Tensor | None, gamma: float, lam: float
) -> Tensor:
    """The reference of :func:`td_lambda`."""
    result, dtype = common_dtype(rewards, values, continues), fp32_dtype(rewards, values, continues)
    if rewards.shape[0] == 0:
        return rewards.clone().to(result)
    with full_precision(rewards):
        discounts = gamma if continues is None else gamma * continues.to(dtype)
        return lambda_returns(rewards.to(dtype), values.to(dtype), discounts, lam).to(result)


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
        grads = [grad[0]]  # of targets
        for t in range(horizon - 1):
            grads.append(grad[t + 1] + lam * _zero_wins(discounts[t], grads[t]))
        to_targets = torch.stack(grads)
        passed = _zero_wins(discounts, to_targets)  # to the bootstraps
        later = torch.cat((targets[1:], values[-1:]))
        bootstraps = later if lam == 1.0 else _mixed(values[1:], later, lam)
        # Towards a discount of 0 the derivative is the bootstrap, as long as that is a number.
        unseen = _lost(to_targets, bootstraps) | _lost(discounts, bootstraps)
        to_discounts = to_targets * torch.where(unseen, 0.0, bootstraps)
        if values.shape[0] == 1:
            return to_targets, passed[-1:], to_discounts, None
        # The last step bootstraps from its value alone.
        to_values = (torch.zeros_like(values[:1]), (1.0 - lam) * passed[:-1], passed[-1:])
        return to_targets, torch.cat(to_values), to_discounts, None


def _lost(weight: Tensor, x: Tensor) -> Tensor:
    """Where a product with a weight of 0 is NaN; elsewhere it is right, and so is its gradient."""
    return (weight == 0.0) & ~torch.isfinite(x)


def _zero_wins(a: Tensor, b: Tensor) -> Tensor:
    """``a b``, and 0 where either is 0."""
    if not torch.is_grad_enabled() and not hidden():
        return (a * b).masked_fill((a == 0.0) | (b == 0.0), 0.0)
    return torch.where(_lost(b, a), 0.0, a) * torch.where(_lost(a, b), 0.0, b)
