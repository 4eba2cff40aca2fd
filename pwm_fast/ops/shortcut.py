"""Flow dynamics whose network is told the size of its step: shortcut models and MeanFlow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pwm_fast.backends.dtypes import at_least_fp32, full_precision
from pwm_fast.backends.transforms import watched
from pwm_fast.fused import weight_cache
from pwm_fast.ops import _checks
from pwm_fast.ops.dynamics import (
    Transitions,
    check_fold,
    check_net,
    input_width,
    noisy,
    squared_error,
)
from pwm_fast.ops.flow import flow_interpolate
from pwm_fast.ops.mlp import RunNet, mlp
from pwm_fast.ops.operator import require_grad
from pwm_fast.ops.types import FusedStep, Layer

Consistency = Literal["shortcut", "meanflow"]

CONSISTENCIES: tuple[Consistency, ...] = ("shortcut", "meanflow")

#: Steps of 1, 1/2, ..., 2^-(LEVELS - 1) learn from two of half their size, the smallest halves
#: being taken for the velocity itself (size 0).
LEVELS = 3
SUBSTEPS = tuple(2**i for i in range(LEVELS))


class Shortcut(NamedTuple):
    """Flow dynamics whose network gives the average velocity over a step of a given size.

    ``u(z, a, tau, d)`` leads from tau to ``tau + d`` in one evaluation: ``z + d u``; ``u`` at
    ``d = 0`` is the velocity. So one Euler step (K = 1) is right by construction, as far as ``u``
    has learned to be consistent. A share of the windows teaches it that; the others are flow
    matching at ``d = 0``. Rollouts are Euler steps of ``d = 1/K``.

    Attributes:
        net: layers of the MLP; input ``[z, a, tau, task, d]``, output width D.
        substeps: K, at least 1.
        consistency: how ``u`` becomes consistent. ``"shortcut"``: a step equals two of half its
            size (K is 1, 2 or 4). ``"meanflow"``: ``u = v + d (d/dtau u)`` along the path, the
            derivative by plain PyTorch in forward mode.
        share: of the windows that teach consistency, in [0, 1], rounded up: the first ones of a
            batch, whose order must be random.
        fold: see :class:`pwm_fast.ops.Flow`.

    Source: Frans et al. 2024 (arXiv 2410.12557) and Geng et al. 2025 (arXiv 2505.13447), with time
    from the start (0) to the successor (1). Unlike there, the halves are of the network itself and
    not of a moving average, and begin at an eighth; MeanFlow's loss is the plain squared error,
    tau is uniform and d uniform in [0, 1 - tau]. The derivative is computed in the dtype of ``z``,
    whatever the precision of GEMMs.
    """

    net: Sequence[Layer]
    substeps: int = 1
    consistency: Consistency = "shortcut"
    share: float = 0.25
    fold: bool | None = None

    @property
    def learns_from_starts(self) -> bool:
        """See :class:`pwm_fast.ops.Dynamics`."""
        return True

    def check(self, z: Tensor, action: int, task: Tensor | None) -> None:
        """See :class:`pwm_fast.ops.Dynamics`."""
        _checks.positive_int("dynamics.substeps", self.substeps)
        _checks.one_of("dynamics.consistency", self.consistency, CONSISTENCIES)
        if not 0.0 <= self.share <= 1.0:
            raise ValueError(f"dynamics.share must lie in [0, 1], got {self.share}")
        if self.consistency == "shortcut" and self.substeps not in SUBSTEPS:
            raise ValueError(
                f"dynamics.substeps must be one of {', '.join(map(str, SUBSTEPS))}, the steps that "
                f"consistency 'shortcut' teaches, got {self.substeps}"
            )
        check_fold(self.net, self.fold)
        check_net(self.net, input_width(z, action, task) + 2, z)

    def step(
        self, z: Tensor, a: Tensor, task: Tensor | None, dtype: torch.dtype, run: RunNet
    ) -> Tensor:
        """K Euler steps, in the dtype of ``z``; see :class:`pwm_fast.ops.Dynamics`."""
        size, state = 1.0 / self.substeps, at_least_fp32(z)
        rows = z.shape[:-1]
        for k in range(self.substeps):
            x = state.to(dtype)
            time, width = (x.new_full((*rows, 1), n) for n in (k / self.substeps, size))
            inputs = (x, a, time, width) if task is None else (x, a, time, task, width)
            state = state + size * run(inputs, self.net, "norm_act").to(state.dtype)
        return state.to(z.dtype)

    def error(self, steps: Transitions) -> Tensor:
        """Flow matching, and on the first windows consistency; see :class:`Shortcut`."""
        z, tau = steps.z, steps.tau
        batch = z.shape[1]
        taught = min(batch, math.ceil(self.share * batch))
        if tau is None:
            tau = torch.rand(z.shape[:2], dtype=z.dtype, device=z.device)
        draw = torch.rand(z.shape[0], taught, dtype=tau.dtype, device=tau.device)
        start = noisy(z, steps.start_noise).to(steps.dtype)
        target = steps.target.to(steps.dtype)
        times, size = self._times(tau.to(steps.dtype), draw.to(steps.dtype))
        point, velocity = flow_interpolate(start, target, times)
        average = self._average(point, times, size, steps, batch)
        if not steps.target_grad:
            velocity = velocity.detach()
        if taught:
            first = slice(0, taught)
            consistent = self._consistent(
                point[:, first], velocity[:, first], times[:, first], size[:, first], steps
            )
            velocity = torch.cat((consistent, velocity[:, taught:]), dim=1)
        return squared_error(average, velocity, steps.dtype)

    def _times(self, tau: Tensor, draw: Tensor) -> tuple[Tensor, Tensor]:
        """Flow times ``[H, B]`` and step sizes; ``draw [H, n]`` says those of the first windows."""
        taught = draw.shape[1]
        first = tau[:, :taught]
        if self.consistency == "shortcut":
            size = torch.exp2(-torch.floor(draw * LEVELS).clamp(max=LEVELS - 1))
            first = torch.minimum(torch.floor(first / size) * size, 1.0 - size)
        else:
            size = draw * (1.0 - first)
        times = torch.cat((first, tau[:, taught:]), dim=1)
        return times, torch.cat((size, torch.zeros_like(tau[:, taught:])), dim=1)

    def _average(
        self, point: Tensor, tau: Tensor, size: Tensor, steps: Transitions, rows: int
    ) -> Tensor:
        """``u`` of the first ``rows`` windows at ``point [H, n, D]``, tau and size ``[H, n]``."""
        columns = self._columns(point, tau, size, steps, rows)
        return mlp([x.to(steps.z.dtype) for x in columns], self.net, backend=steps.backend)

    @staticmethod
    def _columns(
        point: Tensor,
        tau: Tensor,
        size: Tensor,
        steps: Transitions,
        rows: int,
        moves: bool = False,
    ) -> list[Tensor]:
        """The network's inputs; with ``moves`` their tangent, where action and task are fixed."""
        fixed = [steps.action[:, :rows]]
        if steps.task is not None:
            fixed.append(steps.task[:, :rows])
        if moves:
            fixed = [torch.zeros_like(x) for x in fixed]
        return [point, fixed[0], tau.unsqueeze(-1), *fixed[1:], size.unsqueeze(-1)]

    def _consistent(
        self, point: Tensor, velocity: Tensor, tau: Tensor, size: Tensor, steps: Transitions
    ) -> Tensor:
        """What ``u`` at these places is to be, without gradient."""
        rows, dtype = point.shape[1], point.dtype
        with torch.no_grad():
            point, velocity = point.detach(), velocity.detach()
            if self.consistency == "meanflow":
                along = (velocity, torch.ones_like(tau), -torch.ones_like(size))
                x, t = (
                    torch.cat(self._columns(*parts, steps, rows, moves), dim=-1)
                    for parts, moves in (((point, tau, size), False), (along, True))
                )
                with full_precision(x):
                    rate = _tangent(x.to(steps.z.dtype), t.to(steps.z.dtype), self.net)
                return (velocity + size.unsqueeze(-1) * rate.to(dtype)).detach()
            half = 0.5 * size
            told = torch.where(half < 2.0 ** (0.5 - LEVELS), torch.zeros_like(half), half)
            one = self._average(point, tau, told, steps, rows).to(dtype)
            middle = point + half.unsqueeze(-1) * one
            two = self._average(middle, tau + half, told, steps, rows).to(dtype)
            return (0.5 * (one + two)).detach()

    def fused(self) -> FusedStep:
        """Euler steps of a flow, the step's size being part of the first bias."""
        first, *others = self.net
        substeps = self.substeps

        def told(weight: Tensor, *bias: Tensor) -> tuple[Tensor, Tensor]:
            part = weight[:, -1] / substeps
            return weight[:, :-1].contiguous(), bias[0] + part if bias else part

        tensors = (first.weight, *(() if first.bias is None else (first.bias,)))
        # Frozen weights keep what is made of them, and with it what is packed of that.
        anew = require_grad(tensors) or watched()
        weight, bias = (
            told(*tensors) if anew else weight_cache.kept(("told", substeps), tensors, told)
        )
        layer = first._replace(weight=weight, bias=bias)
        return FusedStep((layer, *others), "euler", substeps, fold=self.fold)


