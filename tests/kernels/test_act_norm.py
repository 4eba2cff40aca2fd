"""act_norm against float64, forward and backward, with and without LayerNorm, and of ensembles."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from pwm_fast.kernels import act_norm
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
# Rows, features, rows of a member.
SHAPES = [(1, 1, 0), (5, 7, 0), (6, 33, 3), (4, 777, 2), *((*shape, 0) for shape in WIDE)]
LARGE = [(199, 510, 0), (130, 777, 65), (7, 4096, 0), (2000, 33, 1000)]
SUMS = ("dgamma", "dbeta", "dbias")
pytestmark = pytest.mark.parametrize("device", DEVICES)


def shapes(device: str) -> list[tuple[int, int, int]]:
    return SHAPES if device == "cpu" else SHAPES + LARGE


def vectors(rows: int, n: int, members: int) -> Values:
    lead = (rows // members,) if members else ()
    return {
        "bias": torch.randn(*lead, n),
        "gamma": 1.0 + 0.3 * torch.randn(*lead, n),
        "beta": 0.3 * torch.randn(*lead, n),
    }


def by_row(x: Tensor, members: int) -> Tensor:
    return x.repeat_interleave(members, 0) if members else x


def norm(m: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    mean = m.mean(-1)
    rstd = 1.0 / ((m - mean[:, None]).square().mean(-1) + EPS).sqrt()
    return (m - mean[:, None]) * rstd[:, None], mean, rstd


@pytest.mark.parametrize("act", ["none", "mish"])
@pytest.mark.parametrize("given", ["bias", "gamma beta", "bias gamma beta"])
@pytest.mark.parametrize("dtype", [FP32, FP16], ids=str)
def test_forward(device: str, act: str, given: str, dtype: torch.dtype) -> None:
    def reference(i: Values, wide: torch.dtype) -> Values:
        u = i["x"] + by_row(i["bias"], members) if "bias" in i else i["x"]
        m = activate(u, act, 1)
        xhat, mean, rstd = norm(m)
        if "gamma" in i:
            m = xhat * by_row(i["gamma"], members) + by_row(i["beta"], members)
        return {"y": m, "u": u, "mean": mean, "rstd": rstd}

    for rows, n, members in shapes(device):
        i = {k: v for k, v in vectors(rows, n, members).items() if k in given.split()}
        i["x"] = 2.0 * torch.randn(rows, n) + 0.5
        there = {k: v.to(device) for k, v in i.items() if k != "x"}
        y, u = Rows(rows, n, dtype, device, 3), Rows(rows, n, dtype, device, 1)
        mean, rstd = (Rows(1, rows, FP32, device) for _ in range(2))
        act_norm.act_norm_fwd(
            Rows.of(i["x"], FP32, device, 2).tensor,
            y.tensor,
            u.tensor,
            mean.tensor[0],
            rstd.tensor[0],
            bias=there.get("bias"),
            gamma=there.get("gamma"),
            beta=there.get("beta"),
            act=act,
            eps=EPS,
            rows_per_member=members,
        )
        ours = {"y": y.written(), "u": u.written()}
        if "gamma" in i:
            ours |= {"mean": mean.written()[0], "rstd": rstd.written()[0]}
        check(ours, reference, i, f"{rows} x {n}")


def backward_reference(act: str, members: int):
    def reference(i: Values, wide: torch.dtype) -> Values:
        dy = i["dy"] * i["dy_scale"][:, None] if "dy_scale" in i else i["dy"]
        out, dm = {}, dy

        def total(x: Tensor) -> Tensor:
            return x.unflatten(0, (-1, members)).sum(1) if members else x.sum(0)

        if "gamma" in i:
            xhat = (activate(i["u"], act, 1) - i["mean"][:, None]) * i["rstd"][:, None]
            g = dy * by_row(i["gamma"], members)
            dm = g - g.mean(-1, keepdim=True) - xhat * (g * xhat).mean(-1, keepdim=True)
            dm = dm * i["rstd"][:, None]
            out = {"dgamma": total(dy * xhat), "dbeta": total(dy)}
        dx = pullback(lambda u: activate(u, act, 1), i["u"], dm)
        return out | {"dx": dx, "dbias": total(dx)}

    return reference


def backward_inputs(rows: int, n: int, members: int, act: str, dtype: torch.dtype) -> Values:
    u = (2.0 * torch.randn(rows, n)).to(dtype)
    _, mean, rstd = norm(activate(u.float(), act, 1))
    return {
        "dy": torch.randn(rows, n).to(dtype),
        "u": u,
        "mean": mean,
        "rstd": rstd,
        "gamma": vectors(rows, n, members)["gamma"],
    }


def backward(
    i: Values, device: str, act: str, members: int, dtype: torch.dtype, sums: tuple[str, ...]
) -> Values:
    rows, n = i["dy"].shape
    there = {k: v.to(device) for k, v in i.items()}
    dx, scale = Rows(rows, n, dtype, device, 4), Rows(1, rows, FP32, device)
    lead = rows // members if members else 1
    totals = {name: Rows.of(torch.full((lead, n), 0.25), FP64, device) for name in sums}
    scaled = "dy_scale" in i
    act_norm.act_norm_bwd(
        Rows.of(i["dy"], i["dy"].dtype, device, 1).tensor,
        dx.tensor,
        Rows.of(i["u"], i["u"].dtype, device, 2).tensor,
        there.get("mean"),
        there.get("rstd"),
        gamma=there.get("gamma"),
        act=act,
        rows_per_member=members,
        dy_scale=there.get("dy_scale"),
        dx_scale=scale.tensor[0] if scaled else None,
        **{k: t.tensor if members else t.tensor[0] for k, t in totals.items()},
    )
    out = {"dx": dx.written()}
    for name, t in totals.items():
        found = t.written() - 0.25
        out[name] = found if members else found[0]
    return out | {"dx_scale": scale.written()[0]} if scaled else out


@pytest.mark.parametrize("act", ["none", "mish"])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("dtype", [FP32, FP16], ids=str)
def test_backward(device: str, act: str, normed: bool, dtype: torch.dtype) -> None:
    for rows, n, members in shapes(device):
        i = backward_inputs(rows, n, members, act, dtype)
        sums = SUMS if normed else ("dbias",)
        if not normed:
            i = {k: i[k] for k in ("dy", "u")}
        ours = backward(i, device, act, members, dtype, sums)
        check(ours, backward_reference(act, members), i, f"{rows} x {n}")


@pytest.mark.parametrize("sums", [(), ("dgamma",), ("dbias",), ("dgamma", "dbeta")])
def test_some_sums(device: str, sums: tuple[str, ...]) -> None:
    i = backward_inputs(9, 33, 3, "mish", FP32)
    ours = backward(i, device, "mish", 3, FP32, sums)
    assert set(ours) == {"dx", *sums}
    check(ours, backward_reference("mish", 3), i, str(sums))


def test_backward_scales(device: str) -> None:
    i = backward_inputs(6, 40, 0, "mish", FP16)
    i["dy"] = (i["dy"] / 4.0).half()
    i["dy"][2] = 0.0
    i["dy_scale"] = 2.0 ** torch.tensor([0.0, -20.0, 3.0, -40.0, 10.0, -100.0])
    ours = backward(i, device, "mish", 0, FP16, SUMS)
    scale = ours.pop("dx_scale")
    reference = backward_reference("mish", 0)
    true = reference({k: v.double() for k, v in i.items()}, FP64)["dx"]
    assert_row_scales(ours["dx"], scale, true)

    def scaled(i: Values, wide: torch.dtype) -> Values:
        found = reference(i, wide)
        return found | {"dx": found["dx"] / scale.to(wide)[:, None]}

    check(ours, scaled, i, "scaled")
