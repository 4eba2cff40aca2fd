"""The kernels in plain PyTorch, and the backend that runs the fused passes on them."""

from __future__ import annotations

import torch
from torch import Tensor

from pwm_fast.backends.base import Backend, Call, PlainKernels, fused_why_not
from pwm_fast.backends.dtypes import at_least_fp32
from pwm_fast.backends.esnr import TorchEsnr
from pwm_fast.backends.pointwise import mish
from pwm_fast.backends.precision import EXACT, Precision


def mish_grad(u: Tensor) -> Tensor:
    """Derivative of Mish."""
    t = torch.tanh(torch.nn.functional.softplus(u))
    return t + u * torch.sigmoid(u) * (1.0 - t * t)


def row_scale(x: Tensor) -> Tensor:
    """The power of two that brings a row's largest entry into (0.5, 1], ``[R]``; 1 for zeros."""
    if x.shape[-1] == 0:
        return x.new_ones(x.shape[:-1])
    largest = x.abs().amax(-1)
    _, exponent = torch.frexp(largest)
    # frexp's mantissa is in [0.5, 1): exactly 0.5 belongs to the power below.
    exact = torch.ldexp(torch.ones_like(largest), exponent - 1) == largest
    scale = torch.ldexp(torch.ones_like(largest), exponent - exact.to(exponent.dtype))
    return torch.where((largest > 0) & torch.isfinite(largest), scale, torch.ones_like(largest))


def _scaled(x: Tensor, scale: Tensor | None) -> Tensor:
    return x if scale is None else x * scale.unsqueeze(-1)


def _write(x: Tensor, out: Tensor, scale: Tensor | None) -> None:
    """``out = x / scale`` in the dtype of ``out``, and ``scale`` itself."""
    if scale is not None:
        scale.copy_(row_scale(x))
        x = x / scale.unsqueeze(-1)
    out.copy_(x)


