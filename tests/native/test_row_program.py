"""Row programs: each step, the sums over blocks of rows, and what they refuse."""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from pwm_fast import ops
from pwm_fast.backends import select
from pwm_fast.backends.specs import LayerSpec
from pwm_fast.fused.row_program import FEW, MEMBERS, Builder, LayerSlots, Operand, runs
from tests.helpers import assert_2x
from tests.native.harness import _C, Rows, Values, check

#: None, few (weights are multiplied as they lie), one block, an odd number of them, many.
BATCHES = (0, 1, 5, 16, 48, 49, 97, 199)
#: The widest has blocks of more rows, and weights that are packed for more of them.
SIZES = ((1, 1), (7, 33), (64, 128), (33, 257), (130, 15), (257, 320))


def run(builder: Builder, tensors: list[Tensor], rows: int, threads: int = 1) -> None:
    builder.build().run(tensors, rows, threads)


def gemms(given: Values, threads: int = 1) -> Values:
    """Both GEMMs with an addend, the weight's gradient and a column sum, in poisoned memory."""
    rows, k = given["x"].shape
    n = given["w"].shape[0]
    b = Builder(_C.RowProgram)
    x, y, dx = (Operand(b.rows(name, cols)) for name, cols in (("x", k), ("y", n), ("dx", k)))
    w, dw = (Operand(b.weight(name, n, k)) for name in ("w", "dw"))
    bias, sums = (Operand(b.shared(name, n)) for name in ("bias", "sums"))
    b.gemm(y, x, w, bias)
    b.dgrad(dx, y, w, x)
    b.weight_grad(dw, y, x)
    b.column_sum(sums, y, 0.5, y)
    out = {"y": Rows(rows, n), "dx": Rows(rows, k), "dw": Rows(n, k), "sums": Rows(1, n, gap=0)}
    inputs = [Rows.of(given[name]).tensor for name in ("x", "w")]
    tensors = [inputs[0], out["y"].tensor, out["dx"].tensor, inputs[1], out["dw"].tensor]
    run(b, [*tensors, given["bias"], out["sums"].tensor], rows, threads)
    return {name: each.written() for name, each in out.items()}


def gemms_reference(given: Values, dtype: torch.dtype) -> Values:
    x, w, bias = (given[name].to(dtype) for name in ("x", "w", "bias"))
    y = torch.addmm(bias, x, w.t())
    return {"y": y, "dx": x + y @ w, "dw": y.t() @ x, "sums": (0.5 * y * y).sum(0, keepdim=True)}


def numbers(rows: int, n: int, k: int) -> Values:
    shapes = {"x": (rows, k), "w": (n, k), "bias": (n,)}
    return {name: torch.randn(shape) for name, shape in shapes.items()}


@pytest.mark.parametrize(("n", "k"), SIZES)
@pytest.mark.parametrize("rows", BATCHES)
def test_gemms(rows: int, n: int, k: int) -> None:
    given = numbers(rows, n, k)
    check(gemms(given), gemms_reference, given, f"{rows} x {n} x {k}")


@pytest.mark.parametrize("rows", [25, 200])
def test_rows_alone(rows: int) -> None:
    """Rows have the same bits in any company that weights are packed for."""
    given = numbers(331, 70, 130)
    some, whole = gemms({**given, "x": given["x"][:rows]}), gemms(given)
    for name in ("y", "dx"):
        assert torch.equal(some[name], whole[name][:rows])


@pytest.mark.parametrize("rows", [1, 5, 13, 48, 96, 97, 200])
def test_threads_share_columns(rows: int) -> None:
    """Of one block, as of several blocks that one thread would add up in turn: the same bits."""
    given = numbers(rows, 531, 670)
    one = gemms(given)
    for threads in (2, 3):
        for name, found in gemms(given, threads).items():
            assert torch.equal(found, one[name]), name
    check(one, gemms_reference, given, f"{rows} rows")


