"""A stack gives the same with fused products as with plain products and element kernels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from pwm_fast.backends.precision import EXACT, FAST, Precision
from pwm_fast.backends.specs import LayerParams, LayerSpec
from pwm_fast.backends.torch import TorchKernels
from pwm_fast.backends.triton_gemm import TritonProducts
from pwm_fast.fused.stack import Stack

ROWS, EVALS = 21, 2


class Fusing(TorchKernels):
    """PyTorch's element kernels, and Triton's fused products."""

    def __init__(self, precision: Precision) -> None:
        super().__init__(precision)
        self.products = TritonProducts(precision)


def layers(width: int) -> tuple[list[LayerSpec], list[LayerParams]]:
    """Three normed layers and a plain one, or SimNorm at the end."""
    sizes = [24, 40, 48, 16]
    specs, params = [], []
    for i, n in enumerate(sizes):
        k = sizes[i - 1] if i else 8
        act = ("mish", "none", "mish", "simnorm")[i]
        last_plain = width == 1 and i == 3
        spec = LayerSpec(
            order="norm_act",
            act="none" if last_plain else act,
            bias=True,
            norm=not last_plain,
            group=8,
            eps=1e-5,
        )
        specs.append(spec)
        gain = None if last_plain else 1 + 0.3 * torch.randn(n)
        shift = None if last_plain else 0.3 * torch.randn(n)
        params.append(LayerParams(torch.randn(n, k) / k**0.5, torch.randn(n), gain, shift))
    return specs, params


def run(
    kernels: TorchKernels, specs: list[LayerSpec], params: list[LayerParams], inputs: list[Tensor]
) -> list[Tensor]:
    h, dy, x = inputs
    stack = Stack(kernels, specs, params, EVALS, ROWS, save=True, wgrad=True)
    results = [stack.forward(e, h[e].clone()) for e in range(EVALS)]
    stack.start_backward(keep_first=True)
    for e in range(EVALS):
        dx, scale = stack.backward(e, dy[e].clone())
        assert scale is None  # it is float32 where a CPU stands in
        results.append(dx.clone())
    for grads in stack.param_grads(x):
        results += [g for g in grads if g is not None]
    assert isinstance(kernels, Fusing) == any(stack._fused_backward.values())
    return results


@pytest.mark.interpreted
@pytest.mark.parametrize("precision", [EXACT, FAST], ids=lambda p: p.name)
@pytest.mark.parametrize("last", [0, 1], ids=["simnorm", "plain"])
def test_a_stack_with_fused_products(precision: Precision, last: int) -> None:
    specs, params = layers(last)
    inputs = [torch.randn(EVALS, ROWS, n) for n in (24, 16, 8)]
    ours = run(Fusing(precision), specs, params, inputs)
    plain = run(TorchKernels(precision), specs, params, inputs)
    double = [LayerParams(*(None if t is None else t.double() for t in p)) for p in params]
    truth = run(TorchKernels(), specs, double, [t.double() for t in inputs])
    for i, (a, b, c) in enumerate(zip(ours, plain, truth, strict=True)):
        size = c.abs().max()
        error, allowed = (a - c).abs().max() / size, (b - c).abs().max() / size
        assert error <= 2 * allowed + 1e-6, f"result {i}: {error:.2e}, plain {allowed:.2e}"
