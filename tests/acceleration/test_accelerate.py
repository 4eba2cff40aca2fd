"""pwm_fast.accelerate: what it takes, what it leaves, and that the result is a drop-in."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn.utils import parametrizations

import pwm_fast
from pwm_fast import ops
from pwm_fast.acceleration import AccelerationReport, AccelerationWarning
from pwm_fast.acceleration.stack import AcceleratedStack
from pwm_fast.backends import select
from tests.acceleration import modules as m

# The stacks by name: how to make them, and their order.
STACKS: dict[str, tuple[Callable[[], nn.Sequential], str]] = {
    "td-mpc2 reward": (lambda: m.mlp(10, [24, 24], 101), "norm_act"),
    "td-mpc2 dynamics": (lambda: m.mlp(10, [24], 16, act=m.SimNorm(8)), "norm_act"),
    "groups of 4": (lambda: m.mlp(10, [], 12, act=m.SimNorm(4)), "norm_act"),
    "no activation at the end": (lambda: m.mlp(10, [24], 7, act=nn.Identity()), "norm_act"),
    "pwm": (
        lambda: nn.Sequential(m.PwmNormedLinear(10, 9), m.PwmNormedLinear(9, 9), nn.Linear(9, 3)),
        "norm_act",
    ),
    "no bias": (
        lambda: nn.Sequential(m.NormedLinear(10, 9, bias=False), nn.Linear(9, 3, bias=False)),
        "norm_act",
    ),
    "own mish": (
        lambda: nn.Sequential(m.NormedLinear(10, 9, act=m.OwnMish()), nn.Linear(9, 3)),
        "norm_act",
    ),
    "dropout of 0": (
        lambda: m.changed(m.mlp(10, [9], 3), lambda s: setattr(s[0], "dropout", nn.Dropout(0.0))),
        "norm_act",
    ),
    "epsilon": (
        lambda: m.changed(m.mlp(10, [9], 3), lambda s: setattr(s[0].ln, "eps", 1e-2)),
        "norm_act",
    ),
    "no nn.Linear": (
        lambda: nn.Sequential(m.NoLinear(10, 9), nn.Linear(9, 3)),
        "norm_act",
    ),
    "modules in a row": (
        lambda: nn.Sequential(
            nn.Linear(10, 9), nn.LayerNorm(9), nn.Mish(), nn.Dropout(0.0), nn.Linear(9, 3)
        ),
        "norm_act",
    ),
    "simnorm in a row": (
        lambda: nn.Sequential(nn.Linear(10, 16), nn.LayerNorm(16), m.SimNorm(8)),
        "norm_act",
    ),
    "no norm": (lambda: nn.Sequential(nn.Linear(10, 9), nn.Mish(), nn.Linear(9, 3)), "norm_act"),
    "blocks": (
        lambda: nn.Sequential(
            nn.Sequential(nn.Linear(10, 9), nn.LayerNorm(9), nn.Mish()),
            nn.Sequential(nn.Linear(9, 8), nn.LayerNorm(8), nn.Mish()),
            nn.Linear(8, 3),
        ),
        "norm_act",
    ),
    "actor": (lambda: m.act_norm(10, [20, 12, 8], 3, end=m.Identity()), "act_norm"),
    "critic": (lambda: m.act_norm(10, [20, 12], 1), "act_norm"),
}


def accelerated(stack: nn.Module, **options: Any) -> Any:
    """Without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return pwm_fast.accelerate(stack, **options)


def left_alone(module: nn.Module) -> str:
    """The only reason for leaving a module as it is."""
    before = [id(x) for x in module.modules()]
    with pytest.warns(AccelerationWarning):
        result = pwm_fast.accelerate(module)
    assert result is module and [id(x) for x in module.modules()] == before
    report = result.acceleration_report
    assert isinstance(report, AccelerationReport) and not report.accelerated
    (found,) = report.left
    assert found.reason is not None and found.reason in str(report)
    return found.reason


def random_parameters(module: nn.Module) -> nn.Module:
    """No zeros or ones by which two computations could agree."""
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn_like(p) / p.shape[1] ** 0.5 if p.dim() == 2 else torch.rand_like(p))
    return module


def assert_same(ours: nn.Module, theirs: nn.Module, x: Tensor, **tolerance: float) -> None:
    """Values and all gradients."""
    results = []
    for module in (ours, theirs):
        leaf = x.detach().clone().requires_grad_()
        y = module(leaf)
        weight = torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype).view(y.shape)
        results.append([y, *torch.autograd.grad((y * weight).sum(), [leaf, *module.parameters()])])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, **tolerance)


