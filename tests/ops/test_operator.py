"""The operators as torch.library, torch.compile and autograd see them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.functional import jacobian
from torch.library import opcheck
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from pwm_fast import ops
from pwm_fast.backends import select
from pwm_fast.ops import Layer
from tests.helpers import random_layer

B, D, A, E, H = 3, 8, 2, 3, 2


def usable(backend: str) -> str:
    if backend == "native":
        pytest.importorskip("pwm_fast._C", reason="the native extension is not built")
    return backend


def net(widths: list[int], dtype: torch.dtype, *, members: tuple[int, ...] = ()) -> list[Layer]:
    """Mish layers and a plain last one, all of whose tensors require gradients."""
    layers = [
        random_layer(k, n, "mish", members=members, dtype=dtype) for k, n in pairwise(widths[:-1])
    ]
    layers.append(random_layer(*widths[-2:], norm=False, members=members, dtype=dtype))
    return [trainable(layer) for layer in layers]


def trainable(tree: Any) -> Any:
    def leaf(x: Any) -> Any:
        return x.detach().requires_grad_() if isinstance(x, Tensor) else x

    return pytree.tree_map(leaf, tree)


def normal(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, dtype=dtype)


# Calls of public operations. Together they reach every operator.

Call = Callable[[str, torch.dtype], Tensor]


def call_mlp(backend: str, dtype: torch.dtype) -> Tensor:
    x, a = normal(B, D, dtype=dtype).requires_grad_(), normal(B, A, dtype=dtype)
    return ops.mlp([x, a], net([D + A, 9, 7, 5], dtype), backend=backend)


def call_frozen_mlp(backend: str, dtype: torch.dtype) -> Tensor:
    x = normal(B, D, dtype=dtype).requires_grad_()
    layers = pytree.tree_map_only(Tensor, Tensor.detach, net([D, 9, 5], dtype))
    return ops.mlp([x], layers, backend=backend)


def call_padded_mlp(backend: str, dtype: torch.dtype) -> Tensor:
    with ops.algebra(pad=True):
        return call_mlp(backend, dtype)


def call_ensemble(backend: str, dtype: torch.dtype, order: str = "act_norm") -> Tensor:
    x = normal(B, D, dtype=dtype).requires_grad_()
    layers = net([D, 9, 1], dtype, members=(2,))
    return ops.mlp([x], layers, order=order, backend=backend)  # type: ignore[arg-type]


def call_dropout(backend: str, dtype: torch.dtype) -> Tensor:
    x = normal(B, D, dtype=dtype).requires_grad_()
    first, *others = net([D, 9, 1], dtype, members=(2,))
    mask = torch.randint(0, 2, (2, B, 9)).to(dtype)
    return ops.mlp([x], [first._replace(dropout=mask), *others], backend=backend)


def call_simnorm_layer(backend: str, dtype: torch.dtype) -> Tensor:
    x = normal(B, D, dtype=dtype).requires_grad_()
    layer = trainable(random_layer(D, 16, "simnorm", bias=False, dtype=dtype))
    return ops.linear_norm_act(x, layer, backend=backend)


def call_rollout(backend: str, dtype: torch.dtype, *, fold: bool, method: str) -> Tensor:
    z, action = normal(B, D, dtype=dtype).requires_grad_(), normal(H, B, A, dtype=dtype)
    task = normal(B, E, dtype=dtype)
    flow = ops.Flow(net([D + A + 1 + E, 9, D], dtype), 2, method, fold=fold)  # type: ignore[arg-type]
    return ops.latent_rollout(z, action, flow, task=task, backend=backend)


def call_map_rollout(backend: str, dtype: torch.dtype) -> Tensor:
    z, action = normal(B, D, dtype=dtype).requires_grad_(), normal(H, B, A, dtype=dtype)
    layers = [
        trainable(random_layer(D + A, 9, "mish", dtype=dtype)),
        trainable(random_layer(9, D, "simnorm", dtype=dtype)),
    ]
    return ops.latent_rollout(z, action, ops.LatentMap(layers), backend=backend)


def call_imagine(
    backend: str, dtype: torch.dtype, *, detach: bool = True, frozen: bool = False
) -> Tensor:
    z = normal(B, D, dtype=dtype).requires_grad_()
    velocity = net([D + A + 1, 9, D], dtype)
    if frozen:
        velocity = pytree.tree_map_only(Tensor, Tensor.detach, velocity)
    out = ops.imagine(
        z,
        ops.Policy(net([D, 7, A], dtype), torch.rand(A, dtype=dtype).requires_grad_()),
        ops.Flow(velocity),
        ops.Heads(net([D + A, 7, 5], dtype), value=net([D, 7, 1], dtype, members=(2,))),
        noise=normal(H, B, A, dtype=dtype),
        detach=detach,
        backend=backend,
    )
    assert out.value is not None
    return out.z.sum() + out.action.sum() + out.reward.sum() + out.value.sum()


def call_rows(backend: str, dtype: torch.dtype) -> Tensor:
    x, w, b = (normal(*s, dtype=dtype).requires_grad_() for s in ((B, 16), (16,), (16,)))
    y = ops.layer_norm_act(x, w, b, backend=backend).sum()
    y = y + (ops.simnorm(x, backend=backend) * x.detach()).sum()
    y = y + ops.two_hot_decode(x, backend=backend).sum()
    return y + ops.two_hot_cross_entropy(x, normal(B, dtype=dtype), backend=backend).sum()


def call_esnr(backend: str, dtype: torch.dtype) -> Tensor:
    ratio = ops.esnr([[normal(5, 3, dtype=dtype)] for _ in range(4)], backend=backend).ratio
    return ratio.requires_grad_() * 1.0


def call_esnr_accumulator(backend: str, dtype: torch.dtype) -> Tensor:
    origins = [normal(5, 3, dtype=dtype), normal(2, dtype=dtype)]
    sums = [torch.zeros_like(x) for x in origins]
    squares = torch.zeros(2, dtype=torch.float64)
    for _ in range(3):
        grads = [normal(5, 3, dtype=dtype), normal(2, dtype=dtype)]
        torch.ops.pwm_fast.esnr_update(grads, origins, sums, squares, "torch", "exact")
    signal, noise = torch.ops.pwm_fast.esnr_result(origins, sums, squares, 4, "torch", "exact")
    return (signal / noise).sum().requires_grad_() * 1.0


# With the operators that are of interest: the others of a call have a case of their own.
CALLS: dict[str, tuple[str, Call]] = {
    "mlp": ("mlp", call_mlp),
    "mlp frozen": ("mlp", call_frozen_mlp),
    "mlp padded": ("centred", call_padded_mlp),
    "ensemble": ("mlp", call_ensemble),
    "ensemble norm_act": ("mlp", partial(call_ensemble, order="norm_act")),
    "dropout": ("mlp", call_dropout),
    "simnorm layer": ("mlp", call_simnorm_layer),
    "rollout": ("rollout", lambda b, d: call_rollout(b, d, fold=False, method="heun")),
    "folded rollout": ("rollout", lambda b, d: call_rollout(b, d, fold=True, method="euler")),
    "map rollout": ("rollout", call_map_rollout),
    "imagine": ("imagine", call_imagine),
    "imagine attached": ("imagine", lambda b, d: call_imagine(b, d, detach=False)),
    "imagine frozen": ("imagine", lambda b, d: call_imagine(b, d, frozen=True)),
    "rows": ("", call_rows),
    "esnr": ("", call_esnr),
    "esnr accumulator": ("", call_esnr_accumulator),
}


def runs() -> list:
    """Cases by backends; the second dtype of the torch backend once for each operator."""
    backends = [("torch", torch.float64), ("native", torch.float32)]
    listed = [(n, b, d) for n in CALLS for b, d in backends if CALLS[n][0] or b == "native"]
    listed += [(n, "torch", torch.float32) for n in ("mlp", "rollout", "imagine")]
    return [pytest.param(*run, id="-".join(map(str, run)).replace("torch.", "")) for run in listed]


class Recorder(TorchDispatchMode):
    """Keeps the arguments of the first call of each operator with each set of constants."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[tuple[object, ...], tuple[Any, tuple[Any, ...]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "pwm_fast":
            assert not kwargs
            constants = [x for x in pytree.tree_flatten(args)[0] if isinstance(x, (str, bool))]
            shapes = [x.shape for x in pytree.tree_flatten(args)[0] if isinstance(x, Tensor)]
            key = (func, *constants, *shapes)
            self.calls.setdefault(key, (func, pytree.tree_map_only(Tensor, _copy, args)))
        return func(*args, **(kwargs or {}))


