"""Running statistics."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from pwm_fast.ops.extend import at_least_fp32
from pwm_fast.parallel import ALONE, Ranks


class RunningMeanStd(nn.Module):
    """Mean and variance of everything seen, merged batch by batch (Chan et al. 1979).

    Buffers are float64; updates never synchronise with the host. Before the first update the mean
    is 0 and the variance 1.

    Args:
        shape: of one item; ``()`` for scalars.
        groups: G, of which each has statistics of its own, as items of several tasks have; None is
            one for all.

    Attributes:
        ranks: whose batches are merged, too.
    """

    mean: Tensor
    var: Tensor
    count: Tensor
    ranks: Ranks = ALONE

    def __init__(self, shape: tuple[int, ...] = (), groups: int | None = None) -> None:
        super().__init__()
        self.shape = shape
        of = () if groups is None else (groups,)
        self.register_buffer("mean", torch.zeros((*of, *shape), dtype=torch.float64))
        self.register_buffer("var", torch.ones((*of, *shape), dtype=torch.float64))
        self.register_buffer("count", torch.zeros(of, dtype=torch.float64))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RunningMeanStd:
        """Follow to another device, but not to another dtype: 16 bits cannot even count."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, value in before.items():
            moved = self._buffers[name]
            if value is not None and moved is not None and moved.dtype != value.dtype:
                self._buffers[name] = value.to(moved.device)
        return self

    @torch.no_grad()
    def update(self, x: Tensor, group: Tensor | None = None, *, same: bool = False) -> None:
        """Merge a batch ``[..., *shape]``; items with a non-finite entry are left out.

        Args:
            x: the items.
            group: integers of the leading shape of ``x``, their groups, where there are several.
            same: all ranks are given this batch.
        """
        rows = x.detach().double().reshape(-1, *self.shape)
        finite = torch.isfinite(rows)
        weight = (finite.flatten(1).all(1) if self.shape else finite).double()
        rows = torch.where(finite, rows, 0.0)
        groups = self.count.numel()
        weight = weight.unsqueeze(-1)  # [n, G]
        if group is not None:
            numbers = torch.arange(groups, device=rows.device)
            weight = weight * (group.reshape(-1, 1) == numbers)

        def sums(values: Tensor) -> Tensor:
            """Of each group's ``values [n, *shape]``, ``[G, *shape]``."""
            if group is None:
                return (values * weight.view(-1, *([1] * len(self.shape)))).sum(0, keepdim=True)
            # A product of matrices: rows by groups by entries would be 20 times as slow.
            return (weight.T @ values.reshape(len(values), -1)).view(groups, *self.shape)

        of_groups = (groups, *([1] * len(self.shape)))
        n, count = (v.reshape(of_groups) for v in (weight.sum(0), self.count))
        mean, var = (v.reshape(groups, *self.shape) for v in (self.mean, self.var))
        batch_mean = sums(rows) / n.clamp_min(1.0)
        of_row = batch_mean if group is None else batch_mean[group.reshape(-1)]
        batch_var = sums((rows - of_row).square()) / n.clamp_min(1.0)
        if self.ranks.size > 1 and not same:
            n, batch_mean, batch_var = self._of_all_ranks(n, batch_mean, batch_var)
        total = (count + n).clamp_min(1.0)
        delta = batch_mean - mean
        merged = (var * count + batch_var * n + delta.square() * count * n / total) / total
        seen = n > 0
        self.var.copy_(torch.where(seen, merged, var).view_as(self.var))
        self.mean.add_(torch.where(seen, delta * n / total, 0.0).view_as(self.mean))
        self.count.add_(n.view_as(self.count))

    def _of_all_ranks(self, n: Tensor, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Counts ``[G, 1...]``, means and variances ``[G, *shape]`` of all ranks' batches."""
        own = (n, mean, var)
        all_of_them = self.ranks.gather_tensors(torch.cat([x.flatten() for x in own]))
        parts = all_of_them.split([x.numel() for x in own], dim=-1)
        ns, means, variances = (p.view(-1, *x.shape) for p, x in zip(parts, own, strict=True))
        total = ns.sum(0)
        most = total.clamp_min(1.0)
        centre = (ns * means).sum(0) / most
        spread = (ns * (variances + (means - centre).square())).sum(0) / most
        return total, centre, spread

    def scale(self, eps: float = 1e-5, dtype: torch.dtype = torch.float32) -> Tensor:
        """``sqrt(var + eps)``, of the buffers' shape, rounded once to ``dtype``."""
        return (self.var + eps).sqrt().to(dtype)

    @torch.no_grad()
    def summary(self) -> dict[str, Tensor]:
        """The statistics in a few scalars, float64 on the device.

        Of scalar items ``mean``, ``std`` and ``count``. Of others ``mean_abs`` (the mean over their
        entries of the mean's absolute value), ``std_min`` and ``std_max`` (over their entries) and
        ``count``; entries of groups of which nothing was seen do not count, and without any others
        the first three are not finite.
        """
        std, count = self.var.sqrt(), self.count.sum()
        if not self.shape:
            return {"mean": self.mean, "std": std, "count": count}
        of_groups = (*self.count.shape, *([1] * len(self.shape)))
        seen = (self.count > 0).view(of_groups).expand_as(std)
        return {
            "mean_abs": torch.where(seen, self.mean.abs(), 0.0).sum() / seen.sum(),
            "std_min": torch.where(seen, std, math.inf).amin(),
            "std_max": torch.where(seen, std, -math.inf).amax(),
            "count": count,
        }

    def normalize(
        self,
        x: Tensor,
        clip: float | None = 10.0,
        *,
        centre: bool = True,
        group: Tensor | None = None,
    ) -> Tensor:
        """``(x - mean) / sqrt(var + eps)``, clipped.

        Args:
            x: ``[..., *shape]``, floating.
            clip: deviations from 0 that values are clipped to; None clips nothing.
            centre: subtract the mean.
            group: integers of the leading shape of ``x``, or one that broadcasts to it, where there
                are several groups.

        Returns:
            As ``x``, computed in float32 at least.
        """
        y = at_least_fp32(x)  # in 16 bits a mean far from 0 would lose what is around it
        mean, scale = self.mean.to(y.dtype), self.scale(dtype=y.dtype)
        if group is not None:
            mean, scale = mean[group], scale[group]
        if centre:
            y = y - mean
        y = y / scale
        return (y if clip is None else y.clamp(-clip, clip)).to(x.dtype)


class StartSpread(nn.Module):
    """How far a model's rollouts are from the encoded observations, step by step.

    An exponential moving average of squared errors, with weights that add up to 1 from the first
    update on; without updates the spread is 0. Nothing waits for the device.

    Args:
        steps: H, of the rollouts.
        latent_dim: D.
        decay: of what was seen before, an update.

    Attributes:
        ranks: whose errors are taken in, too.
    """

    mean_square: Tensor
    weight: Tensor
    ranks: Ranks = ALONE

    def __init__(self, steps: int, latent_dim: int, decay: float = 0.9) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("mean_square", torch.zeros(steps, latent_dim))
        self.register_buffer("weight", torch.zeros(()))

    @torch.no_grad()
    def update(self, error: Tensor) -> None:
        """Take in errors ``[H, B, D]``; all of them are left out if one is not finite."""
        seen = error.to(self.mean_square.dtype).square().mean(1)
        self.ranks.average_([seen])
        finite = seen.isfinite().all()
        rate = torch.where(finite, 1.0 - self.decay, 0.0).to(seen.dtype)
        self.mean_square.lerp_(torch.where(finite, seen, self.mean_square), rate)
        self.weight.lerp_(torch.ones_like(self.weight), rate)

    def std(self) -> Tensor:
        """Root mean squares ``[H, 1, D]``."""
        return (self.mean_square / self.weight.clamp(min=1e-9)).sqrt().unsqueeze(1)