@pytest.mark.parametrize("rows", [0, 7, 60, 500])
def test_sums_of_several_steps(rows: int) -> None:
    """A weight's gradient is the sum over steps, of which the first one finds what was there."""
    n, k = 70, 45
    given = {name: torch.randn(rows, cols) for name, cols in (("dy", n), ("x", k), ("x2", k))}
    b = Builder(_C.RowProgram)
    dy, x, x2 = (Operand(b.rows(name, value.shape[1])) for name, value in given.items())
    both, one = (b.weight(name, n, k, 2) for name in ("both", "one"))
    b.weight_grad(Operand(both, 1), dy, x)
    b.weight_grad(Operand(one), dy, x2)
    b.weight_grad(Operand(both, 1), dy, x2)

    def reference(given: Values, dtype: torch.dtype) -> Values:
        dy, x, x2 = (given[name].to(dtype) for name in ("dy", "x", "x2"))
        return {"both": dy.t() @ x + dy.t() @ x2, "one": dy.t() @ x2}

    alone: Values = {}
    for threads in (1, 2, 3):
        out = {name: Rows(2 * n, k) for name in ("both", "one")}
        run(b, [*given.values(), *(each.tensor for each in out.values())], rows, threads)
        found = {"both": out["both"].written()[n:], "one": out["one"].written()[:n]}
        for rest in (out["both"].tensor[:n], out["one"].tensor[n:]):  # no step is of these planes
            assert rest.isnan().all()
        check(found, reference, given, f"{rows} rows")
        alone = alone or found
        for name, value in found.items():
            assert torch.equal(value, alone[name]), f"{name} with {threads} threads"


def test_other_steps() -> None:
    """What is no GEMM: combinations, the policy, and scratch memory between steps."""
    rows, n = 61, 5
    names = ("z", "k1", "k2", "mu", "noise", "da")
    given = {name: torch.randn(rows, n) for name in names} | {"std": torch.rand(n)}
    b = Builder(_C.RowProgram)
    slots = {name: Operand(b.rows(name, n)) for name in names}
    std = Operand(b.shared("std", n))
    out, action, dmu = (Operand(b.rows(name, n)) for name in ("out", "action", "dmu"))
    scratch = b.combine(b.scratch("s", n), slots["z"], slots["k1"], 0.25)
    b.combine(out, scratch, slots["k1"], -0.5, slots["k2"], 2.0)
    b.combine(b.scratch("zero", n), None)
    b.combine(out, out, b.scratch("zero", n), 1.0)
    b.policy(action, slots["mu"], slots["noise"], std)
    b.policy_backward(dmu, slots["da"], action)
    found = {name: Rows(rows, n) for name in ("out", "action", "dmu")}
    run(b, [*given.values(), *(each.tensor for each in found.values())], rows)

    def reference(given: Values, dtype: torch.dtype) -> Values:
        x = {name: value.to(dtype) for name, value in given.items()}
        action = torch.tanh(x["mu"] + x["noise"] * x["std"])
        out = (x["z"] + 0.25 * x["k1"]) + (-0.5 * x["k1"] + 2.0 * x["k2"])
        return {"out": out, "action": action, "dmu": x["da"] * (1 - action * action)}

    check({k: v.written() for k, v in found.items()}, reference, given, "other steps")


