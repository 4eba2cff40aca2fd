"""Rows more than 2^31 elements apart: offsets of rows are 64-bit numbers in every kernel.

Kept evaluations of a large batch reach such offsets (16384 rows, 128 evaluations, 4096 features).
Here the memory is only reserved, and what is not touched does not exist.
"""

from __future__ import annotations

import dataclasses
import mmap
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from pwm_fast.kernels import (
    act_norm,
    axpby,
    linear_act_norm,
    linear_axpby,
    linear_norm_act,
    norm_act,
    running_sum,
    simnorm,
    two_hot,
)
from pwm_fast.kernels.gemm_tile import Exchange
from pwm_fast.kernels.plan import GemmPlan

ROWS = 5
APART = (1 << 29) + 16  # elements from row to row: the fifth begins beyond 2^31
Make = Callable[[Tensor], Tensor]
WHOLE = GemmPlan(16, 64, 16, 4, 2, 1, 1)
SHARED = GemmPlan(16, 16, 16, 4, 2, 3, 1)


def reserved(elements: int, dtype: torch.dtype) -> Tensor:
    """Zeros that take no memory until they are written."""
    no_reserve = getattr(mmap, "MAP_NORESERVE", 0x4000)  # of Python 3.13; the number is Linux's
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    memory = mmap.mmap(-1, elements * dtype.itemsize, flags=flags)
    return torch.frombuffer(memory, dtype=dtype)


def far(x: Tensor) -> Tensor:
    """A copy of a matrix with far rows."""
    rows, n = x.shape
    memory = reserved((rows - 1) * APART + n, x.dtype)
    out = memory.as_strided((rows, n), (APART, 1))
    return out.copy_(x)


def near(x: Tensor) -> Tensor:
    return x.clone()


@pytest.fixture(autouse=True)
def _nothing_copied_back(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The interpreter would copy every tensor's whole memory onto itself."""
    from triton.runtime import interpreter

    monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *args: None)
    yield


def matrix(n: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(ROWS, n, generator=generator).to(dtype)


def vector(n: int, seed: int = 9) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


def run_norm_act(make: Make) -> list[Tensor]:
    n, half = 24, torch.float16
    x, y, hat = make(matrix(n)), make(matrix(n, half)), make(matrix(n, half))
    gamma, beta, rstd = vector(n), vector(n, 8), torch.empty(ROWS)
    options = {"gamma": gamma, "beta": beta, "act": "mish", "group": 1}
    norm_act.norm_act_fwd(x, y, hat, rstd, eps=1e-5, add=make(matrix(n, seed=1)), **options)
    dx, sums = make(matrix(n, half)), torch.zeros(n, dtype=torch.float64)
    dy = make(matrix(n, seed=2))
    norm_act.norm_act_bwd(dy, dx, hat, rstd, y=None, dgamma=sums, **options)
    return [y, hat, rstd, dx, sums]


def run_norm_simnorm(make: Make) -> list[Tensor]:
    n = 24
    y, hat, rstd = make(matrix(n)), make(matrix(n)), torch.empty(ROWS)
    options = {"gamma": vector(n), "beta": vector(n, 8), "act": "simnorm", "group": 8}
    norm_act.norm_act_fwd(make(matrix(n)), y, hat, rstd, eps=1e-5, **options)
    dx = make(matrix(n))
    norm_act.norm_act_bwd(make(matrix(n, seed=2)), dx, hat, rstd, y=y, **options)
    return [y, dx]


def run_act_norm(make: Make) -> list[Tensor]:
    n, half = 24, torch.float16
    y, u = make(matrix(n, half)), make(matrix(n, half))
    mean, rstd = torch.empty(ROWS), torch.empty(ROWS)
    gamma, beta = vector(n), vector(n, 8)
    act_norm.act_norm_fwd(
        make(matrix(n)), y, u, mean, rstd, bias=None, gamma=gamma, beta=beta, act="mish", eps=1e-5
    )
    dx = make(matrix(n, half))
    act_norm.act_norm_bwd(make(matrix(n, seed=2)), dx, u, mean, rstd, gamma=gamma, act="mish")
    return [y, u, dx]


def run_axpby(make: Make) -> list[Tensor]:
    out, operand = make(matrix(24)), make(matrix(24, torch.float16))
    k1, k2 = make(matrix(24, seed=1)), make(matrix(24, seed=2))
    axpby.axpby(make(matrix(24)), k1, k2, out, 0.5, 0.25, cast=operand)
    return [out, operand]


def run_cast(make: Make) -> list[Tensor]:
    out, scale = make(matrix(24, torch.float16)), torch.empty(ROWS)
    axpby.cast(make(matrix(24)), out, scale)
    return [out, scale]


def run_two_hot(make: Make) -> list[Tensor]:
    logits, target = make(matrix(21)), vector(ROWS)
    value, mean, lse, loss = (torch.empty(ROWS) for _ in range(4))
    to_decode, to_loss = make(matrix(21)), make(matrix(21))
    bins = (-10.0, 10.0, True)
    two_hot.two_hot_decode_fwd(logits, value, mean, lse, *bins)
    two_hot.two_hot_decode_bwd(vector(ROWS), logits, mean, lse, to_decode, *bins)
    two_hot.two_hot_ce_fwd(logits, target, loss, lse, *bins)
    two_hot.two_hot_ce_bwd(vector(ROWS), logits, target, lse, to_loss, *bins)
    return [value, loss, to_decode, to_loss]


def run_linear_norm_act(make: Make) -> list[Tensor]:
    n, k, half = 40, 32, torch.float16
    x, w = make(matrix(k, half)), torch.randn(n, k, generator=torch.Generator().manual_seed(3))
    y, hat, rstd = make(matrix(n, half)), make(matrix(n, half)), torch.empty(ROWS)
    options = {"gamma": vector(n), "beta": vector(n, 8), "act": "mish"}
    results = [y, hat, rstd]
    for plan in (WHOLE, SHARED):
        exchange = Exchange(plan, ROWS, linear_norm_act.PLANES, torch.device("cpu"))
        dx, scale = make(matrix(n, half)), torch.empty(ROWS)
        for phase in (1, 2) if plan.synced else (0,):
            launch = {"plan": plan, "exchange": exchange, "phase": phase, **options}
            linear_norm_act.linear_norm_act_fwd(
                x, w.half(), y, hat, rstd, group=1, eps=1e-5, **launch
            )
        for phase in (1, 2) if plan.synced else (0,):
            launch = {"plan": plan, "exchange": exchange, "phase": phase, **options}
            linear_norm_act.linear_norm_act_bwd(
                x,
                w.t().half(),
                dx,
                hat,
                rstd,
                add=make(matrix(n, seed=4)),
                dy_scale=torch.ones(ROWS),
                dx_scale=scale,
                **launch,
            )
        results += [dx, scale]
    return results


def run_linear_act_norm(make: Make) -> list[Tensor]:
    n, k, half = 40, 32, torch.float16
    x, w = make(matrix(k, half)), torch.randn(n, k, generator=torch.Generator().manual_seed(3))
    y, u, dx = make(matrix(n, half)), make(matrix(n, half)), make(matrix(n, half))
    mean, rstd = torch.empty(ROWS), torch.empty(ROWS)
    options = {"gamma": vector(n), "act": "mish", "plan": WHOLE}
    beta = vector(n, 8)
    linear_act_norm.linear_act_norm_fwd(
        x, w.half(), y, u, mean, rstd, beta=beta, eps=1e-5, **options
    )
    linear_act_norm.linear_act_norm_bwd(x, w.t().half(), dx, u, mean, rstd, **options)
    return [y, u, dx]


def run_linear_axpby(make: Make) -> list[Tensor]:
    n, k, half = 40, 32, torch.float16
    x, w = make(matrix(k, half)), torch.randn(n, k, generator=torch.Generator().manual_seed(3))
    out, raw, operand = make(matrix(n)), make(matrix(n)), make(matrix(n, half))
    linear_axpby.linear_axpby(
        x,
        w.half(),
        make(matrix(n)),
        make(matrix(n, seed=1)),
        out,
        1.0,
        0.5,
        0.25,
        plan=dataclasses.replace(WHOLE),
        raw=raw,
        cast=operand,
    )
    return [out, raw, operand]


RUNS = [
    run_norm_act,
    run_norm_simnorm,
    run_act_norm,
    run_axpby,
    run_cast,
    run_two_hot,
    run_linear_norm_act,
    run_linear_act_norm,
    run_linear_axpby,
]


@pytest.mark.interpreted
@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.__name__.removeprefix("run_"))
def test_far_rows_are_as_near_ones(run: Callable[[Make], list[Tensor]]) -> None:
    for i, (one, other) in enumerate(zip(run(far), run(near), strict=True)):
        assert torch.equal(one, other), f"result {i}"


