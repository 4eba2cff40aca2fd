"""Ensembles: some of their members, and dropout, whose mask is drawn as PyTorch draws its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import vmap

from pwm_fast import ops
from pwm_fast.backends import select
from pwm_fast.backends.native import why_missing
from pwm_fast.fused.wgrad import sum_rows
from pwm_fast.ops import Layer
from pwm_fast.ops.mlp import members_of
from tests.helpers import assert_2x, random_layer, tensors_of, with_tensors

E, B = 5, 6
WIDTHS = (9, 13, 16, 3)
DTYPES = {"native": torch.float32, "torch": torch.float64, "reference": torch.float64}
BACKENDS = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(
            name == "native" and why_missing() is not None, reason=f"{why_missing()}"
        ),
    )
    for name in DTYPES
]


def ensemble(dtype: torch.dtype, members: tuple[int, ...] = (E,)) -> list[Layer]:
    layers = [
        random_layer(k, n, "mish", members=members, dtype=dtype) for k, n in pairwise(WIDTHS[:-1])
    ]
    return [*layers, random_layer(*WIDTHS[-2:], norm=False, members=members, dtype=dtype)]


def with_gradients(layers: Sequence[Layer]) -> list[Layer]:
    return [
        with_tensors(p, [x.detach().clone().requires_grad_() for x in tensors_of(p)])
        for p in layers
    ]


def gradients(y: Tensor, layers: Sequence[Layer], *others: Tensor) -> list[Tensor]:
    weight = torch.linspace(-1.0, 1.0, y.numel(), dtype=y.dtype).view(y.shape)
    wanted = [*(x for p in layers for x in tensors_of(p)), *others]
    return list(torch.autograd.grad((y * weight).sum(), wanted))


def assert_near(got: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for ours, theirs in zip(got, expected, strict=True):
        tolerance = 1e-10 if ours.dtype == torch.float64 else 2e-5
        atol = tolerance * max(1.0, theirs.abs().max().item())
        torch.testing.assert_close(ours, theirs, rtol=0.0, atol=atol)


# --- members --------------------------------------------------------------------------------------

CHOSEN = {
    "two": (1, 3),
    "neighbours": (2, 3),
    "one": (4,),
    "backwards": (3, 0),
    "twice": (2, 2, 0),
    "uneven": (0, 1, 4),
    "all": range(5),
}


@pytest.mark.parametrize("order", ops.types.ORDERS)
@pytest.mark.parametrize("chosen", CHOSEN)
@pytest.mark.parametrize("backend", BACKENDS)
def test_members(backend: str, chosen: str, order: ops.types.Order) -> None:
    """What indexing the whole ensemble's result gives, with its gradients: 0 for the others."""
    numbers = [*CHOSEN[chosen]]
    dtype = DTYPES[backend]
    x = torch.randn(2, 3, WIDTHS[0], dtype=dtype, requires_grad=True)
    layers = with_gradients(ensemble(dtype))
    y = ops.mlp([x], layers, order=order, members=numbers, backend=backend)
    assert y.shape == (len(numbers), 2, 3, WIDTHS[-1])
    ours = gradients(y, layers, x)
    truth = with_gradients([with_tensors(p, [t.double() for t in tensors_of(p)]) for p in layers])
    leaf = x.detach().double().requires_grad_()
    whole = ops.mlp([leaf], truth, order=order, backend="reference")[numbers]
    expected = [z.to(dtype) for z in [whole, *gradients(whole, truth, leaf)]]
    assert_near([y, *ours], expected)
    for unused in set(range(E)) - {*numbers}:
        assert all(g[unused].abs().max() == 0.0 for g in ours[:-1])


