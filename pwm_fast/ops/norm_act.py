"""LayerNorm and activation in one."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pwm_fast.backends.base import Call
from pwm_fast.backends.dtypes import at_least_fp32, autocasts
from pwm_fast.backends.pointwise import mish
from pwm_fast.backends.select import declare, select
from pwm_fast.backends.transforms import transformed
from pwm_fast.ops import _checks
from pwm_fast.ops.coverage import without_width
from pwm_fast.ops.operator import Operator, as_rows
from pwm_fast.ops.simnorm import reference_simnorm
from pwm_fast.ops.types import ACTIVATIONS, Activation

declare("layer_norm_act", "rows")


class _LayerNormAct(Operator):
    name, family, outputs = "layer_norm_act", "rows", ("y", "xhat", "rstd")
    grads, contiguous = ("x", "weight", "bias"), ("x", "weight", "bias")
    rows, row_axes = {"x": 0}, (0,)

    @staticmethod
    def forward(
        k: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        act: str,
        group: int,
        eps: float,
        save: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        y = torch.empty_like(x)
        xhat = torch.empty_like(x) if save else x.new_empty(0)
        rstd = x.new_empty(x.shape[0] if save else 0)
        k.norm_act_fwd(
            x,
            y,
            xhat if save else None,
            rstd if save else None,
            gamma=weight,
            beta=bias,
            act=act,
            group=group,
            eps=eps,
        )
        return y, xhat, rstd

    @staticmethod
    def backward(
        k: Any,
        dy: Tensor,
        xhat: Tensor,
        rstd: Tensor,
        y: Tensor,
        weight: Tensor,
        bias: Tensor,
        act: str,
        group: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dx = torch.empty_like(xhat)
        dweight = torch.zeros_like(weight, dtype=torch.float64)
        dbias = torch.zeros_like(bias, dtype=torch.float64)
        k.norm_act_bwd(
            dy.contiguous(),
            dx,
            xhat,
            rstd,
            gamma=weight,
            beta=bias,
            y=y,
            act=act,
            group=group,
            dgamma=dweight,
            dbeta=dbias,
        )
        return dx, dweight.to(dx.dtype), dbias.to(dx.dtype)


_layer_norm_act = _LayerNormAct()


def layer_norm_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    act: Activation = "mish",
    simnorm_dim: int = 8,
    eps: float = 1e-5,
    backend: str | None = None,
) -> Tensor:
    """LayerNorm over the last axis followed by an activation.

    Args:
        x: ``[..., N]``, any floating dtype.
        weight: scale ``[N]``.
        bias: shift ``[N]``.
        act: ``"mish"`` (``x tanh(softplus(x))``), ``"simnorm"`` or ``"none"``.
        simnorm_dim: group width for ``act="simnorm"``.
        eps: added to the variance.
        backend: see :mod:`pwm_fast.backends`.

    Returns:
        ``[..., N]`` in the dtype of ``x``.

    Raises:
        TypeError: a tensor is not floating.
        ValueError: a shape, ``act`` or ``simnorm_dim`` does not fit.
        BackendError: the backend that was asked for cannot run this.
    """
    _checks.vectors("x", x)
    width = x.shape[-1]
    for name, vector in (("weight", weight), ("bias", bias)):
        _checks.floating(name, vector)
        if tuple(vector.shape) != (width,):
            raise ValueError(f"{name} must be [{width}], got {tuple(vector.shape)}")
    _checks.one_of("act", act, ACTIVATIONS)
    if act == "simnorm":
        _checks.simnorm_width("x", width, "simnorm_dim", simnorm_dim)
    call = Call([x, weight, bias], without_width([x]))
    choice = select("layer_norm_act", backend, call)
    if choice.is_reference:
        return activate(layer_norm(x, weight, bias, eps), act, simnorm_dim)
    rows, group = as_rows(x), int(simnorm_dim)  # NumPy's own too: without SimNorm it is not checked
    return _layer_norm_act(rows, weight, bias, act, group, eps, choice=choice).view(x.shape)


def activate(x: Tensor, act: Activation, simnorm_dim: int) -> Tensor:
    """The reference of activations."""
    if act == "mish":
        return mish(x)
    if act == "simnorm":
        return reference_simnorm(x, simnorm_dim)
    return x


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """The reference of LayerNorm over the last axis; without weight and bias it only normalises.

    Where PyTorch's own is differentiated forward and then again, or twice under ``torch.func``, its
    derivatives take mean and deviation for constants, without a word (2.13; pytorch#198017).
    """
    if not transformed():
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    h = at_least_fp32(x)
    h = h - h.mean(-1, keepdim=True)
    h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        h = h * weight
    if bias is not None:
        h = h + bias
    return h if autocasts(x) else h.to(x.dtype)
