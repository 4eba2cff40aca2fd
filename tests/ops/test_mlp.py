"""Layers against their formulas in numpy, and their derivatives against finite differences."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from pwm_fast import ops
from pwm_fast.backends import select
from pwm_fast.ops import Layer
from tests.helpers import random_layer, tensors_of, with_tensors

ACTS = ("none", "mish", "simnorm")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def np_act(x: np.ndarray, act: str, dim: int) -> np.ndarray:
    if act == "mish":
        return x * np.tanh(np.logaddexp(0.0, x))
    if act == "simnorm":
        out = np.empty_like(x)
        for row in np.ndindex(x.shape[:-1]):
            for start in range(0, x.shape[-1], dim):
                group = np.exp(x[row][start : start + dim])
                out[row][start : start + dim] = group / group.sum()
        return out
    return x


def np_norm(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, eps: float) -> np.ndarray:
    out = np.empty_like(x)
    for row in np.ndindex(x.shape[:-1]):
        centred = x[row] - x[row].sum() / x.shape[-1]
        out[row] = weight * centred / np.sqrt((centred**2).sum() / x.shape[-1] + eps) + bias
    return out


def np_linear(x: np.ndarray, layer: Layer) -> np.ndarray:
    h = np.einsum("...k,nk->...n", x, layer.weight.numpy())
    return h if layer.bias is None else h + layer.bias.numpy()


def np_linear_norm_act(x: np.ndarray, layer: Layer) -> np.ndarray:
    h = np_linear(x, layer)
    if layer.ln_weight is not None:
        h = np_norm(h, layer.ln_weight.numpy(), layer.ln_bias.numpy(), layer.eps)
    return np_act(h, layer.act, layer.simnorm_dim)


def np_linear_act_norm(x: np.ndarray, layer: Layer) -> np.ndarray:
    h = np_act(np_linear(x, layer), layer.act, layer.simnorm_dim)
    if layer.ln_weight is not None:
        h = np_norm(h, layer.ln_weight.numpy(), layer.ln_bias.numpy(), layer.eps)
    return h


def assert_equal(ours: Tensor, expected: np.ndarray) -> None:
    assert tuple(ours.shape) == expected.shape
    np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-12, atol=1e-13)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def member(layer: Layer, index: int) -> Layer:
    return with_tensors(layer, [p[index] for p in tensors_of(layer)])


# SimNorm


@pytest.mark.parametrize(("shape", "dim"), [((16,), 8), ((3, 21), 7), ((2, 3, 6), 1), ((0, 8), 4)])
def test_simnorm_is_a_softmax_over_each_group(shape: tuple[int, ...], dim: int) -> None:
    x = 3.0 * normal(*shape)
    assert_equal(ops.simnorm(x, dim), np_act(x.numpy(), "simnorm", dim))


def test_simnorm_lands_on_the_simplex() -> None:
    """Groups are non-negative and sum to 1, also for inputs whose exponential overflows."""
    x = torch.tensor([[1e4, -1e4, 0.0, 1e4], [5.0, 5.0, -80.0, 80.0]])
    y = ops.simnorm(x, 2)
    torch.testing.assert_close(y, torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.5, 0.5, 0.0, 1.0]]))
    groups = ops.simnorm(10.0 * torch.randn(50, 24)).view(50, 3, 8)
    assert (groups >= 0.0).all()
    torch.testing.assert_close(groups.sum(-1), torch.ones(50, 3))


def test_simnorm_groups_are_independent() -> None:
    """The Jacobian is block diagonal: no group sees another one."""
    jacobian = torch.autograd.functional.jacobian(lambda x: ops.simnorm(x, 4), normal(8))
    assert jacobian[:4, :4].abs().min() > 0.0
    assert jacobian[:4, 4:].abs().max() == 0.0 == jacobian[4:, :4].abs().max()


# Mish


@pytest.mark.parametrize("shape", [(), (7,), (2, 3, 5), (0, 4)], ids=str)
def test_mish_value(shape: tuple[int, ...]) -> None:
    x = 5.0 * torch.randn(shape, dtype=torch.float64)
    before = x.clone()
    assert_equal(ops.mish(x), np.asarray(np_act(x.numpy(), "mish", 8)))
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_mish_everywhere(dtype: torch.dtype) -> None:
    """Values keep their relative accuracy over the whole range, slopes their absolute one."""
    x = torch.cat((torch.linspace(-80, 80, 4001), torch.logspace(2, 30, 50))).to(dtype)
    x.requires_grad_()
    y = ops.mish(x)
    (slope,) = torch.autograd.grad(y.sum(), x)
    v = x.detach().double().numpy()
    tanh = np.tanh(np.logaddexp(0.0, v))
    sigmoid = np.exp(-np.logaddexp(0.0, -v))
    eps = torch.finfo(dtype).eps
    np.testing.assert_allclose(y.detach().double().numpy(), v * tanh, rtol=8 * eps)
    truth = tanh + v * sigmoid * (1.0 - tanh) * (1.0 + tanh)
    np.testing.assert_allclose(slope.double().numpy(), truth, rtol=0.0, atol=20 * eps)


def test_mish_of_special_values() -> None:
    x = torch.tensor([math.nan, math.inf, 0.0, -0.0, -1e30])
    torch.testing.assert_close(
        ops.mish(x), torch.tensor([math.nan, math.inf, 0.0, 0.0, 0.0]), equal_nan=True
    )


def test_mish_derivatives() -> None:
    """Up to the third, beyond the point where the formula saturates too."""
    x = torch.tensor([-25.0, -1.2, 0.0, 0.7, 19.0, 21.0], dtype=torch.float64, requires_grad=True)

    def slope(x: Tensor) -> Tensor:
        return torch.autograd.grad(ops.mish(x).sum(), x, create_graph=True)[0]

    assert gradcheck(ops.mish, (x,))
    assert gradgradcheck(ops.mish, (x,))
    assert gradgradcheck(slope, (x,))


def test_mish_under_function_transforms() -> None:
    """Gradients per sample by ``torch.func`` equal those of a loop."""
    x = normal(4, 3)
    ours = torch.vmap(torch.func.grad(lambda row: ops.mish(row).square().sum()))(x)
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(torch.nn.functional.mish(leaf).square().sum(), leaf)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-14)


# LayerNorm and activation


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("shape", [(14,), (5, 14), (2, 3, 14), (0, 14)], ids=str)
@pytest.mark.parametrize("eps", [1e-5, 0.5])
def test_layer_norm_act_value(act: str, shape: tuple[int, ...], eps: float) -> None:
    x, weight, bias = 2.0 * normal(*shape) + 1.0, normal(14), normal(14)
    ours = ops.layer_norm_act(x, weight, bias, act=act, simnorm_dim=7, eps=eps)
    expected = np_act(np_norm(x.numpy(), weight.numpy(), bias.numpy(), eps), act, 7)
    assert_equal(ours, expected)


def test_layer_norm_act_of_constant_rows() -> None:
    """No variance: the result is the activation of the shift, and nothing is divided by zero."""
    bias = normal(9)
    ours = ops.layer_norm_act(torch.full((2, 9), 3.0).double(), normal(9), bias)
    assert_equal(ours, np.tile(np_act(bias.numpy(), "mish", 8), (2, 1)))


def test_a_group_width_that_nobody_uses_may_be_numpy_s() -> None:
    x, w, b = torch.randn(3, 8), torch.randn(8), torch.randn(8)
    ours = ops.layer_norm_act(x, w, b, simnorm_dim=np.int64(4))  # type: ignore[arg-type]
    assert torch.equal(ours, ops.layer_norm_act(x, w, b))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_layer_norm_mish_far_out(dtype: torch.dtype) -> None:
    """Mish neither overflows nor loses its value where exp(x) does, and neither does its slope."""
    x = torch.tensor([[-1.0, 1.0]], dtype=dtype, requires_grad=True)
    shift = torch.tensor([-1e4, 1e4], dtype=dtype, requires_grad=True)
    y = ops.layer_norm_act(x, torch.ones(2, dtype=dtype), shift, eps=0.0)
    torch.testing.assert_close(y, torch.tensor([[0.0, 10001.0]], dtype=dtype))
    (slope,) = torch.autograd.grad(y.sum(), shift)
    torch.testing.assert_close(slope, torch.tensor([0.0, 1.0], dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_layer_norm_act_has_the_dtype_of_x(dtype: torch.dtype) -> None:
    """Also with float32 parameters, as mixed-precision training keeps them."""
    x, weight, bias = torch.randn(4, 16).to(dtype), torch.randn(16), torch.randn(16)
    for act in ACTS:
        y = ops.layer_norm_act(x, weight, bias, act=act)
        truth = ops.layer_norm_act(x.double(), weight.double(), bias.double(), act=act)
        assert y.dtype == dtype
        torch.testing.assert_close(y.double(), truth, rtol=1e-2, atol=1e-2)


# Linear layers

LAYERS = [
    pytest.param(act, bias, norm, id=f"{act}{'-bias' * bias}{'-norm' * norm}")
    for act in ACTS
    for bias in (False, True)
    for norm in (False, True)
]


@pytest.mark.parametrize("shape", [(5,), (7, 5), (2, 3, 5)], ids=str)
@pytest.mark.parametrize(("act", "bias", "norm"), LAYERS)
def test_linear_layers_value(act: str, bias: bool, norm: bool, shape: tuple[int, ...]) -> None:
    """Both orders of activation and LayerNorm, with every part present or absent."""
    x = normal(*shape)
    layer = random_layer(5, 6, act, norm=norm, bias=bias, simnorm_dim=3)._replace(eps=0.1)
    assert_equal(ops.linear_norm_act(x, layer), np_linear_norm_act(x.numpy(), layer))
    assert_equal(ops.linear_act_norm(x, layer), np_linear_act_norm(x.numpy(), layer))


SINGLE = {"norm_act": ops.linear_norm_act, "act_norm": ops.linear_act_norm}
FORMULAS = {"norm_act": np_linear_norm_act, "act_norm": np_linear_act_norm}


@pytest.mark.parametrize("order", ops.types.ORDERS)
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own"])
@pytest.mark.parametrize("batch", [0, 1, 7])
@pytest.mark.parametrize(("act", "bias", "norm"), LAYERS)
def test_ensemble_is_a_loop_over_members(
    act: str, bias: bool, norm: bool, batch: int, shared: bool, order: str
) -> None:
    """Member e of the result is layer e applied to the shared input or to input e."""
    x = normal(batch, 5) if shared else normal(3, batch, 5)
    layer = random_layer(5, 6, act, norm=norm, bias=bias, simnorm_dim=2, members=(3,))
    layer = layer._replace(eps=0.1)
    ours = SINGLE[order](x, layer)
    assert ours.shape == (3, batch, 6)
    for e in range(3):
        own = x if shared else x[e]
        assert_equal(ours[e], FORMULAS[order](own.numpy(), member(layer, e)))


@pytest.mark.parametrize("lead", [(), (4,), (2, 3), (0,)], ids=str)
def test_mlp_value(lead: tuple[int, ...]) -> None:
    """The layers in order, on the inputs put side by side in order."""
    inputs = [normal(*lead, width) for width in (4, 1, 2)]
    net = [random_layer(7, 5, "mish"), random_layer(5, 3, "mish"), random_layer(3, 6, norm=False)]
    expected = np.concatenate([x.numpy() for x in inputs], axis=-1)
    for layer in net:
        expected = np_linear_norm_act(expected, layer)
    assert_equal(ops.mlp(inputs, net), expected)


def test_mlp_of_one_input_and_one_layer() -> None:
    x, layer = normal(3, 5), random_layer(5, 16, "simnorm")
    assert_equal(ops.mlp([x], [layer]), np_linear_norm_act(x.numpy(), layer))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtype_is_kept(dtype: torch.dtype) -> None:
    x = torch.randn(3, 16, dtype=dtype)
    layer = random_layer(16, 16, "simnorm", dtype=dtype)
    ensemble = random_layer(16, 16, "mish", dtype=dtype, members=(2,))
    assert ops.simnorm(x).dtype == ops.mish(x).dtype == dtype
    assert ops.linear_norm_act(x, layer).dtype == dtype
    assert ops.linear_act_norm(x, layer).dtype == dtype
    assert ops.linear_act_norm(x, ensemble).dtype == dtype
    assert ops.mlp([x], [layer, layer]).dtype == dtype


# Derivatives


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [x.detach().requires_grad_() for x in tensors]


def test_simnorm_derivatives() -> None:
    (x,) = leaves(normal(3, 10))
    assert gradcheck(lambda x: ops.simnorm(x, 5), (x,))
    assert gradgradcheck(lambda x: ops.simnorm(x, 5), (x,))


@pytest.mark.parametrize("act", ACTS)
def test_layer_norm_act_derivatives(act: str) -> None:
    def op(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return ops.layer_norm_act(x, weight, bias, act=act, simnorm_dim=3)

    inputs = leaves(normal(3, 9), normal(9), normal(9))
    assert gradcheck(op, inputs)
    assert gradgradcheck(op, inputs)


@pytest.mark.parametrize("op", [ops.linear_norm_act, ops.linear_act_norm], ids=lambda f: f.__name__)
@pytest.mark.parametrize(("act", "bias", "norm"), LAYERS)
def test_linear_layers_derivatives(op, act: str, bias: bool, norm: bool) -> None:
    """In the input and in every parameter."""
    layer = random_layer(5, 6, act, norm=norm, bias=bias, simnorm_dim=3)

    def call(x: Tensor, *tensors: Tensor) -> Tensor:
        return op(x, with_tensors(layer, list(tensors)))

    inputs = leaves(normal(3, 5), *tensors_of(layer))
    assert gradcheck(call, inputs)
    if bias:
        assert gradgradcheck(call, inputs)


@pytest.mark.parametrize("order", ops.types.ORDERS)
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own"])
@pytest.mark.parametrize(("act", "bias", "norm"), LAYERS)
def test_ensemble_derivatives(act: str, bias: bool, norm: bool, shared: bool, order: str) -> None:
    layer = random_layer(5, 4, act, norm=norm, bias=bias, simnorm_dim=2, members=(2,))

    def call(x: Tensor, *tensors: Tensor) -> Tensor:
        return SINGLE[order](x, with_tensors(layer, list(tensors)))

    x = normal(3, 5) if shared else normal(2, 3, 5)
    inputs = leaves(x, *tensors_of(layer))
    assert gradcheck(call, inputs)
    if bias:
        assert gradgradcheck(call, inputs)


def test_mlp_derivatives() -> None:
    """In all inputs and all parameters of all layers."""
    net = [random_layer(5, 4, "mish"), random_layer(4, 6, "simnorm", simnorm_dim=3)]

    def call(x: Tensor, y: Tensor, *tensors: Tensor) -> Tensor:
        layers = [
            with_tensors(layer, list(tensors[4 * i : 4 * i + 4])) for i, layer in enumerate(net)
        ]
        return ops.mlp((x, y), layers)

    inputs = leaves(normal(3, 2), normal(3, 3), *tensors_of(net[0]), *tensors_of(net[1]))
    assert gradcheck(call, inputs)
    assert gradgradcheck(call, inputs)


@pytest.mark.parametrize("order", ops.types.ORDERS)
@pytest.mark.parametrize("steps", [2, 3])
def test_one_layer_of_an_ensemble_shares_what_has_steps(steps: int, order: str) -> None:
    """A leading axis of an MLP's input is no axis of members, as long as the ensemble or not."""
    layer = random_layer(4, 5, "mish", members=(3,))
    x = torch.randn(steps, 6, 4, dtype=torch.float64)
    y = ops.mlp([x], [layer], order=order)  # type: ignore[arg-type]
    assert y.shape == (3, steps, 6, 5)
    for e in range(3):
        torch.testing.assert_close(y[e], SINGLE[order](x, member(layer, e)))