KINDS: dict[str, Callable[[Sequence[int]], object]] = {
    "tuple": tuple,
    "tensor": lambda numbers: torch.tensor([*numbers]),
    "numpy": lambda numbers: np.array([*numbers]),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("numbers", [(1, 3), (3, 1), (2, 2, 0)], ids=str)
def test_members_may_be_numbers_of_any_kind(kind: str, numbers: tuple[int, ...]) -> None:
    layers, x = ensemble(torch.float64), torch.randn(B, WIDTHS[0], dtype=torch.float64)
    y = ops.mlp([x], layers, members=KINDS[kind](numbers))  # type: ignore[arg-type]
    torch.testing.assert_close(y, ops.mlp([x], layers)[[*numbers]])


def test_members_at_even_distances_are_not_copied() -> None:
    """Two of an ensemble, as TD-MPC2 takes them, are a view of its tensors."""
    for numbers in ([1, 4], [0, 2, 4], [3]):
        for whole in ensemble(torch.float32):
            for a, b in zip(tensors_of(members_of(whole, numbers)), tensors_of(whole), strict=True):
                assert a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
                assert torch.equal(a, b[numbers])


def test_members_under_compile_and_vmap() -> None:
    """Numbers that nobody can look at: a compiler's, and those that are mapped over."""
    layers, x = ensemble(torch.float32), torch.randn(B, WIDTHS[0])
    whole = ops.mlp([x], layers)

    def call(members: Tensor) -> Tensor:
        return ops.mlp([x], layers, members=members)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for numbers in ([4, 1], [0, 3]):
        torch.testing.assert_close(compiled(torch.tensor(numbers)), whole[numbers])
    mapped = vmap(call)(torch.tensor([[4, 1], [0, 3]]))
    torch.testing.assert_close(mapped, torch.stack([whole[[4, 1]], whole[[0, 3]]]))


@pytest.mark.parametrize(
    ("members", "error", "message"),
    [
        ([], ValueError, "members must name at least one of the 5 members, got none"),
        (torch.zeros(0, dtype=torch.int64), ValueError, "at least one of the 5 members"),
        ([0, 5], ValueError, r"members\[1\] must be from 0 to 4, got 5"),
        (torch.tensor([0, -1]), ValueError, r"members\[1\] must be from 0 to 4, got -1"),
        ([True], TypeError, r"members\[0\] must be an integer, got bool"),
        ([1.0], TypeError, r"members\[0\] must be an integer, got float"),
        (torch.tensor([1.0]), TypeError, r"members must be int64 \[M\], got torch.float32 \[1\]"),
        (torch.tensor(1), TypeError, r"members must be int64 \[M\], got torch.int64 \[\]"),
        (2, TypeError, "members must be a sequence of integers or a tensor, got int"),
    ],
)
def test_wrong_members(members: object, error: type[Exception], message: str) -> None:
    x = torch.randn(B, WIDTHS[0])
    with pytest.raises(error, match=message):
        ops.mlp([x], ensemble(torch.float32), members=members)  # type: ignore[arg-type]


def test_members_of_no_ensemble() -> None:
    with pytest.raises(ValueError, match=r"members is for an ensemble, whose weights are \[E, N"):
        ops.mlp([torch.randn(B, WIDTHS[0])], ensemble(torch.float32, ()), members=[0])


def test_layers_are_checked_before_members_are_taken() -> None:
    layers = ensemble(torch.float32)
    layers[1] = layers[1]._replace(bias=torch.zeros(2, WIDTHS[2]))
    with pytest.raises(ValueError, match=r"layers\[1\].bias must be \[5, 16\], got \(2, 16\)"):
        ops.mlp([torch.randn(B, WIDTHS[0])], layers, members=[4, 3])


def test_layers_of_different_ensembles() -> None:
    layers = ensemble(torch.float32)
    layers[1] = ensemble(torch.float32, (4,))[1]
    with pytest.raises(ValueError, match=r"layers\[1\].weight has 4 members, but layers\[0\]"):
        ops.mlp([torch.randn(B, WIDTHS[0])], layers)


@pytest.mark.skipif(why_missing() is not None, reason=f"{why_missing()}")
@pytest.mark.parametrize("order", ops.types.ORDERS)
def test_auto_takes_the_fused_pass(order: ops.types.Order) -> None:
    taken: list[str | None] = []
    layers, x = ensemble(torch.float32), torch.randn(B, WIDTHS[0])
    stack = ensemble(torch.float32, ())
    first = layers[0]._replace(dropout=0.5)
    with select.observed(lambda operation, asked, backend, call: taken.append(backend)):
        ops.mlp([x], layers, order=order)
        ops.mlp([x], layers, order=order, members=[1, 3])
        ops.mlp([x], [first, *layers[1:]], order=order)
        vmap(lambda *t: ops.mlp([x], [Layer(*t, act="mish")], order=order))(*tensors_of(layers[0]))
        ops.mlp([x], stack, order=order)
    assert taken == ["native"] * 5


@pytest.mark.parametrize("pad", [False, True])
def test_stacked_parameters_under_vmap_are_one_call(
    pad: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not a call for each member; where weights are centred and padded, too, as on a GPU."""
    layers, x = ensemble(torch.float64), torch.randn(B, WIDTHS[0], dtype=torch.float64)
    rows: list[int] = []
    original = torch.bmm
    monkeypatch.setattr(
        torch,
        "bmm",
        lambda a, b: rows.append(a.shape[0]) or original(a, b),  # type: ignore[func-returns-value]
    )
    flat = [tensors_of(p) for p in layers]

    def call(tensors: list[list[Tensor]]) -> Tensor:
        own = [with_tensors(p, t) for p, t in zip(layers, tensors, strict=True)]
        return ops.mlp([x], own, backend="torch")

    with ops.algebra(centre=pad, pad=pad):
        y = vmap(call)(flat)
    assert rows == [E] * 3
    monkeypatch.undo()
    torch.testing.assert_close(y, ops.mlp([x], layers))


# --- dropout --------------------------------------------------------------------------------------


def plain(x: Tensor, layers: Sequence[Layer], order: str) -> Tensor:
    """One member, with PyTorch's own dropout."""
    for p in layers:
        x = F.linear(x, p.weight, p.bias)
        x = F.dropout(x, p.dropout) if not isinstance(p.dropout, Tensor) else x * p.dropout
        if order == "act_norm" and p.act == "mish":
            x = F.mish(x)
        if p.ln_weight is not None:
            x = F.layer_norm(x, x.shape[-1:], p.ln_weight, p.ln_bias, p.eps)
        if order == "norm_act" and p.act == "mish":
            x = F.mish(x)
    return x


@pytest.mark.parametrize("order", ops.types.ORDERS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_rate_draws_what_pytorch_draws(backend: str, order: ops.types.Order) -> None:
    """The same seed gives the numbers of the plain modules, in every layer; the next ones too."""
    dtype = DTYPES[backend]
    layers = with_gradients([p._replace(dropout=0.3) for p in ensemble(dtype, ())])
    x = torch.randn(2, B, WIDTHS[0], dtype=dtype, requires_grad=True)
    found = []
    for call in (
        lambda: ops.mlp([x], layers, order=order, backend=backend),
        lambda: plain(x, layers, order),
    ):
        torch.manual_seed(3)
        y = call()
        found.append([y, *gradients(y, layers, x), torch.rand(4, dtype=dtype)])
    assert_near(*found)


@pytest.mark.parametrize("order", ops.types.ORDERS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_mask_of_every_layer(backend: str, order: ops.types.Order) -> None:
    """Of each member its own; the last layer, a plain one, has one too."""
    dtype = DTYPES[backend]
    layers = with_gradients(ensemble(dtype))
    masks = [
        (torch.rand(E, B, n, dtype=dtype) < 0.6).to(dtype) / 0.6 * torch.rand(n, dtype=dtype)
        for n in WIDTHS[1:]
    ]
    layers = [p._replace(dropout=m) for p, m in zip(layers, masks, strict=True)]
    x = torch.randn(B, WIDTHS[0], dtype=dtype, requires_grad=True)
    y = ops.mlp([x], layers, order=order, backend=backend)
    two = [p._replace(dropout=m[[3, 1]]) for p, m in zip(layers, masks, strict=True)]
    two_y = ops.mlp([x], two, order=order, members=[3, 1], backend=backend)
    assert_near([two_y], [y[[3, 1]]])
    own = [
        [
            with_tensors(p, [t[e] for t in tensors_of(p)])._replace(dropout=p.dropout[e])
            for p in layers
        ]
        for e in range(E)
    ]
    expected = torch.stack([plain(x, p, order) for p in own])
    assert_near([y, *gradients(y, layers, x)], [expected, *gradients(expected, layers, x)])


def test_a_mask_with_a_gradient() -> None:
    """Which only the reference computes, and takes by itself."""
    layer = random_layer(4, 7, "mish", dtype=torch.float32)
    mask = torch.rand(B, 7, requires_grad=True)
    x = torch.randn(B, 4)
    layer = layer._replace(dropout=mask)
    (got,) = torch.autograd.grad(ops.linear_norm_act(x, layer).sum(), mask)
    (expected,) = torch.autograd.grad(plain(x, [layer], "norm_act").sum(), mask)
    torch.testing.assert_close(got, expected)
    with pytest.raises(select.BackendError, match="a dropout mask requires a gradient"):
        ops.linear_norm_act(x, layer, backend="torch")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [0, 1, 16, 17, 32, 47, 199, 2000])
def test_sums_over_the_rows_of_members(rows: int, dtype: torch.dtype) -> None:
    """Gradients of biases: no worse than PyTorch's sum, of strided tensors too."""
    truth = torch.randn(3, rows, 14, dtype=torch.float64) + 0.5
    for x in (truth.to(dtype), truth.to(dtype)[..., ::2], truth.to(dtype)[1]):
        out = torch.full((*x.shape[:-2], x.shape[-1]), torch.nan, dtype=torch.float64)
        sum_rows(x, out)
        exact = x.double().sum(-2)
        assert_2x(out.to(dtype), x.sum(-2), exact)
        if dtype == torch.float64:
            torch.testing.assert_close(out, exact, rtol=1e-13, atol=1e-12)


def test_dropout_of_everything_and_of_nothing() -> None:
    layer, x = random_layer(4, 7, "mish", dtype=torch.float32), torch.randn(B, 4)
    y = ops.linear_norm_act(x, layer._replace(dropout=1.0))
    torch.testing.assert_close(y, F.mish(layer.ln_bias).expand(B, 7))  # type: ignore[arg-type]
    assert torch.equal(
        ops.linear_norm_act(x, layer._replace(dropout=0)), ops.linear_norm_act(x, layer)
    )


def test_members_drop_out_by_themselves() -> None:
    """Equal members get masks of their own, at the rate that was asked for."""
    one = random_layer(64, 64, norm=False, bias=False, dtype=torch.float32)
    one = one._replace(weight=torch.eye(64), dropout=0.25)
    x = torch.ones(500, 64)
    y = ops.mlp([x], [one._replace(weight=torch.eye(64).expand(3, 64, 64))])
    assert y.unique().tolist() == pytest.approx([0.0, 1.0 / 0.75])
    rates = (y == 0.0).float().mean((1, 2))
    assert ((rates - 0.25).abs() < 0.02).all()
    both = ((y[0] == 0.0) & (y[1] == 0.0)).float().mean().item()
    assert abs(both - 0.25**2) < 0.01

    def call(weight: Tensor) -> Tensor:
        return ops.mlp([x], [one._replace(weight=weight)])

    weights = torch.eye(64).expand(3, 64, 64)
    different = vmap(call, randomness="different")(weights)
    assert not torch.equal(different[0], different[1])
    same = vmap(call, randomness="same")(weights)
    assert torch.equal(same[0], same[1]) and (same == 0.0).any()
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(call)(weights)


def test_dropout_under_compile() -> None:
    """One graph, which draws anew each time; gradients are of that draw."""
    layers = [p._replace(dropout=0.5) for p in ensemble(torch.float32)[:1]]
    x = torch.randn(B, WIDTHS[0], requires_grad=True)
    compiled = torch.compile(
        lambda x: ops.mlp([x], layers, backend="torch"), fullgraph=True, backend="aot_eager"
    )
    assert not torch.equal(compiled(x), compiled(x))
    found = []
    for call in (compiled, lambda x: ops.mlp([x], layers)):
        torch.manual_seed(4)
        y = call(x)
        found.append([y, torch.autograd.grad(y.square().sum(), x)[0]])
    assert_near(*found)


def test_dropout_where_there_is_none() -> None:
    """Rollouts have no dropout, and say so."""
    net = [random_layer(5, 8, "mish", dtype=torch.float32), random_layer(8, 2, norm=False)]
    net = [with_tensors(p, [x.float() for x in tensors_of(p)]) for p in net]
    net[0] = net[0]._replace(dropout=0.1)
    z, a = torch.randn(B, 2), torch.randn(B, 2)
    for call in (
        lambda: ops.flow_step(z, a, net),
        lambda: ops.latent_rollout(z, a.unsqueeze(0), ops.Flow(net)),
        lambda: ops.latent_rollout(
            z, a.unsqueeze(0), ops.Flow([net[0]._replace(dropout=a), net[1]])
        ),
    ):
        with pytest.raises(ValueError, match=r"net\[0\].dropout must be 0 here, got (0.1|a mask)"):
            call()


@pytest.mark.parametrize(
    ("dropout", "error", "message"),
    [
        (-0.1, ValueError, r"layer.dropout must be a rate in \[0, 1\], got -0.1"),
        (1.5, ValueError, r"must be a rate in \[0, 1\], got 1.5"),
        (float("nan"), ValueError, r"must be a rate in \[0, 1\], got nan"),
        ("0.1", TypeError, "layer.dropout must be a rate or a mask, got str"),
        (torch.ones(7), ValueError, r"a rate in \[0, 1\] or a mask \[6, 7\], got \(7,\)"),
        (torch.ones(6, 7, dtype=torch.bool), TypeError, "layer.dropout must have a floating dtype"),
        (torch.ones(6, 7, device="meta"), ValueError, "layer.dropout is on meta"),
    ],
)
def test_wrong_dropout(dropout: object, error: type[Exception], message: str) -> None:
    layer = random_layer(4, 7, "mish", dtype=torch.float32)._replace(dropout=dropout)  # type: ignore[arg-type]
    with pytest.raises(error, match=message):
        ops.linear_norm_act(torch.randn(B, 4), layer)
