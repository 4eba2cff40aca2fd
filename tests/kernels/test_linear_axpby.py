"""Products that end in an integrator's update, against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from pwm_fast.kernels.linear_axpby import linear_axpby
from pwm_fast.kernels.plan import GemmPlan, make_plan
from tests.helpers import assert_2x
from tests.kernels.harness import multiprocessors, on_devices

ROWS, N, K = 37, 40, 21
WHOLE = GemmPlan(16, 64, 16, 4, 2, 1, 3)
SHARED = GemmPlan(16, 16, 16, 4, 2, 3, 2)


def nan(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.full(shape, float("nan"), dtype=dtype, device=device)


def check(plan: GemmPlan, dtype: torch.dtype, scaled: bool, rows: int, n: int, k: int, device: str):
    x, weight = torch.randn(rows, k).to(dtype), (torch.randn(n, k) / k**0.5).to(dtype)
    z, k1, bias = torch.randn(rows, n), torch.randn(rows, n), torch.randn(n)
    x_scale = torch.exp2(torch.randint(-3, 3, (rows,)).float()) if scaled else None
    there = [None if t is None else t.to(device) for t in (x, weight, z, k1, bias, x_scale)]
    out, raw = nan(rows, n, device=device), nan(rows, n, device=device)
    operand = nan(rows, n, dtype=dtype, device=device)
    # The weight as a gradient meets it: its columns contiguous.
    w = there[1].t().contiguous().t() if scaled else there[1]
    linear_axpby(
        there[0], w, there[2], there[3], out, 0.5, 0.25, 0.125, plan=plan,
        bias=there[4], x_scale=there[5], raw=raw, cast=operand, input_precision="ieee",
    )  # fmt: skip

    def plain(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        p = x.to(dtype) @ weight.to(dtype).t()
        if x_scale is not None:
            p *= x_scale.to(dtype).unsqueeze(1)
        p += bias.to(dtype)
        return p, 0.5 * z.to(dtype) + 0.25 * k1.to(dtype) + 0.125 * p

    (exact_raw, exact), (mixed_raw, mixed) = plain(torch.float64), plain(torch.float32)
    assert_2x(raw.cpu(), mixed_raw, exact_raw, "raw")
    assert_2x(out.cpu(), mixed, exact, "out")
    assert_2x(operand.cpu(), mixed.to(dtype), exact, "operand")


@pytest.mark.interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("plan", [WHOLE, SHARED], ids=["whole", "shared"])
def test_update(plan: GemmPlan, scaled: bool, dtype: torch.dtype) -> None:
    check(plan, dtype, scaled, ROWS, N, K, "cpu")


@pytest.mark.interpreted
def test_the_state_may_be_overwritten() -> None:
    x, weight, z = torch.randn(ROWS, K), torch.randn(N, K), torch.randn(ROWS, N)
    expected = z + 0.5 * (x @ weight.t())
    linear_axpby(x, weight, z, None, z, 1.0, 0.0, 0.5, plan=SHARED, input_precision="ieee")
    torch.testing.assert_close(z, expected)


@pytest.mark.interpreted
def test_errors() -> None:
    x, weight, z = torch.randn(ROWS, K), torch.randn(N, K), torch.randn(ROWS, N)
    with pytest.raises(ValueError, match=r"z must be \[37, 40\], got \[36, 40\]"):
        linear_axpby(x, weight, z[1:], None, z, 1.0, 0.0, 0.5, plan=WHOLE)
    with pytest.raises(ValueError, match=r"bias must be contiguous, \[40\]"):
        linear_axpby(x, weight, z, None, z, 1.0, 0.0, 0.5, plan=WHOLE, bias=torch.ones(80)[::2])
    with pytest.raises(ValueError, match="3 tiles of 64 are not 40 columns"):
        linear_axpby(x, weight, z, None, z, 1.0, 0.0, 0.5, plan=GemmPlan(16, 64, 16, 4, 2, 3, 2))


F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    ("device", "rows", "n", "k", "tile", "scaled", "dtype"),
    on_devices(
        [
            (3, 510, 617, (16, 64), True, F16),
            (1, 512, 510, (16, 512), False, F32),
            (2, 768, 1788, (64, 128), True, F16),
            (3, 777, 777, (64, 128), False, F16),
        ],
        [
            (519, 512, 500, tile, scaled, dtype)
            for tile in ((16, 64), (64, 128))
            for scaled in (False, True)
            for dtype in (F16, BF16, F32)
        ],
    ),
)
def test_real_layers(device, rows, n, k, tile, scaled, dtype) -> None:
    plan = make_plan(
        *tile, rows, n, multiprocessors(device), dtype.itemsize, 160 * 1024, backward=True
    )
    assert plan is not None
    check(plan, dtype, scaled, rows, n, k, device)
