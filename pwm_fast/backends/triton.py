"""The elementwise kernels in Triton (:mod:`pwm_fast.kernels`): float32 tensors on a CUDA GPU.

This module imports triton: :mod:`pwm_fast.backends.triton_support` says before whether it can.

With ``TRITON_INTERPRET=1`` in the environment they run on CPU tensors, in Triton's interpreter: far
too slowly for anything but tests.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pwm_fast.backends.fused_gemm import FusedGemms
from pwm_fast.backends.precision import EXACT, Precision
from pwm_fast.backends.triton_gemm import TritonGemms
from pwm_fast.kernels import act_norm, axpby, centre, norm_act, simnorm, two_hot


class TritonKernels:
    """See :class:`pwm_fast.backends.base.Kernels`."""

    name = "triton"
    wgrad_16bit = True
    cast_at_once = True
    persistent = True

    def __init__(self, precision: Precision = EXACT) -> None:
        self.precision = precision
        self.gemms: FusedGemms | None = TritonGemms(precision)
        self.act_norm_fwd = act_norm.act_norm_fwd
        self.act_norm_bwd = act_norm.act_norm_bwd
        self.axpby = axpby.axpby
        self.to_operand = axpby.to_operand
        self.scaled_rows: Callable[..., None] | None = axpby.scaled_rows
        self.centre: Callable[..., None] | None = centre.centre
        self.simnorm_fwd = simnorm.simnorm_fwd
        self.two_hot_decode_fwd = two_hot.two_hot_decode_fwd
        self.two_hot_ce_fwd = two_hot.two_hot_ce_fwd

    def norm_act_fwd(
        self,
        x: Tensor,
        y: Tensor,
        xhat: Tensor | None,
        rstd: Tensor | None,
        *,
        gamma: Tensor,
        beta: Tensor,
        act: str,
        group: int,
        eps: float,
        bias: Tensor | None = None,
        add: Tensor | None = None,
        tau: Tensor | None = None,
        w_tau: Tensor | None = None,
        width: int = 0,
    ) -> None:
        """See :class:`Kernels`."""
        two = act == "simnorm" and not _tiled(group)
        u = torch.empty_like(y, dtype=x.dtype, memory_format=torch.contiguous_format) if two else y
        norm_act.norm_act_fwd(
            x,
            u,
            xhat,
            rstd,
            gamma=gamma,
            beta=beta,
            act="none" if two else act,
            group=group,
            eps=eps,
            bias=bias,
            add=add,
            tau=tau,
            w_tau=w_tau,
            width=width,
        )
        if two:
            simnorm.simnorm_fwd(u, y, group)

    def norm_act_bwd(
        self,
        dy: Tensor,
        dx: Tensor,
        xhat: Tensor,
        rstd: Tensor,
        *,
        gamma: Tensor,
        beta: Tensor,
        y: Tensor | None,
        act: str,
        group: int,
        dgamma: Tensor | None = None,
        dbeta: Tensor | None = None,
        dbias: Tensor | None = None,
        width: int = 0,
        dy_scale: Tensor | None = None,
        dx_scale: Tensor | None = None,
    ) -> None:
        """See :class:`Kernels`."""
        if act == "simnorm" and not _tiled(group):
            assert y is not None
            du = torch.empty_like(dy, dtype=rstd.dtype, memory_format=torch.contiguous_format)
            simnorm.simnorm_bwd(dy, y, du, group, dy_scale)
            dy, dy_scale, act = du, None, "none"
        norm_act.norm_act_bwd(
            dy,
            dx,
            xhat,
            rstd,
            gamma=gamma,
            beta=beta,
            y=y,
            act=act,
            group=group,
            dgamma=dgamma,
            dbeta=dbeta,
            dbias=dbias,
            width=width,
            dy_scale=dy_scale,
            dx_scale=dx_scale,
        )

    def simnorm_bwd(self, dy: Tensor, y: Tensor, dx: Tensor, group: int) -> None:
        """Gradient of ``simnorm_fwd``, from its result ``y``."""
        simnorm.simnorm_bwd(dy, y, dx, group)

    def two_hot_decode_bwd(
        self,
        dvalue: Tensor,
        logits: Tensor,
        mean: Tensor,
        lse: Tensor,
        dlogits: Tensor,
        vmin: float,
        vmax: float,
        transform: bool,
    ) -> None:
        """Gradient of ``two_hot_decode_fwd``; the kernel sums the softmax anew."""
        two_hot.two_hot_decode_bwd(dvalue, logits, mean, dlogits, vmin, vmax, transform)

    def two_hot_ce_bwd(
        self,
        dloss: Tensor,
        logits: Tensor,
        x: Tensor,
        lse: Tensor,
        dlogits: Tensor,
        vmin: float,
        vmax: float,
        transform: bool,
    ) -> None:
        """Gradient of ``two_hot_ce_fwd`` towards the logits; the softmax is summed anew."""
        two_hot.two_hot_ce_bwd(dloss, logits, x, dlogits, vmin, vmax, transform)


def _tiled(group: int) -> bool:
    """Groups of a row make up a tile of their own in one kernel; other widths take two."""
    return group & (group - 1) == 0
