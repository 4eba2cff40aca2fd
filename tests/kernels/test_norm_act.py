"""norm_act against float64, forward and backward, in poisoned memory."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from pwm_fast.kernels import norm_act
from tests.kernels.harness import (
    DEVICES,
    WIDE,
    Rows,
    Values,
    activate,
    assert_row_scales,
    check,
    pullback,
)

FP16, FP32, FP64 = torch.float16, torch.float32, torch.float64
EPS = 1e-5
SHAPES = [(1, 1), (5, 7), (9, 40), *WIDE]
LARGE = [(199, 510), (130, 777), (77, 1788), (33, 4096), (5, 8192)]
pytestmark = pytest.mark.parametrize("device", DEVICES)


def shapes(device: str) -> list[tuple[int, int]]:
    return SHAPES if device == "cpu" else SHAPES + LARGE


def centre(x: torch.Tensor, width: int) -> torch.Tensor:
    """Mean 0 over the first ``width`` features, 0 beyond."""
    x = x.clone()
    x[..., :width] -= x[..., :width].mean(-1, keepdim=True)
    x[..., width:] = 0.0
    return x


def forward_reference(act: str, group: int, width: int):
    def reference(i: Values, dtype: torch.dtype) -> Values:
        v = i["x"]
        rows, n = v.shape
        if "bias" in i:
            v = v + i["bias"]
        if "add" in i:
            v = v + i["add"][torch.arange(rows) % i["add"].shape[0]]
        if "tau" in i:
            v = v + i["tau"].expand(rows)[:, None] * i["w_tau"]
        if not width:
            v = v - v.mean(-1, keepdim=True)
        rstd = 1.0 / (v.square().sum(-1) / (width or n) + EPS).sqrt()
        xhat = v * rstd[:, None]
        return {"xhat": xhat, "rstd": rstd} | {
            "y": activate(xhat * i["gamma"] + i["beta"], act, group)
        }

    return reference


def forward(
    i: Values, device: str, act: str, group: int, width: int, dtype: torch.dtype, save: bool
) -> Values:
    rows, n = i["x"].shape
    there = {k: v.to(device) for k, v in i.items() if k != "x"}
    x = Rows.of(i["x"], FP32, device, 3)
    y, xhat = Rows(rows, n, dtype, device, 5), Rows(rows, n, dtype, device, 2)
    rstd = Rows(1, rows, FP32, device)
    norm_act.norm_act_fwd(
        x.tensor,
        y.tensor,
        xhat.tensor if save else None,
        rstd.tensor[0] if save else None,
        act=act,
        group=group,
        eps=EPS,
        width=width,
        **there,
    )
    out = {"y": y.written()}
    return out | {"xhat": xhat.written(), "rstd": rstd.written()[0]} if save else out


@pytest.mark.parametrize(
    "given", ["", "bias", "add tau w_tau", "bias add tau w_tau", "add tau1 w_tau"]
)
def test_forward_addends(device: str, given: str) -> None:
    for rows, n in shapes(device):
        i = {
            "x": 2.0 * torch.randn(rows, n) + 0.5,
            "gamma": 1.0 + 0.3 * torch.randn(n),
            "beta": 0.3 * torch.randn(n),
            "bias": torch.randn(n),
            "add": torch.randn(max(1, rows // 2), n),
            "tau": torch.rand(1 if "tau1" in given else rows),
            "w_tau": torch.randn(n),
        }
        optional = ("bias", "add", "tau", "w_tau")
        i = {k: v for k, v in i.items() if k not in optional or k in given}
        ours = forward(i, device, "mish", 1, 0, FP32, save=True)
        check(ours, forward_reference("mish", 1, 0), i, f"{rows} x {n}")


@pytest.mark.parametrize("act", ["none", "mish", "simnorm"])
@pytest.mark.parametrize("dtype", [FP32, FP16], ids=str)
def test_forward_activations(device: str, act: str, dtype: torch.dtype) -> None:
    for rows, n in [(9, 8), (3, 72), (2, 1376)] + ([(199, 512)] if device == "cuda" else []):
        i = {
            "x": torch.randn(rows, n),
            "gamma": 1.0 + 0.3 * torch.randn(n),
            "beta": 0.3 * torch.randn(n),
        }
        ours = forward(i, device, act, 8, 0, dtype, save=False)
        check(ours, forward_reference(act, 8, 0), i, f"{rows} x {n}")


@pytest.mark.parametrize("dtype", [FP32, FP16], ids=str)
def test_forward_centred(device: str, dtype: torch.dtype) -> None:
    for rows, n, width in [(9, 64, 61), (3, 128, 128), (2, 576, 510)]:
        padded = torch.arange(n) < width
        i = {
            "x": centre(torch.randn(rows, n), width),
            "bias": centre(torch.randn(n), width),
            "gamma": (1.0 + 0.3 * torch.randn(n)) * padded,
            "beta": 0.3 * torch.randn(n) * padded,
        }
        ours = forward(i, device, "mish", 1, width, dtype, save=True)
        check(ours, forward_reference("mish", 1, width), i, f"{rows} x {n}")
        assert (ours["y"][:, width:] == 0).all()


def test_forward_extremes(device: str) -> None:
    """fp16 overflows to infinity, NaN stays in its row, Mish neither overflows nor underflows."""
    x = torch.randn(3, 16)
    x[1, 4] = float("nan")
    i = {"x": x, "gamma": torch.full((16,), 1e6), "beta": torch.zeros(16)}
    y = Rows(3, 16, FP16, device)
    norm_act.norm_act_fwd(
        x.to(device),
        y.tensor,
        None,
        None,
        gamma=i["gamma"].to(device),
        beta=i["beta"].to(device),
        act="mish",
        group=1,
        eps=EPS,
    )
    out = y.written()
    assert out[1].isnan().all()
    assert not out[[0, 2]].isnan().any()
    assert out[0].max() == float("inf")
    assert (out[0][x[0] < x[0].mean()] == 0).all()


def backward_reference(act: str, group: int, width: int):
    def reference(i: Values, dtype: torch.dtype) -> Values:
        dy, xhat = i["dy"], i["xhat"]
        if "dy_scale" in i:
            dy = dy * i["dy_scale"][:, None]
        u = xhat * i["gamma"] + i["beta"]
        du = pullback(lambda u: activate(u, act, group), u, dy)
        g = du * i["gamma"]
        inner = (g * xhat).sum(-1, keepdim=True) / (width or dy.shape[1])
        if not width:
            g = g - g.mean(-1, keepdim=True)
        dx = (g - xhat * inner) * i["rstd"][:, None]
        return {
            "dx": dx,
            "dgamma": (du * xhat).sum(0),
            "dbeta": du.sum(0),
            "dbias": dx.sum(0),
        }

    return reference


def backward(
    i: Values,
    device: str,
    act: str,
    group: int,
    width: int,
    dtype: torch.dtype,
    sums: str,
    scaled: bool,
    start: float = 0.0,
) -> Values:
    rows, n = i["dy"].shape
    there = {k: v.to(device) for k, v in i.items()}
    dx, scale = Rows(rows, n, dtype, device, 4), Rows(1, rows, FP32, device)
    totals = {name: Rows.of(torch.full((1, n), start), FP64, device) for name in sums.split()}
    norm_act.norm_act_bwd(
        Rows.of(i["dy"], i["dy"].dtype, device, 1).tensor,
        dx.tensor,
        Rows.of(i["xhat"], i["xhat"].dtype, device, 3).tensor,
        there["rstd"],
        gamma=there["gamma"],
        beta=there["beta"],
        y=there.get("y"),
        act=act,
        group=group,
        width=width,
        dy_scale=there.get("dy_scale"),
        dx_scale=scale.tensor[0] if scaled else None,
        **{name: total.tensor[0] for name, total in totals.items()},
    )
    out = {"dx": dx.written()} | {name: t.written()[0] - start for name, t in totals.items()}
    return out | {"dx_scale": scale.written()[0]} if scaled else out


def backward_inputs(rows: int, n: int, act: str, dtype: torch.dtype) -> Values:
    xhat = torch.randn(rows, n)
    gamma, beta = 1.0 + 0.3 * torch.randn(n), 0.3 * torch.randn(n)
    i = {
        "dy": torch.randn(rows, n).to(dtype),
        "xhat": xhat.to(dtype),
        "rstd": 0.5 + torch.rand(rows),
        "gamma": gamma,
        "beta": beta,
    }
    if act == "simnorm":
        i["y"] = activate(i["xhat"].float() * gamma + beta, act, 8)
    return i


SUMS = "dgamma dbeta dbias"


@pytest.mark.parametrize("sums", ["", "dgamma dbeta", SUMS, "dbeta", "dbias"])
def test_backward_sums(device: str, sums: str) -> None:
    """Sums are added to what is there, and take no row twice."""
    more = [(140, 3)] if device == "cpu" else [(5000, 33)]
    for rows, n in shapes(device) + more:
        i = backward_inputs(rows, n, "mish", FP32)
        ours = backward(i, device, "mish", 1, 0, FP32, sums, scaled=False, start=0.25)
        check(ours, backward_reference("mish", 1, 0), i, f"{rows} x {n}")


@pytest.mark.parametrize("act", ["none", "mish", "simnorm"])
@pytest.mark.parametrize("dtype", [FP32, FP16], ids=str)
def test_backward_activations(device: str, act: str, dtype: torch.dtype) -> None:
    for rows, n in [(9, 8), (3, 72), (2, 1376)] + ([(199, 512)] if device == "cuda" else []):
        i = backward_inputs(rows, n, act, dtype)
        ours = backward(i, device, act, 8, 0, dtype, SUMS, scaled=False)
        check(ours, backward_reference(act, 8, 0), i, f"{rows} x {n}")


@pytest.mark.parametrize("centred", [False, True])
def test_backward_scales(device: str, centred: bool) -> None:
    """Gradients far below fp16's range keep their accuracy; a row of zeros has scale 1."""
    rows, n, width = 6, 64, 61 if centred else 0
    i = backward_inputs(rows, n, "mish", FP16)
    if centred:
        for name in ("gamma", "beta", "xhat"):
            i[name][..., width:] = 0.0
    i["dy"] = (i["dy"] / 4.0).half()
    i["dy"][2] = 0.0
    i["dy_scale"] = 2.0 ** torch.tensor([0.0, -20.0, 3.0, -40.0, 10.0, -100.0])
    ours = backward(i, device, "mish", 1, width, FP16, SUMS, scaled=True)
    scale = ours.pop("dx_scale")
    reference = backward_reference("mish", 1, width)
    true = reference({k: v.double() for k, v in i.items()}, FP64)["dx"]
    assert_row_scales(ours["dx"], scale, true)
    check(
        {"dx": ours["dx"]},
        lambda i, dtype: {"dx": reference(i, dtype)["dx"] / scale.to(dtype)[:, None]},
        i,
        "scaled",
    )
    del ours["dx"]
    check(ours, reference, i, "sums")


