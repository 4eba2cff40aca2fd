"""Mish, ``x tanh(softplus(x))``, by one exponential."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pwm_fast.backends.transforms import PLAIN, transformed

# tanh(softplus(x)) = n / (n + 2) with n = e (e + 2), e = exp(x). Beyond 20 it is 1 in float64 too.
_SATURATION = 20.0


class _Mish(torch.autograd.Function):
    """PyTorch's CPU kernel takes 4 to 5 ns an element each way, these eager steps a third of it.

    In training on a CPU that is a quarter of the whole time (docs/performance.md).
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        e = x.clamp_max(_SATURATION).exp_()
        t = (e + 2.0).mul_(e)
        t = t.div_(t + 2.0)
        return x * t, t

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(inputs[0], output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> Tensor:
        x, t = ctx.saved_tensors
        if torch.is_grad_enabled():  # somebody differentiates this: t must depend on x
            t = torch.tanh(F.softplus(x))
            return grad * (t + x * (1.0 - t * t) * torch.sigmoid(x))
        slope = torch.sigmoid(x).mul_(x)
        slope.addcmul_(slope, t * t, value=-1.0)
        slope.add_(t)
        # With many gradients at a time there is no place for them in the slope of one.
        return slope * grad if _batched(grad) else slope.mul_(grad)


def _batched(x: Tensor) -> bool:
    """Whether a tensor stands for many, under ``vmap`` or autograd's ``is_grads_batched``."""
    if torch.compiler.is_dynamo_compiling():
        return False
    functorch = torch._C._functorch
    return functorch.is_batchedtensor(x) or functorch.is_legacy_batchedtensor(x)


def mish(x: Tensor) -> Tensor:
    """``x tanh(softplus(x))``; see :func:`pwm_fast.ops.mish`."""
    # A function of ours has no forward-mode derivative, which torch.compile would not take, and no
    # rule of functionalize's; torch.jit.trace cannot write it, and what a subclass does is unknown.
    if transformed():
        return x * torch.tanh(F.softplus(x))  # PyTorch's own misses a derivative of its backward
    plain = torch.compiler.is_dynamo_compiling() or type(x) in PLAIN
    if plain and x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64):
        return _Mish.apply(x)[0]
    return F.mish(x)
