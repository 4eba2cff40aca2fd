"""Public operations on distributional heads and returns.

All compute in float32 at least, inside autocast too, and round once, to the dtype of their tensors
(where these differ, to what PyTorch promotes them to).
"""

from __future__ import annotations

from torch import Tensor

from pwm_fast.backends import select
from pwm_fast.fused import calls
from pwm_fast.ops import _checks
from pwm_fast.ops.reference import heads as reference


def symlog(x: Tensor) -> Tensor:
    """``sign(x) log(1 + |x|)``, elementwise (Hafner et al. 2023, arXiv 2301.04104, equation 9).

    Raises:
        TypeError: ``x`` is not a floating tensor.
    """
    _checks.floating("x", x)
    return reference.symlog(x)


def symexp(x: Tensor) -> Tensor:
    """``sign(x) (exp(|x|) - 1)``, elementwise: the inverse of :func:`symlog`.

    Raises:
        TypeError: ``x`` is not a floating tensor.
    """
    _checks.floating("x", x)
    return reference.symexp(x)


def two_hot_encode(
    x: Tensor, bins: int = 101, vmin: float = -10.0, vmax: float = 10.0, *, transform: bool = True
) -> Tensor:
    """Spread each value over the two nearest of ``bins`` equally spaced centres.

    Args:
        x: values ``[...]``, any floating dtype. Outside the range they count as its nearest end.
        bins: number of centres, at least 2.
        vmin: first centre.
        vmax: last centre.
        transform: encode ``symlog(x)``, so that the centres live in symlog space.

    Returns:
        ``[..., bins]``: non-negative, summing to 1, at most two entries non-zero; the expectation
        over the centres is the (clamped) value.

    Raises:
        TypeError: ``x`` is not a floating tensor.
        ValueError: fewer than 2 bins, or an empty range.

    Source: DreamerV3 (arXiv 2301.04104), equations 9 and 10.
    """
    _checks.floating("x", x)
    _checks.value_range(bins, vmin, vmax)
    return reference.two_hot_encode(x, bins, vmin, vmax, transform)


def two_hot_decode(
    logits: Tensor,
    vmin: float = -10.0,
    vmax: float = 10.0,
    *,
    transform: bool = True,
    backend: str | None = None,
) -> Tensor:
    """Expected value of a two-hot head.

    Args:
        logits: ``[..., bins]``, any floating dtype.
        vmin: first centre.
        vmax: last centre.
        transform: apply :func:`symexp` to the expectation (the centres live in symlog space).
        backend: see :mod:`pwm_fast.backends`.

    Returns:
        ``[...]``.

    Raises:
        TypeError: ``logits`` is not a floating tensor.
        ValueError: fewer than 2 bins, or an empty range.
    """
    _checks.vectors("logits", logits)
    _checks.value_range(logits.shape[-1], vmin, vmax)
    name = select.select("two_hot_decode", backend, select.Call([logits]))
    if name in calls.ROW_KERNELS:
        return calls.two_hot_decode(name, logits, vmin, vmax, transform)
    return reference.two_hot_decode(logits, vmin, vmax, transform)


def two_hot_cross_entropy(
    logits: Tensor,
    x: Tensor,
    vmin: float = -10.0,
    vmax: float = 10.0,
    *,
    transform: bool = True,
    backend: str | None = None,
) -> Tensor:
    """Cross-entropy of a two-hot head against the two-hot encoding of ``x``.

    Args:
        logits: ``[..., bins]``.
        x: target values ``[...]``.
        vmin: first centre.
        vmax: last centre.
        transform: encode ``symlog(x)``.
        backend: see :mod:`pwm_fast.backends`. All but the reference give no gradient towards ``x``.

    Returns:
        ``[...]``, not reduced.

    Raises:
        TypeError: a tensor is not floating.
        ValueError: shapes differ, fewer than 2 bins, or an empty range.
    """
    _checks.vectors("logits", logits)
    _checks.floating("x", x)
    _checks.value_range(logits.shape[-1], vmin, vmax)
    if logits.shape[:-1] != x.shape:
        raise ValueError(
            f"x must have shape {tuple(logits.shape[:-1])} to fit the logits, got {tuple(x.shape)}"
        )
    reason = "a gradient towards x is asked for" if x.requires_grad else None
    call = select.Call([logits, x], reason)
    name = select.select("two_hot_cross_entropy", backend, call)
    if name in calls.ROW_KERNELS:
        return calls.two_hot_cross_entropy(name, logits, x, vmin, vmax, transform)
    return reference.two_hot_cross_entropy(logits, x, vmin, vmax, transform)


def td_lambda(
    rewards: Tensor,
    values: Tensor,
    *,
    gamma: float = 0.99,
    lam: float = 0.95,
    continues: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """TD(lambda) targets by the backward recursion.

    ``G_t = r_t + gamma c_t ((1 - lam) V_{t+1} + lam G_{t+1})`` with ``G_H = V_H``.

    Args:
        rewards: ``[H, ...]``, time first.
        values: ``[H+1, ...]``: values of the visited states, the last one bootstraps.
        gamma: discount in [0, 1].
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
    for name, value in (("gamma", gamma), ("lam", lam)):
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"{name} must lie in [0, 1], got {value}")
    if _returns_backend(rewards, values, continues, backend) == "triton":
        return calls.td_lambda(rewards, values, continues, gamma, lam)
    return reference.td_lambda(rewards, values, continues, gamma, lam)


def discounted_return(
    rewards: Tensor, last_value: Tensor, gamma: float, continues: Tensor | None = None
) -> Tensor:
    """``sum_t gamma^t r_t + gamma^H V`` with the discounts of :func:`td_lambda`.

    Args:
        rewards: ``[H, ...]``, time first.
        last_value: ``[...]``, of the state after the last step.
        gamma: discount.
        continues: ``[H, ...]`` or None.

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
    if _returns_backend(rewards, last_value, continues, None) == "triton":
        values = last_value.unsqueeze(0)
        return calls.td_lambda(rewards, values, continues, gamma, 1.0)[0]
    return reference.discounted_return(rewards, last_value, continues, gamma)


def _check_continues(rewards: Tensor, continues: Tensor | None) -> None:
    if continues is None:
        return
    _checks.floating("continues", continues)
    if continues.shape != rewards.shape:
        raise ValueError(
            f"continues must be {tuple(rewards.shape)} as the rewards, got {tuple(continues.shape)}"
        )


def _returns_backend(
    rewards: Tensor, values: Tensor, continues: Tensor | None, backend: str | None
) -> str:
    tensors = [rewards, values, *([] if continues is None else [continues])]
    reason = None if rewards.numel() else "there are no rewards"
    return select.select("td_lambda", backend, select.Call(tensors, reason))