def test_backward_in_place(device: str) -> None:
    """``dx`` may be ``dy``."""
    i = {k: v.to(device) for k, v in backward_inputs(5, 40, "mish", FP32).items()}
    out = torch.empty(5, 40, device=device)
    rest = {"gamma": i["gamma"], "beta": i["beta"], "y": None, "act": "mish", "group": 1}
    norm_act.norm_act_bwd(i["dy"], out, i["xhat"], i["rstd"], **rest)
    norm_act.norm_act_bwd(i["dy"], i["dy"], i["xhat"], i["rstd"], **rest)
    assert torch.equal(i["dy"], out)


def test_repeats_to_the_bit(device: str) -> None:
    rows, n = (5000, 777) if device == "cuda" else (9, 7)
    i = backward_inputs(rows, n, "mish", FP32)
    first = backward(i, device, "mish", 1, 0, FP32, SUMS, scaled=False)
    for _ in range(20 if device == "cuda" else 1):
        again = backward(i, device, "mish", 1, 0, FP32, SUMS, scaled=False)
        assert all(torch.equal(again[k], first[k]) for k in first)


def test_too_wide_a_row(device: str) -> None:
    x = torch.zeros(1, 10000, device=device)
    vector = torch.ones(10000, device=device)
    with pytest.raises(ValueError, match="10000"):
        norm_act.norm_act_fwd(
            x, x, None, None, gamma=vector, beta=vector, act="none", group=1, eps=EPS
        )
