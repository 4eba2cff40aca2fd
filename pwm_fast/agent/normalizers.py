"""Running statistics."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RunningMeanStd(nn.Module):
    """Mean and variance of everything seen, merged batch by batch (Chan et al. 1979).

    Buffers are float64; updates never synchronise with the host. Before the first update the mean
    is 0 and the variance 1.

    Args:
        shape: of one item; ``()`` for scalars.
    """

    mean: Tensor
    var: Tensor
    count: Tensor

    def __init__(self, shape: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.shape = shape
        self.register_buffer("mean", torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("var", torch.ones(shape, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Merge a batch ``[..., *shape]``; items with a non-finite entry are left out."""
        rows = x.detach().double().reshape(-1, *self.shape)
        finite = torch.isfinite(rows)
        weight = (finite.flatten(1).all(1) if self.shape else finite).double()
        n = weight.sum()
        spread = weight.reshape(-1, *([1] * len(self.shape)))
        rows = torch.where(finite, rows, 0.0)
        batch_mean = (rows * spread).sum(0) / n.clamp_min(1.0)
        batch_var = ((rows - batch_mean).square() * spread).sum(0) / n.clamp_min(1.0)
        total = (self.count + n).clamp_min(1.0)
        delta = batch_mean - self.mean
        merged = (
            self.var * self.count + batch_var * n + delta.square() * self.count * n / total
        ) / total
        seen = n > 0
        self.var.copy_(torch.where(seen, merged, self.var))
        self.mean.add_(torch.where(seen, delta * n / total, 0.0))
        self.count.add_(n)

    def scale(self, eps: float = 1e-5) -> Tensor:
        """``sqrt(var + eps)``, float32, of the item's shape."""
        return (self.var + eps).sqrt().float()

    def normalize(self, x: Tensor) -> Tensor:
        """``(x - mean) / sqrt(var + eps)``, clipped to 10 deviations."""
        return ((x - self.mean.to(x.dtype)) / self.scale().to(x.dtype)).clamp(-10.0, 10.0)
