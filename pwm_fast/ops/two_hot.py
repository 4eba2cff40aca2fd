"""Two-hot distributional heads: encoding, expectation, cross-entropy.

All compute in float32 at least, inside autocast too, and round once, to the dtype of their tensors
(where these differ, to what PyTorch promotes them to).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pwm_fast.backends.base import Call
from pwm_fast.backends.dtypes import at_least_fp32, common_dtype, fp32_dtype, full_precision
from pwm_fast.backends.select import declare, select
from pwm_fast.backends.transforms import hidden
from pwm_fast.ops import _checks
from pwm_fast.ops.operator import Operator, as_rows
from pwm_fast.ops.pointwise import symexp, symlog
from pwm_fast.ops.returns import discounted

declare("two_hot_decode", "rows")
declare("two_hot_cross_entropy", "rows")


class _Decode(Operator):
    name, family, outputs = "two_hot_decode", "rows", ("value", "mean", "lse")
    grads, contiguous = ("logits",), ("logits",)
    rows, row_axes = {"logits": 0}, (0, 0, 0)

    @staticmethod
    def forward(
        k: Any, logits: Tensor, vmin: float, vmax: float, transform: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        value, mean, lse = (logits.new_empty(logits.shape[0]) for _ in range(3))
        k.two_hot_decode_fwd(logits, value, mean, lse, vmin, vmax, transform)
        return value, mean, lse

    @staticmethod
    def backward(
        k: Any,
        dvalue: Tensor,
        logits: Tensor,
        mean: Tensor,
        lse: Tensor,
        vmin: float,
        vmax: float,
        transform: bool,
    ) -> Tensor:
        dlogits = torch.empty_like(logits)
        k.two_hot_decode_bwd(dvalue.contiguous(), logits, mean, lse, dlogits, vmin, vmax, transform)
        return dlogits


class _CrossEntropy(Operator):
    name, family, outputs = "two_hot_cross_entropy", "rows", ("loss", "lse")
    grads, refused, contiguous = ("logits",), ("x",), ("logits", "x")
    rows, row_axes = {"logits": 0, "x": 0}, (0, 0)

    @staticmethod
    def forward(
        k: Any, logits: Tensor, x: Tensor, vmin: float, vmax: float, transform: bool
    ) -> tuple[Tensor, Tensor]:
        loss, lse = logits.new_empty(logits.shape[0]), logits.new_empty(logits.shape[0])
        k.two_hot_ce_fwd(logits, x, loss, lse, vmin, vmax, transform)
        return loss, lse

    @staticmethod
    def backward(
        k: Any,
        dloss: Tensor,
        logits: Tensor,
        x: Tensor,
        lse: Tensor,
        vmin: float,
        vmax: float,
        transform: bool,
    ) -> Tensor:
        dlogits = torch.empty_like(logits)
        k.two_hot_ce_bwd(dloss.contiguous(), logits, x, lse, dlogits, vmin, vmax, transform)
        return dlogits


_decode, _cross_entropy = _Decode(), _CrossEntropy()


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
    with full_precision(x):
        index, upper = _two_hot(_exact(x), bins, vmin, vmax, transform)
        out = torch.zeros(*x.shape, bins, dtype=x.dtype, device=x.device)
        out = out.scatter(-1, index, (1.0 - upper).to(x.dtype))
        return out.scatter(-1, index + 1, upper.to(x.dtype))


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
    choice = select("two_hot_decode", backend, Call([logits]))
    if not choice.is_reference:
        value = _decode(as_rows(logits), vmin, vmax, bool(transform), choice=choice)
        return value.view(logits.shape[:-1])
    with full_precision(logits):
        x = at_least_fp32(logits)
        centres = torch.linspace(vmin, vmax, x.shape[-1], dtype=x.dtype, device=x.device)
        value = torch.softmax(x, dim=-1) @ centres
        return (symexp(value) if transform else value).to(logits.dtype)


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
    choice = select("two_hot_cross_entropy", backend, Call([logits, x], reason))
    if not choice.is_reference:
        rows = as_rows(logits)
        loss = _cross_entropy(rows, x.reshape(-1), vmin, vmax, bool(transform), choice=choice)
        return loss.view(x.shape)
    with full_precision(logits):
        dtype = fp32_dtype(logits, x)
        lower, upper = _two_hot(_exact(x), logits.shape[-1], vmin, vmax, transform)
        log_p = F.log_softmax(logits.to(dtype), dim=-1)
        weights = torch.cat((1.0 - upper, upper), -1).to(dtype)
        taken = discounted(weights, log_p.gather(-1, torch.cat((lower, lower + 1), -1)))
        # A bin without weight counts nothing, even where its logit is -inf.
        return taken.sum(-1).neg().to(common_dtype(logits, x))


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
