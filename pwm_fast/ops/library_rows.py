"""Row-wise operators of kernels alone: what plain PyTorch does is the reference's.

See :mod:`pwm_fast.ops.library` for the conventions.
"""

from __future__ import annotations

from typing import Any, Protocol, cast

import torch
from torch import Tensor

from pwm_fast.backends.base import Kernels
from pwm_fast.ops.library import (
    check_kept,
    define,
    first_order_only,
    kernels,
    no_gradient,
    register_gradient,
)


class RowKernels(Kernels, Protocol):
    """What a backend of these operators has beside :class:`Kernels`; rows are contiguous."""

    def simnorm_fwd(self, x: Tensor, y: Tensor, group: int) -> None:
        """``y = softmax`` over groups of ``x [R, n]``."""

    def simnorm_bwd(self, dy: Tensor, y: Tensor, dx: Tensor, group: int) -> None:
        """Gradient of :meth:`simnorm_fwd`, from its result ``y``."""

    def two_hot_decode_fwd(
        self,
        logits: Tensor,
        value: Tensor,
        mean: Tensor,
        lse: Tensor,
        vmin: float,
        vmax: float,
        transform: bool,
    ) -> None:
        """Expectation of logits ``[R, bins]`` over the centres; saves mean and log-sum-exp."""

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
        """Gradient of :meth:`two_hot_decode_fwd`."""

    def two_hot_ce_fwd(
        self,
        logits: Tensor,
        x: Tensor,
        loss: Tensor,
        lse: Tensor,
        vmin: float,
        vmax: float,
        transform: bool,
    ) -> None:
        """Cross-entropy of logits ``[R, bins]`` against the two-hot code of ``x [R]``."""

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
        """Gradient of :meth:`two_hot_ce_fwd` towards the logits."""


def _kernels(backend: str) -> RowKernels:
    return cast(RowKernels, kernels(backend))


# --- LayerNorm and activation -------------------------------------------------------------------