@pytest.mark.parametrize("order", ops.types.ORDERS)
@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_linears_in_succession(order: ops.types.Order, precision: str) -> None:
    """The second weight's gradient needs the first's output, which nothing else keeps."""
    net = [
        random_layer(5, 16, norm=False),
        random_layer(16, 12, norm=False, bias=False),
        random_layer(12, 8, "mish"),
        random_layer(8, 8, norm=False),
        random_layer(8, 3, norm=False),
    ]
    x, cotangent = normal(6, 5), normal(6, 3)

    def gradients(dtype: torch.dtype, backend: str) -> list[Tensor]:
        flat = [[t.to(dtype).requires_grad_() for t in tensors_of(layer)] for layer in net]
        layers = [with_tensors(layer, tensors) for layer, tensors in zip(net, flat, strict=True)]
        y = ops.mlp((x.to(dtype),), layers, order=order, backend=backend)
        return list(torch.autograd.grad(y, [t for each in flat for t in each], cotangent.to(dtype)))

    expected = gradients(torch.float64, "reference")
    with select.precision(precision):
        ours = gradients(torch.float32, "torch")
    for a, b in zip(ours, expected, strict=True):
        off = (a.double() - b).norm() / b.norm()
        assert off < (1e-5 if precision == "exact" else 1e-2), off
