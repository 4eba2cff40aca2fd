"""NormedLinear and MLP modules against PyTorch's own modules."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pwm_fast.models import MLP, NormedLinear, mlp
from pwm_fast.ops import Activation
from tests.helpers import assert_2x
from tests.models.builders import normal, randomize_, same


def composed(layer: NormedLinear, x: torch.Tensor) -> torch.Tensor:
    """Linear, LayerNorm and activation by PyTorch's functions."""
    h = nn.functional.linear(x, layer.weight, layer.bias)
    h = nn.functional.layer_norm(h, h.shape[-1:], layer.ln.weight, layer.ln.bias, eps=1e-5)
    if layer.act == "mish":
        return nn.functional.mish(h)
    if layer.act == "simnorm":
        return h.unflatten(-1, (-1, layer.simnorm_dim)).softmax(-1).flatten(-2)
    return h


@pytest.mark.parametrize("act", ["mish", "simnorm", "none"])
def test_normed_linear(act: Activation) -> None:
    """Value and every gradient, float64 against PyTorch and float32 by the 2x rule."""
    layer = NormedLinear(7, 24, act).double()
    randomize_(layer)
    single = NormedLinear(7, 24, act)
    single.load_state_dict(layer.state_dict())
    x, grad = normal(5, 7).requires_grad_(), normal(5, 24)
    x32 = x.detach().float().requires_grad_()

    def run(module: NormedLinear, x: torch.Tensor, ours: bool) -> list[torch.Tensor]:
        y = module(x) if ours else composed(module, x)
        return [y, *torch.autograd.grad(y, [x, *module.parameters()], grad.to(y.dtype))]

    truth = run(layer, x, ours=False)
    for value, expected in zip(run(layer, x, ours=True), truth, strict=True):
        same(value, expected)
    results = zip(run(single, x32, ours=True), run(single, x32, ours=False), truth, strict=True)
    for i, (value, torch_value, expected) in enumerate(results):
        assert_2x(value, torch_value, expected, f"output {i}")


def test_simnorm_width_must_divide() -> None:
    with pytest.raises(ValueError, match=r"out_features=20 is no multiple of simnorm_dim=8"):
        NormedLinear(4, 20, "simnorm")


def test_simnorm_groups_of_another_width() -> None:
    layer = NormedLinear(4, 20, "simnorm", simnorm_dim=5)
    same(layer(torch.randn(3, 4)).unflatten(-1, (4, 5)).sum(-1), torch.ones(3, 4), atol=1e-6)


def test_mlp_concatenates_its_inputs_in_order() -> None:
    """Several inputs equal one concatenated input, and the layers applied one after another."""
    net = mlp(9, [6, 5], 4).double()
    randomize_(net)
    parts = [normal(3, 2), normal(3, 6), normal(3, 1)]
    x = torch.cat(parts, dim=-1)
    expected = x
    for module in net:
        expected = module(expected)
    same(net(*parts), expected)
    same(net(x), expected)


def test_mlp_without_hidden_layers_and_with_a_normed_end() -> None:
    plain = mlp(3, [], 2)
    assert isinstance(plain, MLP) and [type(m) for m in plain] == [nn.Linear]
    ended = mlp(3, [4], 8, last="simnorm")
    assert [m.act for m in ended if isinstance(m, NormedLinear)] == ["mish", "simnorm"]
