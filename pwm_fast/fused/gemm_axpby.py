"""Products that end in a step of the state or of its adjoint."""

from __future__ import annotations

from torch import Tensor

from pwm_fast.backends.fused_gemm import products_of
from pwm_fast.fused.gemm import Gemm


class Update:
    """``out = z + c1 k1 + c2 p`` with ``p = x W^T + bias``, or ``p = x W`` of an adjoint ``x``.

    One kernel where the kernel set has one for these sizes; else a product and an element kernel.

    Args:
        gemm: the product.
        rows: of ``x``.
        bias: ``[N]`` or None.
        adjoint: the product is the one towards the input; its operand has factors a row where the
            precision says so.
    """

    def __init__(
        self, gemm: Gemm, rows: int, bias: Tensor | None = None, *, adjoint: bool = False
    ) -> None:
        self.gemm, self.bias, self.adjoint = gemm, bias, adjoint
        n, k = gemm.weight.shape
        if adjoint:
            n, k = k, n
        products, weight = products_of(gemm.kernels), gemm.weight
        self.fused = None
        if products is not None:
            operand = gemm.precision.dtype(weight.dtype)
            self.fused = products.update(rows, n, k, operand, weight.device)

    def __call__(
        self,
        x: Tensor,
        z: Tensor,
        out: Tensor,
        c2: float,
        *,
        k1: Tensor | None = None,
        c1: float = 0.0,
        keep: bool = False,
        operand: Tensor | None = None,
        scale: Tensor | None = None,
    ) -> Tensor | None:
        """Write ``out [R, N]``, which may be ``z`` or ``k1``; ``p`` is returned if ``keep``.

        Args:
            x: ``[R, K]``, in the state's or the operands' dtype.
            z: ``[R, N]``.
            out: ``[R, N]``, written.
            c2: factor of the product.
            k1: ``[R, N]`` or None.
            c1: its factor.
            keep: return the product, for a later step.
            operand: ``[R, N]`` in the operands' dtype or None, written: ``out`` for a product.
            scale: factors of the rows of an adjoint ``x`` that is an operand already, or None.
        """
        gemm = self.gemm
        if self.fused is not None:
            x, scale = gemm.operand(x, scale, scaled=self.adjoint and gemm.precision.scaled)
            weight = gemm.operand_weight()
            raw = z.new_empty(z.shape) if keep else None
            self.fused(
                x,
                weight.t() if self.adjoint else weight,
                z,
                k1,
                out,
                c1,
                c2,
                bias=self.bias,
                x_scale=scale,
                raw=raw,
                operand=operand,
            )
            return raw
        p = gemm.scaled_dgrad(x, 0, scale, wide=True)[0] if self.adjoint else gemm(x)
        if self.bias is not None:
            p.add_(self.bias)
        if k1 is None:
            gemm.kernels.axpby(z, p, None, out, c2, 0.0, operand=operand)
        else:
            gemm.kernels.axpby(z, k1, p, out, c1, c2, operand=operand)
        return p if keep else None
