"""Packing of layers against float64: the kernel, the operator's values, copies and gradients."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from pwm_fast import ops
from pwm_fast.fused import algebra, weight_cache
from pwm_fast.kernels import centre
from pwm_fast.ops import weights
from tests.helpers import choice, random_layer
from tests.kernels.harness import DEVICES, Rows, Values, check

FP16, FP32 = torch.float16, torch.float32
#: Outputs and inputs of a layer, and of its packed copy.
SHAPES = [(1, 1, 1, 1), (5, 7, 64, 7), (37, 19, 64, 30), (64, 33, 64, 33)]
BACK = [(64, 30, 37, 19), (64, 7, 5, 7)]
LARGE = [(510, 521, 512, 521), (1788, 1788, 1792, 1792), (512, 512, 510, 510), (2050, 40, 2112, 40)]
pytestmark = pytest.mark.parametrize("device", DEVICES)
NAMES = ("weight", "bias", "gamma", "beta")


def packed(size: tuple[int, int], centred: bool, i: Values, dtype: torch.dtype) -> Values:
    found = {}
    for name, x in i.items():
        x = x[tuple(slice(s) for s in size[: x.dim()])]
        if centred and name in ("weight", "bias"):
            x = x - x.mean(0)
        found[name] = x.new_zeros(size[: x.dim()])
        found[name][tuple(slice(s) for s in x.shape)] = x
    return found | {"operand": found["weight"]}


@pytest.mark.parametrize("centred", [True, False])
def test_kernel(device: str, centred: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if device == "cpu":
        monkeypatch.setattr(centre, "_ROWS", 32)  # so that sums take several turns
    for n, k, n_out, k_out in SHAPES + BACK + (LARGE if device == "cuda" else []):
        reference = partial(packed, (n_out, k_out), centred)
        i = {"weight": torch.randn(n, k) + 0.5}
        i |= {name: torch.randn(n) for name in NAMES[1:]}
        out, operand = Rows(n_out, k_out, FP32, device, 3), Rows(n_out, k_out, FP16, device, 3)
        vectors = [Rows(1, n_out, FP32, device) for _ in NAMES[1:]]
        centre.centre(
            [Rows.of(i["weight"], FP32, device, 2).tensor, *(i[m].to(device) for m in NAMES[1:])],
            [out.tensor, *(v.tensor[0] for v in vectors)],
            centred=centred,
            cast=operand.tensor,
        )
        written = (v.written()[0] for v in vectors)
        ours = {"weight": out.written(), **dict(zip(NAMES[1:], written, strict=True))}
        assert torch.equal(operand.written(), ours["weight"].half())
        ours["operand"] = operand.written()
        check(ours, reference, i, f"{n} x {k} to {n_out} x {k_out}")


def test_what_a_layer_lacks(device: str) -> None:
    """Vectors and gradients may be missing, and the weight, too."""
    weight, bias = torch.randn(7, 5, device=device), torch.randn(7, device=device)
    out = torch.full((7, 5), float("nan"), device=device)
    centre.centre([weight, None, None, None], [out, None, None, None], centred=False)
    assert torch.equal(out, weight)
    vector = torch.full((9,), float("nan"), device=device)
    centre.centre([None, bias, None, None], [None, vector, None, None], centred=True)
    torch.testing.assert_close(vector[:7], bias - bias.mean())
    assert not vector[7:].any()


def layers(device: str) -> list[ops.Layer]:
    generator = torch.Generator().manual_seed(0)

    def made(n: int, k: int, act: ops.Activation = "none", **options: bool) -> ops.Layer:
        layer = random_layer(k, n, act, dtype=FP32, generator=generator, **options)
        return layer._replace(
            **{
                name: getattr(layer, name).detach().to(device).requires_grad_()
                for name in ("weight", "bias", "ln_weight", "ln_bias")
                if getattr(layer, name) is not None
            }
        )

    return [
        made(37, 11, "mish"),
        made(33, 37, "mish", bias=False),
        made(24, 33, "simnorm"),
        made(5, 24, norm=False),
    ]


def flat(found: list[ops.Layer]) -> list[Tensor]:
    return [x for p in found for x in p[:4] if x is not None]


@pytest.mark.parametrize("pad", [True, False])
def test_operator(device: str, pad: bool) -> None:
    """As the same packing in PyTorch, with its gradients."""
    user = layers(device)
    with ops.algebra(centre=True, pad=pad):
        ours, widths = weights.centred(choice("triton", "fast"), user)
        theirs, same = weights.centred(choice("torch", "fast"), user)
    assert widths == same
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(x.shape, generator=generator).to(x) for x in flat(ours)]
    grads = [torch.autograd.grad(flat(found), flat(user), cotangents) for found in (ours, theirs)]
    for a, b in zip(flat(ours), flat(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_copies(device: str) -> None:
    """A pack and its views have the rounded copy made with it, while they stay as they are."""
    user = layers(device)
    with ops.algebra(centre=True, pad=True):
        packed, _ = weights.centred(choice("triton", "fast"), user)
    weight = packed[0].weight
    assert weight.shape == (64, 11) and weight.stride(0) % 8 == 0
    for x in (weight, weight[:, 3:9], weight[:, 10], weight[:, :4].t()):
        copy = weight_cache.attached(x, FP16)
        assert copy is not None and torch.equal(copy, x.half())
    assert weight_cache.attached(weight, torch.bfloat16) is None
    assert weight_cache.attached(user[0].weight, FP16) is None
    with torch.no_grad():
        weight.add_(1.0)
    assert weight_cache.attached(weight, FP16) is None


def test_missing_gradients(device: str) -> None:
    """Nothing reaches what nothing came from; the padding's gradients are dropped."""
    user = layers(device)
    with ops.algebra(centre=True, pad=True):
        packed, _ = weights.centred(choice("triton", "fast"), user)
    first = packed[0]
    assert first.bias is not None and first.bias.shape[0] % algebra.PAD_TO == 0
    grads = torch.autograd.grad(
        first.bias[:37].square().sum() + first.bias[37:].sum(), flat(user), allow_unused=True
    )
    assert [g is not None for g in grads] == [i == 1 for i in range(len(grads))]
    bias = user[0].bias
    assert bias is not None
    torch.testing.assert_close(grads[1], 2 * (bias - bias.mean()))
