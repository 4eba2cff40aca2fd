"""Rollouts on the persistent kernels through the public operations, and when they are taken."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from pwm_fast import ops
from pwm_fast.backends import select
from pwm_fast.backends.base import Kernels
from pwm_fast.backends.precision import EXACT, FAST
from pwm_fast.backends.specs import DynamicsSpec, LayerSpec
from pwm_fast.backends.torch import TorchKernels
from pwm_fast.backends.triton import TritonKernels
from pwm_fast.fused import persistent
from pwm_fast.fused import rollout as fused_rollout
from pwm_fast.fused.rollout import Sizes, candidates
from pwm_fast.kernels import rollout
from pwm_fast.kernels.launch import INTERPRETING
from pwm_fast.kernels.rollout_plan import EXCHANGES
from tests.helpers import assert_2x, random_layer
from tests.ops.contract import ROLLOUTS, Case
from tests.ops.test_precision import check_precision

# Of width 33 their hidden layers have 31 and 29 features, padded to 64.
FOLDED = [
    case
    for case in ROLLOUTS
    if case.name in ("rollout_heun_folded", "imagine_euler_folded", "imagine_attached_heun_folded")
]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the persistent kernels as they are launched."""
    seen: list[str] = []

    def spied(name: str) -> None:
        original = getattr(persistent, name)

        def launch(*args: object, **kwargs: object) -> object:
            seen.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(persistent, name, launch)

    spied("rollout_forward")
    spied("rollout_backward")
    with select.backend("triton"):
        yield seen