class TorchKernels(PlainKernels):
    """The kernels in plain PyTorch: any device, any floating dtype; the truth for the others."""

    name = "torch"

    def __init__(self, precision: Precision = EXACT) -> None:
        self.precision = precision

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
        v = at_least_fp32(x) if bias is None else at_least_fp32(x) + bias
        if add is not None:
            v = (v.view(-1, *add.shape) + add).view(v.shape) if v.shape[0] else v
        if tau is not None and w_tau is not None:
            v = v + tau.reshape(-1, 1) * w_tau
        if width:
            centred = v
            variance = v.square().sum(-1, keepdim=True) / width
        else:
            centred = v - v.mean(-1, keepdim=True)
            variance = centred.square().mean(-1, keepdim=True)
        r = torch.rsqrt(variance + eps)
        hat = centred * r
        if xhat is not None:
            xhat.copy_(hat)
        if rstd is not None:
            rstd.copy_(r.squeeze(-1))
        u = hat * gamma + beta
        if act == "mish":
            u = mish(u)
        elif act == "simnorm":
            u = torch.softmax(u.unflatten(-1, (-1, group)), -1).flatten(-2)
        _write(u, y, None)

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
        rstd = at_least_fp32(rstd)
        dy, xhat = _scaled(dy.to(rstd.dtype), dy_scale), xhat.to(rstd.dtype)
        if act == "mish":
            du = dy * mish_grad(xhat * gamma + beta)
        elif act == "simnorm" and y is not None:
            y = y.to(rstd.dtype)
            product = (dy * y).unflatten(-1, (-1, group))
            total = product.sum(-1, keepdim=True).expand_as(product).flatten(-2)
            du = y * (dy - total)
        else:
            du = dy
        g = du * gamma
        if width:
            inner = (g * xhat).sum(-1, keepdim=True) / width
        else:
            inner = (g * xhat).mean(-1, keepdim=True)
            g = g - g.mean(-1, keepdim=True)
        result = (g - xhat * inner) * rstd.unsqueeze(-1)
        if dgamma is not None:
            dgamma += (du * xhat).sum(0, dtype=torch.float64)
        if dbeta is not None:
            dbeta += du.sum(0, dtype=torch.float64)
        if dbias is not None:
            dbias += result.sum(0, dtype=torch.float64)
        _write(result, dx, dx_scale)

    def act_norm_fwd(
        self,
        x: Tensor,
        y: Tensor,
        u: Tensor | None,
        mean: Tensor | None,
        rstd: Tensor | None,
        *,
        bias: Tensor | None,
        gamma: Tensor | None,
        beta: Tensor | None,
        act: str,
        eps: float,
        rows_per_member: int = 0,
    ) -> None:
        """See :class:`Kernels`."""
        v = at_least_fp32(x) if bias is None else at_least_fp32(x) + _rows(bias, rows_per_member)
        if u is not None:
            u.copy_(v)
        m = mish(v) if act == "mish" else v
        if gamma is not None and beta is not None:
            mu = m.mean(-1, keepdim=True)
            r = torch.rsqrt((m - mu).square().mean(-1, keepdim=True) + eps)
            if mean is not None and rstd is not None:
                mean.copy_(mu.squeeze(-1))
                rstd.copy_(r.squeeze(-1))
            m = (m - mu) * r * _rows(gamma, rows_per_member) + _rows(beta, rows_per_member)
        _write(m, y, None)

    def act_norm_bwd(
        self,
        dy: Tensor,
        dx: Tensor,
        u: Tensor,
        mean: Tensor | None,
        rstd: Tensor | None,
        *,
        gamma: Tensor | None,
        act: str,
        rows_per_member: int = 0,
        dgamma: Tensor | None = None,
        dbeta: Tensor | None = None,
        dbias: Tensor | None = None,
        dy_scale: Tensor | None = None,
        dx_scale: Tensor | None = None,
    ) -> None:
        """See :class:`Kernels`."""
        u = at_least_fp32(u)
        dm = dy = _scaled(dy.to(u.dtype), dy_scale)
        if gamma is not None and mean is not None and rstd is not None:
            m = mish(u) if act == "mish" else u
            r = rstd.unsqueeze(-1)
            xhat = (m - mean.unsqueeze(-1)) * r
            g = dy * _rows(gamma, rows_per_member)
            dm = (g - g.mean(-1, keepdim=True) - xhat * (g * xhat).mean(-1, keepdim=True)) * r
            if dgamma is not None:
                dgamma += _sum_rows(dy * xhat, rows_per_member)
            if dbeta is not None:
                dbeta += _sum_rows(dy, rows_per_member)
        result = dm * mish_grad(u) if act == "mish" else dm
        if dbias is not None:
            dbias += _sum_rows(result, rows_per_member)
        _write(result, dx, dx_scale)

    def axpby(
        self,
        z: Tensor,
        k1: Tensor,
        k2: Tensor | None,
        out: Tensor,
        c1: float,
        c2: float,
        *,
        cast: Tensor | None = None,
        k1_scale: Tensor | None = None,
        k2_scale: Tensor | None = None,
    ) -> None:
        """See :class:`Kernels`."""
        state = at_least_fp32(z)
        into = out if out.dtype == state.dtype else torch.empty_like(state)
        torch.add(state, _scaled(k1, k1_scale), alpha=c1, out=into)
        if k2 is not None:
            into.add_(_scaled(k2, k2_scale), alpha=c2)
        if into is not out:
            out.copy_(into)
        if cast is not None:
            _write(out, cast, None)

    def cast(self, x: Tensor, out: Tensor, scale: Tensor | None) -> None:
        """See :class:`Kernels`."""
        _write(x, out, scale)


def _rows(param: Tensor, rows_per_member: int) -> Tensor:
    return param.repeat_interleave(rows_per_member, 0) if rows_per_member else param


def _sum_rows(x: Tensor, rows_per_member: int) -> Tensor:
    if not rows_per_member:
        return x.sum(0, dtype=torch.float64)
    return x.unflatten(0, (-1, rows_per_member)).sum(1, dtype=torch.float64)


class Torch(Backend):
    """The fused passes on plain PyTorch: any device and floating dtype. Only where asked for."""

    name = "torch"
    automatic = False
    runs_all = True
    families = frozenset({"gemm"})

    def why_not(self, family: str, call: Call) -> str | None:
        """See :class:`Backend`."""
        if call.precision == "tf32" and call.tensors[0].device.type != "cuda":
            return f"precision 'tf32' is CUDA's; the tensors are on {call.tensors[0].device}"
        return fused_why_not(call)

    def kernels(self, family: str, precision: Precision) -> TorchKernels | TorchEsnr:
        """See :class:`Backend`."""
        return TorchKernels(precision) if family == "gemm" else TorchEsnr()