def _copy(x: Tensor) -> Tensor:
    return torch.empty_like(x).copy_(x).detach()


def record(call: Call, backend: str, dtype: torch.dtype) -> list[tuple[Any, tuple[Any, ...]]]:
    """Operators that a call and its backward pass run, with their arguments."""
    recorder = Recorder()
    with recorder:
        output = call(backend, dtype)
        output.square().sum().backward()
    return list(recorder.calls.values())


def require_what_is_kept(func: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Let those tensors require gradients whose gradients the constants announce."""
    names = [a.name for a in func._schema.arguments]
    named = dict(zip(names, args, strict=True))
    groups = {
        "save": ("inputs", "z0", "c", "base", "w_a", "std", "x", "weight", "bias"),
        "wgrad": ("params", "w_z", "w_tau"),
        "actor_wgrad": ("actor",),
    }
    if "backward" in func.name():
        return args  # they have no gradient
    if "save" not in named:
        groups = (
            {"": ("x", "logits", "tensors")} if "entropy" not in func.name() else {"": ("logits",)}
        )
    for flag, members in groups.items():
        if not named.get(flag, True):
            continue
        for name in members:
            if name in named and named[name] is not None:
                named[name] = trainable(named[name])
    return tuple(named.values())


@pytest.mark.parametrize(("name", "backend", "dtype"), runs())
def test_opcheck(name: str, backend: str, dtype: torch.dtype) -> None:
    """Schema, fake implementation, autograd and compiled gradients of a call's operators."""
    usable(backend)
    operator, call = CALLS[name]
    checked = 0
    for func, args in record(call, backend, dtype):
        if operator in ("", func._opname.removesuffix("_backward")):
            opcheck(func, require_what_is_kept(func, args))
            checked += 1
    assert checked


def test_every_operator_is_checked() -> None:
    usable("native")
    seen = set()
    for operator, call in CALLS.values():
        for func, _ in record(call, "native", torch.float32):
            if operator in ("", func._opname.removesuffix("_backward")):
                seen.add(func.name())
    registered = {
        name for name in torch._C._dispatch_get_all_op_names() if name.startswith("pwm_fast::")
    }
    only_triton = {"pwm_fast::td_lambda", "pwm_fast::td_lambda_backward"}  # kernels/test_returns.py
    assert seen | only_triton == registered and not seen & only_triton


# Operations over rows by their first argument.
ROWS: dict[str, Callable[[Tensor], Tensor]] = {
    "layer_norm_act": lambda x: ops.layer_norm_act(x, torch.arange(8.0), torch.ones(8)),
    "simnorm": lambda x: ops.simnorm(x, 4),
    "two_hot_decode": lambda x: ops.two_hot_decode(x),
    "two_hot_cross_entropy": lambda x: ops.two_hot_cross_entropy(x, torch.linspace(-9, 9, B)),
}


@pytest.mark.parametrize("name", ROWS)
def test_no_rows(name: str) -> None:
    """Of any strides, which are all contiguous to PyTorch: an input's, and a gradient's."""
    usable("native")
    function = {**ROWS, "two_hot_cross_entropy": cross_entropy_of_nothing}[name]
    strided = torch.zeros(0, D, 2)[..., 0].requires_grad_()
    with select.backend("native"):
        y = function(strided)
        assert y.shape[0] == 0
        (found,) = torch.autograd.grad(y.sum(), strided)  # a gradient without strides
        assert found.shape == strided.shape


def cross_entropy_of_nothing(x: Tensor) -> Tensor:
    return ops.two_hot_cross_entropy(x, torch.zeros(0, 2)[:, 0])


@pytest.mark.parametrize("name", ROWS)
def test_many_gradients_at_a_time(name: str) -> None:
    """Operators without lists need no rule: autograd's batching runs them one after another."""
    usable("native")
    x, function = normal(B, D, dtype=torch.float32), ROWS[name]
    with select.backend("reference"):
        expected = jacobian(function, x)
    with select.backend("native"):
        found = jacobian(function, x, vectorize=True)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ROWS)
