"""Elementwise operations."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pwm_fast.backends import pointwise
from pwm_fast.backends.dtypes import at_least_fp32, full_precision
from pwm_fast.ops import _checks


def mish(x: Tensor) -> Tensor:
    """``x tanh(softplus(x))``, elementwise (Misra 2019, arXiv 1908.08681).

    Args:
        x: any shape and floating dtype.

    Raises:
        TypeError: ``x`` is not a floating tensor.
    """
    _checks.floating("x", x)
    return pointwise.mish(x)


# Both halves are written with one clamp (slope 1 at its bound) and one relu (slope 0 there):
# sign(x) * log1p(|x|) has the right value but the derivative 0 instead of 1 at x = 0.
def symlog(x: Tensor) -> Tensor:
    """``sign(x) log(1 + |x|)``, elementwise (Hafner et al. 2023, arXiv 2301.04104, equation 9).

    Raises:
        TypeError: ``x`` is not a floating tensor.
    """
    _checks.floating("x", x)
    with full_precision(x):
        y = at_least_fp32(x)
        return (torch.log1p(y.clamp_min(0.0)) - torch.log1p(F.relu(-y))).to(x.dtype)


def symexp(x: Tensor) -> Tensor:
    """``sign(x) (exp(|x|) - 1)``, elementwise: the inverse of :func:`symlog`.

    Raises:
        TypeError: ``x`` is not a floating tensor.
    """
    _checks.floating("x", x)
    with full_precision(x):
        y = at_least_fp32(x)
        return (_expm1(y.clamp_min(0.0)) - _expm1(F.relu(-y))).to(x.dtype)


def _expm1(x: Tensor) -> Tensor:
    # Inductor's vectors on a CPU are exp(x) - 1 (torch 2.13), which is 0 where x is small.
    if torch.compiler.is_compiling() and x.device.type == "cpu":
        half = 0.5 * x.double()
        return (2.0 * torch.sinh(half) * torch.exp(half)).to(x.dtype)
    return torch.expm1(x)
