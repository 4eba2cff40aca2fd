"""Rollouts layer by layer whose products end in the integrator's update, and those that do not."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from pwm_fast import ops
from pwm_fast.backends import select
from pwm_fast.fused import rollout as fused_rollout
from pwm_fast.kernels import linear_axpby, linear_norm_act, plan
from tests.helpers import assert_2x, random_layer
from tests.kernels.harness import on_devices

HORIZON, SUBSTEPS, ACTION = 2, 2, 3


class Sizes(NamedTuple):
    """Rows, latent and hidden features."""

    rows: int
    latent: int
    hidden: int


TINY = Sizes(9, 21, 33)
FEW = Sizes(3, 512, 510)
SIZES = (Sizes(128, 512, 510), Sizes(128, 768, 1788))  # 5M, 48M


def rollout(
    sizes: Sizes, dtype: torch.dtype, method: ops.Method, fold: bool, device: str = "cpu"
) -> list[Tensor]:
    """Latents and the gradients towards all inputs, on the CPU; on the backend in force."""
    generator = torch.Generator().manual_seed(0)
    rows, latent, hidden = sizes
    f32 = torch.float32

    def leaf(x: Tensor) -> Tensor:
        return x.to(device, dtype).requires_grad_()

    net = [
        random_layer(latent + ACTION + 1, hidden, "mish", dtype=f32, generator=generator),
        random_layer(hidden, hidden, "mish", dtype=f32, generator=generator),
        random_layer(hidden, latent, norm=False, dtype=f32, generator=generator),
    ]
    names = ("weight", "bias", "ln_weight", "ln_bias")
    net = [
        p._replace(**{n: leaf(getattr(p, n)) for n in names if getattr(p, n) is not None})
        for p in net
    ]
    z = leaf(torch.randn(rows, latent, generator=generator))
    action = leaf(torch.randn(HORIZON, rows, ACTION, generator=generator))
    out = ops.latent_rollout(z, action, ops.Flow(net, SUBSTEPS, method, fold=fold))
    weight = torch.randn(out.shape, generator=generator).to(device, dtype)
    inputs = [z, action, *(t for p in net for t in p[:4] if t is not None)]
    grads = torch.autograd.grad((out * weight).sum(), inputs)
    return [out.detach().cpu(), *(g.cpu() for g in grads)]


def launched(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts launches of the fused updates, and of backward products with an addend."""
    seen: Counter[str] = Counter()
    update, backward = linear_axpby.linear_axpby, linear_norm_act.linear_norm_act_bwd

    def counted_update(*args: object, **kwargs: object) -> None:
        seen["update"] += 1
        seen["cast"] += kwargs["cast"] is not None
        update(*args, **kwargs)  # type: ignore[arg-type]

    def counted_backward(*args: object, **kwargs: object) -> None:
        seen["add"] += kwargs["add"] is not None
        backward(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(linear_axpby, "linear_axpby", counted_update)
    monkeypatch.setattr(linear_norm_act, "linear_norm_act_bwd", counted_backward)
    return seen


def check(
    sizes: Sizes,
    precision: str,
    method: ops.Method,
    fold: bool,
    device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> Counter[str]:
    """Fused and not against float64; what the fused one launched."""
    monkeypatch.setenv(fused_rollout.VARIABLE, "layers")
    with select.backend("reference"):
        truth = rollout(sizes, torch.float64, method, fold)
    seen = launched(monkeypatch)
    with select.backend("triton"), select.precision(precision):
        ours = rollout(sizes, torch.float32, method, fold, device)
        found = seen.copy()
        monkeypatch.setenv(plan.VARIABLE, "0")
        plain = rollout(sizes, torch.float32, method, fold, device)
    assert seen == found, "not fused, but launched"
    for i, (a, b, c) in enumerate(zip(ours, plain, truth, strict=True)):
        size = c.abs().max()
        assert_2x((a / size).float(), b / size.float(), c / size, f"result {i}")
    return found


# Each pair of a fold, an integrator and a precision.
PAIRS = [
    (False, "heun", "fast"),
    (False, "euler", "exact"),
    (True, "heun", "exact"),
    (True, "euler", "fast"),
]
OTHERS = [(not fold, method, precision) for fold, method, precision in PAIRS]


@pytest.mark.interpreted
@pytest.mark.parametrize(
    ("fold", "method", "precision"),
    [*PAIRS, *(pytest.param(*x, marks=pytest.mark.repeats) for x in OTHERS)],
)
def test_as_right_as_products_and_updates_apart(
    fold: bool, method: ops.Method, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = check(TINY, precision, method, fold, "cpu", monkeypatch)
    evals = HORIZON * SUBSTEPS * (2 if method == "heun" else 1)
    # Folded: an update an evaluation and the latent's once a macro step; backward the addend.
    assert found["update"] == (evals + HORIZON if fold else 2 * evals)
    assert found["add"] == (evals if fold else 0)
    # No product takes the rollout's last latent.
    assert found["cast"] == (evals - 1 if precision == "fast" and not fold else 0)


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize(
    ("device", "sizes", "method", "precision"),
    on_devices(
        [(FEW, "heun", "fast"), (FEW, "euler", "exact")],
        [
            (sizes, method, precision)
            for sizes in SIZES
            for method in ("heun", "euler")
            for precision in ("tf32", "bf16", "fast")
        ],
    ),
)
def test_real_nets(
    device: str,
    sizes: Sizes,
    method: ops.Method,
    precision: str,
    fold: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whether the plan fuses is its own choice at these sizes; either is as right."""
    check(sizes, precision, method, fold, device, monkeypatch)
