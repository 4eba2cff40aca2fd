"""Products fused with norm and activation against float64, in whole rows and in shared ones."""

from __future__ import annotations

import dataclasses
import multiprocessing
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from pwm_fast.backends.torch import TorchKernels
from pwm_fast.kernels.gemm_tile import Exchange
from pwm_fast.kernels.linear_norm_act import (
    PLANES,
    linear_norm_act_bwd,
    linear_norm_act_fwd,
)
from pwm_fast.kernels.plan import GemmPlan, make_plan
from tests.helpers import assert_2x
from tests.kernels.harness import multiprocessors, on_devices

EPS = 1e-5
WHOLE = GemmPlan(16, 64, 16, 4, 2, 1, 1 << 20)
SHARED = GemmPlan(16, 16, 16, 4, 2, 3, 2)  # two row blocks in flight, of three


def plan_of(plan: GemmPlan, rows: int) -> GemmPlan:
    return dataclasses.replace(plan, groups=min(plan.groups, -(-rows // plan.block_m)))


def phases(plan: GemmPlan, device: str = "cpu") -> tuple[int, ...]:
    """The interpreter runs programs one after another: the two halves of the exchange in turn."""
    return (1, 2) if plan.synced and device == "cpu" else (0,)


class Layer:
    """A Linear and the norm after it, and its input, in several dtypes."""

    def __init__(self, rows: int, n: int, k: int, width: int, dtype: torch.dtype) -> None:
        self.x = torch.randn(rows, k).to(dtype)
        weight, bias = torch.randn(n, k) / k**0.5, torch.randn(n)
        gamma, beta = 1.0 + 0.3 * torch.randn(n), 0.3 * torch.randn(n)
        if width:
            weight[width:], bias[width:], gamma[width:], beta[width:] = 0, 0, 0, 0
            weight[:width] -= weight[:width].mean(0)
            bias[:width] -= bias[:width].mean()
        self.weight = weight.to(dtype)
        self.bias = bias
        self.gamma, self.beta = gamma, beta
        self.width = width

    def to(self, dtype: torch.dtype, device: str) -> Layer:
        other = object.__new__(Layer)
        for name, value in self.__dict__.items():
            is_tensor = isinstance(value, Tensor)
            other.__dict__[name] = value.to(device, dtype) if is_tensor else value
        return other

    def plain(self, act: str) -> tuple[Tensor, Tensor, Tensor]:
        """``y``, ``xhat`` and ``rstd`` in PyTorch, in the layer's own precision."""
        x, w = self.x, self.weight
        h = (x @ w.t()).to(self.bias.dtype)
        y, hat = torch.empty_like(h), torch.empty_like(h)
        rstd = h.new_empty(h.shape[0])
        n = self.width or h.shape[1]
        for out in (y, hat):
            out[:, n:] = 0
        TorchKernels().norm_act_fwd(
            h[:, :n].contiguous(),
            y[:, :n],
            hat[:, :n],
            rstd,
            gamma=self.gamma[:n],
            beta=self.beta[:n],
            act=act,
            group=8,
            eps=EPS,
            bias=self.bias[:n],
        )
        return y, hat, rstd


def nan(*shape: int, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    return torch.full(shape, float("nan"), dtype=dtype, device=device)


def forward(layer: Layer, plan: GemmPlan, act: str, device: str = "cpu", exchange=None, phase=None):
    rows, n = layer.x.shape[0], layer.weight.shape[0]
    plan = plan_of(plan, rows)
    y = nan(rows, n, dtype=layer.x.dtype, device=device)
    hat = nan(rows, n, dtype=layer.x.dtype, device=device)
    rstd = nan(rows, dtype=torch.float32, device=device)
    if plan.synced and exchange is None:
        exchange = Exchange(plan, rows, PLANES, layer.x.device)
    for each in phases(plan, device) if phase is None else (phase,):
        linear_norm_act_fwd(
            layer.x,
            layer.weight,
            y,
            hat,
            rstd,
            gamma=layer.gamma,
            beta=layer.beta,
            act=act,
            group=8,
            eps=EPS,
            plan=plan,
            exchange=exchange,
            bias=layer.bias,
            width=layer.width,
            input_precision="ieee",
            phase=each,
        )
    return y, hat, rstd


SHAPES = [  # plan, rows, n, k, width
    (WHOLE, 19, 40, 21, 0),
    (WHOLE, 33, 48, 32, 43),
    (SHARED, 37, 40, 21, 0),
    (SHARED, 37, 48, 32, 43),
]


@pytest.mark.interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("act", ["none", "mish", "simnorm"])
@pytest.mark.parametrize(("plan", "rows", "n", "k", "width"), SHAPES)
def test_forward(plan, rows, n, k, width, act, dtype) -> None:
    if act == "simnorm" and width:
        width = 40
    layer = Layer(rows, n, k, width, dtype)
    ours = forward(layer, plan, act)
    exact = layer.to(torch.float64, "cpu").plain(act)
    mixed = layer.to(torch.float32, "cpu").plain(act)
    for name, a, b, c in zip(("y", "xhat", "rstd"), ours, mixed, exact, strict=True):
        assert_2x(a, b.to(a.dtype), c, name)
    if width:
        assert not ours[0][:, width:].any()
        assert not ours[1][:, width:].any()


def gradient(rows: int, k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Rows of very different size, as fp16 with a power of two each, or as they are."""
    dy = torch.randn(rows, k) * 10.0 ** torch.linspace(-7, 2, rows).unsqueeze(1)
    if dtype != torch.float16:
        return dy.to(dtype), None
    scale = torch.exp2(torch.ceil(torch.log2(dy.abs().amax(1))))
    return (dy / scale.unsqueeze(1)).to(dtype), scale


class Backward:
    """A layer's backward pass: its inputs on the CPU, and launches on a device."""

    def __init__(self, plan, rows, n, k, width, act, dtype, device="cpu") -> None:
        self.plan, self.act, self.device, self.width = plan_of(plan, rows), act, device, width
        layer = Layer(rows, n, k, width, dtype)
        _, hat, rstd = layer.to(torch.float32, "cpu").plain("none")
        self.hat, self.rstd, self.gamma, self.beta = hat.to(dtype), rstd, layer.gamma, layer.beta
        self.dy, self.dy_scale = gradient(rows, k, dtype)
        self.weight = (torch.randn(k, n) / k**0.5).to(dtype)  # of the layer that follows
        self.add = torch.randn(rows, n) * 10.0 ** torch.linspace(-7, 2, rows).unsqueeze(1)
        if width:  # only its centred columns come in
            self.weight[:, width:] = 0
            self.add[:, width:] = 0
        names = ("hat", "rstd", "gamma", "beta", "dy", "dy_scale", "weight", "add")
        self.there = {
            name: None if value is None else value.to(device)
            for name, value in ((name, getattr(self, name)) for name in names)
        }
        self.exchange = None
        if self.plan.synced:
            self.exchange = Exchange(self.plan, rows, PLANES, self.there["dy"].device)

    def launch(self) -> tuple[Tensor, Tensor | None, Tensor]:
        """``dx``, its rows' factors, and the sums of row blocks, on the device."""
        rows, n = self.hat.shape
        there, scaled = self.there, self.dy_scale is not None
        f32 = torch.float32
        dx = nan(rows, n, dtype=self.dy.dtype, device=self.device)
        dx_scale = nan(rows, dtype=f32, device=self.device) if scaled else None
        blocks = -(-rows // self.plan.block_m)
        sums = nan(3, blocks, n, dtype=f32, device=self.device)
        for phase in phases(self.plan, self.device):
            linear_norm_act_bwd(
                there["dy"],
                there["weight"],
                dx,
                there["hat"],
                there["rstd"],
                gamma=there["gamma"],
                beta=there["beta"],
                act=self.act,
                plan=self.plan,
                exchange=self.exchange,
                dy_scale=there["dy_scale"],
                dx_scale=dx_scale,
                add=there["add"],
                add_factor=0.5,
                sums=sums,
                width=self.width,
                input_precision="ieee",
                phase=phase,
            )
        return dx, dx_scale, sums

    def plain(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """``dx`` and the parameters' gradients in PyTorch."""
        to = lambda t: t.to(dtype)  # noqa: E731
        dm = to(self.dy) @ to(self.weight)
        if self.dy_scale is not None:
            dm *= to(self.dy_scale).unsqueeze(1)
        dm += 0.5 * to(self.add)
        h, gamma = to(self.hat), to(self.gamma)
        u = h * gamma + to(self.beta)
        if self.act == "mish":
            t = torch.tanh(torch.nn.functional.softplus(u))
            dm = dm * (t + u * torch.sigmoid(u) * (1 - t * t))
        g = dm * gamma
        features = self.width or h.shape[1]
        out = g - h * (g * h).sum(1, keepdim=True) / features
        if not self.width:
            out -= g.mean(1, keepdim=True)
        out = out * to(self.rstd).unsqueeze(1)
        return out, torch.stack([(dm * h).sum(0), dm.sum(0), out.sum(0)])


def check_backward(backward: Backward) -> None:
    """Against float64."""
    results = backward.launch()
    dx, dx_scale, sums = (None if t is None else t.cpu() for t in results)
    assert dx is not None and sums is not None
    plan, plain, dtype = backward.plan, backward.plain, dx.dtype
    (exact, exact_sums), (mixed, mixed_sums) = plain(torch.float64), plain(torch.float32)
    if dx_scale is not None:
        assert torch.equal(dx_scale, torch.exp2(torch.log2(dx_scale).round()))
        largest = dx.abs().amax(1).float()
        assert largest.max() <= 1.0
        assert largest.min() > (0.4 if not plan.synced else 0.02)
        exact, mixed = (v / dx_scale.to(v.dtype).unsqueeze(1) for v in (exact, mixed))
    size = exact.abs().amax(1, keepdim=True)  # rows count alike
    ours, plain_dx = ((v.double() / size).to(dtype) for v in (dx, mixed))
    assert_2x(ours, plain_dx, exact / size, "dx")
    for name, a, b, c in zip(
        ("gamma", "beta", "bias"), sums.double().sum(1), mixed_sums, exact_sums, strict=True
    ):
        size = c.abs().max() + 1e-30
        assert_2x((a / size).float(), b / size.float(), c / size, name)


@pytest.mark.interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("act", ["none", "mish"])
@pytest.mark.parametrize(("plan", "rows", "n", "k", "width"), SHAPES)
def test_backward(plan, rows, n, k, width, act, dtype) -> None:
    check_backward(Backward(plan, rows, n, k, width, act, dtype))


@pytest.mark.interpreted
def test_a_scale_holds_zero_rows_and_tiny_ones() -> None:
    layer = Layer(3, 40, 16, 0, torch.float16)
    _, hat, rstd = forward(layer, WHOLE, "mish")
    dy, weight = torch.randn(3, 16).half(), torch.randn(16, 40).half()
    dy[0] = 0
    scale = torch.tensor([1.0, 2.0**-120, 2.0**100])
    dx, dx_scale = nan(3, 40, dtype=torch.float16), nan(3, dtype=torch.float32)
    linear_norm_act_bwd(
        dy,
        weight,
        dx,
        hat,
        rstd,
        gamma=layer.gamma,
        beta=layer.beta,
        act="mish",
        plan=plan_of(WHOLE, 3),
        exchange=None,
        dy_scale=scale,
        dx_scale=dx_scale,
    )
    assert not dx[0].any()
    assert dx_scale[0] == 1.0
    assert dx[1:].isfinite().all()
    assert (dx[1:].abs().amax(1) > 0.4).all()


@pytest.mark.interpreted
def test_a_scale_is_that_of_the_row_alone() -> None:
    """A gradient that is nearly the mean: what is left of it is small, but not beyond the row."""
    backward = Backward(WHOLE, 16, 40, 16, 0, "none", torch.float16)
    there = backward.there
    there["weight"] = (1.0 + 1e-2 * torch.randn(16, 40)).half()
    there["dy"], there["add"] = torch.ones(16, 16).half(), torch.zeros(16, 40)
    there["gamma"] = torch.ones(40)
    dx, _, _ = backward.launch()
    assert (dx.abs().amax(1) > 0.4).all(), dx.abs().amax(1)


@pytest.mark.interpreted
def test_fp16_overflows_to_infinity_and_keeps_nan() -> None:
    layer = Layer(16, 40, 16, 0, torch.float16)
    layer.gamma = layer.gamma * 1e6
    layer.x[3] = float("nan")
    y, _, _ = forward(layer, WHOLE, "none")
    assert y[3].isnan().all()
    others = torch.cat([y[:3], y[4:]])
    assert not others.isnan().any()
    assert others.max() == float("inf")


# --- the exchange itself ---------------------------------------------------------------------


ROUNDS, PROGRAMS = 3, 3
ONE_ROW_BLOCK = GemmPlan(16, 16, 16, 4, 2, PROGRAMS, 1)


class Single:
    """A kernel of which this process runs one program, whatever the grid is told to be."""

    def __init__(self, kernel, program: int) -> None:
        from triton.runtime.interpreter import interpreter_builder as builder

        set_idx = builder.set_grid_idx
        builder.set_grid_dim = lambda *dims: setattr(builder, "grid_dim", (PROGRAMS, 1, 1))
        builder.set_grid_idx = lambda *idx: set_idx(program, 0, 0)
        self.kernel = kernel

    def __getitem__(self, grid):
        return self.kernel[(1,)]


def shared_exchange(folder: Path) -> Exchange:
    """An exchange whose memory lies in files, for several processes."""
    exchange = Exchange(ONE_ROW_BLOCK, 16, PLANES, torch.device("cpu"))
    for name in ("slots", "counters"):
        tensor = getattr(exchange, name)
        file = str(folder / name)
        setattr(exchange, name, torch.from_file(file, True, tensor.numel(), dtype=tensor.dtype))
    return exchange


def one_program(program: int, folder: Path) -> None:
    """Run one program of each launch, that waits for those of other processes."""
    from pwm_fast.kernels import linear_norm_act

    name = "linear_norm_act_fwd_kernel"
    setattr(linear_norm_act, name, Single(getattr(linear_norm_act, name), program))
    torch.manual_seed(0)
    layer = Layer(16, 40, 21, 0, torch.float32)
    exchange = shared_exchange(folder)
    for i in range(ROUNDS):
        layer.x += 1.0
        y, _, _ = forward(layer, ONE_ROW_BLOCK, "mish", exchange=exchange, phase=0)
        torch.save(y[:, program * 16 : program * 16 + 16], folder / f"y{i}-{program}")
        # Launches follow one another: none begins while a program of the one before still reads.
        until = time.monotonic() + 100.0
        while not all((folder / f"y{i}-{p}").exists() for p in range(PROGRAMS)):
            assert time.monotonic() < until, f"another program did not end its launch {i}"
            time.sleep(0.001)


@pytest.mark.interpreted
def test_programs_wait_for_one_another(tmp_path: Path) -> None:
    """Three programs of a row block in three processes, three launches on the same counters."""
    exchange = shared_exchange(tmp_path)
    exchange.counters.zero_()
    fork = multiprocessing.get_context("fork")  # with all that is imported
    workers = [fork.Process(target=one_program, args=(p, tmp_path)) for p in range(PROGRAMS)]
    try:
        for w in workers:
            w.start()
        for w in workers:
            w.join(120)
        assert [w.exitcode for w in workers] == [0] * PROGRAMS
    finally:
        for w in workers:
            w.kill()
    assert exchange.counters[0] == PROGRAMS * ROUNDS
    torch.manual_seed(0)
    layer = Layer(16, 40, 21, 0, torch.float32)
    for i in range(ROUNDS):
        layer.x += 1.0
        expected, _, _ = forward(layer, ONE_ROW_BLOCK, "mish")
        parts = [torch.load(tmp_path / f"y{i}-{p}") for p in range(PROGRAMS)]
        assert torch.equal(torch.cat(parts, 1), expected)


@pytest.mark.interpreted
def test_errors() -> None:
    layer = Layer(19, 40, 21, 0, torch.float32)
    with pytest.raises(ValueError, match="needs an Exchange"):
        linear_norm_act_fwd(
            layer.x, layer.weight, nan(19, 40, dtype=torch.float32), None, None,
            gamma=layer.gamma, beta=layer.beta, act="mish", group=8, eps=EPS, plan=SHARED,
            exchange=None,
        )  # fmt: skip
    with pytest.raises(ValueError, match=r"y must be \[19, 40\], got \[19, 39\]"):
        linear_norm_act_fwd(
            layer.x, layer.weight, nan(19, 39, dtype=torch.float32), None, None,
            gamma=layer.gamma, beta=layer.beta, act="mish", group=8, eps=EPS, plan=WHOLE,
            exchange=None,
        )  # fmt: skip
    with pytest.raises(ValueError, match="float16"):
        linear_norm_act_fwd(
            layer.x.double(), layer.weight.double(), nan(19, 40, dtype=torch.float32), None, None,
            gamma=layer.gamma, beta=layer.beta, act="mish", group=8, eps=EPS, plan=WHOLE,
            exchange=None,
        )  # fmt: skip


# --- with the plans of a device ---------------------------------------------------------------

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
DTYPES = (F16, BF16, F32)
TILES = ((16, 64), (32, 64), (64, 64), (64, 128), (16, 512))

# Rows, features, summed over, centred width, tile, dtype.
REAL = [
    (3, 510, 617, 0, (16, 512), F32),
    (3, 512, 777, 510, (16, 512), F16),
    (1, 512, 510, 510, (16, 64), F16),
    (2, 1788, 777, 0, (64, 128), F16),
]


def real(tiles: Sequence[tuple[int, int]]) -> list[Any]:
    """Sizes of real layers for the interpreter and for a GPU."""
    wide = [(199, 1788, 777, 0, (64, 128), dtype) for dtype in DTYPES]
    cuda = [(519, 512, 500, width, t, d) for t in tiles for d in DTYPES for width in (0, 510)]
    return on_devices(REAL, [*cuda, *wide])


def device_plan(
    device: str, tile: tuple[int, int], rows: int, n: int, dtype: torch.dtype, backward: bool
) -> GemmPlan:
    shared = 160 * 1024
    sms = multiprocessors(device)
    plan = make_plan(*tile, rows, n, sms, dtype.itemsize, shared, backward)
    if plan is None:
        pytest.skip(f"tiles of {tile} do not fit")
    return plan


def layer_on(device: str, layer: Layer) -> Layer:
    there = layer.to(torch.float32, device)
    there.x, there.weight = layer.x.to(device), layer.weight.to(device)
    return there


@pytest.mark.parametrize(
    ("device", "rows", "n", "k", "width", "tile", "dtype"), real((*TILES, (128, 128)))
)
def test_real_layers(device, rows, n, k, width, tile, dtype) -> None:
    layer = Layer(rows, n, k, width, dtype)
    plan = device_plan(device, tile, rows, n, dtype, False)
    ours = forward(layer_on(device, layer), plan, "mish", device)
    exact = layer.to(torch.float64, "cpu").plain("mish")
    mixed = layer.to(torch.float32, "cpu").plain("mish")
    for name, a, b, c in zip(("y", "xhat", "rstd"), ours, mixed, exact, strict=True):
        assert_2x(a.cpu(), b.to(a.dtype), c, name)


@pytest.mark.parametrize(("device", "rows", "n", "k", "width", "tile", "dtype"), real(TILES))
def test_backward_of_real_layers(device, rows, n, k, width, tile, dtype) -> None:
    plan = device_plan(device, tile, rows, n, dtype, True)
    check_backward(Backward(plan, rows, n, k, width, "mish", dtype, device))


REPEATED = on_devices(
    [(2, 19, (16, 64), F16)],
    [(100, 1000, tile, dtype) for tile in ((16, 64), (64, 128), (16, 512)) for dtype in DTYPES],
)


@pytest.mark.parametrize(("device", "times", "rows", "tile", "dtype"), REPEATED)
def test_the_same_bits_each_time(device, times, rows, tile, dtype) -> None:
    """In whole rows and in shared ones, launches on the same counters."""
    plan = device_plan(device, tile, rows, 512, dtype, False)
    there = layer_on(device, Layer(rows, 512, 512, 0, dtype))
    exchange = Exchange(plan_of(plan, rows), rows, PLANES, there.x.device) if plan.synced else None
    first = forward(there, plan, "mish", device, exchange)
    for _ in range(times):
        again = forward(there, plan, "mish", device, exchange)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize(("device", "times", "rows", "tile", "dtype"), REPEATED)
def test_backward_gives_the_same_bits_each_time(device, times, rows, tile, dtype) -> None:
    plan = device_plan(device, tile, rows, 512, dtype, True)
    backward = Backward(plan, rows, 512, 512, 0, "mish", dtype, device)
    first = [t for t in backward.launch() if t is not None]
    for _ in range(times):
        again = [t for t in backward.launch() if t is not None]
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
