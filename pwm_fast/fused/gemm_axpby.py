"""GEMMs that end in a step of the state or of its gradient."""

from __future__ import annotations

from torch import Tensor

from pwm_fast.backends.fused_gemm import GemmCall
from pwm_fast.fused.gemm import Gemm


class GemmAxpby:
    """``out = z + c1 k1 + c2 p`` with ``p = x W^T + bias``, or ``p = x W`` of a gradient ``x``.

    One kernel where the kernels have one for these sizes; else a GEMM and an elementwise kernel.

    Args:
        gemm: the GEMM.
        rows: of ``x``.
        bias: ``[N]`` or None.
        dgrad: the GEMM is the one towards the input; ``x`` has row scales where the precision
            says so.
    """

    def __init__(
        self, gemm: Gemm, rows: int, bias: Tensor | None = None, *, dgrad: bool = False
    ) -> None:
        self.gemm, self.bias, self.dgrad = gemm, bias, dgrad
        n, k = gemm.weight.shape
        if dgrad:
            n, k = k, n
        gemms, weight = gemm.kernels.gemms, gemm.weight
        self.fused = None
        if gemms is not None:
            compute_dtype = gemm.precision.dtype(weight.dtype)
            shape = GemmCall(rows, n, k, compute_dtype, weight.device)
            self.fused = gemms.gemm_axpby(shape)

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
        cast: Tensor | None = None,
        scale: Tensor | None = None,
    ) -> Tensor | None:
        """Write ``out [R, N]``, which may be ``z`` or ``k1``; ``p`` is returned if ``keep``.

        Args:
            x: ``[R, K]``, in the state's or the compute dtype.
            z: ``[R, N]``.
            out: ``[R, N]``, written.
            c2: factor of the GEMM.
            k1: ``[R, N]`` or None.
            c1: its factor.
            keep: return the GEMM, for a later step.
            cast: ``[R, N]`` in the compute dtype or None, written: ``out`` for a GEMM.
            scale: row scales of a gradient ``x`` in the compute dtype, or None.
        """
        gemm = self.gemm
        if self.fused is not None:
            x, scale = gemm.cast(x, scale, scaled=self.dgrad and gemm.precision.scaled)
            weight = gemm.cast_weight()
            raw = z.new_empty(z.shape) if keep else None
            self.fused(
                x,
                weight.t() if self.dgrad else weight,
                z,
                k1,
                out,
                c1,
                c2,
                bias=self.bias,
                x_scale=scale,
                raw=raw,
                cast=cast,
            )
            return raw
        p = gemm.scaled_dgrad(x, 0, scale, fp32=True)[0] if self.dgrad else gemm(x)
        if self.bias is not None:
            p.add_(self.bias)
        if k1 is None:
            gemm.kernels.axpby(z, p, None, out, c2, 0.0, cast=cast)
        else:
            gemm.kernels.axpby(z, k1, p, out, c1, c2, cast=cast)
        return p if keep else None