def _tangent(x: Tensor, t: Tensor, layers: Sequence[Layer]) -> Tensor:
    """The derivative of an MLP at ``x [..., K]`` along ``t [..., K]``.

    Written out, not ``torch.func.jvp``: that does not run on fake tensors of another device.
    """
    for p in layers:
        x, t = F.linear(x, p.weight, p.bias), F.linear(t, p.weight)
        if p.ln_weight is not None:
            centred, t = x - x.mean(-1, keepdim=True), t - t.mean(-1, keepdim=True)
            rstd = (centred.square().mean(-1, keepdim=True) + p.eps).rsqrt()
            hat = centred * rstd
            t = (t - hat * (hat * t).mean(-1, keepdim=True)) * rstd * p.ln_weight
            x = hat * p.ln_weight + p.ln_bias  # type: ignore[operator]
        if p.act == "mish":
            soft = torch.tanh(F.softplus(x))
            t = t * (soft + x * torch.sigmoid(x) * (1.0 - soft.square()))
            x = x * soft
        elif p.act == "simnorm":
            groups = (*x.shape[:-1], -1, p.simnorm_dim)
            y, s = torch.softmax(x.view(groups), dim=-1), t.view(groups)
            t = (y * (s - (y * s).sum(-1, keepdim=True))).view(x.shape)
            x = y.view(x.shape)
    return t
