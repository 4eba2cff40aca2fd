"""norm_act: LayerNorm, then the activation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.native.harness import (
    _C,
    ACTS,
    BATCHES,
    WIDTHS,
    Rows,
    Values,
    activate,
    check,
    group_of,
    parameters,
)

EPS = 1e-5
OPTIONAL = ("add", "tau", "w_tau", "bias", "gamma", "beta")
FP32, BF16 = torch.float32, torch.bfloat16


def inputs(rows: int, n: int, absent: tuple[str, ...] = (), add_rows: int = 5) -> Values:
    values = {
        "x": 2.0 * torch.randn(rows, n) + 0.5,
        "add": torch.randn(add_rows, n),
        "tau": torch.rand(rows),
        "w_tau": torch.randn(n),
        "bias": torch.randn(n),
        "gamma": 1.0 + 0.3 * torch.randn(n),
        "beta": 0.3 * torch.randn(n),
    }
    return {name: value for name, value in values.items() if name not in absent}


def forward_reference(act: str, group: int):
    def reference(given: Values, dtype: torch.dtype) -> Values:
        v = given["x"]
        rows, n = v.shape
        if "bias" in given:
            v = v + given["bias"]
        if "add" in given:
            v = v + given["add"][torch.arange(rows) % given["add"].shape[0]]
        if "tau" in given:
            v = v + given["tau"].expand(rows)[:, None] * given["w_tau"]
        xhat = F.layer_norm(v, (n,), eps=EPS)
        u = xhat * given["gamma"] if "gamma" in given else xhat
        u = u + given["beta"] if "beta" in given else u
        rstd = ((v - v.mean(-1, keepdim=True)).square().mean(-1) + EPS).rsqrt()
        return {"y": activate(u, act, group), "xhat": xhat, "rstd": rstd}

    return reference


def forward(
    given: Values,
    act: str,
    group: int,
    *,
    types: tuple[torch.dtype, torch.dtype, torch.dtype] = (FP32, FP32, FP32),
    gap: int = 3,
    save: bool = True,
    threads: int = 1,
) -> Values:
    """Run the kernel in poisoned memory; ``types`` of x, y and xhat."""
    rows, n = given["x"].shape
    x = Rows.of(given["x"], types[0], gap)
    y, xhat = Rows(rows, n, types[1], gap), Rows(rows, n, types[2], 0)
    rstd = Rows(rows, 1, gap=0)
    add = Rows.of(given["add"], gap=2) if "add" in given else None
    _C.norm_act_fwd(
        x=x.tensor,
        y=y.tensor,
        xhat=xhat.tensor if save else None,
        rstd=rstd.tensor if save else None,
        add=add.tensor if add else None,
        **parameters(given, "tau", "w_tau", "bias", "gamma", "beta"),
        act=act,
        group=group,
        eps=EPS,
        threads=threads,
    )
    result = {"y": y.written()}
    if save:
        result |= {"xhat": xhat.written(), "rstd": rstd.written()[:, 0]}
    return result


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("rows", BATCHES)
@pytest.mark.parametrize("n", WIDTHS)
def test_forward(n: int, rows: int, act: str) -> None:
    given, group = inputs(rows, n), group_of(n)
    ours = forward(given, act, group)
    if n == 1 and rows:
        # v - mean is 0 or a rounding error of v, which 1/sqrt(eps) multiplies.
        assert (ours["rstd"] - EPS**-0.5).abs().max() < 1e-3
        assert torch.equal(ours["xhat"], torch.zeros(rows, 1))
    check(ours, forward_reference(act, group), given, f"{act} {rows}x{n}")


@pytest.mark.parametrize("absent", [*((name,) for name in OPTIONAL), OPTIONAL])
@pytest.mark.parametrize("n", [7, 617])
def test_forward_without(n: int, absent: tuple[str, ...]) -> None:
    if set(absent) & {"tau", "w_tau"}:
        absent = (*absent, "tau", "w_tau")
    given = inputs(6, n, absent)
    reference = forward_reference("mish", 1)
    check(forward(given, "mish", 1), reference, given, f"without {absent}")
    check(forward(given, "mish", 1, save=False), reference, given, "y alone")


def test_forward_with_one_tau() -> None:
    given = inputs(6, 33)
    given["tau"] = given["tau"][:1]
    check(forward(given, "mish", 1), forward_reference("mish", 1), given, "one tau")


@pytest.mark.parametrize("x_type", [FP32, BF16])
@pytest.mark.parametrize("y_type", [FP32, BF16])
@pytest.mark.parametrize("xhat_type", [FP32, BF16])
@pytest.mark.parametrize("act", ACTS)
def test_forward_types(x_type, y_type, xhat_type, act: str) -> None:
    given = inputs(9, 777)
    given["x"] = given["x"].to(x_type).float()
    ours = forward(given, act, 7, types=(x_type, y_type, xhat_type))
    assert (ours["y"].dtype, ours["xhat"].dtype) == (y_type, xhat_type)
    check(ours, forward_reference(act, 7), given, f"{act} {x_type} {y_type} {xhat_type}")


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("act", ACTS)
def test_forward_in_place(act: str, dtype: torch.dtype) -> None:
    given = inputs(5, 70, ("add", "tau", "w_tau"))
    apart = forward(given, act, 7, types=(dtype, dtype, FP32), save=False)["y"]
    x = Rows.of(given["x"], dtype)
    affine = parameters(given, "bias", "gamma", "beta")
    _C.norm_act_fwd(x=x.tensor, y=x.tensor, **affine, act=act, group=7, eps=EPS, threads=1)
    assert torch.equal(x.written(), apart)


def test_nan_stays_in_its_row() -> None:
    given = inputs(3, 37)
    for dtype in (FP32, BF16):
        given["x"][1, 36] = 0.0
        clean = forward(given, "mish", 1, types=(FP32, dtype, FP32))["y"]
        for bad in (float("nan"), float("inf")):
            given["x"][1, 36] = bad
            y = forward(given, "mish", 1, types=(FP32, dtype, FP32))["y"]
            assert y[1].isnan().all()
            assert torch.equal(y[[0, 2]], clean[[0, 2]])


def test_wide_rows() -> None:
    given = inputs(2, 40_001)
    check(forward(given, "mish", 1), forward_reference("mish", 1), given, "wide")


def test_far_mean() -> None:
    """Two passes: E v^2 - (E v)^2 would have no correct digit here."""
    given = inputs(4, 510, OPTIONAL)
    given["x"] = given["x"] + 3000.0
    check(forward(given, "none", 1), forward_reference("none", 1), given, "far mean")


# ---------------------------------------------------------------------------------- backward


def backward_inputs(rows: int, n: int, act: str, group: int) -> Values:
    gamma, beta = 1.0 + 0.3 * torch.randn(n), 0.3 * torch.randn(n)
    values = {
        "dy": torch.randn(rows, n),
        "xhat": torch.randn(rows, n),
        "rstd": 0.1 + torch.rand(rows),
        "gamma": gamma,
        "beta": beta,
    }
    if act == "simnorm":
        values["y"] = activate(values["xhat"], act, group)
    return values


def backward_reference(act: str, group: int):
    def reference(given: Values, dtype: torch.dtype) -> Values:
        dy, xhat = given["dy"], given["xhat"]
        n = dy.shape[-1]
        gamma = given.get("gamma", torch.ones(n, dtype=dtype))
        if act == "simnorm":
            y = given["y"]
            dots = (dy * y).unflatten(-1, (-1, group)).sum(-1)
            du = y * (dy - dots.repeat_interleave(group, -1))
        else:
            u = (gamma * xhat + given.get("beta", torch.zeros(n, dtype=dtype))).requires_grad_()
            (du,) = torch.autograd.grad(activate(u, act, group), u, dy)
        g = gamma * du
        dx = given["rstd"][:, None] * (
            g - g.mean(-1, keepdim=True) - xhat * (g * xhat).mean(-1, keepdim=True)
        )
        return {
            "dx": dx,
            "dgamma": (du * xhat).sum(0),
            "dbeta": du.sum(0),
            "dbias": dx.sum(0),
        }

    return reference


def backward(
    given: Values,
    act: str,
    group: int,
    *,
    types: tuple[torch.dtype, ...] = (FP32, FP32, FP32, FP32),
    wanted: tuple[str, ...] = ("dgamma", "dbeta", "dbias"),
    in_place: bool = False,
    threads: int = 1,
) -> Values:
    """Run the kernel; ``types`` of dy, xhat, y and dx."""
    rows, n = given["dy"].shape
    dy = Rows.of(given["dy"], types[0])
    xhat = Rows.of(given["xhat"], types[1], 0)
    y = Rows.of(given["y"], types[2], 1) if "y" in given else None
    dx = dy if in_place else Rows(rows, n, types[3], 5)
    before = {name: torch.randn(1, n, dtype=torch.float64) for name in wanted}
    sums = {name: Rows.of(value, torch.float64, 0) for name, value in before.items()}
    _C.norm_act_bwd(
        dy=dy.tensor,
        dx=dx.tensor,
        xhat=xhat.tensor,
        **parameters(given, "rstd", "gamma", "beta"),
        y=y.tensor if y else None,
        act=act,
        group=group,
        **{name: rows.tensor for name, rows in sums.items()},
        threads=threads,
    )
    added = {name: (sums[name].written() - before[name])[0] for name in wanted}
    return {"dx": dx.written(), **added}


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("rows", BATCHES)
@pytest.mark.parametrize("n", WIDTHS)
def test_backward(n: int, rows: int, act: str) -> None:
    group = group_of(n)
    given = backward_inputs(rows, n, act, group)
    check(backward(given, act, group), backward_reference(act, group), given, f"{act} {rows}x{n}")


@pytest.mark.parametrize("absent", [("gamma",), ("beta",), ("gamma", "beta")])
def test_backward_without(absent: tuple[str, ...]) -> None:
    given = backward_inputs(6, 61, "mish", 1)
    given = {name: value for name, value in given.items() if name not in absent}
    check(backward(given, "mish", 1), backward_reference("mish", 1), given, f"without {absent}")


@pytest.mark.parametrize("wanted", [(), ("dgamma",), ("dbeta",), ("dbias",)])
def test_backward_of_some(wanted: tuple[str, ...]) -> None:
    given = backward_inputs(40, 61, "mish", 1)
    ours = backward(given, "mish", 1, wanted=wanted)
    check(ours, backward_reference("mish", 1), given, f"only {wanted}")


@pytest.mark.parametrize("types", [(BF16, FP32, FP32, FP32), (FP32, BF16, FP32, FP32)])
@pytest.mark.parametrize("outer", [FP32, BF16])
@pytest.mark.parametrize("act", ACTS)
def test_backward_types(types: tuple[torch.dtype, ...], outer: torch.dtype, act: str) -> None:
    types = (types[0], types[1], outer, outer)
    given = backward_inputs(9, 777, act, 7)
    for name, dtype in zip(("dy", "xhat", "y"), types, strict=False):
        if name in given:
            given[name] = given[name].to(dtype).float()
    check(backward(given, act, 7, types=types), backward_reference(act, 7), given, f"{act} {types}")


@pytest.mark.parametrize("act", ACTS)
def test_backward_in_place(act: str) -> None:
    given = backward_inputs(5, 70, act, 7)
    together, apart = backward(given, act, 7, in_place=True), backward(given, act, 7)
    assert torch.equal(together["dx"], apart["dx"])


@pytest.mark.parametrize("act", ACTS)
def test_both_ways_are_the_gradient(act: str) -> None:
    """From x through the saved tensors to dx and the parameters, against autograd."""
    given = inputs(33, 64) | {"dy": torch.randn(33, 64)}

    def reference(values: Values, dtype: torch.dtype) -> Values:
        leaves = {k: v.clone().requires_grad_() for k, v in values.items() if k != "dy"}
        y = forward_reference(act, 8)(leaves, dtype)["y"]
        names = ("x", "gamma", "beta", "bias")
        grads = torch.autograd.grad(y, [leaves[name] for name in names], values["dy"])
        return {f"d{name}": grad for name, grad in zip(names, grads, strict=True)}

    saved = forward(given, act, 8)
    if act != "simnorm":
        del saved["y"]
    names = ("dy", "gamma", "beta")
    ours: dict[str, Tensor] = backward(saved | {name: given[name] for name in names}, act, 8)
    check(ours, reference, given, act)
