"""SimNorm and the two-hot heads against float64, forward and backward."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton")

from pwm_fast.kernels import simnorm, two_hot
from tests.kernels.harness import DEVICES, Rows, Values, activate, check, pullback

FP32 = torch.float32
pytestmark = pytest.mark.parametrize("device", DEVICES)


@pytest.mark.parametrize("group", [1, 7, 8, 300])
def test_simnorm(device: str, group: int) -> None:
    wide = 512 // group + 1
    for rows, groups in [(1, 1), (3, 5), (0, 3), (2, wide)] + [(199, 97)] * (device == "cuda"):
        n = group * groups
        i = {"x": 5.0 * torch.randn(rows, n), "dy": torch.randn(rows, n)}
        y, dx = Rows(rows, n, FP32, device), Rows(rows, n, FP32, device)
        simnorm.simnorm_fwd(i["x"].to(device), y.tensor, group)
        check(
            {"y": y.written()},
            lambda i, dtype: {"y": activate(i["x"], "simnorm", group)},
            i,
            f"{rows} x {n}",
        )
        i["y"] = y.written().clone()
        i["scale"] = 2.0 ** torch.randint(-3, 3, (rows,))

        def backward(i: Values, dtype: torch.dtype) -> Values:
            dy = (i["dy"] * i["scale"][:, None]).unflatten(-1, (-1, group))
            s = i["y"].unflatten(-1, (-1, group))
            return {"dx": (s * (dy - (dy * s).sum(-1, keepdim=True))).flatten(-2)}

        scale = i["scale"].to(device)
        simnorm.simnorm_bwd(i["dy"].to(device), y.tensor, dx.tensor, group, scale)
        check({"dx": dx.written()}, backward, i, f"backward {rows} x {n}")


SIZES = [(1, 2), (5, 7), (9, 101), (0, 101), (2, 255)]
LARGE = [(4000, 101), (33, 255)]


def sizes(device: str) -> list[tuple[int, int]]:
    return SIZES if device == "cpu" else SIZES + LARGE


def symexp(x: Tensor) -> Tensor:
    return x.sign() * x.abs().expm1()


def decode(logits: Tensor, transform: bool) -> Tensor:
    centres = torch.linspace(-9.0, 11.0, logits.shape[-1], dtype=logits.dtype)
    mean = torch.softmax(logits, -1) @ centres
    return symexp(mean) if transform else mean


@pytest.mark.parametrize("transform", [False, True])
def test_decode(device: str, transform: bool) -> None:
    for rows, bins in sizes(device):
        i = {"logits": 3.0 * torch.randn(rows, bins) + 50.0, "dvalue": torch.randn(rows)}
        logits = Rows.of(i["logits"], FP32, device, 3).tensor
        value, mean, lse = (Rows(1, rows, FP32, device) for _ in range(3))
        saved = (value.tensor[0], mean.tensor[0], lse.tensor[0])
        two_hot.two_hot_decode_fwd(logits, *saved, -9.0, 11.0, transform)
        check(
            {"value": value.written()[0], "mean": mean.written()[0], "lse": lse.written()[0]},
            lambda i, dtype: {
                "value": decode(i["logits"], transform),
                "mean": decode(i["logits"], False),
                "lse": i["logits"].logsumexp(-1),
            },
            i,
            f"{rows} x {bins}",
        )
        out = Rows(rows, bins, FP32, device, 2)
        dvalue = i["dvalue"].to(device)
        two_hot.two_hot_decode_bwd(
            dvalue, logits, mean.tensor[0], lse.tensor[0], out.tensor, -9.0, 11.0, transform
        )
        check(
            {"dlogits": out.written()},
            lambda i, dtype: {
                "dlogits": pullback(lambda x: decode(x, transform), i["logits"], i["dvalue"])
            },
            i,
            f"backward {rows} x {bins}",
        )


def cross_entropy(logits: Tensor, x: Tensor, transform: bool) -> Tensor:
    bins = logits.shape[-1]
    if transform:
        x = x.sign() * x.abs().log1p()
    position = ((x + 9.0) * ((bins - 1) / 20.0)).clamp(0.0, bins - 1)
    lower = position.floor().clamp(max=bins - 2)
    upper = (position - lower)[:, None]
    one = F.one_hot(lower.long(), bins).to(x) * (1.0 - upper)
    two = F.one_hot(lower.long() + 1, bins).to(x) * upper
    return -((one + two) * F.log_softmax(logits, -1)).sum(-1)


@pytest.mark.parametrize("transform", [False, True])
def test_cross_entropy(device: str, transform: bool) -> None:
    """Targets within the range, beyond both ends of it, and 0."""
    for rows, bins in sizes(device):
        x = 8.0 * torch.randn(rows)
        x[:3] = torch.tensor([1e6, -1e6, 0.0])[:rows]
        i = {"logits": 3.0 * torch.randn(rows, bins) + 50.0, "x": x, "dloss": torch.randn(rows)}
        logits, target = Rows.of(i["logits"], FP32, device, 3).tensor, x.to(device)
        loss, lse = (Rows(1, rows, FP32, device) for _ in range(2))
        two_hot.two_hot_ce_fwd(logits, target, loss.tensor[0], lse.tensor[0], -9.0, 11.0, transform)
        check(
            {"loss": loss.written()[0], "lse": lse.written()[0]},
            lambda i, dtype: {
                "loss": cross_entropy(i["logits"], i["x"], transform),
                "lse": i["logits"].logsumexp(-1),
            },
            i,
            f"{rows} x {bins}",
        )
        out = Rows(rows, bins, FP32, device, 2)
        dloss = i["dloss"].to(device)
        two_hot.two_hot_ce_bwd(
            dloss, logits, target, lse.tensor[0], out.tensor, -9.0, 11.0, transform
        )
        check(
            {"dlogits": out.written()},
            lambda i, dtype: {
                "dlogits": pullback(
                    lambda v: cross_entropy(v, i["x"], transform),
                    i["logits"],
                    i["dloss"],
                )
            },
            i,
            f"backward {rows} x {bins}",
        )


def test_infinities_and_nan(device: str) -> None:
    """A logit of -inf that no weight falls on counts nothing; a NaN target gives NaN."""
    logits = torch.zeros(2, 5)
    logits[0, 0] = -float("inf")
    x = torch.tensor([11.0, float("nan")])
    loss, lse = (Rows(1, 2, FP32, device) for _ in range(2))
    two_hot.two_hot_ce_fwd(
        logits.to(device), x.to(device), loss.tensor[0], lse.tensor[0], -9.0, 11.0, False
    )
    found = loss.written()[0]
    torch.testing.assert_close(found[0], torch.tensor(4.0).log())
    assert found[1].isnan()
