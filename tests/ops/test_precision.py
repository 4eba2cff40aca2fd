"""Precisions of products: right in each, and refused where they cannot be had."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import pwm_fast
from pwm_fast import ops
from pwm_fast.backends import select
from pwm_fast.backends.native import why_missing
from pwm_fast.backends.precision import FAST
from pwm_fast.backends.torch import TorchKernels, row_scale
from pwm_fast.fused import gemm
from tests.helpers import random_layer
from tests.ops.contract import (
    CASES,
    POLICIES,
    ROLLOUTS,
    Case,
    check_precision,
    values_and_gradients,
)

PRODUCTS = [
    *ROLLOUTS,
    *POLICIES,
    *(
        case
        for case in CASES
        if case.name.startswith(("mlp", "linear_norm_act", "flow_step"))
        or case.name == "linear_act_norm_ensemble_shared_input"
    ),
]
MODES = [("torch", "bf16"), ("torch", "fast"), ("native", "bf16")]


@pytest.mark.parametrize("pad", [False, True])
@pytest.mark.parametrize(("backend", "precision"), MODES)
@pytest.mark.parametrize("case", PRODUCTS, ids=lambda case: case.name)
def test_errs_no_more_than_autocast(case: Case, backend: str, precision: str, pad: bool) -> None:
    """At most twice PyTorch's own error in that precision, for outputs and every gradient."""
    if backend == "native" and why_missing() is not None:
        pytest.skip(f"no native kernels: {why_missing()}")
    with select.backend(backend), ops.algebra(pad=pad):
        check_precision(case, precision, 33, 33)


@pytest.mark.parametrize("precision", ["bf16", "fast"])
def test_small_and_large_gradients(precision: str) -> None:
    """Rows whose gradients are 1e-9 and 1e+4 of the others': neither is lost nor overflows."""
    torch.manual_seed(0)
    layers = [
        random_layer(40, 48, "mish", dtype=torch.float32),
        random_layer(48, 8, norm=False, dtype=torch.float32),
    ]
    x = torch.randn(6, 40, requires_grad=True)
    cotangent = torch.randn(6, 8) * torch.tensor([1e-9, 1.0, 1e4, 0.0, 1e-6, 1e2]).unsqueeze(1)

    def gradient(layers: list[ops.Layer], x: Tensor, cotangent: Tensor) -> Tensor:
        return torch.autograd.grad(ops.mlp((x,), layers), x, cotangent)[0]

    with select.backend("torch"), select.precision(precision):
        ours = gradient(layers, x, cotangent)
    double = [
        p._replace(**{k: v.double() for k, v in p._asdict().items() if isinstance(v, Tensor)})
        for p in layers
    ]
    truth = gradient(double, x.detach().double().requires_grad_(), cotangent.double())
    for row in range(6):
        error = (ours[row].double() - truth[row]).norm()
        assert error <= 0.02 * truth[row].norm(), row


def test_scales_are_powers_of_two() -> None:
    x = torch.tensor([[0.75, -3.0], [0.5, 0.25], [0.0, 0.0], [1e-30, 0.0], [1024.0, 1.0]])
    scale = row_scale(x)
    mantissa, _ = torch.frexp(scale)
    assert torch.equal(mantissa, torch.full_like(scale, 0.5))
    largest = (x / scale.unsqueeze(1)).abs().amax(1)
    assert torch.equal(scale[2], torch.tensor(1.0))
    assert ((largest > 0.5) & (largest <= 1.0))[[0, 1, 3, 4]].all()


def test_fp16_overflows_to_infinity() -> None:
    x = torch.tensor([[1e6, -1e6, float("nan"), 2.0]])
    out = torch.empty(1, 4, dtype=torch.float16)
    TorchKernels(FAST).cast(x, out, None)
    assert out[0, 0] == float("inf")
    assert out[0, 1] == -float("inf")
    assert out[0, 2].isnan()


@pytest.mark.parametrize("fold", [False, True])
def test_an_overflow_reaches_every_gradient(fold: bool) -> None:
    """A latent beyond fp16: what is skipped for it must not look sound."""
    case = next(
        c for c in ROLLOUTS if c.name == ("rollout_heun_folded" if fold else "rollout_heun")
    )
    inputs = case.inputs(4, 16, torch.float32)
    name = next(k for k, v in inputs.items() if k.startswith("z"))
    inputs[name] = inputs[name] * 1e6
    with select.backend("torch"), select.precision("fast"):
        found = values_and_gradients(case, case.call, inputs, False)
    gradients = [v for k, v in found.items() if k.startswith("gradient of") and v.numel()]
    assert gradients
    assert not any(bool(v.isfinite().all()) for v in gradients)


def test_bf16_without_hardware_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of rounded operands in float32 and products in bf16 agree to bf16's rounding."""
    layers = [random_layer(33, 32, "mish", dtype=torch.float32)]
    x = torch.randn(9, 33)
    found = []
    for hardware in (False, True):
        monkeypatch.setattr(gemm, "cpu_multiplies_bf16", lambda on=hardware: on)
        with select.backend("torch"), select.precision("bf16"):
            found.append(ops.mlp((x,), layers))
    assert not torch.equal(*found)
    torch.testing.assert_close(*found, rtol=0.02, atol=0.02)


def linear() -> tuple[Tensor, list[ops.Layer]]:
    return torch.randn(3, 5), [random_layer(5, 4, norm=False, dtype=torch.float32)]


def test_the_context_and_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert select.requested_precision() == "auto"
    monkeypatch.setenv(select.PRECISION_VARIABLE, "bf16")
    assert select.requested_precision() == "bf16"
    with pwm_fast.precision("exact"):
        assert select.requested_precision() == "exact"
    monkeypatch.setenv(select.PRECISION_VARIABLE, "fp8")
    with pytest.raises(ValueError, match=r"PWM_FAST_PRECISION must be one of auto, .* got 'fp8'"):
        select.requested_precision()
    with pytest.raises(ValueError, match="precision must be one of"), pwm_fast.precision("half"):
        pass


@pytest.mark.parametrize(
    ("precision", "backend", "message"),
    [
        ("fast", "native", "precision 'fast' is asked for; it has exact and bf16"),
        ("tf32", "torch", "precision 'tf32' is CUDA's; the tensors are on cpu"),
        ("bf16", "reference", "it computes in the tensors' own dtype"),
        ("fast", None, "no backend can run mlp; reference: precision 'fast' is asked for"),
    ],
)
def test_what_cannot_be_had(precision: str, backend: str | None, message: str) -> None:
    x, layers = linear()
    if backend == "native" and why_missing() is not None:
        pytest.skip(f"no native kernels: {why_missing()}")
    with select.precision(precision), pytest.raises(select.BackendError, match=message):
        ops.mlp((x,), layers, backend=backend)


def test_float64_has_no_precision() -> None:
    x, layers = linear()
    double = [layers[0]._replace(weight=layers[0].weight.double(), bias=None)]
    with select.precision("bf16"), pytest.raises(select.BackendError, match="float32 tensors"):
        ops.mlp((x.double(),), double, backend="torch")


def test_operations_without_products_do_not_care() -> None:
    with select.precision("bf16"):
        ops.simnorm(torch.randn(3, 16, dtype=torch.float64))
