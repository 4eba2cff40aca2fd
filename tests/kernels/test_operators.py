"""The operations on ``backend="triton"``: a little in the interpreter, all of it on a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

pytest.importorskip("triton")

from pwm_fast import ops
from pwm_fast.backends import select
from tests.helpers import random_layer
from tests.kernels.harness import DEVICES, gpu, on_devices
from tests.ops import test_flow_policy as flow_policy
from tests.ops.contract import ROLLOUTS, Case, check, check_precision
from tests.ops.test_backends import FUSED, NATIVE
from tests.ops.test_contract import expanded, strided, transposed
from tests.ops.test_precision import PRODUCTS

ROWS = tuple(case for case in NATIVE if case not in FUSED)


def name(case: Case) -> str:
    return case.name


@pytest.fixture(autouse=True)
def on_triton():
    with select.backend("triton"):
        yield


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", NATIVE, ids=name)
def test_contract(case: Case, device: str) -> None:
    """Odd and real widths; empty, single and odd batches, few of them in the interpreter."""
    sizes = [(batch, width) for batch in (0, 1, 199) for width in case.widths]
    if device == "cpu":
        sizes = [(3, 7), (2, case.widths[-1])]
        sizes += [(0, 7), (1, case.widths[2])] if case in ROWS else []
    with select.precision("exact"):
        for batch, width in sizes:
            inputs = case.inputs(batch, width, torch.float32)
            check(case, {k: v.to(device) for k, v in inputs.items()})


SOME = (
    "rollout_heun",
    "imagine_attached_heun_folded",
    "imagine_map",
    "mlp",
    "mlp_ensemble_dropout",
)


@pytest.mark.parametrize(
    ("device", "case"),
    on_devices(
        [(case,) for case in NATIVE if case in ROWS or case.name in SOME],
        [(case,) for case in NATIVE],
    ),
)
def test_strides(device: str, case: Case) -> None:
    """Of the outputs' gradients, too. Of real width where a row is all there is to compute."""
    width = case.widths[2] if case in ROWS else 33
    inputs = {k: v.to(device) for k, v in case.inputs(7, width, torch.float32).items()}
    with select.precision("exact"):
        check(case, inputs, summed=True)
        check(case, {k: strided(x) for k, x in inputs.items()})
        check(case, {k: transposed(x) for k, x in inputs.items()})
        check(case, inputs | {k: expanded(inputs[k]) for k in case.rows})


@pytest.mark.parametrize(
    ("device", "case", "precision", "pad"),
    on_devices(
        [(case, "fast", pad) for case in PRODUCTS if case.name in SOME for pad in (False, True)],
        [
            (case, precision, None)  # as it is by itself
            for case in PRODUCTS
            for precision in ("tf32", "bf16", "fast")
        ],
    ),
)
def test_precisions(device: str, case: Case, precision: str, pad: bool | None) -> None:
    sizes = ((9, 33), (2, 510)) if device == "cpu" else ((33, 33), (199, 510), (64, 777))
    with ops.algebra(centre=pad, pad=pad):
        for batch, width in sizes:
            check_precision(case, precision, batch, width, device)


@pytest.mark.interpreted
def test_any_group_of_simnorm() -> None:
    """Group widths that are no power of two take two kernels."""
    for group in (1, 3, 6, 8):
        layers = [random_layer(5, 24, "simnorm", simnorm_dim=group, dtype=torch.float32)]
        x = torch.randn(4, 5, requires_grad=True)
        weight = torch.randn(4, 24)
        found = {}
        for backend in ("triton", "reference"):
            y = (
                ops.mlp([x], layers, backend=backend)
                if backend == "reference"
                else exact(x, layers)
            )
            found[backend] = (y, *torch.autograd.grad((y * weight).sum(), x))
        for ours, theirs in zip(*found.values(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def exact(x: Tensor, layers: list[ops.Layer]) -> Tensor:
    with select.precision("exact"):
        return ops.mlp([x], layers, backend="triton")


@pytest.mark.interpreted
def test_opcheck() -> None:
    """Schemas, shapes and gradients of the row-wise operators as torch.library sees them."""
    x = torch.randn(3, 16, requires_grad=True)
    vector = torch.rand(16)
    operators = torch.ops.pwm_fast
    opcheck(operators.layer_norm_act, (x, vector, vector, "mish", 8, 1e-5, True, "triton", "exact"))
    opcheck(operators.simnorm, (x, 8, "triton", "exact"))
    opcheck(operators.two_hot_decode, (x, -10.0, 10.0, True, "triton", "exact"))
    opcheck(operators.two_hot_cross_entropy, (x, vector[:3], -10.0, 10.0, True, "triton", "exact"))


@pytest.mark.interpreted
def test_vmap() -> None:
    x, w, b = torch.randn(2, 3, 8), torch.rand(8), torch.rand(8)
    mapped = torch.vmap(lambda x: ops.layer_norm_act(x, w, b))(x)
    torch.testing.assert_close(mapped, ops.layer_norm_act(x, w, b))


@gpu
@pytest.mark.parametrize("case", ROLLOUTS[:2], ids=name)
def test_auto_takes_triton(case: Case) -> None:
    seen: list[str | None] = []
    inputs = {k: v.cuda() for k, v in case.inputs(7, 7, torch.float32).items()}
    with select.backend("auto"), select.observed(lambda *args: seen.append(args[2])):
        case.call(inputs)
    assert seen and set(seen) == {"triton"}


def test_what_it_refuses() -> None:
    """Without a GPU, and not in the interpreter, asking for it says what it needs."""
    with pytest.raises(select.BackendError, match="it runs on CUDA GPUs"):
        ops.simnorm(torch.randn(2, 8))


@pytest.mark.interpreted
def test_what_it_refuses_of_a_call() -> None:
    with pytest.raises(select.BackendError, match="float64; it computes in float32"):
        ops.simnorm(torch.randn(2, 8).double())
    with pytest.raises(ValueError, match="9000 features do not fit"):
        ops.layer_norm_act(torch.randn(1, 9000), torch.ones(9000), torch.ones(9000))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("form", "action"), [("ode", 1), ("meanflow", 3), ("gated", 3)])
def test_flow_policies(form: str, action: int, device: str) -> None:
    """A policy's flow against plain PyTorch: a state that is narrower than any tile."""
    torch.manual_seed(0)
    policy = flow_policy.policy_of(form, action=action, substeps=2)
    draw = flow_policy.arguments(policy, 3, 2)
    plain = flow_policy.cast(draw, torch.float64)
    expected = flow_policy.results(plain, flow_policy.slow_rollout(plain, True), noise=False)
    given = flow_policy.cast(draw, torch.float32)
    moved = {id(x): x.detach().to(device).requires_grad_() for x in flow_policy.leaves(given)}
    given = flow_policy.replaced(given, moved)
    given["noise"] = given["noise"].detach()
    with select.precision("exact"):
        ours = flow_policy.results(given, ops.imagine(**given)[:3], noise=False)
    for x, y in zip(ours, expected, strict=True):
        torch.testing.assert_close(x.double().cpu(), y, rtol=1e-4, atol=1e-4)
