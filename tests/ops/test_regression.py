"""Loss and gradients of value functions without autograd: as right as autograd's."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import pwm_fast
from pwm_fast import ops
from pwm_fast.backends import native, select
from pwm_fast.fused.regression import BlockedRegression, Regression
from pwm_fast.models import CriticEnsemble
from pwm_fast.ops import extend
from tests.helpers import assert_2x, errs_alike

_NATIVE = pytest.mark.skipif(native.why_missing() is not None, reason="no native kernels")
BACKENDS = [  # and PWM_FAST_GEMM: with torch's GEMMs native kernels run layer by layer
    pytest.param(("native", "native"), marks=_NATIVE, id="native"),
    pytest.param(("native", "torch"), marks=_NATIVE, id="native layers"),
    pytest.param(("torch", "auto"), id="torch"),
]
Found = tuple[Tensor, list[Tensor]]


@pytest.fixture(params=BACKENDS)
def backend(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[str, str]]:
    monkeypatch.setenv("PWM_FAST_GEMM", request.param[1])
    with select.backend(request.param[0]):
        yield request.param


def critics(
    units: tuple[int, ...], members: int, latent: int = 17, dtype: torch.dtype = torch.float32
) -> CriticEnsemble:
    torch.manual_seed(2)
    found = CriticEnsemble(latent, units, members).to(dtype)
    with torch.no_grad():
        for p in found.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return found


def batch(rows: int, latent: int = 17, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rows, latent, generator=g), torch.randn(rows, generator=g)


def by_autograd(critic: CriticEnsemble, x: Tensor, targets: Tensor) -> Found:
    with select.backend("reference"):
        loss = (critic(x) - targets).square().mean()
        return loss.detach(), list(torch.autograd.grad(loss, list(critic.parameters())))


def direct(critic: CriticEnsemble, x: Tensor, targets: Tensor) -> Found:
    step = extend.regression(critic.layers(), x)
    assert step is not None
    return step(x, targets)


@pytest.mark.parametrize("rows", [1, 7, 199, 512])
@pytest.mark.parametrize("members", [1, 2, 3])
@pytest.mark.parametrize("units", [(128, 128), (41,), (7, 33, 510)])
def test_as_right_as_autograd(
    units: tuple[int, ...], members: int, rows: int, backend: str
) -> None:
    critic, double = critics(units, members), critics(units, members).double()
    x, targets = batch(rows)
    near = torch.Generator().manual_seed(1)
    inputs = [x, *(x + 0.01 * torch.randn(x.shape, generator=near) for _ in range(16))]

    @functools.cache
    def ours(draw: int) -> list[Tensor]:
        loss, grads = direct(critic, inputs[draw], targets)
        return [loss, *(g.clone() for g in grads)]  # the next call writes over them

    @functools.cache
    def theirs(draw: int) -> list[Tensor]:
        loss, grads = by_autograd(critic, inputs[draw], targets)
        return [loss, *grads]

    @functools.cache
    def truth(draw: int) -> list[Tensor]:
        loss, grads = by_autograd(double, inputs[draw].double(), targets.double())
        return [loss, *grads]

    assert len(ours(0)) == len(theirs(0))
    for i in range(len(ours(0))):
        try:
            assert_2x(ours(0)[i], theirs(0)[i], truth(0)[i], f"gradient {i - 1}" if i else "loss")
        except AssertionError:
            of_draws = ([found(n)[i] for n in range(17)] for found in (ours, theirs, truth))
            if not errs_alike(*of_draws):
                raise


@pytest.mark.parametrize("members", [1, 3])
def test_the_formula_in_float64(members: int) -> None:
    """On plain PyTorch's kernels the two ways differ by rounding alone."""
    critic = critics((9, 5), members, dtype=torch.float64)
    x, targets = (t.double() for t in batch(33))
    with select.backend("torch"):
        loss, grads = direct(critic, x, targets)
    true_loss, truth = by_autograd(critic, x, targets)
    torch.testing.assert_close(loss, true_loss, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(grads, truth, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("members", [1, 3])
def test_every_call_reads_the_parameters_anew(members: int, backend: tuple[str, str]) -> None:
    """As they are after a step; and the last call's numbers are overwritten, not added to."""
    critic = critics((12, 12), members)
    x, targets = batch(20)
    step = extend.regression(critic.layers(), x)
    assert step is not None
    first = [g.clone() for g in step(x, targets)[1]]
    with torch.no_grad():
        for p, g in zip(critic.parameters(), first, strict=True):
            p.sub_(0.5 * g)
    other = batch(20, seed=5)
    loss, grads = step(*other)
    fresh_loss, fresh = direct(critic, *other)
    assert torch.equal(loss, fresh_loss)
    assert all(torch.equal(a, b) for a, b in zip(grads, fresh, strict=True))
    assert not any(p.grad is not None for p in critic.parameters())


def test_rows_that_are_views(backend: tuple[str, str]) -> None:
    """Minibatches are slices of one tensor."""
    critic = critics((12, 12), 2)
    x, targets = batch(40)
    whole = direct(critic, x[10:30], targets[10:30])
    copied = direct(critic, x[10:30].clone(), targets[10:30].clone())
    torch.testing.assert_close(whole, copied, rtol=0.0, atol=0.0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_shows(bad: float, backend: tuple[str, str]) -> None:
    critic = critics((12,), 2)
    x, targets = batch(9)
    targets[4] = bad
    loss, grads = direct(critic, x, targets)
    assert not loss.isfinite()
    assert not all(bool(g.isfinite().all()) for g in grads)


class _Counts(torch.utils._python_dispatch.TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        return function(*args, **(kwargs or {}))


def plain(critic: CriticEnsemble) -> list[ops.Layer]:
    return critic.layers()


OTHERS = {
    "the reference": ("reference", plain),
    "a head of width 2": (
        "torch",
        lambda c: [*c.layers()[:-1], ops.Layer(torch.randn(2, 2, 12), torch.randn(2, 2))],
    ),
    "a head alone": ("torch", lambda c: [ops.Layer(torch.randn(2, 1, 17), torch.randn(2, 1))]),
    "a layer without norm": (
        "torch",
        lambda c: [c.layers()[0]._replace(ln_weight=None, ln_bias=None), c.layers()[-1]],
    ),
    "a dropout mask": (
        "torch",
        lambda c: [c.layers()[0]._replace(dropout=torch.ones(2, 9, 12)), c.layers()[-1]],
    ),
    "no ensemble": (
        "torch",
        lambda c: [ops.Layer(*(None if t is None else t[0] for t in p[:4])) for p in c.layers()],
    ),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_what_it_does_not_cover(kind: str) -> None:
    backend, layers = OTHERS[kind]
    with select.backend(backend):
        assert extend.regression(layers(critics((12,), 2)), batch(9)[0]) is None


def test_where_somebody_watches_operators(backend: tuple[str, str]) -> None:
    critic, (x, _) = critics((12,), 2), batch(9)
    way = BlockedRegression if backend == ("native", "native") else Regression
    assert isinstance(extend.regression(critic.layers(), x), way)
    with _Counts():
        assert extend.regression(critic.layers(), x) is None
    with pwm_fast.precision("bf16"):
        assert extend.regression(critic.layers(), x) is None


def test_the_backend_that_is_asked_for_must_run_it() -> None:
    critic, (x, _) = critics((12,), 2, dtype=torch.float64), batch(9)
    with select.backend("native"), pytest.raises(pwm_fast.BackendError, match="float64"):
        extend.regression(critic.layers(), x.double())
