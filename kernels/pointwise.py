"""What kernels compute on tiles in registers: Mish and its slope, tanh, rounding, powers of two."""

from __future__ import annotations

import triton
import triton.language as tl

from pwm_fast.kernels.launch import INTERPRETING

_COMPILED = tl.constexpr(not INTERPRETING)


@triton.jit
def mish(x):
    """``x tanh(softplus(x))`` in float32 by one exponential and one division.

    ``tanh(softplus(x)) = n / (n + 2)`` with ``n = e (e + 2)`` and ``e = exp(x)``: nothing cancels.
    Beyond 20 it is 1.
    """
    e = tl.exp(tl.minimum(x, 20.0))
    n = e * (e + 2.0)
    return x * (n / (n + 2.0))


@triton.jit
def mish_slope(x):
    """Derivative of Mish in float32, by one exponential and one division.

    With ``r = 1 / (n + 2)``: ``1 - tanh(softplus(x))^2 = 4 (1 + e)^2 r^2`` and
    ``sigmoid(x) = e / (1 + e)``, so the derivative is ``r (n + 4 x e (1 + e) r)``.
    """
    e = tl.exp(tl.minimum(x, 20.0))
    n = e * (e + 2.0)
    r = 1.0 / (n + 2.0)
    return r * (n + 4.0 * x * e * (1.0 + e) * r)


@triton.jit
def tanh(x):
    """``tanh(x)`` in float32: by one exponential, and near 0, where that cancels, by its series."""
    e = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    s = x * x
    near = 1.0 + s * (-1.0 / 3.0 + s * (2.0 / 15.0 + s * (-17.0 / 315.0 + s * (62.0 / 2835.0))))
    return tl.where(s < 0.0625, x * near, tl.where(x < 0.0, -far, far))


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """``x`` in another dtype; what fp16 cannot hold becomes infinite, so that nobody misses it."""
    return x.to(dtype)


@triton.jit
def operand(x, PRECISION: tl.constexpr):
    """``x`` as a GEMM takes it: in tf32 the nearest such number, as cuBLAS has it on Ampere.

    Tensor cores do not look at the bits below, and cut off so they err 2.6 times as much.
    """
    if PRECISION == "tf32" and x.dtype == tl.float32 and _COMPILED:
        x = tl.inline_asm_elementwise(
            "cvt.rna.tf32.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return x


@triton.jit
def row_exponent(largest):
    """Biased exponent of the power of two that brings ``largest >= 0`` into (0.5, 1].

    That of 1 for zero, infinity and NaN. Kept within what has a normal inverse, so that of numbers
    above 2^126 the result may be a few times larger.
    """
    bits = largest.to(tl.int32, bitcast=True)
    exponent = (bits >> 23) + tl.where((bits & 0x7FFFFF) != 0, 1, 0)
    exponent = tl.minimum(tl.maximum(exponent, 1), 253)
    return tl.where((largest > 0.0) & (largest < float("inf")), exponent, 127)


@triton.jit
def power(exponent):
    """2 to a biased exponent from 1 to 254, float32."""
    return (exponent << 23).to(tl.float32, bitcast=True)
