"""Accelerated stacks the short way: what changes later is noticed, as by the plan."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, jvp, vmap
from torch.nn.modules import module as globals_of_torch
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import pwm_fast
from pwm_fast import ops
from pwm_fast.acceleration import shortcut
from pwm_fast.acceleration.shortcut import Shortcut
from pwm_fast.acceleration.stack import AcceleratedStack
from pwm_fast.backends import select
from pwm_fast.fused import gemm
from tests.acceleration import modules as m

pytest.importorskip("pwm_fast._C", reason="the native extension is not built")

X = torch.randn(4, 10, generator=torch.Generator().manual_seed(0))
SHORT: list[bool] = []


@pytest.fixture(autouse=True)
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Write down which calls went the short way."""
    monkeypatch.delenv(select.VARIABLE, raising=False)
    original = Shortcut.run

    def run(self: Shortcut, stack: Any, x: Tensor) -> Tensor | None:
        y = original(self, stack, x)
        SHORT.append(y is not None)
        return y

    monkeypatch.setattr(Shortcut, "run", run)
    SHORT.clear()
    yield


def in_a_row() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(10, 16), nn.LayerNorm(16), m.SimNorm(8), nn.Linear(16, 4, bias=False)
    )


def in_one() -> nn.Sequential:
    stack = m.mlp(10, [16], 16, act=m.SimNorm(8))
    stack[0].dropout = nn.Dropout(0.0)
    return stack


def known(make: Callable[[], nn.Sequential] = in_one) -> Any:
    """An accelerated stack whose calls on :data:`X` go the short way."""
    fast = pwm_fast.accelerate(make())
    for _ in range(2):
        fast(X)
    assert goes_short(fast)
    return fast


def goes_short(fast: nn.Module, x: Tensor | None = None) -> bool:
    SHORT.clear()
    fast(X if x is None else x)
    return SHORT == [True]


def plain(fast: Any, x: Tensor = X) -> Tensor:
    """What the modules compute one by one."""
    return nn.Sequential.forward(fast, x)


class Other(nn.Linear):
    """Another class with another forward pass."""

    def forward(self, x: Tensor) -> Tensor:
        return 2.0 * super().forward(x)


class Norm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return 2.0 * super().forward(x)


HOOKS = (
    "register_forward_hook",
    "register_forward_pre_hook",
    "register_full_backward_hook",
    "register_full_backward_pre_hook",
)


@pytest.mark.parametrize("register", HOOKS)
@pytest.mark.parametrize("where", ["0", "0.ln", "1.act"])
def test_hooks(register: str, where: str) -> None:
    fast = known()
    fired: list[int] = []
    handle = getattr(fast.get_submodule(where), register)(lambda *_: fired.append(1))
    fast(X.clone().requires_grad_()).sum().backward()
    assert fired == [1]
    handle.remove()
    assert goes_short(fast)


GLOBAL_HOOKS = (
    "register_module_forward_hook",
    "register_module_forward_pre_hook",
    "register_module_full_backward_hook",
    "register_module_full_backward_pre_hook",
)


@pytest.mark.parametrize("register", GLOBAL_HOOKS)
def test_hooks_of_all_modules(register: str) -> None:
    fast = known()
    fired: list[type] = []
    handle = getattr(globals_of_torch, register)(lambda module, *_: fired.append(type(module)))
    try:
        fast(X.clone().requires_grad_()).sum().backward()
    finally:
        handle.remove()
    assert nn.LayerNorm in fired
    assert goes_short(fast)


def norm_of_16() -> nn.LayerNorm:
    norm = nn.LayerNorm(16)
    with torch.no_grad():
        norm.weight.mul_(3.0)
    return norm


def normed_weight(fast: Any) -> None:
    parametrizations.weight_norm(fast[3])
    with torch.no_grad():
        fast[3].parametrizations.weight.original0.mul_(2.0)


def no_parameter(fast: Any) -> None:
    del fast[3].weight
    fast[3].weight = torch.randn(4, 16)


