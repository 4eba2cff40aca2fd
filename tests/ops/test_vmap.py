"""torch.vmap over the operations, and the function transforms that only the reference follows."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.func import grad, jacrev, jvp, vmap
from torch.utils import _pytree as pytree

from pwm_fast import ops
from pwm_fast.backends import select
from pwm_fast.ops import Layer
from tests.helpers import random_layer

MAPPED = 3
DTYPES = {"native": torch.float32, "torch": torch.float64, "reference": torch.float64}
Values = dict[str, Any]  # trees of tensors by name


class Case(NamedTuple):
    """An operation as a function of named trees of tensors.

    Attributes:
        operation: its name in the dispatch table.
        call: from values and the backend's name.
        values: all arguments.
        rows: names of those that vary by row.
        constants: names of those without a gradient.
    """

    operation: str
    call: Callable[[Values, str], Tensor]
    values: Values
    rows: tuple[str, ...]
    constants: tuple[str, ...] = ()


def net(widths: list[int], *, members: tuple[int, ...] = ()) -> list[Layer]:
    layers = [random_layer(k, n, "mish", members=members) for k, n in pairwise(widths[:-1])]
    return [*layers, random_layer(*widths[-2:], norm=False, members=members)]


def mlp_case(order: str) -> Case:
    return Case(
        "mlp",
        lambda v, b: ops.mlp([v["x"], v["a"]], v["net"], order=order, backend=b),  # type: ignore[arg-type]
        {"x": torch.randn(4, 4), "a": torch.randn(4, 2), "net": net([6, 9, 7, 5])},
        ("x", "a"),
    )


def ensemble_case(order: str) -> Case:
    return Case(
        "mlp",
        lambda v, b: ops.mlp([v["x"]], v["net"], order=order, backend=b),  # type: ignore[arg-type]
        {"x": torch.randn(4, 4), "net": net([4, 9, 3], members=(2,))},
        ("x",),
    )


def dropout_case(members: tuple[int, ...]) -> Case:
    """The mask is an argument, which varies by row as the input does."""

    def call(v: Values, backend: str) -> Tensor:
        layers = [v["net"][0]._replace(dropout=v["mask"]), *v["net"][1:]]
        return ops.mlp([v["x"]], layers, backend=backend)

    mask = torch.randint(0, 2, (*members, 4, 9)) / 0.5
    values = {"x": torch.randn(4, 4), "mask": mask, "net": net([4, 9, 3], members=members)}
    return Case("mlp", call, values, ("x", "mask"), ("mask",))


def flow_case() -> Case:
    return Case(
        "flow_step",
        lambda v, b: ops.flow_step(v["z"], v["a"], v["net"], task=v["task"], backend=b),
        {
            "z": torch.randn(4, 8),
            "a": torch.randn(4, 2),
            "task": torch.randn(4, 3),
            "net": net([14, 9, 8]),
        },
        ("z", "a", "task"),
    )


def imagine_case(task: int) -> Case:
    def call(v: Values, backend: str) -> Tensor:
        out = ops.imagine(
            v["z"],
            ops.Policy(v["policy"], v["std"]),
            ops.Flow(v["net"]),
            ops.Heads(v["reward"]),
            noise=v["noise"],
            task=v.get("task"),
            backend=backend,
        )
        return torch.cat([out.z[1:], out.action, out.reward.unsqueeze(-1)], -1)

    values = {
        "z": torch.randn(4, 8),
        "noise": torch.randn(2, 4, 2),
        "policy": net([8, 9, 2]),
        "std": torch.rand(2),
        "net": net([11 + task, 9, 8]),
        "reward": net([10 + task, 7, 5]),
    }
    if task:
        values["task"] = torch.randn(4, task)
    return Case("imagine", call, values, ("z", "noise", "task")[: 2 + bool(task)], ("noise",))


def tdmpc2_case() -> Case:
    """A deviation for each state, a task and a mask: an MLP for each network at each step."""

    def call(v: Values, backend: str) -> Tensor:
        out = ops.imagine(
            v["z"],
            ops.Policy(v["policy"], None, "norm_act", task_input=True),
            ops.LatentMLP(v["net"]),
            ops.Heads(v["reward"]),
            noise=v["noise"],
            task=v["task"],
            action_mask=v["mask"],
            backend=backend,
        )
        return torch.cat([out.z[1:], out.action, out.reward.unsqueeze(-1)], -1)

    values = {
        "z": torch.randn(4, 8),
        "noise": torch.randn(2, 4, 2),
        "task": torch.randn(4, 3),
        "mask": torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0], [1.0, 1.0]]),
        "policy": net([11, 9, 4]),
        "net": net([13, 9, 8]),
        "reward": net([13, 7, 5]),
    }
    return Case("imagine", call, values, ("z", "noise", "task", "mask"), ("noise", "mask"))


def cases() -> dict[str, Case]:
    torch.manual_seed(0)
    return {
        "mlp norm_act": mlp_case("norm_act"),
        "mlp act_norm": mlp_case("act_norm"),
        "mlp ensemble": ensemble_case("act_norm"),
        "mlp ensemble norm_act": ensemble_case("norm_act"),
        "mlp dropout": dropout_case(()),
        "mlp ensemble dropout": dropout_case((2,)),
        "flow_step": flow_case(),
        "imagine": imagine_case(0),
        "imagine task": imagine_case(3),
        "imagine tdmpc2": tdmpc2_case(),
        "simnorm": Case(
            "simnorm",
            lambda v, b: ops.simnorm(v["x"], backend=b),
            {"x": torch.randn(4, 16)},
            ("x",),
        ),
        "layer_norm_act": Case(
            "layer_norm_act",
            lambda v, b: ops.layer_norm_act(v["x"], v["weight"], v["bias"], backend=b),
            {"x": torch.randn(4, 7), "weight": torch.rand(7), "bias": torch.randn(7)},
            ("x",),
        ),
        "two_hot_decode": Case(
            "two_hot_decode",
            lambda v, b: ops.two_hot_decode(v["x"], backend=b),
            {"x": torch.randn(4, 11)},
            ("x",),
        ),
        "two_hot_cross_entropy": Case(
            "two_hot_cross_entropy",
            lambda v, b: ops.two_hot_cross_entropy(v["x"], v["target"], backend=b),
            {"x": torch.randn(4, 11), "target": torch.randn(4)},
            ("x", "target"),
            ("target",),
        ),
    }


with torch.random.fork_rng(devices=[]):  # other tests keep their random numbers
    CASES = cases()

MAPS: dict[str, Callable[[Case], set[str]]] = {
    "rows": lambda case: set(case.rows),
    "one input": lambda case: {case.rows[0]},
    "parameters": lambda case: set(case.values) - set(case.rows),
    "all": lambda case: set(case.values),
}


def runs() -> list:
    """Cases by the fused backends that have them by what is mapped over."""
    return [
        pytest.param(case, backend, what(case), id=f"{name}-{backend}-{label}")
        for name, case in CASES.items()
        for backend in (b.name for b in select.OPERATIONS[case.operation].backends[:-1])
        if backend != "triton"  # its operators are the same (tests/kernels/test_operators.py)
        for label, what in MAPS.items()
        if what(case)
    ]


def usable(backend: str) -> str:
    if backend == "native":
        pytest.importorskip("pwm_fast._C", reason="the native extension is not built")
    return backend


def of_tensors(function: Callable[[Tensor], Any], tree: Any) -> Any:
    return pytree.tree_map(lambda x: function(x) if isinstance(x, Tensor) else x, tree)


def prepare(case: Case, dtype: torch.dtype, mapped: set[str], axis: int) -> tuple[Values, Values]:
    """Leaves that require gradients, those to map over stacked along a new axis, and in_dims."""

    def stacked(x: Tensor) -> Tensor:
        return torch.stack([x * s for s in (0.7, 1.0, 1.3)], axis if axis >= 0 else x.dim())

    values, dims = {}, {}
    for name, tree in case.values.items():
        if name in mapped:
            tree = of_tensors(stacked, tree)
        gradient = name not in case.constants
        values[name] = of_tensors(lambda x, g=gradient: x.to(dtype).requires_grad_(g), tree)
        dims[name] = pytree.tree_map(
            lambda x, name=name: axis if name in mapped and isinstance(x, Tensor) else None, tree
        )
    return values, dims


def member(values: Values, dims: Values, i: int) -> Values:
    flat, structure = pytree.tree_flatten(values)
    flat_dims = pytree.tree_flatten(dims)[0]
    picked = [x if d is None else x.select(d, i) for x, d in zip(flat, flat_dims, strict=True)]
    return pytree.tree_unflatten(picked, structure)


def over_tensors(
    function: Callable[[Values], Tensor], values: Values, dims: Values
) -> Callable[[], Tensor]:
    """``vmap`` of a function of a tree that holds more than tensors."""
    flat, structure = pytree.tree_flatten(values)
    flat_dims = pytree.tree_flatten(dims)[0]
    where = [i for i, x in enumerate(flat) if isinstance(x, Tensor)]

    def of_list(tensors: list[Tensor]) -> Tensor:
        leaves = list(flat)
        for i, x in zip(where, tensors, strict=True):
            leaves[i] = x
        return function(pytree.tree_unflatten(leaves, structure))

    return lambda: vmap(of_list, in_dims=([flat_dims[i] for i in where],))([flat[i] for i in where])


def assert_close(got: Tensor, expected: Tensor) -> None:
    """Equal but for rounding, in float32 by the scale of the whole tensor."""
    if expected.dtype == torch.float32:
        scale = expected.detach().abs().max().clamp_min(1.0).item()
        torch.testing.assert_close(got, expected, atol=3e-5 * scale, rtol=0.0)
    else:
        torch.testing.assert_close(got, expected)


def leaves(values: Values) -> list[Tensor]:
    flat = pytree.tree_flatten(values)[0]
    return [x for x in flat if isinstance(x, Tensor) and x.requires_grad]


@pytest.mark.parametrize("axis", [0, -1])
@pytest.mark.parametrize(("case", "backend", "mapped"), runs())
def test_vmap_is_a_loop(case: Case, backend: str, mapped: set[str], axis: int) -> None:
    """Values and gradients of a mapped operation are those of one call after another."""
    usable(backend)
    values, dims = prepare(case, DTYPES[backend], mapped, axis)
    got = over_tensors(lambda v: case.call(v, backend), values, dims)()
    expected = torch.stack([case.call(member(values, dims, i), backend) for i in range(MAPPED)])
    assert_close(got, expected)
    weight, wanted = torch.randn_like(got), leaves(values)
    for ours, theirs in zip(
        torch.autograd.grad((got * weight).sum(), wanted),
        torch.autograd.grad((expected * weight).sum(), wanted),
        strict=True,
    ):
        assert_close(ours, theirs)


def test_nested_vmap() -> None:
    """A mapped axis within a mapped axis."""
    case = CASES["mlp norm_act"]
    layers = [Layer(*layer) for layer in case.values["net"]]
    x = torch.randn(2, 3, 4, 6, dtype=torch.float64, requires_grad=True)

    def call(x: Tensor) -> Tensor:
        return ops.mlp([x], layers, backend="torch")

    got = vmap(vmap(call, in_dims=1), in_dims=-1, out_dims=-1)(x.movedim(1, 2).movedim(0, -1))
    expected = call(x).movedim(0, -1)
    torch.testing.assert_close(got, expected)
    for output in (got, expected):
        assert output.requires_grad
    weight = torch.randn_like(got)
    torch.testing.assert_close(
        *(torch.autograd.grad((y * weight).sum(), x)[0] for y in (got, expected))
    )


@pytest.mark.parametrize("name", ["mlp norm_act", "flow_step", "imagine", "simnorm"])
def test_batched_backward(name: str) -> None:
    """Several gradients at a time, as vectorised Jacobians take them."""
    case = CASES[name]
    has = [b.name for b in select.OPERATIONS[case.operation].backends]
    backend = usable("torch" if "torch" in has else "native")
    values, _ = prepare(case, DTYPES[backend], set(), 0)
    output, inputs = case.call(values, backend), leaves(values)
    weights = torch.randn(3, *output.shape, dtype=output.dtype)
    together = vmap(lambda w: torch.autograd.grad(output, inputs, w, retain_graph=True))(weights)
    for i, weight in enumerate(weights):
        alone = torch.autograd.grad(output, inputs, weight, retain_graph=True)
        for ours, theirs in zip(together, alone, strict=True):
            assert_close(ours[i], theirs)


@pytest.mark.parametrize("name", CASES)
def test_function_transforms_run_on_the_reference(name: str) -> None:
    """torch.func's own gradients: by themselves right, and an error where a backend is forced."""
    case = CASES[name]
    usable("native")
    values, _ = prepare(case, torch.float32, set(), 0)
    values = of_tensors(lambda x: x.detach(), values)
    first = next(iter(case.rows))
    x = values[first]

    def loss(x: Tensor, backend: str = "auto") -> Tensor:
        return case.call(values | {first: x}, backend).square().sum()

    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    assert_close(grad(loss)(x), expected)
    assert_close(jacrev(loss)(x), expected)
    stacked = torch.stack([x, x])
    assert_close(vmap(grad(loss))(stacked)[1], expected)
    tangent = torch.randn_like(x)
    _, slope = jvp(lambda x: loss(x, "reference"), (x,), (tangent,))
    torch.testing.assert_close(slope, (expected * tangent).sum(), atol=1e-3, rtol=1e-3)
    _, slope = jvp(loss, (x,), (tangent,))
    torch.testing.assert_close(slope, (expected * tangent).sum(), atol=1e-3, rtol=1e-3)
    with pytest.raises(select.BackendError, match=r"torch\.func transform \(grad\)"):
        grad(lambda x: loss(x, "native"))(x)