@pytest.fixture(params=EXCHANGES)
def exchange(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """How the programs of every launch exchange."""
    plan, workspace = rollout.choose_layout, persistent.Workspace
    made: list[str] = []

    def planned(*args: Any) -> rollout.RolloutLayout | str:
        found = plan(*args)
        return found if isinstance(found, str) else found._replace(exchange=request.param)

    def recorded(plan: rollout.RolloutLayout, *args: Any) -> rollout.Workspace:
        made.append(plan.exchange)
        return workspace(plan, *args)

    monkeypatch.setattr(rollout, "choose_layout", planned)
    monkeypatch.setattr(persistent, "Workspace", recorded)
    yield
    if INTERPRETING:  # else the test runs in another process
        assert set(made) == {request.param}


@pytest.mark.interpreted
@pytest.mark.usefixtures("exchange")
@pytest.mark.parametrize("case", FOLDED, ids=lambda case: case.name)
def test_contract(case: Case, launches: list[str]) -> None:
    """Results and gradients by the 2x rule, one launch a direction where no policy is between."""
    for batch, width in ((9, 33), (2, 510)):
        launches.clear()
        with ops.algebra(centre=True, pad=True):
            check_precision(case, "fast", batch, width)
        assert "rollout_forward" in launches and "rollout_backward" in launches


def _rollout(
    dtype: torch.dtype, wgrad: bool, method: ops.Method = "heun", steps: int = 3
) -> tuple[Tensor, list[Tensor]]:
    """A rollout and its gradients, on the backend in force, folded by default."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype).requires_grad_()

    net = [
        random_layer(21 + 3 + 1, 33, "mish", dtype=torch.float32, generator=generator),
        random_layer(33, 33, "mish", dtype=torch.float32, generator=generator),
        random_layer(33, 21, norm=False, dtype=torch.float32, generator=generator),
    ]
    made = [
        p._replace(
            **{
                name: getattr(p, name).to(dtype).requires_grad_(wgrad)
                for name in ("weight", "bias", "ln_weight", "ln_bias")
                if getattr(p, name) is not None
            }
        )
        for p in net
    ]
    z, action = normal(9, 21), normal(steps, 9, 3)
    out = ops.latent_rollout(z, action, ops.Flow(made, 2, method))
    weights = [t for p in made for t in p[:4] if t is not None] if wgrad else []
    loss = (out * torch.randn(out.shape, generator=generator).to(dtype)).sum()
    return out.detach(), list(torch.autograd.grad(loss, [z, action, *weights]))


@pytest.mark.interpreted
@pytest.mark.usefixtures("exchange")
@pytest.mark.parametrize("wgrad", [False, True])
@pytest.mark.parametrize("method", ["heun", "euler"])
def test_as_right_as_layer_by_layer(
    method: ops.Method, wgrad: bool, launches: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with select.backend("reference"):
        truth = _rollout(torch.float64, wgrad, method)
    with select.precision("fast"), ops.algebra(centre=True, pad=True):
        ours = _rollout(torch.float32, wgrad, method)
        assert launches == ["rollout_forward", "rollout_backward"]
        monkeypatch.setenv(fused_rollout.VARIABLE, "layers")
        layers = _rollout(torch.float32, wgrad, method)
        assert len(launches) == 2
    assert_2x(ours[0], layers[0], truth[0], "z")
    for i, (a, b, c) in enumerate(zip(ours[1], layers[1], truth[1], strict=True)):
        assert_2x(a, b, c, f"gradient {i}")


@pytest.mark.interpreted
@pytest.mark.parametrize("wgrad", [False, True])
def test_no_macro_steps(wgrad: bool, launches: list[str]) -> None:
    with select.precision("fast"), ops.algebra(centre=True, pad=True):
        z, (dz, *others) = _rollout(torch.float32, wgrad, steps=0)
    assert not launches
    assert z.shape == (1, 9, 21) and dz.abs().min() > 0
    assert all(not grad.any() for grad in others)


# --- the choice ---------------------------------------------------------------------------------

_HIDDEN = LayerSpec("norm_act", "mish", True, True, 8, 1e-5, 510)
_HEAD = LayerSpec("norm_act", "none", True, False, 8, 1e-5)
_SPEC = DynamicsSpec((_HIDDEN, _HIDDEN, _HEAD), "heun", 4, True)
_SIZES = Sizes(128, 512, 512, 512)


def _reasons(
    spec: DynamicsSpec = _SPEC,
    sizes: Sizes = _SIZES,
    kernels: Kernels | None = None,
) -> dict[str, str | None]:
    kernels = TritonKernels(FAST) if kernels is None else kernels
    found = candidates(kernels, spec, sizes, torch.device("cuda"))
    return {c.name: c.reason for c in found}


def test_every_way_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_rollout, "_limits", lambda index: (132, 227 * 1024))
    monkeypatch.setattr(fused_rollout, "_tuned", lambda index: None)
    found = _reasons()
    assert list(found) == ["cluster", "persistent", "blocks", "layers"]
    assert "backend native" in str(found["blocks"])
    assert "not built" in str(found["cluster"])
    assert found["persistent"] is None and found["layers"] is None
    for match, changed in (
        ("backend triton", {"kernels": TorchKernels(FAST)}),
        ("not folded", {"spec": replace(_SPEC, fold=False)}),
        ("two hidden layers", {"spec": replace(_SPEC, layers=(_HIDDEN, _HEAD))}),
        ("Mish", {"spec": replace(_SPEC, layers=(replace(_HIDDEN, act="none"), _HIDDEN, _HEAD))}),
        ("centred", {"spec": replace(_SPEC, layers=(replace(_HIDDEN, width=0),) * 2 + (_HEAD,))}),
        ("same multiple", {"sizes": Sizes(128, 512, 256, 512)}),
        ("multiple of 64", {"sizes": Sizes(128, 510, 510, 512)}),
        ("tensor cores", {"kernels": TritonKernels(EXACT)}),
        ("multiprocessors", {"sizes": Sizes(16384, 512, 512, 512)}),
    ):
        found = _reasons(**changed)  # type: ignore[arg-type]
        assert match in str(found["persistent"]), match
        assert found["layers"] is None


def test_the_environment_rules_one_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_rollout, "_limits", lambda index: (132, 227 * 1024))
    monkeypatch.setattr(fused_rollout, "_tuned", lambda index: None)
    monkeypatch.setenv(fused_rollout.VARIABLE, "layers")
    assert "is layers" in str(_reasons()["persistent"])
    monkeypatch.setenv(fused_rollout.VARIABLE, "fast")
    with pytest.raises(ValueError, match="PWM_FAST_ARCHITECTURE"):
        _reasons()
