"""act_norm: the activation, then LayerNorm; one layer or an ensemble. Also how exact Mish is."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.native.harness import (
    _C,
    BATCHES,
    WIDTHS,
    Rows,
    Values,
    activate,
    check,
    parameters,
)

EPS = 1e-5
FP32, BF16 = torch.float32, torch.bfloat16


def inputs(rows: int, n: int, members: int = 1, absent: tuple[str, ...] = ()) -> Values:
    values = {
        "x": 2.0 * torch.randn(rows, n),
        "bias": torch.randn(members, n),
        "gamma": 1.0 + 0.3 * torch.randn(members, n),
        "beta": 0.3 * torch.randn(members, n),
        "dy": torch.randn(rows, n),
    }
    return {name: value for name, value in values.items() if name not in absent}


def by_row(parameter: Tensor, rows: int) -> Tensor:
    """[members, n] to [rows, n]."""
    return parameter.repeat_interleave(-(-rows // parameter.shape[0]) or 1, 0)[:rows]


def forward_reference(act: str):
    def reference(given: Values, dtype: torch.dtype) -> Values:
        rows, n = given["x"].shape
        u = given["x"]
        if "bias" in given:
            u = u + by_row(given["bias"], rows)
        m = activate(u, act, 1)
        if "gamma" not in given:
            return {"y": m, "u": u}
        y = F.layer_norm(m, (n,), eps=EPS) * by_row(given["gamma"], rows)
        if "beta" in given:
            y = y + by_row(given["beta"], rows)
        mean = m.mean(-1)
        rstd = ((m - mean[:, None]).square().mean(-1) + EPS).rsqrt()
        return {"y": y, "u": u, "mean": mean, "rstd": rstd}

    return reference


def forward(
    given: Values,
    act: str,
    *,
    types: tuple[torch.dtype, torch.dtype, torch.dtype] = (FP32, FP32, FP32),
    rows_per_member: int = 0,
    in_place: bool = False,
    save: bool = True,
    threads: int = 1,
) -> Values:
    """Run the kernel in poisoned memory; ``types`` of x, y and u."""
    rows, n = given["x"].shape
    x = Rows.of(given["x"], types[0])
    y, u = x if in_place else Rows(rows, n, types[1], 4), Rows(rows, n, types[2], 0)
    mean, rstd = Rows(rows, 1, gap=0), Rows(rows, 1, gap=0)
    saved = {"u": u.tensor, "mean": mean.tensor, "rstd": rstd.tensor} if save else {}
    _C.act_norm_fwd(
        x=x.tensor,
        y=y.tensor,
        **saved,
        **parameters(given, "bias", "gamma", "beta"),
        act=act,
        eps=EPS,
        rows_per_member=rows_per_member,
        threads=threads,
    )
    result = {"y": y.written()}
    if save:
        result["u"] = u.written()
    if save and "gamma" in given:
        result |= {"mean": mean.written()[:, 0], "rstd": rstd.written()[:, 0]}
    return result


def backward(
    given: Values,
    act: str,
    *,
    types: tuple[torch.dtype, torch.dtype, torch.dtype] = (FP32, FP32, FP32),
    rows_per_member: int = 0,
    in_place: bool = False,
    wanted: bool = True,
    threads: int = 1,
) -> Values:
    """Run the kernel on u, mean, rstd, gamma and dy; ``types`` of dy, u and dx."""
    rows, n = given["dy"].shape
    members = -(-rows // rows_per_member) if rows_per_member else 1
    dy, u = Rows.of(given["dy"], types[0]), Rows.of(given["u"], types[1], 0)
    dx = dy if in_place else Rows(rows, n, types[2], 5)
    names = ("dgamma", "dbeta", "dbias") if wanted else ()
    before = {name: torch.randn(members, n, dtype=torch.float64) for name in names}
    sums = {name: Rows.of(value, torch.float64, 0) for name, value in before.items()}
    _C.act_norm_bwd(
        dy=dy.tensor,
        dx=dx.tensor,
        u=u.tensor,
        **parameters(given, "mean", "rstd", "gamma"),
        act=act,
        rows_per_member=rows_per_member,
        **{name: each.tensor for name, each in sums.items()},
        threads=threads,
    )
    return {"dx": dx.written()} | {name: sums[name].written() - before[name] for name in names}


def backward_reference(act: str, members: int = 1):
    def reference(given: Values, dtype: torch.dtype) -> Values:
        dy, u = given["dy"], given["u"].clone().requires_grad_()
        rows, n = dy.shape
        m = activate(u, act, 1)

        def sums(values: Tensor) -> Tensor:
            return values.view(members, -1, n).sum(1) if rows else values.new_zeros(members, n)

        if "gamma" not in given:
            (dx,) = torch.autograd.grad(m, u, dy)
            zero = torch.zeros(members, n, dtype=dtype)
            return {"dx": dx, "dgamma": zero, "dbeta": zero, "dbias": sums(dx)}
        xhat = (m.detach() - given["mean"][:, None]) * given["rstd"][:, None]
        g = dy * by_row(given["gamma"], rows)
        dm = given["rstd"][:, None] * (
            g - g.mean(-1, keepdim=True) - xhat * (g * xhat).mean(-1, keepdim=True)
        )
        (dx,) = torch.autograd.grad(m, u, dm)
        return {"dx": dx, "dgamma": sums(dy * xhat), "dbeta": sums(dy), "dbias": sums(dx)}

    return reference


def backward_inputs(rows: int, n: int, members: int = 1, norm: bool = True) -> Values:
    values = {"dy": torch.randn(rows, n), "u": 2.0 * torch.randn(rows, n)}
    if norm:
        values["gamma"] = 1.0 + 0.3 * torch.randn(members, n)
        values["mean"], values["rstd"] = torch.randn(rows), 0.1 + torch.rand(rows)
    return values


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("act", ["none", "mish"])
@pytest.mark.parametrize("rows", BATCHES)
@pytest.mark.parametrize("n", WIDTHS)
def test_forward(n: int, rows: int, act: str, norm: bool) -> None:
    given = inputs(rows, n, absent=() if norm else ("gamma", "beta"))
    floors = {"mean": 2e-7} if rows == 1 < n else {}  # one sum of n terms of order 1
    check(forward(given, act), forward_reference(act), given, f"{act} {rows}x{n}", floors)


@pytest.mark.parametrize("absent", [("bias",), ("beta",), ("bias", "beta", "gamma")])
def test_forward_without(absent: tuple[str, ...]) -> None:
    given = inputs(6, 61, absent=absent)
    check(forward(given, "mish"), forward_reference("mish"), given, f"without {absent}")
    check(forward(given, "mish", save=False), forward_reference("mish"), given, "y alone")


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("rows", [3, 6, 111])
def test_ensemble(rows: int, norm: bool) -> None:
    """Members of 1, 2 and 37 rows: the last of these do not fill the blocks of the sums."""
    members = 3
    given = inputs(rows, 61, members, absent=() if norm else ("gamma", "beta"))
    ours = forward(given, "mish", rows_per_member=rows // members)
    check(ours, forward_reference("mish"), given, f"{rows} rows")
    given = backward_inputs(rows, 61, members, norm)
    ours = backward(given, "mish", rows_per_member=rows // members)
    check(ours, backward_reference("mish", members), given, f"{rows} rows, backward")


def test_ensemble_is_its_members() -> None:
    given = inputs(10, 33, members=2)
    whole = forward(given, "mish", rows_per_member=5)["y"]
    for member in range(2):
        part = {k: v[5 * member : 5 * member + 5] for k, v in given.items() if v.shape[0] == 10}
        part |= {k: v[member : member + 1] for k, v in given.items() if v.shape[0] == 2}
        assert torch.equal(forward(part, "mish")["y"], whole[5 * member : 5 * member + 5])


@pytest.mark.parametrize("x_type", [FP32, BF16])
@pytest.mark.parametrize("y_type", [FP32, BF16])
@pytest.mark.parametrize("u_type", [FP32, BF16])
@pytest.mark.parametrize("norm", [True, False])
def test_forward_types(x_type, y_type, u_type, norm: bool) -> None:
    given = inputs(9, 777, absent=() if norm else ("gamma", "beta"))
    given["x"] = given["x"].to(x_type).float()
    ours = forward(given, "mish", types=(x_type, y_type, u_type))
    assert (ours["y"].dtype, ours["u"].dtype) == (y_type, u_type)
    check(ours, forward_reference("mish"), given, f"{x_type} {y_type} {u_type}")


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("act", ["none", "mish"])
@pytest.mark.parametrize("rows", BATCHES)
@pytest.mark.parametrize("n", WIDTHS)
def test_backward(n: int, rows: int, act: str, norm: bool) -> None:
    given = backward_inputs(rows, n, norm=norm)
    check(backward(given, act), backward_reference(act), given, f"{act} {rows}x{n}")


@pytest.mark.parametrize("dy_type", [FP32, BF16])
@pytest.mark.parametrize("u_type", [FP32, BF16])
@pytest.mark.parametrize("dx_type", [FP32, BF16])
@pytest.mark.parametrize("norm", [True, False])
def test_backward_types(dy_type, u_type, dx_type, norm: bool) -> None:
    given = backward_inputs(9, 777, norm=norm)
    given["dy"], given["u"] = given["dy"].to(dy_type).float(), given["u"].to(u_type).float()
    ours = backward(given, "mish", types=(dy_type, u_type, dx_type))
    check(ours, backward_reference("mish"), given, f"{dy_type} {u_type} {dx_type}")


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("act", ["none", "mish"])
def test_in_place(act: str, norm: bool) -> None:
    given = inputs(5, 61, absent=() if norm else ("gamma", "beta"))
    assert torch.equal(forward(given, act, in_place=True)["y"], forward(given, act)["y"])
    given = backward_inputs(5, 61, norm=norm)
    assert torch.equal(backward(given, act, in_place=True)["dx"], backward(given, act)["dx"])
    check(backward(given, act, wanted=False), backward_reference(act), given, "dx alone")


@pytest.mark.parametrize("act", ["none", "mish"])
def test_both_ways_are_the_gradient(act: str) -> None:
    """From x through the saved tensors to dx and the parameters, against autograd."""
    given = inputs(66, 64, members=2)

    def reference(values: Values, dtype: torch.dtype) -> Values:
        leaves = {k: v.clone().requires_grad_() for k, v in values.items() if k != "dy"}
        y = forward_reference(act)(leaves, dtype)["y"]
        names = ("x", "gamma", "beta", "bias")
        grads = torch.autograd.grad(y, [leaves[name] for name in names], values["dy"])
        return {f"d{name}": grad for name, grad in zip(names, grads, strict=True)}

    saved = forward(given, act, rows_per_member=33) | {
        name: given[name] for name in ("dy", "gamma")
    }
    check(backward(saved, act, rows_per_member=33), reference, given, act)


# -------------------------------------------------------------------------------------- Mish


def mish(u: Tensor) -> tuple[Tensor, Tensor]:
    """Value and slope by the kernels."""
    given = {"x": u.view(1, -1), "u": u.view(1, -1), "dy": torch.ones(1, u.numel())}
    return forward(given, "mish", save=False)["y"][0], backward(given, "mish", wanted=False)["dx"][
        0
    ]


def exact_mish(u: Tensor) -> tuple[Tensor, Tensor]:
    """In fp64; with e = exp(-|u|) neither overflows nor cancels."""
    u = u.double()
    e = torch.exp(-u.abs())
    top = torch.where(u < 0, e * e + 2 * e, 1 + 2 * e)
    rest = torch.where(u < 0, torch.full_like(e, 2.0), 2 * e * e)
    t = top / (top + rest)
    slope = t + u * torch.sigmoid(u) * (rest * (2 * top + rest)) / (top + rest).square()
    return u * t, slope


def test_mish_is_exact_to_a_few_ulp() -> None:
    u = torch.cat([torch.linspace(-87.0, 20.0, 400_001), torch.logspace(0, 4, 100_001)])
    (value, slope), (exact, exact_slope) = mish(u), exact_mish(u)
    assert ((value.double() - exact).abs() / exact.abs().clamp_min(1e-300)).max() < 3e-7
    # The slope is 0 near -1.19; there the error is relative to its terms, which are about 0.2.
    error = (slope.double() - exact_slope).abs()
    assert (error / (exact_slope.abs() + 0.2 * (u > -10))).max() < 4e-7


def test_mish_far_below_zero_is_exact_to_subnormals() -> None:
    u = torch.linspace(-130.0, -87.0, 50_001)
    value, slope = mish(u)
    exact, exact_slope = exact_mish(u)
    assert (value.double() - exact).abs().max() < 2e-43  # 130 units of the smallest subnormal
    assert (slope.double() - exact_slope).abs().max() < 2e-43


def test_mish_of_special_values() -> None:
    u = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 3e38, -3e38, 1e-40])
    value, slope = mish(u)
    torch.testing.assert_close(value, F.mish(u), rtol=1e-5, atol=0.0, equal_nan=True)
    # The limits, where PyTorch's formula gives NaN at the infinities.
    limits = torch.tensor([float("nan"), 1.0, 0.0, 0.6, 0.6, 1.0, 0.0, 0.6])
    torch.testing.assert_close(slope, limits, rtol=1e-6, atol=0.0, equal_nan=True)


def test_mish_of_the_rest_of_a_row() -> None:
    """Every position of a vector, in rows of every length."""
    u = torch.randn(61) * 5
    expected = mish(u)
    for n in range(1, 61):
        for part, whole in zip(mish(u[:n].clone()), expected, strict=True):
            torch.testing.assert_close(part, whole[:n], rtol=1e-6, atol=1e-7)