def test_what_vmap_cannot_hide() -> None:
    """Inside vmap nobody sees that a gradient is asked for; where there is none, it is an error."""
    usable("native")
    logits, x = torch.randn(2, 3, 11), torch.randn(2, 3, requires_grad=True)
    with pytest.raises(RuntimeError, match="no gradient towards x"):
        vmap(lambda v, x: ops.two_hot_cross_entropy(v, x, backend="native"))(logits, x)
    grads = torch.randn(4, 2, 5, requires_grad=True)
    with pytest.raises(RuntimeError, match="no gradient towards grads"):
        vmap(lambda g: ops.esnr(g, backend="native").ratio)(grads)
    ratios = vmap(lambda g: ops.esnr(g, backend="native").ratio)(grads.detach())
    expected = [ops.esnr(g, backend="reference").ratio for g in grads.detach()]
    torch.testing.assert_close(ratios, torch.stack(expected), rtol=1e-5, atol=0.0)


def test_vmap_over_nothing() -> None:
    """An axis of length 0 that cannot join the rows."""
    weights = torch.zeros(0, 5, 6, dtype=torch.float64)
    x = torch.zeros(4, 6, dtype=torch.float64)
    with pytest.raises(ValueError, match="an axis of length 0"):
        vmap(lambda w: ops.mlp([x], [Layer(w)], backend="torch"))(weights)
    empty = torch.zeros(0, 4, 6, dtype=torch.float64)
    layer = Layer(torch.ones(5, 6, dtype=torch.float64))
    assert vmap(lambda x: ops.mlp([x], [layer], backend="torch"))(empty).shape == (0, 4, 5)
