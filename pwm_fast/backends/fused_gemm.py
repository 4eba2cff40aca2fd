"""GEMMs that kernels fuse with the norm and activation around them, where they have such.

The calls are declared here alone: what implements them passes its arguments on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from pwm_fast.backends.specs import LayerParams, LayerSpec


class GemmCall(NamedTuple):
    """Of ``[rows, k]`` operands and ``[rows, n]`` results.

    Attributes:
        rows: those of all members.
        n: columns of the result.
        k: columns of the operand.
        dtype: the compute dtype.
        device: of the tensors.
        members: of an ensemble, else 0.
    """

    rows: int
    n: int
    k: int
    dtype: torch.dtype
    device: torch.device
    members: int = 0


class FusedForward(Protocol):
    """One layer's GEMM, norm and activation, at one shape.

    Of an ensemble ``weight`` is ``[E, N, K]``, other parameters ``[E, N]``; rows are those of all
    members one after another.
    """

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
        mean: Tensor | None = None,
    ) -> None:
        """``y = act(norm(x weight^T + bias))``, see :meth:`Kernels.norm_act_fwd`.

        Of layers that act first ``y = norm(act(x weight^T + bias))``, see
        :meth:`Kernels.act_norm_fwd`: ``xhat`` is its ``u`` there, and ``mean`` is written as well.
        """


class FusedBackward(Protocol):
    """One layer's dgrad GEMM, and the gradient of the norm below, at one shape.

    Attributes:
        blocks: row blocks that ``sums`` has, a member.
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
        mean: Tensor | None = None,
        add: Tensor | None = None,
        add_factor: float = 1.0,
    ) -> None:
        """:meth:`Kernels.norm_act_bwd`, or :meth:`Kernels.act_norm_bwd`, of ``dy weight``.

        With order ``"norm_act"`` of ``dy weight + add_factor add``; else there is no ``add``.

        ``sums [3, blocks, N]``, or ``[3, E, blocks, N]``, fp32 is written: what row blocks add to
        the gradients of gamma, beta and bias.
        """


class FusedGemmAxpby(Protocol):
    """A GEMM that ends in a step of the state or of its gradient, at one shape."""

    def __call__(
        self,
        x: Tensor,
        weight: Tensor,
        z: Tensor,
        k1: Tensor | None,
        out: Tensor,
        c1: float,
        c2: float,
        *,
        bias: Tensor | None,
        x_scale: Tensor | None,
        raw: Tensor | None,
        cast: Tensor | None,
    ) -> None:
        """``out = z + c1 k1 + c2 p`` with ``p = x_scale x weight^T + bias``; ``out`` may be ``z``.

        ``raw`` and ``cast`` are written where they are given: ``p`` itself, and ``out`` in the
        compute dtype.
        """


class FusedPolicy(Protocol):
    """What follows a policy's first GEMM, up to the next macro step's term, at one shape."""

    def __call__(
        self,
        h: Tensor,
        params: Sequence[LayerParams],
        weights: Sequence[Tensor | None],
        outputs: Sequence[Tensor],
        kept: Sequence[tuple[Tensor | None, Tensor | None, Tensor | None]],
        *,
        std: Tensor,
        noise: Tensor,
        base: Tensor,
        w_a: Tensor,
        action: Tensor,
        c: Tensor,
    ) -> None:
        """``action = tanh(mu + std noise)`` and ``c = base + action w_a^T``.

        Args:
            h: ``[R, N]``, the first layer's GEMM.
            params: of all layers, the last one the head.
            weights: theirs in the compute dtype; the first one's is not read.
            outputs: ``[R, N]`` a hidden layer, written: what the next GEMM takes.
            kept: of each hidden layer ``u [R, N]``, ``mean [R]`` and ``rstd [R]``, written for a
                backward pass, or None.
            std: ``[A]``.
            noise: ``[R, A]``.
            base: ``[1 or R, U]``.
            w_a: ``[U, A]``.
            action: ``[R, A]``, written.
            c: ``[R, U]``, written.
        """


class FusedGemms(Protocol):
    """See :attr:`pwm_fast.backends.base.Kernels.gemms`.

    Each method gives a launch for one shape, or None where a plain GEMM and an elementwise kernel
    are better. It serves launches that follow one another on one stream. ``order`` is that of
    :class:`pwm_fast.backends.specs.LayerSpec`.
    """

    def forward(self, shape: GemmCall, order: str) -> FusedForward | None:
        """For ``[rows, k] [n, k]^T``."""

    def backward(self, shape: GemmCall, order: str) -> FusedBackward | None:
        """For ``[rows, k] [k, n]``."""

    def gemm_axpby(self, shape: GemmCall) -> FusedGemmAxpby | None:
        """For ``[rows, k] [n, k]^T``, the weight in either order."""

    def policy(
        self,
        specs: Sequence[LayerSpec],
        widths: Sequence[int],
        rows: int,
        compute: torch.dtype | None,
        device: torch.device,
    ) -> FusedPolicy | None:
        """For a policy of these layers; ``compute`` is None where GEMMs take the state's dtype."""