CHANGES: dict[str, tuple[Callable[[], nn.Sequential], Callable[[Any], object]]] = {
    "module": (in_one, lambda f: f.__setitem__(0, m.NormedLinear(10, 16))),
    "module appended": (in_one, lambda f: f.append(nn.Tanh())),
    "module deleted": (in_one, lambda f: f.__delitem__(1)),
    "modules in another dictionary": (in_one, lambda f: setattr(f, "_modules", {"0": f[0]})),
    "norm": (in_one, lambda f: setattr(f[0], "ln", norm_of_16())),
    "activation": (in_one, lambda f: setattr(f[0], "act", nn.ReLU())),
    "activation is gone": (in_one, lambda f: setattr(f[0], "act", nn.Identity())),
    "class": (in_a_row, lambda f: setattr(f[3], "__class__", Other)),
    "class of an inner module": (in_one, lambda f: setattr(f[0].ln, "__class__", Norm)),
    "parametrization": (in_a_row, normed_weight),
    "forward": (in_a_row, lambda f: setattr(f[1], "forward", lambda x: 2.0 * x)),
    "epsilon": (in_one, lambda f: setattr(f[0].ln, "eps", 1.0)),
    "groups": (in_a_row, lambda f: setattr(f[2], "dim", 4)),
    "weight": (in_a_row, lambda f: setattr(f[0], "weight", nn.Parameter(torch.randn(16, 10)))),
    "weight that is no parameter": (in_a_row, no_parameter),
    "data": (in_a_row, lambda f: setattr(f[0].weight, "data", torch.randn(16, 10))),
    "values": (in_one, lambda f: f[0].ln.bias.data.add_(1.0)),
    "bias": (in_a_row, lambda f: setattr(f[3], "bias", nn.Parameter(torch.randn(4)))),
    "no bias": (in_a_row, lambda f: setattr(f[0], "bias", None)),
    "state": (
        in_one,
        lambda f: f.load_state_dict(
            {k: torch.randn_like(v) for k, v in f.state_dict().items()}, assign=True
        ),
    ),
    "turned": (in_a_row, lambda f: setattr(f[0].weight, "data", torch.randn(10, 16).t())),
    "negative": (in_a_row, lambda f: setattr(f[3].weight, "data", torch._neg_view(f[3].weight))),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changes(name: str) -> None:
    """The next call computes what the modules now do, with and without gradients."""
    make, change = CHANGES[name]
    fast = known(make)
    before = fast(X)
    change(fast)
    expected = plain(fast)
    assert before.shape != expected.shape or not torch.allclose(before, expected, atol=1e-2)
    for _ in range(2):
        torch.testing.assert_close(fast(X), expected, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(fast(X), expected, atol=1e-4, rtol=1e-4)


def test_what_is_learnt_again() -> None:
    """Where the modules still are a stack's, calls soon go the short way again."""
    for change in (
        lambda f: setattr(f[1], "eps", 1.0),
        lambda f: setattr(f[2], "dim", 4),
        lambda f: setattr(f[0], "bias", None),
        lambda f: f.__setitem__(1, norm_of_16()),
        lambda f: f.__setitem__(3, nn.Linear(16, 7, bias=False)),
        lambda f: setattr(f[3], "weight", nn.Parameter(torch.randn(5, 16))),
        lambda f: setattr(f[3], "bias", nn.Parameter(torch.randn(4))),
    ):
        fast = known(in_a_row)
        change(fast)
        assert not goes_short(fast)
        assert goes_short(fast)
        torch.testing.assert_close(fast(X), plain(fast), atol=1e-5, rtol=1e-5)


def test_forward_of_a_class() -> None:
    fast = known(in_a_row)
    with mock.patch.object(nn.LayerNorm, "forward", lambda self, x: 2.0 * x):
        torch.testing.assert_close(fast(X), plain(fast))
    assert goes_short(fast)


def test_dropout() -> None:
    """A rate that was 0, and the mode where it was not."""
    fast = known()
    fast[0].dropout.p = 0.5
    assert not torch.equal(fast(X), fast(X))
    fast.eval()
    assert torch.equal(fast(X), fast(X))
    fast = pwm_fast.accelerate(m.mlp(10, [16], 3, dropout=0.5)).eval()
    for _ in range(2):
        expected = fast(X)
    assert goes_short(fast)
    fast.train()
    assert not torch.equal(fast(X), fast(X))
    fast[0].dropout.p = 0.0
    torch.testing.assert_close(fast(X), expected)
    assert goes_short(fast)
    fast[0].dropout.p = 0.5
    assert not torch.equal(fast(X), fast(X))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    fast = known()
    assert fast.to(dtype)(X.to(dtype)).dtype == dtype
    with pytest.raises(RuntimeError, match="dtype"):
        fast(X)
    assert goes_short(fast.float())
    with pytest.raises(RuntimeError, match="dtype"):
        fast(X.double())
    fast = pwm_fast.accelerate(in_one()).double()
    fast(X.double())
    assert fast._shortcut is None, "there is nothing to learn"


def test_settings_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a backend is chosen by is looked at in every call."""
    fast = known()
    for block in (
        pwm_fast.backend("reference"),
        pwm_fast.backend("torch"),
        pwm_fast.precision("bf16"),
        ops.algebra(centre=True),
        torch.autocast("cpu"),
    ):
        with block:
            for _ in range(3):
                assert not goes_short(fast)
        assert goes_short(fast)
    with pwm_fast.backend("native"):
        fast(X)
        assert goes_short(fast)
    with monkeypatch.context() as patch:
        patch.setenv(select.VARIABLE, "reference")
        for _ in range(3):
            assert not goes_short(fast)
    with monkeypatch.context() as patch:
        patch.setenv(gemm.VARIABLE, "torch")
        assert not goes_short(fast)  # the first of its kind, which runs layer by layer
        assert goes_short(fast)
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="PWM_FAST_BACKEND"):
        patch.setenv(select.VARIABLE, "nothing")
        fast(X)
    assert goes_short(fast)
    calls: list[str] = []
    with select.observed(lambda operation, *_: calls.append(operation)):
        fast(X)
    assert calls == ["mlp"]


def test_wide_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a few rows they run block by block, on more layer by layer; both go the short way."""
    monkeypatch.setattr(gemm, "_WIDEST", 8)
    fast = pwm_fast.accelerate(m.mlp(10, [17], 3))
    for rows in (4, 64, 4, 64):
        x = torch.randn(rows, 10)
        fast(x)
        assert goes_short(fast, x)
        torch.testing.assert_close(fast(x), plain(fast, x))


def test_few_situations_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shortcut, "_LIMIT", 2)
    fast = known()
    for number in range(4):
        with ops.algebra(fold=bool(number % 2)):
            fast(torch.randn(20 if number > 1 else 4, 10))
            assert len(fast._shortcut._known) <= 2


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_transforms() -> None:
    """Under vmap, in forward mode, inside a trace and a compiler, as ever."""
    fast = known()
    expected = plain(fast)
    torch.testing.assert_close(vmap(fast)(X), expected)
    with torch.no_grad():
        primal, tangent = jvp(fast, (X,), (X,))
        theirs = jvp(lambda x: plain(fast, x), (X,), (X,))
    torch.testing.assert_close((primal, tangent), theirs, atol=1e-5, rtol=1e-5)
    with forward_ad.dual_level(), torch.no_grad():
        _, tangent = forward_ad.unpack_dual(fast(forward_ad.make_dual(X, X)))
    torch.testing.assert_close(tangent, theirs[1], atol=1e-5, rtol=1e-5)
    traced = torch.jit.trace(fast, (X,), check_trace=False)
    torch.testing.assert_close(traced(X[:3]), expected[:3])
    compiled = torch.compile(fast, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(X), expected)
    with torch.inference_mode():
        made = X.clone()
        torch.testing.assert_close(fast(made), expected)
    with pytest.raises(RuntimeError, match="Inference tensors"):
        plain(fast, made)
    torch.testing.assert_close(fast(made), expected)
    assert goes_short(fast)


def test_parameters_of_a_call() -> None:
    """``functional_call`` puts others in for a while; those of an ensemble keep its axis."""
    fast = known()
    other = {name: torch.randn_like(p) for name, p in fast.named_parameters()}
    torch.testing.assert_close(
        functional_call(fast, other, (X,)), functional_call(nn.Sequential(*fast), other, (X,))
    )
    assert goes_short(fast)
    one = {name: p[None] for name, p in other.items()}
    assert functional_call(fast, one, (X,)).shape == (1, 4, 16)
    assert goes_short(fast)


def test_inputs() -> None:
    """Ranks, no rows, strides, subclasses and wrong widths."""
    fast = known()
    for x in (X[0], X.view(2, 2, 10), X[:0], X.t().contiguous().t(), nn.Parameter(X.clone())):
        torch.testing.assert_close(fast(x), plain(fast, x), atol=1e-5, rtol=1e-5)
    negative = torch._neg_view(-X)
    assert negative.is_neg() and negative.is_contiguous()
    torch.testing.assert_close(fast(negative), plain(fast), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="10 inputs, but 9 arrive"):
        fast(X[:, :9])
    with pytest.raises(ValueError, match="10 inputs, but 0 arrive"):
        fast(X.new_empty(2, 3, 0))
    with pytest.raises(ValueError, match="must have at least one axis"):
        fast(X[0, 0])
    with pytest.raises(TypeError, match=r"inputs\[0\] must be a torch.Tensor"):
        fast([1.0])
    assert goes_short(fast)


@pytest.mark.parametrize("frozen", [False, True])
def test_gradients(frozen: bool) -> None:
    """Those of all parameters, of some, and of the input alone."""
    fast = known().requires_grad_(not frozen)
    x = X.clone().requires_grad_()
    for some in (False, True):
        if some:
            fast[0].bias.requires_grad_(frozen)
        leaves = [x, *(p for p in fast.parameters() if p.requires_grad)]
        assert goes_short(fast, x)
        ours = torch.autograd.grad(fast(x).square().sum(), leaves)
        theirs = torch.autograd.grad(plain(fast, x).square().sum(), leaves)
        for got, expected in zip(ours, theirs, strict=True):
            torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints(reentrant: bool) -> None:
    """The first call of all keeps the tensors that its repetition keeps."""
    fast = pwm_fast.accelerate(m.mlp(10, [16], 11))
    x = X.clone().requires_grad_()
    for _ in range(2):
        checkpoint(fast, x, use_reentrant=reentrant).sum().backward()
    assert x.grad is not None


def test_copies() -> None:
    """They look things up for themselves, and run on parameters of their own."""
    fast = known()
    for twin in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast)), copy.copy(fast)):
        assert isinstance(twin, AcceleratedStack) and twin._shortcut is None
        assert torch.equal(twin(X), fast(X))
        assert goes_short(twin)
    twin = copy.deepcopy(fast)
    with torch.no_grad():
        twin[0].ln.bias.add_(1.0)
    torch.testing.assert_close(twin(X), plain(twin), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(twin(X), fast(X))
    assert fast[:1]._shortcut is None


def test_replicas() -> None:
    """What nn.DataParallel makes shares a module's attributes, but holds other modules."""
    fast = known()
    replica = fast._replicate_for_data_parallel()
    replica._modules["0"] = m.NormedLinear(10, 16)
    torch.testing.assert_close(replica(X), plain(replica), atol=1e-5, rtol=1e-5)
    assert goes_short(fast)


def test_without_a_plan() -> None:
    fast = known()
    fast.plan = None
    assert not goes_short(fast)
    torch.testing.assert_close(fast(X), plain(fast))


def test_other_plans() -> None:
    """A plan that was put in the place of the stack's own is followed."""
    fast = known()
    step = fast.plan.steps[1]
    fast.plan = fast.plan._replace(steps=(fast.plan.steps[0], step._replace(act="none")))
    assert not torch.allclose(fast(X), plain(fast), atol=1e-2)


def test_threads() -> None:
    """Several at a time, from the first call on."""
    fast = pwm_fast.accelerate(m.mlp(10, [16], 13))
    inputs = [torch.randn(rows, 10) for rows in (1, 3, 9, 20)]
    expected = [plain(fast, x) for x in inputs]
    failures: list[object] = []

    def work(x: Tensor, wanted: Tensor) -> None:
        try:
            for _ in range(50):
                torch.testing.assert_close(fast(x), wanted, atol=1e-5, rtol=1e-5)
        except BaseException as error:
            failures.append(error)

    threads = [
        threading.Thread(target=work, args=pair) for pair in zip(inputs, expected, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
