"""axpby and cast against float64."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from pwm_fast.kernels import axpby
from tests.kernels.harness import DEVICES, WIDE, Rows, Values, assert_row_scales, check

FP16, FP32, FP64 = torch.float16, torch.float32, torch.float64
SHAPES = [(1, 1), (5, 7), (9, 40), *WIDE]
LARGE = [(199, 510), (77, 1788), (3000, 33)]
pytestmark = pytest.mark.parametrize("device", DEVICES)


def shapes(device: str) -> list[tuple[int, int]]:
    return SHAPES if device == "cpu" else SHAPES + LARGE


def reference(i: Values, dtype: torch.dtype) -> Values:
    k1 = i["k1"] * i["k1_scale"][:, None] if "k1_scale" in i else i["k1"]
    out = i["z"] + 0.3 * k1
    if "k2" in i:
        k2 = i["k2"] * i["k2_scale"][:, None] if "k2_scale" in i else i["k2"]
        out = out - 0.7 * k2
    return {"out": out, "operand": out}


@pytest.mark.parametrize("given", ["", "k2", "operand", "k1_scale", "k2 operand k1_scale k2_scale"])
@pytest.mark.parametrize("dtype", [FP32, FP16], ids=str)
def test_axpby(device: str, given: str, dtype: torch.dtype) -> None:
    for rows, n in shapes(device):
        i = {
            "z": torch.randn(rows, n),
            "k1": torch.randn(rows, n).to(dtype),
            "k2": torch.randn(rows, n).to(dtype),
            "k1_scale": 2.0 ** torch.randint(-8, 8, (rows,)),
            "k2_scale": 2.0 ** torch.randint(-8, 8, (rows,)),
        }
        i = {k: v for k, v in i.items() if k in ("z", "k1") or k in given.split()}
        there = {k: v.to(device) for k, v in i.items()}
        out, operand = Rows(rows, n, FP32, device, 3), Rows(rows, n, FP16, device, 1)
        axpby.axpby(
            Rows.of(i["z"], FP32, device, 2).tensor,
            Rows.of(i["k1"], dtype, device, 5).tensor,
            there.get("k2"),
            out.tensor,
            0.3,
            -0.7,
            cast=operand.tensor if "operand" in given else None,
            k1_scale=there.get("k1_scale"),
            k2_scale=there.get("k2_scale"),
        )
        ours = {"out": out.written()}
        if "operand" in given:
            ours["operand"] = operand.written()
            assert torch.equal(ours["operand"], ours["out"].half())
        check(ours, reference, i, f"{rows} x {n}")


def test_in_place(device: str) -> None:
    """``out`` may be ``z``, and tensors may have more than two axes."""
    z, k = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    found = z.clone().to(device)
    axpby.axpby(found, k.to(device), None, found, 0.5, 0.0)
    torch.testing.assert_close(found.cpu(), z + 0.5 * k)


def test_scaled_operand(device: str) -> None:
    for rows, n in shapes(device):
        x = torch.randn(rows, n) * 10.0 ** torch.randint(-30, 30, (rows, 1)).float()
        if rows > 2:
            x[1] = 0.0
            x[2] = 0.5  # exactly a power of two
        out, scale = Rows(rows, n, FP16, device, 3), Rows(1, rows, FP32, device)
        axpby.cast(Rows.of(x, FP32, device, 2).tensor, out.tensor, scale.tensor[0])
        factors = scale.written()[0]
        assert_row_scales(out.written(), factors, x.double())
        exact = (x.double() / factors.double()[:, None]).to(FP16)
        assert torch.equal(out.written(), exact)


@pytest.mark.parametrize("dtype", [FP32, FP16], ids=str)
def test_scaled_rows(device: str, dtype: torch.dtype) -> None:
    """Powers of two leave only the rounding to 16 bits; rows that members share are taken again."""
    for rows, n in shapes(device):
        for members in (1, 3):
            x = torch.randn(rows, n).to(dtype)
            scale = 2.0 ** torch.randint(-20, 20, (members * rows,))
            largest = scale.amax() if rows else torch.ones(())
            out = Rows(members * rows, n, FP16, device, 3)
            axpby.scaled_rows(
                Rows.of(x, dtype, device, 2).tensor,
                out.tensor,
                scale.to(device),
                largest.to(device),
            )
            factors = (scale / largest).double()[:, None]
            assert torch.equal(out.written(), (x.double().repeat(members, 1) * factors).half())


def test_plain_operand(device: str) -> None:
    """Without a scale it rounds to nearest, overflows to infinity, and keeps NaN."""
    x = torch.randn(7, 33)
    x[3, :4] = torch.tensor([1e6, -1e6, float("nan"), float("inf")])
    out = Rows(7, 33, FP16, device, 1)
    axpby.cast(x.to(device), out.tensor, None)
    expected = x.half()
    torch.testing.assert_close(out.written(), expected, rtol=0, atol=0, equal_nan=True)
