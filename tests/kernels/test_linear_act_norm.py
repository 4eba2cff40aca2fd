"""Products fused with activation and LayerNorm, of layers and of ensembles, against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from pwm_fast.backends.precision import EXACT, FAST, Precision
from pwm_fast.backends.specs import LayerParams, LayerSpec
from pwm_fast.backends.torch import TorchKernels
from pwm_fast.backends.triton_gemm import TritonProducts
from pwm_fast.fused.stack import Stack
from pwm_fast.kernels.linear_act_norm import linear_act_norm_bwd, linear_act_norm_fwd
from pwm_fast.kernels.plan import Limits, Plan, Product, candidates, make_plan, plan
from tests.helpers import assert_2x
from tests.kernels.harness import on_devices

EPS = 1e-5


def tiles(n: int, block_m: int = 16) -> Plan:
    """Small for the interpreter, with a K that takes several rounds."""
    return Plan(block_m, max(16, 1 << (n - 1).bit_length()), 16, 4, 2, 1, 1 << 20)


def nan(*shape: int, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    return torch.full(shape, float("nan"), dtype=dtype, device=device)


class Ensemble:
    """A Linear, Mish and LayerNorm of some members (0: a layer alone), and its input."""

    def __init__(self, members: int, rows: int, n: int, k: int, dtype: torch.dtype) -> None:
        lead = (members,) if members else ()
        self.members, self.rows = members, rows
        self.x = torch.randn(max(members, 1) * rows, k).to(dtype)
        self.weight = (torch.randn(*lead, n, k) / k**0.5).to(dtype)
        self.bias = torch.randn(*lead, n)
        self.gamma, self.beta = 1.0 + 0.3 * torch.randn(*lead, n), 0.3 * torch.randn(*lead, n)

    def to(self, device: str) -> Ensemble:
        other = object.__new__(Ensemble)
        for name, value in self.__dict__.items():
            other.__dict__[name] = value.to(device) if isinstance(value, Tensor) else value
        return other

    def forward(self, plan: Plan, act: str, precision: str = "ieee", bias: bool = True):
        x, n, device = self.x, self.weight.shape[-2], str(self.x.device)
        total = x.shape[0]
        y, u = (nan(total, n, dtype=x.dtype, device=device) for _ in range(2))
        mean, rstd = (nan(total, dtype=torch.float32, device=device) for _ in range(2))
        linear_act_norm_fwd(
            x,
            self.weight,
            y,
            u,
            mean,
            rstd,
            gamma=self.gamma,
            beta=self.beta,
            act=act,
            eps=EPS,
            plan=plan,
            bias=self.bias if bias else None,
            input_precision=precision,
        )
        return y, u, mean, rstd

    def plain(self, dtype: torch.dtype, act: str, tf32: bool = False, bias: bool = True):
        """The same in PyTorch; ``tf32`` rounds the operands to ten bits."""
        total, n = self.x.shape[0], self.weight.shape[-2]
        h = multiply(self.x, self.weight.transpose(-1, -2), self.members, dtype, tf32)
        y, u = torch.empty_like(h), torch.empty_like(h)
        mean, rstd = h.new_empty(total), h.new_empty(total)
        TorchKernels().act_norm_fwd(
            h,
            y,
            u,
            mean,
            rstd,
            bias=self.bias.to(dtype) if bias else torch.zeros_like(self.bias, dtype=dtype),
            gamma=self.gamma.to(dtype),
            beta=self.beta.to(dtype),
            act=act,
            eps=EPS,
            rows_per_member=self.rows if self.members else 0,
        )
        assert y.shape == (total, n)
        return y, u, mean, rstd


def multiply(x: Tensor, weight: Tensor, members: int, dtype: torch.dtype, tf32: bool) -> Tensor:
    a, b = x.to(dtype), weight.to(dtype)
    if tf32:
        a, b = ten_bits(a), ten_bits(b)
    if not members:
        return a @ b
    return (a.view(members, -1, a.shape[-1]) @ b).flatten(0, 1)


def ten_bits(x: Tensor) -> Tensor:
    """``x`` rounded to tf32."""
    return (x.view(torch.int32) + 0x1000 & ~0x1FFF).view(torch.float32)


SHAPES = [(0, 19, 21, 13), (1, 16, 40, 16), (3, 7, 21, 35), (3, 33, 17, 32)]  # members, rows, n, k


@pytest.mark.interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("act", ["none", "mish"])
@pytest.mark.parametrize(("members", "rows", "n", "k"), SHAPES)
def test_forward(members, rows, n, k, act, dtype) -> None:
    layer = Ensemble(members, rows, n, k, dtype)
    ours = layer.forward(tiles(n), act)
    exact, mixed = layer.plain(torch.float64, act), layer.plain(torch.float32, act)
    for name, a, b, c in zip(("y", "u", "mean", "rstd"), ours, mixed, exact, strict=True):
        assert_2x(a, b.to(a.dtype), c, name)


@pytest.mark.interpreted
def test_what_is_not_asked_for() -> None:
    """No bias, nothing kept; a result of another dtype, in rows that lie apart."""
    layer = Ensemble(3, 7, 21, 13, torch.float16)
    out = nan(21, 30, dtype=torch.float32)
    linear_act_norm_fwd(
        layer.x, layer.weight, out[:, :21], None, None, None, gamma=layer.gamma, beta=layer.beta,
        act="mish", eps=EPS, plan=tiles(21),
    )  # fmt: skip
    exact, mixed = (layer.plain(d, "mish", bias=False) for d in (torch.float64, torch.float32))
    assert_2x(out[:, :21], mixed[0], exact[0])
    assert out[:, 21:].isnan().all()


def gradient(
    layer: Ensemble,
    kept: tuple[Tensor, Tensor, Tensor],
    dy: Tensor,
    dy_scale: Tensor | None,
    weight: Tensor,
    dtype: torch.dtype,
    act: str,
    tf32: bool = False,
) -> tuple[Tensor, Tensor]:
    """``dx`` and ``[3, E N]`` gradients of gamma, beta and bias, in PyTorch."""
    d = multiply(dy, weight, layer.members, dtype, tf32)
    if dy_scale is not None:
        d *= dy_scale.to(dtype).unsqueeze(1)
    dx = torch.empty_like(d)
    sums = [torch.zeros_like(layer.gamma, dtype=torch.float64) for _ in range(3)]
    u, mean, rstd = (t.to(dtype) for t in kept)
    TorchKernels().act_norm_bwd(
        d,
        dx,
        u,
        mean,
        rstd,
        gamma=layer.gamma.to(dtype),
        act=act,
        rows_per_member=layer.rows if layer.members else 0,
        dgamma=sums[0],
        dbeta=sums[1],
        dbias=sums[2],
    )
    return dx, torch.stack([s.flatten() for s in sums])


def check_backward(
    layer: Ensemble, k: int, plan: Plan, act: str, precision: str, device: str = "cpu"
) -> None:
    """Rows of very different size; ``k`` columns above."""
    dtype, n, members = layer.x.dtype, layer.weight.shape[-2], layer.members
    total, lead = layer.x.shape[0], (members,) if members else ()
    _, *kept = (t.to(dtype if t.dim() == 2 else t.dtype) for t in layer.plain(torch.float32, act))
    dy = torch.randn(total, k) * 10.0 ** torch.linspace(-7, 2, total).unsqueeze(1)
    weight = (torch.randn(*lead, k, n) / k**0.5).to(dtype)
    dy_scale = dx_scale = None
    if dtype == torch.float16:
        dy_scale = torch.exp2(torch.ceil(torch.log2(dy.abs().amax(1))))
        dy = dy / dy_scale.unsqueeze(1)
        dx_scale = nan(total, dtype=torch.float32, device=device)
    dy = dy.to(dtype)
    blocks = -(-layer.rows // plan.block_m)
    dx = nan(total, n, dtype=dtype, device=device)
    parts = nan(3, max(members, 1), blocks, n, dtype=torch.float32, device=device)
    linear_act_norm_bwd(
        dy.to(device),
        weight.to(device),
        dx,
        *(t.to(device) for t in kept),
        gamma=layer.gamma.to(device),
        act=act,
        plan=plan,
        dy_scale=None if dy_scale is None else dy_scale.to(device),
        dx_scale=dx_scale,
        sums=parts,
        input_precision=precision,
    )
    args = layer, kept, dy, dy_scale, weight
    exact, exact_sums = gradient(*args, torch.float64, act)
    tf32 = precision == "tf32" and dtype == torch.float32
    mixed, mixed_sums = gradient(*args, torch.float32, act, tf32)
    dx, sums = dx.cpu(), parts.cpu().double().sum(2).view(3, -1)
    if dx_scale is not None:
        dx_scale = dx_scale.cpu()
        assert torch.equal(dx_scale, torch.exp2(torch.log2(dx_scale).round()))
        largest = dx.abs().amax(1).float()
        assert 0.49 < largest.min() <= largest.max() <= 1.0
        exact, mixed = (v / dx_scale.to(v.dtype).unsqueeze(1) for v in (exact, mixed))
    size = exact.abs().amax(1, keepdim=True)  # rows count alike
    ours, plain = ((v.double() / size).to(dtype) for v in (dx, mixed))
    assert_2x(ours, plain, exact / size, "dx")
    for name, a, b, c in zip(("gamma", "beta", "bias"), sums, mixed_sums, exact_sums, strict=True):
        size = c.abs().max()
        assert_2x((a / size).float(), (b / size).float(), c / size, name)


@pytest.mark.interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("act", ["none", "mish"])
@pytest.mark.parametrize(("members", "rows", "n", "k"), SHAPES)
def test_backward(members, rows, n, k, act, dtype) -> None:
    check_backward(Ensemble(members, rows, n, 8, dtype), k, tiles(n), act, "ieee")


@pytest.mark.interpreted
def test_a_zero_row_has_the_factor_one() -> None:
    layer = Ensemble(0, 3, 21, 8, torch.float16)
    _, u, mean, rstd = layer.forward(tiles(21), "mish")
    dy, weight = torch.randn(3, 5).half(), torch.randn(5, 21).half()
    dy[1] = 0
    dx, dx_scale = nan(3, 21, dtype=torch.float16), nan(3, dtype=torch.float32)
    linear_act_norm_bwd(
        dy, weight, dx, u, mean, rstd, gamma=layer.gamma, act="mish", plan=tiles(21),
        dy_scale=torch.tensor([2.0**-110, 1.0, 2.0**100]), dx_scale=dx_scale,
    )  # fmt: skip
    assert dx_scale[1] == 1.0
    assert not dx[1].any()
    assert (dx[::2].abs().amax(1) > 0.49).all()


@pytest.mark.interpreted
def test_fp16_overflows_and_keeps_nan() -> None:
    layer = Ensemble(3, 7, 21, 13, torch.float16)
    layer.gamma = layer.gamma * 1e6
    layer.x[3] = float("nan")
    y, *_ = layer.forward(tiles(21), "mish")
    assert y[3].isnan().all()
    others = torch.cat([y[:3], y[4:]])
    assert others.isinf().any()
    assert not others.isnan().any()


@pytest.mark.interpreted
def test_errors() -> None:
    layer = Ensemble(3, 7, 21, 13, torch.float32)
    with pytest.raises(ValueError, match="21 columns must lie in one tile, got tiles of 16"):
        layer.forward(tiles(16), "mish")
    with pytest.raises(ValueError, match='act must be "none" or "mish", got \'simnorm\''):
        layer.forward(tiles(21), "simnorm")
    layer.bias = layer.bias[0]
    with pytest.raises(ValueError, match=r"bias must be contiguous, \[3, 21\], got \[21\]"):
        layer.forward(tiles(21), "mish")
    layer.x = layer.x[1:]
    with pytest.raises(ValueError, match="20 rows are not as many for each of 3 members"):
        layer.forward(tiles(21), "mish")


# --- in a stack ------------------------------------------------------------------------------


class Fusing(TorchKernels):
    """PyTorch's element kernels, and Triton's fused products."""

    def __init__(self, precision: Precision) -> None:
        super().__init__(precision)
        self.products = TritonProducts(precision)


ROWS = 19  # of a member


def run(
    kernels: TorchKernels, specs: list[LayerSpec], params: list[LayerParams], inputs: list[Tensor]
) -> list[Tensor]:
    h, dy, x = inputs
    stack = Stack(kernels, specs, params, 1, h.shape[1], save=True, wgrad=True)
    results = [stack.forward(0, h[0].clone())]
    stack.start_backward(keep_first=True)
    dx, scale = stack.backward(0, dy[0].clone())
    assert scale is None  # it is float32 where a CPU stands in
    results.append(dx.clone())
    for grads in stack.param_grads(x):
        results += [g for g in grads if g is not None]
    fusing = isinstance(kernels, Fusing)
    assert [i for i, f in stack._fused_forward.items() if f] == ([1, 2] if fusing else [])
    assert sorted(i for i, f in stack._fused_backward.items() if f) == ([1, 2, 3] if fusing else [])
    return results


@pytest.mark.interpreted
@pytest.mark.parametrize("precision", [EXACT, FAST], ids=lambda p: p.name)
@pytest.mark.parametrize("members", [0, 1, 3])
def test_a_stack_with_fused_products(members: int, precision: Precision) -> None:
    sizes, lead = [24, 21, 17, 5], (members,) if members else ()
    specs, params = [], []
    for i, n in enumerate(sizes):
        k, hidden = sizes[i - 1] if i else 8, i < 3
        act = ("mish", "none", "mish", "none")[i]
        specs.append(LayerSpec("act_norm", act, bias=i != 2, norm=hidden, group=8, eps=EPS))
        weight, vectors = torch.randn(*lead, n, k) / k**0.5, torch.randn(3, *lead, n)
        params.append(
            LayerParams(
                weight,
                vectors[0] if i != 2 else None,
                1 + 0.3 * vectors[1] if hidden else None,
                0.3 * vectors[2] if hidden else None,
            )
        )
    inputs = [torch.randn(1, max(members, 1) * ROWS, n) for n in (24, 5, 8)]
    ours = run(Fusing(precision), specs, params, inputs)
    plain = run(TorchKernels(precision), specs, params, inputs)
    double = [LayerParams(*(None if t is None else t.double() for t in p)) for p in params]
    truth = run(TorchKernels(), specs, double, [t.double() for t in inputs])
    for i, (a, b, c) in enumerate(zip(ours, plain, truth, strict=True)):
        assert a.shape == b.shape == c.shape
        size = c.abs().max()
        error, allowed = (a - c).abs().max() / size, (b - c).abs().max() / size
        assert error <= 2 * allowed + 1e-6, f"result {i}: {error:.2e}, plain {allowed:.2e}"


# --- plans -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", ["linear_act_norm_fwd", "linear_act_norm_bwd"])
@pytest.mark.parametrize("n", [1, 101, 200, 400, 512])
def test_plans_hold_whole_rows_of_a_member(n: int, kernel: str) -> None:
    found = candidates(Product(kernel, 300, n, 400, members=3), Limits(132, 160 * 1024))
    assert found
    for p in found:
        assert p.tiles_n == 1 and p.block_n >= n
        assert p.groups == -(-300 // p.block_m)


def test_what_has_no_plan() -> None:
    product = Product("linear_act_norm_fwd", 1024, 200, 400, members=3)
    assert plan(product, Limits(132)) is not None
    for changed in ({"n": 513}, {"k": 401}):
        other = product._replace(**changed)
        assert candidates(other, Limits(132)) == [] and plan(other, Limits(132)) is None
    backward = Product("linear_act_norm_bwd", 300, 400, 200, members=3)
    assert [p.block_m for p in candidates(backward, Limits(132))] == [16]


# --- on a device -----------------------------------------------------------------------------


KINDS = {
    "exact": (torch.float32, "ieee"),
    "tf32": (torch.float32, "tf32"),
    "bf16": (torch.bfloat16, "tf32"),
    "fp16": (torch.float16, "tf32"),
}


# Members, rows of one, features, summed over.
REAL = [
    (3, 300, 400, 512),
    (3, 300, 200, 400),
    (0, 77, 101, 333),
    (2, 33, 399, 201),
    (1, 64, 512, 512),
]


@pytest.mark.parametrize(
    ("device", "members", "rows", "n", "k", "block_m", "kind"),
    on_devices(
        [
            (3, 2, 400, 512, 16, "fp16"),
            (3, 17, 200, 400, 32, "exact"),
            (0, 3, 101, 617, 16, "fp16"),
            (2, 1, 399, 201, 16, "exact"),
            (1, 3, 510, 777, 16, "fp16"),
        ],
        [(*sizes, block_m, kind) for sizes in REAL for block_m in (16, 32) for kind in KINDS],
    ),
)
def test_real_layers(device, members, rows, n, k, block_m, kind) -> None:
    dtype, precision = KINDS[kind]
    layer = Ensemble(members, rows, n, k, dtype)
    block_n = 256 if n <= 256 else 512
    fixed = (block_m, block_n, rows, n, 1, dtype.itemsize, 160 * 1024)
    plans = [make_plan(*fixed, backward) for backward in (False, True)]
    if plans == [None, None]:
        pytest.skip(f"rows of {n} do not fit {block_m} at a time")
    if plans[0] is not None:
        ours = layer.to(device).forward(plans[0], "mish", precision)
        exact = layer.plain(torch.float64, "mish")
        mixed = layer.plain(torch.float32, "mish", kind == "tf32")
        for name, a, b, c in zip(("y", "u", "mean", "rstd"), ours, mixed, exact, strict=True):
            assert_2x(a.cpu(), b.to(a.dtype), c, name)
    if plans[1] is not None:
        check_backward(layer, 200, plans[1], "mish", precision, device)
