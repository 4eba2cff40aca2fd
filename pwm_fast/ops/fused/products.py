"""Products that a kernel set fuses with the norm and activation around them, where it has them."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from pwm_fast.ops.fused.kernels import Kernels


class FusedForward(Protocol):
    """One layer's product, norm and activation, at one shape."""

    def __call__(
        self,
        x: Tensor,
        weight: Tensor,
        y: Tensor,
        xhat: Tensor | None,
        rstd: Tensor | None,
        *,
        gamma: Tensor,
        beta: Tensor,
        bias: Tensor | None,
        act: str,
        group: int,
        eps: float,
        width: int,
    ) -> None:
        """``y = act(norm(x weight^T + bias))``, see :meth:`Kernels.norm_act_fwd`."""


class FusedBackward(Protocol):
    """The product with one layer's adjoint, and the gradient of the norm below, at one shape.

    Attributes:
        blocks: row blocks that ``sums`` has.
    """

    blocks: int

    def __call__(
        self,
        dy: Tensor,
        weight: Tensor,
        dx: Tensor,
        xhat: Tensor,
        rstd: Tensor,
        *,
        gamma: Tensor,
        beta: Tensor,
        act: str,
        width: int,
        dy_scale: Tensor | None,
        dx_scale: Tensor | None,
        sums: Tensor | None,
    ) -> None:
        """:meth:`Kernels.norm_act_bwd` of ``dy weight``.

        ``sums [3, blocks, N]`` fp32 is written: what row blocks add to the gradients of gamma, beta
        and bias.
        """


class Products(Protocol):
    """What a kernel set has as its attribute ``products``."""

    def forward(
        self, rows: int, n: int, k: int, operand: torch.dtype, device: torch.device
    ) -> FusedForward | None:
        """For ``[rows, k] [n, k]^T``; None where plain product and element kernel are better.

        One object serves launches that follow one another on one stream.
        """

    def backward(
        self, rows: int, n: int, k: int, operand: torch.dtype, device: torch.device
    ) -> FusedBackward | None:
        """For ``[rows, k] [k, n]``; likewise."""


def products_of(kernels: Kernels) -> Products | None:
    """The fused products of a kernel set, None where it has none."""
    return getattr(kernels, "products", None)
