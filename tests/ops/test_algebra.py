"""Every identity of the algebra, alone and together, changes nothing but rounding."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from pwm_fast import ops
from pwm_fast.backends import select
from pwm_fast.backends.native import why_missing
from pwm_fast.backends.specs import decode_dynamics
from pwm_fast.fused import algebra
from pwm_fast.ops import weights
from pwm_fast.ops.types import FusedStep
from tests.helpers import choice, random_layer
from tests.ops.contract import CASES, POLICIES, ROLLOUTS, Case, check

DEFAULT: dict[str, bool] = {}
ALONE = [
    {"hoist": False},
    {"fold": False},
    {"fold": True},
    {"centre": True},
    {"pad": True},
    {"batch_heads": False},
]
TOGETHER = [
    dict(zip(("hoist", "fold", "pad", "batch_heads"), on, strict=True))
    for on in itertools.product((False, True), repeat=4)
]
LAYERS = [
    case
    for case in CASES
    if case.name.startswith(("mlp", "linear_norm_act", "velocity_field", "flow_step"))
]


def name(switches: dict[str, bool]) -> str:
    return " ".join(f"{'' if on else 'no '}{k}" for k, on in switches.items())


def differentiable(case: Case) -> Case:
    """The case with gradients towards everything, also where the dynamics were frozen."""
    return dataclasses.replace(case, constants=tuple({*case.constants} & {"noise", "mask"}))


@pytest.mark.parametrize("switches", [*ALONE, *TOGETHER], ids=name)
@pytest.mark.parametrize("case", [*ROLLOUTS, *POLICIES, *LAYERS], ids=lambda case: case.name)
def test_in_float64(case: Case, switches: dict[str, bool]) -> None:
    with select.backend("torch"), ops.algebra(**switches):
        for each in {case.constants: case, (): differentiable(case)}.values():
            check(each, each.inputs(3, 7, torch.float64))


@pytest.mark.parametrize("backend", ["torch", "native"])
@pytest.mark.parametrize(
    "switches", [s for s in ALONE if not {"centre", "pad"} & s.keys()], ids=name
)
@pytest.mark.parametrize("case", ROLLOUTS, ids=lambda case: case.name)
def test_in_float32(case: Case, switches: dict[str, bool], backend: str) -> None:
    """The 2x rule, but for centring: it rounds weights once more and so belongs to 16-bit operands.

    There it is held to the rule by test_precision.py.
    """
    if backend == "native" and why_missing() is not None:
        pytest.skip(f"no native kernels: {why_missing()}")
    with select.backend(backend), ops.algebra(**switches):
        check(case, case.inputs(33, 33, torch.float32))


@pytest.mark.parametrize("width", [7, 64, 510])
@pytest.mark.parametrize("pad", [False, True])
def test_centred_layers(width: int, pad: bool) -> None:
    layers = [
        random_layer(11, width, "mish"),
        random_layer(width, width, "mish", bias=False),
        random_layer(width, 24, "simnorm"),
        random_layer(24, 5, norm=False),
    ]
    with ops.algebra(centre=True, pad=pad):
        packed, widths = weights.centred(choice("torch"), layers)
    assert widths == [width, width, 24, 0]
    padded = -(-width // algebra.PAD_TO) * algebra.PAD_TO if pad else width
    assert [tuple(p.weight.shape) for p in packed] == [
        (padded, 11),
        (padded, padded),
        (24, padded),
        (5, 24),
    ]
    for layer in packed[:3]:
        assert layer.weight.mean(0).abs().max() < 1e-15
    assert packed[3] is not layers[3]
    assert torch.equal(packed[3].weight, layers[3].weight)
    assert not packed[0].weight[width:].any()
    assert packed[0].ln_weight is not None
    assert not packed[0].ln_weight[width:].any()


@pytest.mark.parametrize(
    ("backend", "frozen", "trained"),
    [
        ("native", True, False),
        ("native+bf16", True, False),
        ("torch+fast", True, False),
        ("triton", True, False),
        ("triton+bf16", True, True),
        ("triton+fast", True, True),
    ],
)
def test_what_is_folded_by_default(backend: str, frozen: bool, trained: bool) -> None:
    """Trained dynamics only where that spares more than the fold's own GEMMs cost."""
    latent, hidden, action = 16, 24, 3
    net = [
        random_layer(latent + action + 1, hidden, "mish", dtype=torch.float32),
        random_layer(hidden, latent, norm=False, dtype=torch.float32),
    ]
    wide = [random_layer(latent + action + 1, 2 * latent, "mish"), random_layer(2 * latent, latent)]

    def folded(layers: list[ops.Layer]) -> bool:
        with ops.algebra(centre=False):  # which takes a kernel
            step = FusedStep(layers, "heun", 2, fold=None)
            packed = weights.pack(choice(*backend.split("+")), step, latent, action)
        return decode_dynamics(packed.spec).fold

    for grad, expected in ((False, frozen), (True, trained)):
        layers = [p._replace(weight=p.weight.detach().requires_grad_(grad)) for p in net]
        assert folded(layers) is expected
    assert not folded(wide)


@pytest.mark.parametrize("backend", ["native", "native+bf16", "torch"])
def test_a_trained_fold_pays_on_many_rows(backend: str) -> None:
    """Of 128 features and more, in fp32 on native kernels."""
    latent, action, substeps = 128, 3, 2

    def folded(hidden: int, rows: int, grad: bool = True) -> bool:
        first = random_layer(latent + action + 1, hidden, "mish", dtype=torch.float32)
        net = [first, random_layer(hidden, latent, norm=False, dtype=torch.float32)]
        net[0] = first._replace(weight=first.weight.detach().requires_grad_(grad))
        step = FusedStep(net, "heun", substeps, fold=None)
        packed = weights.pack(choice(*backend.split("+")), step, latent, action, rows=rows)
        return decode_dynamics(packed.spec).fold

    least = 6 * 128 // (2 * substeps)  # rows for as many evaluations as the GEMMs cost, six times
    assert folded(128, 1, grad=False)
    assert not folded(127, 10 * least) and not folded(128, least - 1)
    assert folded(128, least) is (backend == "native")
    assert not folded(192, 2 * least - 1)  # spares less
    assert folded(192, 3 * least) is (backend == "native")


def test_the_users_weights_stay_as_they_are() -> None:
    layers = [random_layer(9, 7, "mish"), random_layer(7, 4, norm=False)]
    before = [p.weight.clone() for p in layers]
    with ops.algebra(pad=True), select.backend("torch"):
        ops.mlp((torch.randn(3, 9, dtype=torch.float64),), layers)
    assert all(torch.equal(p.weight, w) for p, w in zip(layers, before, strict=True))


def test_contexts_nest() -> None:
    with ops.algebra(fold=True):
        with ops.algebra(centre=True):
            assert algebra.in_force().fold
            assert algebra.in_force().centre
        assert algebra.in_force().centre is None
    assert algebra.in_force() == algebra.Algebra()


def test_padding_needs_centring() -> None:
    with (
        pytest.raises(ValueError, match="pad=True needs centred weights"),
        ops.algebra(pad=True, centre=False),
    ):
        pass
