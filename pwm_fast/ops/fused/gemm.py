"""Products with one weight, forward and towards the input."""

from __future__ import annotations

import os
from functools import lru_cache

import torch
from torch import Tensor

VARIABLE = "PWM_FAST_GEMM"
CHOICES = ("torch", "onednn")
_NARROW = 16


@lru_cache(maxsize=1)
def _onednn_works() -> bool:
    """Whether torch has, and this CPU runs, oneDNN's Linear on a prepacked weight.

    The operators are PyTorch's own, but private: they are tried once, with their result checked.
    """
    try:
        x, weight = torch.randn(5, 33), torch.randn(17, 33)
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, 5)
        y = torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
        return bool(torch.allclose(y, x @ weight.t(), rtol=1e-4, atol=1e-4))
    except (AttributeError, RuntimeError, NotImplementedError, TypeError):
        return False


def prepacks(weight: Tensor) -> bool:
    """Whether products with ``weight`` run on oneDNN with a prepacked copy.

    Only where ``PWM_FAST_GEMM=onednn`` asks for it: on AVX2 machines torch's own product is faster,
    and oneDNN's one long sum rounds more, up to 2.6 times torch's error (docs/performance.md).

    Raises:
        ValueError: the environment variable is neither ``torch`` nor ``onednn``.
    """
    choice = os.environ.get(VARIABLE) or "torch"
    if choice not in CHOICES:
        raise ValueError(f"{VARIABLE} must be one of {', '.join(CHOICES)}, got {choice!r}")
    if choice == "torch" or weight.dim() != 2 or weight.numel() == 0:
        return False
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        return False
    return _onednn_works()


class Gemm:
    """``x W^T`` and ``dy W`` for a weight ``[N, K]``, or one ``[E, N, K]`` of an ensemble.

    Args:
        weight: the weight.
        rows: rows of a product.
    """

    def __init__(self, weight: Tensor, rows: int = 0) -> None:
        self.weight = weight
        self._rows = rows
        self._prepack = rows > 0 and prepacks(weight)
        self._packed: Tensor | None = None
        self._packed_transpose: Tensor | None = None

    def __call__(self, x: Tensor, members: int = 0) -> Tensor:
        """``x W^T``: ``[R, K]`` to ``[R, N]``; rows are those of all members one after another."""
        if members:
            y = torch.bmm(x.view(members, -1, x.shape[-1]), self.weight.transpose(1, 2))
            return y.view(-1, y.shape[-1])
        if self._prepack:
            if self._packed is None:
                self._packed = self._pack(self.weight)
            return _prepacked(x, self._packed)
        return torch.mm(x, self.weight.t())

    def dgrad(self, dy: Tensor, members: int = 0) -> Tensor:
        """``dy W``: ``[R, N]`` to ``[R, K]``."""
        if members:
            dx = torch.bmm(dy.view(members, -1, dy.shape[-1]), self.weight)
            return dx.view(-1, dx.shape[-1])
        if self._prepack:
            if self._packed_transpose is None:
                self._packed_transpose = self._pack(self.weight.t())
            return _prepacked(dy, self._packed_transpose)
        return torch.mm(dy, self.weight)

    def _pack(self, weight: Tensor) -> Tensor:
        return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), self._rows)


def _prepacked(x: Tensor, packed: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x.contiguous(), packed, None, "none", [], "")


def weight_grad(dh: Tensor, x: Tensor) -> Tensor:
    """``dh^T x``: ``[R, N]`` and ``[R, K]`` to ``[N, K]``.

    Where one of the sides is narrow, MKL sums all rows one after another and the error grows with
    their number (5 times that of step-by-step gradients at 600 rows and width 7): such a product,
    cheap as it is, is formed in float64.
    """
    if min(dh.shape[1], x.shape[1]) < _NARROW:
        return torch.mm(dh.double().t(), x.double()).to(dh.dtype)
    return torch.mm(dh.t(), x)