def test_nodes_of_the_graph_have_names(name: str) -> None:
    """So have errors: that something was changed in place before the backward pass."""
    usable("native")
    with select.backend("native"):
        y = ROWS[name](normal(B, D, dtype=torch.float32).requires_grad_())
    node = y.grad_fn
    while node is not None and name not in node.name():  # views of the result
        node = node.next_functions[0][0]
    assert node is not None


@pytest.mark.parametrize("name", ROWS)
def test_a_sign_that_is_still_to_be_turned(name: str) -> None:
    """Of an input, and of a gradient: kernels must not read the memory as it is."""
    usable("native")
    x, function = normal(B, D, dtype=torch.float32), ROWS[name]
    with select.backend("native"):
        assert torch.equal(function(torch._neg_view(x)), function(-x))
        y = function(x.requires_grad_())
        g = normal(*y.shape, dtype=torch.float32)
        (found,) = torch.autograd.grad(y, x, torch._neg_view(g), retain_graph=True)
        assert torch.equal(found, torch.autograd.grad(y, x, -g)[0])


def test_one_number_that_is_the_negative_of_another() -> None:
    usable("native")
    logits, x = normal(1, D, dtype=torch.float32), torch.tensor([0.3 + 2.0j]).conj().imag
    assert x.is_neg() and x.is_contiguous()
    found = ops.two_hot_cross_entropy(logits, x, backend="native")
    assert torch.equal(found, ops.two_hot_cross_entropy(logits, x.clone(), backend="native"))