@pytest.mark.parametrize("widths", [(300, 517, 33), (510, 617, 1788)], ids=str)
@pytest.mark.parametrize("rows", [5, 70, 201])
def test_wider_than_by_default(
    rows: int, widths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """``PWM_FAST_GEMM=native`` takes sums of several runs, in layers of any width."""
    layers = [
        ops.Layer(
            torch.randn(n, k) / k**0.5, torch.randn(n), torch.randn(n), torch.randn(n), act="mish"
        )
        for k, n in pairwise(widths)
    ]
    x = torch.randn(rows, widths[0] + 3)[:, 1:-2]

    def values(dtype: torch.dtype, backend: str, x: Tensor = x) -> list[Tensor]:
        own = [p._replace(**{n: getattr(p, n).to(dtype) for n in p._fields[:4]}) for p in layers]
        leaves = [t.detach().requires_grad_() for p in own for t in p[:4]]
        own = [
            p._replace(**dict(zip(p._fields[:4], leaves[4 * i : 4 * i + 4], strict=True)))
            for i, p in enumerate(layers)
        ]
        start = x.to(dtype).requires_grad_()
        y = ops.mlp([start], own, backend=backend)
        return [y, *torch.autograd.grad(y.square().sum(), [start, *leaves])]

    @cache
    def pairs(draw: int) -> list[tuple[Tensor, Tensor]]:
        near = x + 0.01 * draw * torch.randn(rows, widths[0])
        each = (values(dtype, "reference", near) for dtype in (torch.float32, torch.float64))
        return list(zip(*each, strict=True))

    monkeypatch.setenv("PWM_FAST_GEMM", "native")
    for i, ours in enumerate(values(torch.float32, "native")):
        nearby = (pairs(draw)[i] for draw in range(1, 9))
        assert_2x(ours, *pairs(0)[i], f"tensor {i}", nearby)


def one_gemm() -> tuple[Builder, list[Tensor]]:
    b = Builder(_C.RowProgram)
    x, y = Operand(b.rows("x", 3)), Operand(b.rows("y", 2))
    b.gemm(y, x, Operand(b.weight("w", 2, 3)))
    return b, [torch.randn(4, 3), torch.full((4, 2), 7.0), torch.randn(2, 3)]


def test_errors_of_tensors() -> None:
    b, tensors = one_gemm()
    for index, wrong, message in (
        (0, torch.randn(5, 3), r"x must be \[4, 3\], got \[5, 3\]"),
        (0, torch.randn(4, 3).double(), "x must be float32, got float64"),
        (1, torch.randn(3, 4).t()[:, :2], "y must be a tensor whose last stride is 1"),
        (2, torch.randn(3, 2), r"w must be \[2, 3\], got \[3, 2\]"),
        (2, None, "w must be a tensor, got NoneType|w must be a tensor, got None"),
    ):
        given: list = [*tensors]
        given[index] = wrong
        with pytest.raises((ValueError, TypeError), match=message):
            run(b, given, 4)
        assert (tensors[1] == 7.0).all()
    with pytest.raises(ValueError, match="tensors must be 3, got 2"):
        run(b, tensors[:2], 4)
    with pytest.raises(ValueError, match="rows must be at least 0"):
        run(b, tensors, -1)


def test_errors_of_steps() -> None:
    def made(change: str) -> None:
        b = Builder(_C.RowProgram)
        x, y, w = b.rows("x", 3), b.rows("y", 2), b.weight("w", 2, 3)
        if change == "width":
            b.gemm(Operand(x), Operand(y), Operand(w))
        elif change == "plane":
            b.gemm(Operand(y), Operand(x, 1), Operand(w))
        elif change == "kind":
            b.combine(Operand(w), Operand(w))
        elif change == "slot":
            b.combine(Operand(17), None)
        elif change == "total":
            b.weight_grad(Operand(x), Operand(y), Operand(x))
        elif change == "gap":  # what kernels index without strides cannot be scratch memory
            scratch = {"hat": b.scratch("hat", 2), "rstd": b.scratch("rstd", 1)}
            spec = LayerSpec("norm_act", "mish", False, True, 8, 1e-5)
            b.norm_act(spec, Operand(y), Operand(y), LayerSlots(None, None, None, None), scratch)
        b.build()

    for change, message in (
        ("width", "operand 0 must be 2 wide, got 3"),
        ("plane", "x has no plane 1"),
        ("kind", "operand 0 is of the wrong kind"),
        ("slot", "there is no slot 17"),
        ("total", "a total must be a weight's or a vector's"),
        ("gap", "operand 2 is of the wrong kind"),
    ):
        with pytest.raises(ValueError, match=message):
            made(change)


def test_large_ensembles_are_no_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Members take turns in every block, so their weights leave the caches."""
    kernels = select.kernels("gemm", "native", "exact")
    spec = LayerSpec("norm_act", "none", bias=False, norm=False, group=8, eps=1e-5)
    one = torch.zeros(480, 500)
    few, many = torch.zeros(3, *one.shape), torch.zeros(5, *one.shape)
    assert few.numel() < MEMBERS < many.numel()
    for name, expected in (("auto", False), ("native", True), ("torch", False)):
        monkeypatch.setenv("PWM_FAST_GEMM", name)
        assert runs(kernels, [many], [spec], 256) is expected
        for weight, rows in ((few, 256), (one, 256), (many, FEW)):
            assert runs(kernels, [weight], [spec], rows) is (name != "torch")