@pytest.mark.interpreted
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_far_groups(direction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last program of a SimNorm over more than 2^31 numbers."""
    from triton.runtime.interpreter import interpreter_builder as builder

    width, many = 8, (1 << 28) + 3
    tile = simnorm.tile_of(width)
    first = many // tile.rows * tile.rows
    x, y = reserved(many * width, torch.float32), reserved(many * width, torch.float16)
    x[first * width :] = vector((many - first) * width)
    last = (many // tile.rows, 0, 0)
    monkeypatch.setattr(builder, "set_grid_idx", lambda *_: setattr(builder, "grid_idx", last))
    sizes = {"groups": many, "width": width, "GROUPS": tile.rows, "WIDTH": tile.block}
    own = x[first * width :].view(-1, width)
    if direction == "forward":
        simnorm.simnorm_fwd_kernel[(1,)](x, y, **sizes)
        expected = torch.softmax(own, 1)
    else:
        y[first * width :] = 0.125
        dx = reserved(many * width, torch.float32)
        simnorm.simnorm_bwd_kernel[(1,)](x, y, dx, None, per_row=1, **sizes)
        expected, y = 0.125 * (own - 0.125 * own.sum(1, keepdim=True)), dx
    torch.testing.assert_close(
        y[first * width :].view(-1, width).float(), expected, atol=1e-3, rtol=0
    )


@pytest.mark.interpreted
@pytest.mark.parametrize("backward", [False, True])
def test_far_steps(backward: bool) -> None:
    """The first program of a sum over steps that lie more than 2^31 elements apart."""
    steps, block = 5, running_sum.BLOCK
    x, out = (reserved((steps - 1) * APART + block, torch.float32) for _ in range(2))
    at = x.as_strided((steps, block), (APART, 1))
    at.copy_(torch.randn(steps, block))
    running_sum.running_sum_kernel[(1,)](None, x, out, steps, APART, BACKWARD=backward, BLOCK=block)
    expected = at.flip(0).cumsum(0).flip(0) if backward else at.cumsum(0)
    torch.testing.assert_close(out.as_strided((steps, block), (APART, 1)), expected)
