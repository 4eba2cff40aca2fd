"""Products with one weight, forward and towards the input."""

from __future__ import annotations

import torch
from torch import Tensor


class Gemm:
    """``x W^T`` and ``dy W`` for a weight ``[N, K]``, or one ``[E, N, K]`` of an ensemble."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def __call__(self, x: Tensor, members: int = 0) -> Tensor:
        """``x W^T``: ``[R, K]`` to ``[R, N]``; rows are those of all members one after another."""
        if not members:
            return torch.mm(x, self.weight.t())
        y = torch.bmm(x.view(members, -1, x.shape[-1]), self.weight.transpose(1, 2))
        return y.view(-1, y.shape[-1])

    def dgrad(self, dy: Tensor, members: int = 0) -> Tensor:
        """``dy W``: ``[R, N]`` to ``[R, K]``."""
        if not members:
            return torch.mm(dy, self.weight)
        dx = torch.bmm(dy.view(members, -1, dy.shape[-1]), self.weight)
        return dx.view(-1, dx.shape[-1])


_NARROW = 16


def weight_grad(dh: Tensor, x: Tensor) -> Tensor:
    """``dh^T x``: ``[R, N]`` and ``[R, K]`` to ``[N, K]``.

    Where one of the sides is narrow, MKL sums all rows one after another and the error grows with
    their number (5 times that of step-by-step gradients at 600 rows and width 7): such a product,
    cheap as it is, is formed in float64.
    """
    if min(dh.shape[1], x.shape[1]) < _NARROW:
        return torch.mm(dh.double().t(), x.double()).to(dh.dtype)
    return torch.mm(dh.t(), x)
