"""SimNorm: softmax over groups of features, and the projection onto the same simplices."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pwm_fast.backends.base import Call
from pwm_fast.backends.dtypes import at_least_fp32
from pwm_fast.backends.select import declare, select
from pwm_fast.ops import _checks
from pwm_fast.ops.coverage import without_width
from pwm_fast.ops.operator import Operator, as_rows

declare("simnorm", "rows")


class _SimNorm(Operator):
    name, family, outputs = "simnorm", "rows", ("y",)
    grads, contiguous = ("x",), ("x",)
    rows, row_axes = {"x": 0}, (0,)

    @staticmethod
    def forward(k: Any, x: Tensor, group: int) -> Tensor:
        y = torch.empty_like(x)
        k.simnorm_fwd(x, y, group)
        return y

    @staticmethod
    def backward(k: Any, dy: Tensor, y: Tensor, group: int) -> Tensor:
        dx = torch.empty_like(y)
        k.simnorm_bwd(dy.contiguous(), y, dx, group)
        return dx


_simnorm = _SimNorm()


def simnorm(x: Tensor, dim: int = 8, *, backend: str | None = None) -> Tensor:
    """Softmax over consecutive groups of the last axis (simplicial normalisation).

    Args:
        x: ``[..., D]``, any floating dtype; D a multiple of ``dim``.
        dim: group width V.
        backend: see :mod:`pwm_fast.backends`.

    Returns:
        ``[..., D]``: every group of V is non-negative and sums to 1.

    Raises:
        TypeError: ``x`` is not a floating tensor.
        ValueError: D is not a multiple of ``dim``.
        BackendError: the backend that was asked for cannot run this.

    Source: Lavoie et al. 2022 (arXiv 2204.00616); TD-MPC2 (arXiv 2310.16828), section 3.1.
    """
    _checks.vectors("x", x)
    _checks.simnorm_width("x", x.shape[-1], "dim", dim)
    choice = select("simnorm", backend, Call([x], without_width([x])))
    if choice.is_reference:
        return reference_simnorm(x, dim)
    return _simnorm(as_rows(x), dim, choice=choice).view(x.shape)


def reference_simnorm(x: Tensor, dim: int) -> Tensor:
    """The reference of :func:`simnorm`."""
    return torch.softmax(x.unflatten(-1, (-1, dim)), dim=-1).flatten(-2)


def project_simplex(x: Tensor, dim: int = 8) -> Tensor:
    """Clamp at 0 and divide every group of the last axis by its sum, which becomes 1.

    A group without a positive entry stays 0.

    Args:
        x: ``[..., D]``, any floating dtype; D a multiple of ``dim``.
        dim: group width.

    Raises:
        TypeError: ``x`` is not a floating tensor.
        ValueError: D is not a multiple of ``dim``.
    """
    _checks.vectors("x", x)
    _checks.simnorm_width("x", x.shape[-1], "dim", dim)
    groups = at_least_fp32(x).unflatten(-1, (-1, dim)).clamp_min(0.0)
    return (groups / groups.sum(-1, keepdim=True).clamp_min(1e-6)).flatten(-2).to(x.dtype)