def _layer_norm_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    act: str,
    group: int,
    eps: float,
    backend: str,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    y = torch.empty_like(x)
    xhat = torch.empty_like(x) if save else x.new_empty(0)
    rstd = x.new_empty(x.shape[0] if save else 0)
    _kernels(backend).norm_act_fwd(
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


def _layer_norm_act_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    act: str,
    group: int,
    eps: float,
    backend: str,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, n = x.shape
    saved = (rows, n) if save else (0,)
    return x.new_empty(rows, n), x.new_empty(saved), x.new_empty(saved[:1])


define(
    "layer_norm_act",
    "(Tensor x, Tensor weight, Tensor bias, str act, int group, float eps, str backend,"
    " bool save)"
    " -> (Tensor, Tensor, Tensor)",
    _layer_norm_act,
    _layer_norm_act_fake,
)


def _layer_norm_act_backward(
    dy: Tensor,
    xhat: Tensor,
    rstd: Tensor,
    y: Tensor,
    weight: Tensor,
    bias: Tensor,
    act: str,
    group: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    dx = torch.empty_like(xhat)
    dweight = torch.zeros_like(weight, dtype=torch.float64)
    dbias = torch.zeros_like(bias, dtype=torch.float64)
    _kernels(backend).norm_act_bwd(
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


def _layer_norm_act_backward_fake(
    dy: Tensor,
    xhat: Tensor,
    rstd: Tensor,
    y: Tensor,
    weight: Tensor,
    bias: Tensor,
    act: str,
    group: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(xhat), torch.empty_like(weight), torch.empty_like(bias)


define(
    "layer_norm_act_backward",
    "(Tensor dy, Tensor xhat, Tensor rstd, Tensor y, Tensor weight, Tensor bias, str act,"
    " int group, str backend) -> (Tensor, Tensor, Tensor)",
    _layer_norm_act_backward,
    _layer_norm_act_backward_fake,
)
first_order_only("layer_norm_act_backward")


def _layer_norm_act_setup(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.set_materialize_grads(False)
    _, weight, bias, ctx.act, ctx.group, _, ctx.backend, ctx.save = inputs
    y, xhat, rstd = output
    ctx.save_for_backward(xhat, rstd, y, weight, bias)


def _layer_norm_act_grad(ctx: Any, dy: Tensor | None, *_: Any) -> Any:
    if dy is None:
        return (None,) * 8
    check_kept("layer_norm_act", ctx.save)
    grads = torch.ops.pwm_fast.layer_norm_act_backward(
        dy, *ctx.saved_tensors, ctx.act, ctx.group, ctx.backend
    )
    return (*grads, None, None, None, None, None)


register_gradient("layer_norm_act", _layer_norm_act_grad, _layer_norm_act_setup)


# --- SimNorm ------------------------------------------------------------------------------------


def _simnorm(x: Tensor, group: int, backend: str) -> Tensor:
    y = torch.empty_like(x)
    _kernels(backend).simnorm_fwd(x, y, group)
    return y


define(
    "simnorm",
    "(Tensor x, int group, str backend) -> Tensor",
    _simnorm,
    lambda x, group, backend: torch.empty_like(x),
)


def _simnorm_backward(dy: Tensor, y: Tensor, group: int, backend: str) -> Tensor:
    dx = torch.empty_like(y)
    _kernels(backend).simnorm_bwd(dy.contiguous(), y, dx, group)
    return dx


define(
    "simnorm_backward",
    "(Tensor dy, Tensor y, int group, str backend) -> Tensor",
    _simnorm_backward,
    lambda dy, y, group, backend: torch.empty_like(y),
)
first_order_only("simnorm_backward")


def _simnorm_setup(ctx: Any, inputs: Any, output: Any) -> None:
    _, ctx.group, ctx.backend = inputs
    ctx.save_for_backward(output)


def _simnorm_grad(ctx: Any, dy: Tensor) -> Any:
    grad = torch.ops.pwm_fast.simnorm_backward(dy, *ctx.saved_tensors, ctx.group, ctx.backend)
    return grad, None, None


register_gradient("simnorm", _simnorm_grad, _simnorm_setup)


# --- two-hot heads ------------------------------------------------------------------------------


def _two_hot_decode(
    logits: Tensor, vmin: float, vmax: float, transform: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    rows = logits.shape[0]
    value, mean, lse = (logits.new_empty(rows) for _ in range(3))
    _kernels(backend).two_hot_decode_fwd(logits, value, mean, lse, vmin, vmax, transform)
    return value, mean, lse


def _two_hot_decode_fake(
    logits: Tensor, vmin: float, vmax: float, transform: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    rows = logits.shape[0]
    return logits.new_empty(rows), logits.new_empty(rows), logits.new_empty(rows)


define(
    "two_hot_decode",
    "(Tensor logits, float vmin, float vmax, bool transform, str backend)"
    " -> (Tensor, Tensor, Tensor)",
    _two_hot_decode,
    _two_hot_decode_fake,
)


def _two_hot_decode_backward(
    dvalue: Tensor,
    logits: Tensor,
    mean: Tensor,
    lse: Tensor,
    vmin: float,
    vmax: float,
    transform: bool,
    backend: str,
) -> Tensor:
    dlogits = torch.empty_like(logits)
    _kernels(backend).two_hot_decode_bwd(
        dvalue.contiguous(), logits, mean, lse, dlogits, vmin, vmax, transform
    )
    return dlogits


define(
    "two_hot_decode_backward",
    "(Tensor dvalue, Tensor logits, Tensor mean, Tensor lse, float vmin, float vmax,"
    " bool transform, str backend) -> Tensor",
    _two_hot_decode_backward,
    lambda dvalue, logits, mean, lse, vmin, vmax, transform, backend: torch.empty_like(logits),
)
first_order_only("two_hot_decode_backward")


def _two_hot_decode_setup(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.set_materialize_grads(False)
    logits, *ctx.constants = inputs
    ctx.save_for_backward(logits, *output[1:])


def _two_hot_decode_grad(ctx: Any, dvalue: Tensor | None, *_: Any) -> Any:
    if dvalue is None:
        return (None,) * 5
    grad = torch.ops.pwm_fast.two_hot_decode_backward(dvalue, *ctx.saved_tensors, *ctx.constants)
    return grad, None, None, None, None


register_gradient("two_hot_decode", _two_hot_decode_grad, _two_hot_decode_setup)


def _cross_entropy(
    logits: Tensor, x: Tensor, vmin: float, vmax: float, transform: bool, backend: str
) -> tuple[Tensor, Tensor]:
    loss, lse = logits.new_empty(logits.shape[0]), logits.new_empty(logits.shape[0])
    _kernels(backend).two_hot_ce_fwd(logits, x, loss, lse, vmin, vmax, transform)
    return loss, lse


def _cross_entropy_fake(
    logits: Tensor, x: Tensor, vmin: float, vmax: float, transform: bool, backend: str
) -> tuple[Tensor, Tensor]:
    return logits.new_empty(logits.shape[0]), logits.new_empty(logits.shape[0])


define(
    "two_hot_cross_entropy",
    "(Tensor logits, Tensor x, float vmin, float vmax, bool transform, str backend)"
    " -> (Tensor, Tensor)",
    _cross_entropy,
    _cross_entropy_fake,
)


def _cross_entropy_backward(
    dloss: Tensor,
    logits: Tensor,
    x: Tensor,
    lse: Tensor,
    vmin: float,
    vmax: float,
    transform: bool,
    backend: str,
) -> Tensor:
    dlogits = torch.empty_like(logits)
    _kernels(backend).two_hot_ce_bwd(
        dloss.contiguous(), logits, x, lse, dlogits, vmin, vmax, transform
    )
    return dlogits


define(
    "two_hot_cross_entropy_backward",
    "(Tensor dloss, Tensor logits, Tensor x, Tensor lse, float vmin, float vmax, bool transform,"
    " str backend) -> Tensor",
    _cross_entropy_backward,
    lambda dloss, logits, x, lse, vmin, vmax, transform, backend: torch.empty_like(logits),
)
first_order_only("two_hot_cross_entropy_backward")


def _cross_entropy_setup(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.set_materialize_grads(False)
    logits, x, *ctx.constants = inputs
    ctx.save_for_backward(logits, x, output[1])


def _cross_entropy_grad(ctx: Any, dloss: Tensor | None, _: Any) -> Any:
    if dloss is None:
        return (None,) * 6
    if ctx.needs_input_grad[1]:
        raise no_gradient("two_hot_cross_entropy", "x")
    grad = torch.ops.pwm_fast.two_hot_cross_entropy_backward(
        dloss, *ctx.saved_tensors, *ctx.constants
    )
    return grad, None, None, None, None, None


register_gradient("two_hot_cross_entropy", _cross_entropy_grad, _cross_entropy_setup)