@pytest.mark.parametrize("name", STACKS)
def test_stack(name: str) -> None:
    """Values and gradients, in float64 exactly and on the backend of float32; ranks and no rows."""
    make, order = STACKS[name]
    stack = random_parameters(make()).double()
    fast = accelerated(stack)
    assert isinstance(fast, AcceleratedStack) and fast.plan is not None
    assert fast.plan.order == order
    for rows in ((4,), (2, 3), (1,), (0,), ()):
        assert_same(fast, stack, torch.randn(*rows, 10, dtype=torch.float64))
    stack.float()
    x = torch.randn(6, 10)
    assert_same(fast, stack, x, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), stack(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", STACKS)
def test_stack_runs_as_one_operation(name: str) -> None:
    stack = STACKS[name][0]()
    fast = accelerated(stack)
    calls: list[str] = []
    with select.observed(lambda operation, *_: calls.append(operation)):
        fast(torch.randn(4, 10))
    assert calls == ["mlp"]
    calls.clear()
    with select.observed(lambda operation, *_: calls.append(operation)):
        stack(torch.randn(4, 10))
    assert calls == [], "the original stays as it was"


def test_world_of_td_mpc2() -> None:
    world = m.TdMpc2World()
    fast = accelerated(world)
    report = fast.acceleration_report
    names = [f.name for f in report.accelerated]
    assert names == ["_encoder.state", "_dynamics", "_reward", "_pi", "_Qs.0", "_Qs.1"]
    assert [(f.name, f.kind) for f in report.others] == [("_task_emb", "Embedding")]
    assert type(fast) is m.TdMpc2World and fast is not world
    assert type(world._reward) is nn.Sequential, "the original stays as it was"
    assert list(fast.state_dict()) == list(world.state_dict())
    assert all(p is q for p, q in zip(fast.parameters(), world.parameters(), strict=True))
    random_parameters(world)
    obs, action, task = torch.randn(5, 10), torch.randn(5, 3), torch.arange(5)
    for got, expected in zip(
        fast.eval()(obs, action, task).values(), world(obs, action, task).values(), strict=True
    ):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("order", ["norm_act", "act_norm", "in one"])
def test_dropout(order: str) -> None:
    """The same random numbers give the same result; the rate and the mode may change later."""
    parts: list[nn.Module] = [nn.LayerNorm(9), nn.Mish()]
    stack = m.mlp(10, [9, 9], 3, dropout=0.3)
    if order != "in one":
        parts = parts if order == "norm_act" else parts[::-1]
        stack = nn.Sequential(nn.Linear(10, 9), nn.Dropout(0.3), *parts, nn.Linear(9, 3))
    random_parameters(stack).double()
    fast = accelerated(stack)
    dropout: Any = stack[0].dropout if order == "in one" else stack[1]
    x = torch.randn(2, 6, 10, dtype=torch.float64)
    for rate, training in ((0.3, True), (0.3, False), (0.6, True), (0.0, True)):
        dropout.p = rate
        fast.train(training)
        results = []
        for module in (fast, stack):
            torch.manual_seed(1)
            results.append(module(x))
        torch.testing.assert_close(*results)
        assert fast.layers()[0].dropout == (rate if training else 0.0)
        assert torch.equal(fast(x), fast(x)) == (rate == 0.0 or not training)
    with mock.patch.object(F, "mish", side_effect=AssertionError), select.backend("torch"):
        fast.float()(x.float())  # one operation


def test_models_of_pwm() -> None:
    agent = nn.ModuleDict({"world": m.PwmWorld(), "actor": m.PwmActor(), "critic": m.PwmCritics()})
    fast = accelerated(agent)
    report = fast.acceleration_report
    assert [f.name for f in report.accelerated] == [
        "world._encoder",
        "world._velocity",
        "world._reward",
        "actor.mu_net",
        "critic.members.0",
        "critic.members.1",
        "critic.members.2",
    ]
    assert not report.left and not report.notes
    assert [(f.name, f.parameters) for f in report.others] == [("actor", 3)]
    random_parameters(agent)
    obs, action, z = torch.randn(5, 10), torch.randn(5, 3), torch.randn(5, 16)
    for got, expected in zip(
        fast["world"](obs, action).values(), agent["world"](obs, action).values(), strict=True
    ):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    for name in ("actor", "critic"):
        torch.testing.assert_close(fast[name](z), agent[name](z), atol=1e-5, rtol=1e-5)
    text = str(report)
    assert "actor.mu_net (Sequential," in text and "left alone: none" in text


def test_in_place() -> None:
    """Everything that holds the module gains."""
    world = m.PwmWorld()
    holder = {"model": world}
    assert accelerated(world, inplace=True) is world
    assert isinstance(holder["model"]._velocity, AcceleratedStack)
    stack = m.mlp(10, [9], 3)
    fast = accelerated(stack, inplace=True)
    assert fast is not stack and type(stack) is nn.Sequential, "a stack itself cannot change"


def test_optimisers_go_on() -> None:
    """One made before trains both modules; both see the same parameters after."""
    world = m.PwmWorld()
    optimiser = torch.optim.Adam(world.parameters(), lr=1e-2)
    fast = accelerated(world)
    obs, action = torch.randn(5, 10), torch.randn(5, 3)
    losses = []
    for _ in range(3):
        loss = fast(obs, action)["reward"].square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[0] > losses[1] > losses[2]
    again = world(obs, action)["reward"]
    torch.testing.assert_close(fast(obs, action)["reward"], again, atol=1e-5, rtol=1e-5)


# --- what is left alone ---------------------------------------------------------------------------


def with_first(make: Callable[[int, int], nn.Module]) -> Callable[[], nn.Sequential]:
    return lambda: nn.Sequential(make(10, 9), m.NormedLinear(9, 9), nn.Linear(9, 3))


def hook(*_: object) -> None:
    pass


def changed(change: Callable[[nn.Sequential], object]) -> Callable[[], nn.Sequential]:
    return lambda: m.changed(m.mlp(10, [9], 3), change)


def row(*between: nn.Module) -> Callable[[], nn.Sequential]:
    return lambda: nn.Sequential(nn.Linear(10, 16), *between, nn.Linear(16, 3))


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "dropout in a row": (
        row(nn.LayerNorm(16), nn.Mish(), nn.Dropout(0.5)),
        "3 (Dropout) drops with probability 0.5, which is known right after a Linear alone",
    ),
    "another dropout": (
        row(nn.AlphaDropout(0.5), nn.LayerNorm(16), nn.Mish()),
        "1 (AlphaDropout) drops with probability 0.5 as AlphaDropout does, not nn.Dropout",
    ),
    "dropout at the end": (
        with_first(lambda k, n: m.DropsLater(k, n, dropout=0.1)),
        "its output in training mode differs from the operations' by",
    ),
    "dropout in evaluation": (
        with_first(lambda k, n: m.DropsAlways(k, n, dropout=0.1)),
        "its output in evaluation mode differs from the operations' by",
    ),
    "dropout of a number": (
        changed(lambda s: s[0].__dict__.update(dropout=0.1)),
        "0 (NormedLinear).dropout is 0.1, neither a Dropout nor None",
    ),
    "relu": (row(nn.LayerNorm(16), nn.ReLU()), "2 (ReLU) is ReLU, not Mish, SimNorm or Identity"),
    "relu inside": (
        with_first(lambda k, n: m.NormedLinear(k, n, act=nn.ReLU())),
        "0 (NormedLinear).act is ReLU, not Mish",
    ),
    "softmax": (row(nn.LayerNorm(16), nn.Softmax(dim=1)), "is Softmax, not Mish"),
    "swish": (row(nn.LayerNorm(16), m.Swish()), "computes neither of Mish"),
    "temperature": (row(nn.LayerNorm(16), m.Scaled()), "computes neither of Mish"),
    "learned activation": (row(nn.LayerNorm(16), m.Learned()), "with a state of its own"),
    "function": (with_first(m.FunctionAct), "0 (FunctionAct).act is <built-in method tanh"),
    "no affine": (
        row(nn.LayerNorm(16, elementwise_affine=False), nn.Mish()),
        "1 (LayerNorm) is a LayerNorm without affine parameters",
    ),
    "no norm bias": (row(nn.LayerNorm(16, bias=False), nn.Mish()), "LayerNorm without a bias"),
    "two axes": (row(nn.LayerNorm((4, 16)), nn.Mish()), "normalises over 2 axes"),
    "rms norm": (row(nn.RMSNorm(16), nn.Mish()), "1 (RMSNorm) is RMSNorm, not"),
    "batch norm": (row(nn.BatchNorm1d(16), nn.Mish()), "is BatchNorm1d, not"),
    "norm first": (
        lambda: nn.Sequential(nn.LayerNorm(10), nn.Linear(10, 9), nn.Mish(), nn.Linear(9, 3)),
        "0 (LayerNorm) follows no Linear",
    ),
    "mixed orders": (
        lambda: nn.Sequential(
            nn.Linear(10, 9),
            nn.Mish(),
            nn.LayerNorm(9),
            nn.Linear(9, 9),
            nn.LayerNorm(9),
            nn.Mish(),
        ),
        "follows no Linear in an order that is known",
    ),
    "mixed styles": (
        lambda: nn.Sequential(nn.Linear(10, 9), nn.Mish(), nn.LayerNorm(9), m.NormedLinear(9, 3)),
        "LayerNorm",
    ),
    "nothing to fuse": (
        lambda: nn.Sequential(nn.Linear(10, 9), nn.Linear(9, 3)),
        "nothing to fuse",
    ),
    "simnorm without norm": (row(m.SimNorm(8)), "SimNorm without a LayerNorm before it"),
    "forward hook": (changed(lambda s: s[0].register_forward_hook(hook)), "hooks"),
    "pre-hook": (changed(lambda s: s[1].register_forward_pre_hook(hook)), "1 (Linear) has forward"),
    "backward hook": (
        changed(lambda s: s[0].ln.register_full_backward_hook(hook)),
        "0.ln (LayerNorm) has forward or backward hooks",
    ),
    "hook on the stack": (changed(lambda s: s.register_forward_hook(hook)), "it has forward"),
    "replaced forward": (
        changed(lambda s: setattr(s[0], "forward", lambda x: x)),
        "0 (NormedLinear) has a forward replaced on the instance",
    ),
    "parametrization": (
        changed(lambda s: parametrizations.spectral_norm(s[1])),
        "1 (ParametrizedLinear) has parametrizations",
    ),
    "subclass": (lambda: m.OwnStack(*m.mlp(10, [9], 3)), "is a subclass of nn.Sequential"),
    "pwm_fast's own": (
        lambda: pytest.importorskip("pwm_fast.models.layers").mlp(10, [9], 3),
        "runs on the operations already",
    ),
    "own buffer": (with_first(m.OwnBuffer), "0 (OwnBuffer) has buffers: steps"),
    "own parameter": (with_first(m.Gated), "has parameters besides weight and bias: gate"),
    "low rank": (
        lambda: nn.Sequential(m.LowRank(10, 9), nn.LayerNorm(9), nn.Mish()),
        "has parts besides act, dropout, ln: down, up",
    ),
    "lazy": (
        lambda: nn.Sequential(nn.LazyLinear(9), nn.LayerNorm(9), nn.Mish()),
        "has no shape yet",
    ),
    "dtypes": (changed(lambda s: s[1].double()), "of several dtypes: torch.float32, torch.float64"),
    "compiled": (changed(lambda s: s.compile(backend="eager")), "accelerate first, then compile"),
    # These have the right structure; running them tells.
    "other order": (with_first(m.ActThenNorm), "its forward is not what its parts say"),
    "norm twice": (with_first(m.NormTwice), "differs from the operations' by"),
    "other epsilon": (with_first(m.OtherEpsilon), "differs from the operations' by"),
    "half the gradient": (with_first(m.Detached), "its gradient towards the input"),
    "frozen scale": (with_first(m.FrozenScale), "its gradient towards 0.ln.weight"),
    "noise in training": (with_first(m.NoiseInTraining), "different results for the same input"),
    "other in evaluation": (with_first(m.OtherInEvaluation), "in evaluation mode"),
    "clipped": (with_first(m.Clipped), "differs from the operations' by"),
    "through float32": (with_first(m.InFloat32), "in float64"),
    "keeps something": (with_first(m.Keeps), "its forward keeps something: 0.hidden"),
    "transposed": (
        lambda: nn.Sequential(m.Transposed(9, 9), nn.Linear(9, 3)),
        "differs from the operations' by",
    ),
    "transposed and not square": (
        lambda: nn.Sequential(m.Transposed(9, 8), nn.Linear(8, 3)),
        "fails on torch.float64 [5, 8]",
    ),
    "computed weight": (
        lambda: nn.Sequential(m.ComputedWeight(10, 9), nn.LayerNorm(9), nn.Mish()),
        "0 (ComputedWeight) has no parameter `weight`",
    ),
    "no parameters": (
        lambda: m.without_parameters(m.mlp(10, [9], 3)),
        "0 (NormedLinear) has no parameter `weight`",
    ),
    "no parameters in one layer": (
        lambda: m.changed(m.mlp(10, [9], 3), lambda s: m.without_parameters(s[1].to("meta"))),
        "1 (Linear) has no parameter `weight`",
    ),
    "no parameters, for more than weight and bias": (
        lambda: m.without_parameters(nn.Sequential(m.Gated(10, 9), nn.Linear(9, 3)).to("meta")),
        "0 (Gated) has parameters besides weight and bias: gate",
    ),
    "no parameters, for more than those of all members": (
        lambda: m.changed(
            m.TdMpc2Ensemble(q_functions(), whole=True, bare=True).module,
            lambda s: setattr(s[0], "steps", torch.zeros((), device="meta")),
        ),
        "0 (NormedLinear) has parameters besides weight and bias: steps",
    ),
    "no parameters, for another forward": (
        lambda: m.without_parameters(with_first(m.ActThenNorm)().to("meta")),
        "its forward is not what its parts say",
    ),
    "integers": (
        lambda: m.changed(
            nn.Sequential(nn.Linear(10, 9, bias=False), nn.Mish()),
            lambda s: setattr(s[0], "weight", nn.Parameter(torch.ones(9, 10).int(), False)),
        ),
        "0.weight is of torch.int32, which has no gradient",
    ),
    "residual": (
        lambda: nn.Sequential(m.NormedLinear(10, 9), m.Residual(9, 9), nn.Linear(9, 3)),
        "differs from the operations' by",
    ),
    "standardised weight": (
        lambda: nn.Sequential(m.Standardized(10, 9), nn.LayerNorm(9), nn.Mish()),
        "differs from the operations' by",
    ),
    "failure": (with_first(m.Fails), "fails on torch.float64 [5, 10]: ValueError: not for this"),
    "no copy": (with_first(m.Uncopyable), "cannot be copied to be compared: RuntimeError: this"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_left_alone(name: str) -> None:
    make, reason = REFUSED[name]
    assert reason in left_alone(make())


def test_a_head_of_zeros_hides_nothing() -> None:
    """Reward heads start with weights of 0: whatever comes before them gives the same output."""
    stack = nn.Sequential(m.ActThenNorm(10, 9), nn.Linear(9, 3))
    nn.init.zeros_(stack[-1].weight)
    assert "is not what its parts say" in left_alone(stack)


def test_the_check_leaves_no_trace() -> None:
    """Parameters, their gradients, the mode and the random numbers are as before."""
    stack = m.mlp(10, [9], 3).eval()
    stack[0].ln.train()
    stack(torch.randn(4, 10)).sum().backward()
    before = copy.deepcopy([(p, p.grad) for p in stack.parameters()])
    modes = [x.training for x in stack.modules()]
    state = torch.get_rng_state()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        fast = accelerated(stack)
    assert torch.equal(torch.get_rng_state(), state)
    assert [x.training for x in fast.modules()] == modes
    for (p, g), q in zip(before, stack.parameters(), strict=True):
        assert torch.equal(p, q) and q.grad is not None and torch.equal(g, q.grad)


def test_parts_of_what_is_left() -> None:
    """A stack within one that is left alone is looked at."""
    outer = nn.Sequential(m.mlp(10, [9], 8), nn.Tanh(), nn.Linear(8, 2))
    with pytest.warns(AccelerationWarning, match="Tanh"):
        fast = pwm_fast.accelerate(outer)
    assert [f.name for f in fast.acceleration_report.accelerated] == ["0"]
    assert isinstance(fast[0], AcceleratedStack)
    x = torch.randn(4, 10)
    torch.testing.assert_close(fast(x), outer(x), atol=1e-5, rtol=1e-5)


def test_nothing_to_accelerate() -> None:
    module = nn.Bilinear(3, 3, 3)
    with pytest.warns(AccelerationWarning, match=r"Bilinear holds no nn\.Sequential of layers"):
        assert pwm_fast.accelerate(module) is module
    with pytest.raises(TypeError, match=r"module must be an nn\.Module, got list"):
        pwm_fast.accelerate([module])  # type: ignore[arg-type]


def test_twice() -> None:
    fast = accelerated(m.PwmWorld())
    again = accelerated(fast)
    assert again is fast
    assert len(again.acceleration_report.accelerated) == 3


def test_compiled_and_wrapped() -> None:
    compiled = torch.compile(m.PwmWorld(), backend="eager")
    assert "accelerate first, then compile" in left_alone(compiled)


def test_attributes_bound_to_the_original() -> None:
    """They go on calling it, which the report says."""

    class World(m.PwmWorld):
        def __init__(self) -> None:
            super().__init__()
            self.act = self.reward
            self.fast_reward = torch.compile(self.reward, backend="eager")

        def reward(self, x: Tensor) -> Tensor:
            return self._reward(x)

    notes = accelerated(World()).acceleration_report.notes
    assert len(notes) == 2
    assert "act is bound to the original" in notes[0] and "fast_reward is bound" in notes[1]
    assert accelerated(World(), inplace=True).acceleration_report.notes == ()


def test_one_module_in_two_places() -> None:
    stack = m.mlp(10, [9], 3)
    fast = accelerated(nn.ModuleDict({"a": stack, "b": stack}))
    assert fast["a"] is fast["b"] and isinstance(fast["a"], AcceleratedStack)


# --- a drop-in ------------------------------------------------------------------------------------


def test_changes_after() -> None:
    """Whatever changes a stack's modules later makes it run them one by one."""
    x = torch.randn(4, 10)

    def check(fast: Any, stack: Any) -> None:
        calls: list[str] = []
        with select.observed(lambda operation, *_: calls.append(operation)):
            got = fast(x)
        assert not calls
        torch.testing.assert_close(got, nn.Sequential.forward(stack, x))

    def make() -> tuple[Any, Any]:
        stack = m.mlp(10, [9, 9], 3)
        return accelerated(stack), stack

    fast, stack = make()
    seen: list[Tensor] = []
    handle = fast[0].register_forward_hook(lambda module, args, output: seen.append(output))
    check(fast, stack)
    assert len(seen) == 2, "both modules share the layer"
    handle.remove()
    assert fast.intact()

    fast, _ = make()
    fast[1] = nn.Linear(9, 9)
    check(fast, fast)
    fast, _ = make()
    fast.append(nn.Tanh())
    check(fast, fast)
    fast, stack = make()
    fast[0].act = nn.ReLU()
    check(fast, stack)
    fast, stack = make()
    fast[0].dropout = nn.Dropout(0.5)
    check(fast.eval(), stack)
    fast, stack = make()
    parametrizations.weight_norm(fast[2])
    check(fast, stack)
    fast, stack = make()
    check(fast[:2], stack[:2])
    fast, stack = make()
    fast[0].forward = lambda x: torch.zeros(4, 9)
    check(fast, stack)
    fast, stack = make()
    with mock.patch.object(type(fast[0]), "forward", lambda self, x: torch.zeros(4, 9)):
        check(fast, stack)
    assert fast.intact()

    stack = m.changed(m.mlp(10, [9], 3), lambda s: setattr(s[0], "dropout", nn.Dropout(0.0)))
    fast = accelerated(stack)
    assert fast.intact()
    fast[0].dropout.p = 0.5
    assert not fast.intact()


def test_copies_and_pickles() -> None:
    fast = accelerated(m.PwmWorld())
    obs, action = torch.randn(5, 10), torch.randn(5, 3)
    expected = fast(obs, action)["v"]
    buffer = io.BytesIO()
    torch.save(fast, buffer)
    buffer.seek(0)
    for twin in (
        copy.deepcopy(fast),
        pickle.loads(pickle.dumps(fast)),
        torch.load(buffer, weights_only=False),
    ):
        assert isinstance(twin._velocity, AcceleratedStack) and twin._velocity.intact()
        assert torch.equal(twin(obs, action)["v"], expected)
        with torch.no_grad():
            twin._velocity[-1].bias.add_(1.0)
        assert not torch.allclose(twin(obs, action)["v"], expected)
    assert torch.equal(fast(obs, action)["v"], expected), "copies have parameters of their own"


def test_state_dicts_both_ways(tmp_path) -> None:
    original, other = m.PwmWorld(), m.PwmWorld()
    fast = accelerated(m.PwmWorld())
    torch.save(original.state_dict(), tmp_path / "a.pt")
    fast.load_state_dict(torch.load(tmp_path / "a.pt"))
    obs, action = torch.randn(5, 10), torch.randn(5, 3)
    expected = original(obs, action)["v"]
    torch.testing.assert_close(fast(obs, action)["v"], expected, atol=1e-5, rtol=1e-5)
    other.load_state_dict(fast.state_dict())
    assert torch.equal(other(obs, action)["v"], expected)
    fresh = m.PwmWorld().state_dict()
    fast.load_state_dict(fresh, assign=True)  # new parameter objects
    original.load_state_dict(fresh)
    expected = original(obs, action)["v"]
    torch.testing.assert_close(fast(obs, action)["v"], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    """Before and after acceleration."""
    x = torch.randn(4, 10).to(dtype)
    for stack in (m.mlp(10, [9], 3).to(dtype), m.mlp(10, [9], 3)):
        fast = accelerated(stack).to(dtype)
        y = fast(x)
        assert y.dtype == dtype == stack[0].weight.dtype
        torch.testing.assert_close(
            y,
            stack(x),
            atol=2e-2 if dtype == torch.bfloat16 else 1e-9,
            rtol=1e-2 if dtype == torch.bfloat16 else 1e-9,
        )


def test_wrong_inputs_fail_as_before() -> None:
    fast = accelerated(m.mlp(10, [9], 3))
    with pytest.raises(ValueError, match="10 inputs, but 9 arrive"):
        fast(torch.randn(4, 9))
    with pytest.raises(RuntimeError, match="dtype"):
        fast(torch.randn(4, 10).double())


def test_modes() -> None:
    fast = accelerated(m.TdMpc2World()._pi)
    assert fast.training and fast.eval() is fast
    assert not any(x.training for x in fast.modules())


def test_autocast() -> None:
    stack = m.mlp(10, [24, 24], 5)
    fast = accelerated(stack)
    x = torch.randn(4, 10)
    with torch.autocast("cpu", torch.bfloat16):
        got, expected = fast(x), stack(x)
    assert got.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(got, expected, atol=2e-2, rtol=2e-2)


def test_compile() -> None:
    """One graph, whose gradients are those of eager."""
    world = random_parameters(m.PwmWorld())
    fast = accelerated(world)
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    for rows in (5, 7):
        obs, action = torch.randn(rows, 10), torch.randn(rows, 3)
        losses = []
        for model in (compiled, world):
            out = model(obs, action)
            losses.append(out["v"].square().sum() + out["reward"].square().sum())
        torch.testing.assert_close(losses[0], losses[1], atol=1e-4, rtol=1e-4)
        got, expected = (torch.autograd.grad(loss, list(world.parameters())) for loss in losses)
        for g, e in zip(got, expected, strict=True):
            torch.testing.assert_close(g, e, atol=1e-3 * max(1.0, e.abs().max().item()), rtol=0.0)


def test_functional_ensemble() -> None:
    """Stacked parameters of several members under vmap, as functional ensembles are written."""
    members = [random_parameters(m.act_norm(10, [8], 1)) for _ in range(3)]
    fast = [accelerated(member) for member in members]
    params, buffers = stack_module_state(fast)  # type: ignore[arg-type]
    x = torch.randn(4, 10)
    y = vmap(lambda p, b: functional_call(fast[0], (p, b), (x,)))(params, buffers)
    expected = torch.stack([member(x) for member in members])
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
    wanted = torch.autograd.grad(expected.sum(), members[1][0].weight)[0]
    (got,) = torch.autograd.grad(y.sum(), params["0.weight"])
    torch.testing.assert_close(got[1], wanted, atol=1e-4, rtol=1e-4)


ENSEMBLES: dict[str, Callable[[list[nn.Sequential]], nn.Module]] = {
    "td-mpc2": m.TdMpc2Ensemble,
    "td-mpc2 target": lambda members: m.TdMpc2Ensemble(members, whole=True),
    "td-mpc2 bare": lambda members: m.TdMpc2Ensemble(members, bare=True),
    "td-mpc2 target bare": lambda members: m.TdMpc2Ensemble(members, whole=True, bare=True),
    "functorch": m.FunctorchEnsemble,
    "torch.func": m.FuncEnsemble,
    "torch.func attribute": lambda members: m.FuncEnsemble(members, "attribute"),
}


def q_functions(order: str = "norm_act", dropout: float = 0.3) -> list[nn.Sequential]:
    make = (
        (lambda: m.mlp(10, [9, 8], 5, dropout=dropout))
        if order == "norm_act"
        else (lambda: m.act_norm(10, [9, 8], 5))
    )
    return [random_parameters(make()) for _ in range(3)]  # type: ignore[misc]


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("order", ["norm_act", "act_norm"])
@pytest.mark.parametrize("kind", ENSEMBLES)
@pytest.mark.filterwarnings("ignore:We've integrated functorch:FutureWarning")
def test_ensembles_of_stacked_parameters(kind: str, order: str, inplace: bool) -> None:
    """One operation for all members, in training with the plain modules' masks; same parameters."""
    members = q_functions(order)
    plain = nn.ModuleDict({"q": ENSEMBLES[kind](members)})
    fast = accelerated(copy.deepcopy(plain) if inplace else plain, inplace=inplace)
    report = fast.acceleration_report
    (stack,) = report.accelerated
    assert stack.name.startswith("q.") and not report.left
    assert list(fast.state_dict()) == list(plain.state_dict())
    if not inplace:
        assert all(p is q for p, q in zip(fast.parameters(), plain.parameters(), strict=True))
    x = torch.randn(4, 10)
    results, rows = [], []
    original = torch.bmm
    for module in (fast, plain):
        leaf = x.clone().requires_grad_()
        torch.manual_seed(2)
        count = lambda a, b: rows.append(a.shape[0]) or original(a, b)  # type: ignore[func-returns-value]  # noqa: E731
        with mock.patch.object(torch, "bmm", count), select.backend("torch"):
            y = module["q"](leaf)
        if module is fast:
            assert rows == [3] * 3
        weight = torch.linspace(0.5, 1.5, y.numel()).view(y.shape)
        wanted = [leaf, *(p for p in module["q"].parameters() if not p.is_meta)]
        results.append([y, *torch.autograd.grad((y * weight).sum(), wanted)])
    for got, expected in zip(*results, strict=True):
        size = max(1.0, expected.abs().max().item())
        torch.testing.assert_close(got, expected, atol=2e-5 * size, rtol=0.0)


@pytest.mark.filterwarnings("ignore:We've integrated functorch:FutureWarning")
def test_ensembles_are_copied() -> None:
    """The original goes on running the plain modules."""
    for make in ENSEMBLES.values():
        plain = make(q_functions())
        fast = accelerated(plain)
        assert type(fast) is type(plain) and fast is not plain
        for module, operations in ((fast, ["mlp"]), (plain, [])):
            calls: list[str] = []
            with select.observed(lambda operation, *_, calls=calls: calls.append(operation)):
                module(torch.randn(4, 10))
            assert calls == operations
        fast = accelerated(make(q_functions(dropout=0.0)))
        twin = copy.deepcopy(fast)
        x = torch.randn(4, 10)
        assert torch.equal(twin(x), fast(x))
        with torch.no_grad():
            for p in twin.parameters():
                if not p.is_meta:
                    p.zero_()
        assert fast(x).abs().min() > 0.0 == twin(x).abs().max()


@pytest.mark.parametrize("kind", ["td-mpc2", "td-mpc2 bare", "torch.func"])
def test_ensembles_compile(kind: str) -> None:
    """Around the whole of them, with dropout."""
    plain = ENSEMBLES[kind](q_functions())
    fast, x = accelerated(plain), torch.randn(4, 10)
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    assert not torch.equal(compiled(x), compiled(x))
    expected = plain.eval()(x)
    torch.testing.assert_close(compiled.eval()(x), expected, atol=1e-5, rtol=1e-5)


def test_ensemble_whose_module_cannot_be_found() -> None:
    reason = left_alone(m.FuncEnsemble(q_functions(), "closure"))
    assert reason == (
        "it holds stacked parameters but not the module that they are put into: accelerate each "
        "member before you stack them"
    )
    members = [accelerated(q) for q in q_functions(dropout=0.0)]
    fast, x = m.FuncEnsemble(members, "closure"), torch.randn(4, 10)
    calls: list[str] = []
    with select.observed(lambda operation, *_: calls.append(operation)):
        y = fast(x)
    assert calls == ["mlp"]
    expected = torch.stack([nn.Sequential.forward(q, x) for q in members])
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)


def test_ensembles_of_other_layers_are_left_to_themselves() -> None:
    """A module that multiplies with a stacked weight itself has no members to accelerate."""
    module = nn.ModuleDict({"a": nn.Bilinear(3, 3, 3), "b": nn.Bilinear(3, 3, 3)})
    with pytest.warns(AccelerationWarning, match=r"holds no nn\.Sequential"):
        pwm_fast.accelerate(module)


@pytest.mark.parametrize("bare", [False, True])
def test_some_members_of_an_accelerated_ensemble(bare: bool) -> None:
    """TD-MPC2 takes two of five values: the stacked parameters go into one operation."""
    fast = accelerated(m.TdMpc2Ensemble(q_functions(), bare=bare)).eval()
    x = torch.randn(4, 10)
    layers = fast.module.layers(fast.params)
    y = ops.mlp([x], layers, members=[2, 0])
    torch.testing.assert_close(y, fast(x)[[2, 0]], atol=1e-5, rtol=1e-5)
    flat = {".".join(k[1:] for k in n.split(".")): p for n, p in fast.params.named_parameters()}
    again = ops.mlp([x], fast.module.layers(flat), members=[2, 0])
    assert torch.equal(again, y)
    assert [p.dropout for p in fast.train().module.layers(flat)] == [0.3, 0.0, 0.0]
    del flat["0.ln.weight"]
    with pytest.raises(KeyError, match=r"parameters lacks '0\.ln\.weight'"):
        fast.module.layers(flat)


def test_replicas() -> None:
    """What nn.DataParallel makes of a module on each device: parameters become plain attributes."""
    fast = accelerated(m.mlp(10, [9], 3))
    replicas = {module: module._replicate_for_data_parallel() for module in fast.modules()}
    for module, replica in replicas.items():
        for key, child in module._modules.items():
            if child is not None:
                setattr(replica, key, replicas[child])
        for key, p in module._parameters.items():
            setattr(replica, key, None if p is None else p * 1.0)
    x = torch.randn(4, 10)
    assert replicas[fast].intact()
    torch.testing.assert_close(replicas[fast](x), fast(x))


def test_second_derivatives() -> None:
    """By the reference, and by nothing else."""
    stack = m.mlp(10, [9], 3)
    fast = accelerated(stack)
    x = torch.randn(4, 10, requires_grad=True)
    with pwm_fast.backend("reference"):
        (first,) = torch.autograd.grad(fast(x).square().sum(), x, create_graph=True)
        (got,) = torch.autograd.grad(first.square().sum(), x)
    (first,) = torch.autograd.grad(stack(x).square().sum(), x, create_graph=True)
    (expected,) = torch.autograd.grad(first.square().sum(), x)
    torch.testing.assert_close(got, expected, atol=1e-3, rtol=1e-3)


def test_accelerated_layers_in_other_operations() -> None:
    """The parameters of an accelerated stack go into a whole rollout."""
    fast = accelerated(m.PwmWorld())
    z, a = ops.simnorm(torch.randn(5, 16)), torch.randn(5, 3)
    step = ops.flow_step(z, a, fast._velocity.layers())

    def velocity(z: Tensor, tau: float) -> Tensor:
        return fast._velocity(torch.cat([z, a, torch.full_like(z[:, :1], tau)], -1))

    torch.testing.assert_close(step, ops.integrate(velocity, z), atol=1e-4, rtol=1e-4)
    assert F.mse_loss(step, z) > 0.0


def test_the_package_alone_imports_no_torch() -> None:
    code = (
        "import sys, pwm_fast\n"
        "assert 'torch' not in sys.modules\n"
        "assert {'accelerate', 'explain', 'backend'} <= set(dir(pwm_fast))\n"
        "pwm_fast.accelerate, pwm_fast.explain, pwm_fast.backend, pwm_fast.BackendError\n"
        "assert 'torch' in sys.modules and 'hydra' not in sys.modules\n"
        "assert not hasattr(pwm_fast, 'nothing')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
