"""Nothing that happens in or around a network's modules is skipped by running them as one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as globals_of_torch
from torch.nn.utils import parametrizations, prune

from pwm_fast import ops
from pwm_fast.acceleration import accelerate
from pwm_fast.acceleration.stack import AcceleratedStack
from pwm_fast.backends import select
from pwm_fast.models import CriticEnsemble, GaussianActor, LatentModel
from pwm_fast.models.critic import Critic
from pwm_fast.models.layers import MLP, Mish, NormedLinear, act_norm_mlp, mlp
from tests.models.builders import ACTION, OBS, randomize_, small_model

D = 16


def one_by_one(net: nn.Module, x: Tensor) -> Tensor:
    """What ``nn.Sequential`` does."""
    for module in net.children():
        x = module(x)
    return x


def plain(network: nn.Module) -> nn.Sequential:
    """An ``nn.Sequential`` for ``accelerate``."""
    modules: list[nn.Module] = [nn.Linear(7, 9), nn.LayerNorm(9), nn.Mish(), nn.Linear(9, D)]
    return nn.Sequential(*modules)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module, Tensor], Tensor]]] = {
    "MLP": (lambda: mlp(7, [9, 9], D), lambda m, x: m(x)),
    "MLP, simnorm": (lambda: mlp(7, [9, 9], D, last="simnorm"), lambda m, x: m(x)),
    "act_norm": (
        lambda: GaussianActor(7, D, (9, 9)),
        lambda m, x: torch.atanh(m(x.double()).clamp(-1 + 1e-15, 1 - 1e-15)),
    ),
    "critic": (
        lambda: Critic(7, (9, 9)),
        lambda m, x: m(x).unsqueeze(-1),
    ),
}


def network_of(model: nn.Module) -> nn.Sequential:
    """The Sequential inside."""
    found = getattr(model, "mu_net", getattr(model, "critic", model))
    assert isinstance(found, nn.Sequential)
    return found


def made(name: str) -> tuple[nn.Module, nn.Sequential]:
    model = NETWORKS[name][0]().double()
    randomize_(model, 0.3)
    return model, network_of(model)


def scaled(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return 1.5 * output


def shifted(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
    return (args[0] + 0.25,)


def own_forward(module: Any) -> None:
    before = module.forward
    module.forward = lambda x: 2.0 * before(x)


class Doubled(NormedLinear):
    """A subclass that computes something else."""

    def forward(self, x: Tensor) -> Tensor:
        return 2.0 * super().forward(x)


def a_subclass(net: nn.Sequential) -> None:
    if isinstance(net, MLP):
        net[1].__class__ = Doubled
    else:
        net[1].__class__ = type("Doubled", (Mish,), {"forward": lambda m, x: 2.0 * ops.mish(x)})


CHANGES: dict[str, Callable[[nn.Sequential], Any]] = {
    "nothing": lambda net: None,
    "forward hook": lambda net: net[1].register_forward_hook(scaled),
    "forward hook of the last": lambda net: net[-1].register_forward_hook(scaled),
    "pre-hook": lambda net: net[0].register_forward_pre_hook(shifted),
    "weight_norm by hook": lambda net: nn.utils.weight_norm(net[0]),
    "spectral_norm by hook": lambda net: nn.utils.spectral_norm(net[0].eval()),
    "weight_norm": lambda net: parametrizations.weight_norm(net[0]),
    "orthogonal": lambda net: parametrizations.orthogonal(net[0]),
    "pruning": lambda net: prune.l1_unstructured(net[0], "weight", 0.5),
    "forward replaced": lambda net: own_forward(net[1]),
    "subclass": a_subclass,
    "another activation": lambda net: net.insert(1, nn.Tanh()),
    "Identity": lambda net: net.insert(1, nn.Identity()),
    "Dropout of 0": lambda net: net.insert(1, nn.Dropout(0.0)),
    "Dropout, evaluation": lambda net: net.insert(1, nn.Dropout(0.5).eval()),
    "no activation": lambda net: net.__delitem__(1),
    "tied": lambda net: setattr(net[1 if isinstance(net, MLP) else 3], "bias", net[0].bias),
    "no bias": lambda net: net[-1].register_parameter("bias", None),
    "compiled part": lambda net: net[0].compile(backend="eager"),
}
# After which the network still is what one operation computes.
AS_ONE = {
    "nothing",
    "weight_norm",
    "orthogonal",
    "Identity",
    "Dropout of 0",
    "Dropout, evaluation",
    "tied",
    "no bias",
    "compiled part",
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name: str, change: str) -> None:
    """Values and gradients of the modules one by one; taken apart, or an error that says why."""
    model, net = made(name)
    CHANGES[change](net)
    x = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    seen: list[str] = []
    with select.observed(lambda operation, *_: seen.append(operation)):
        ours = NETWORKS[name][1](model, x)
    theirs = one_by_one(net, x)
    as_one = change in AS_ONE or (change == "no activation" and name.startswith("MLP"))
    assert (seen == ["mlp"]) is as_one
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)
    wanted = [x, *(p for p in model.parameters() if p.requires_grad)]
    weight = torch.randn_like(theirs)
    for a, b in zip(
        torch.autograd.grad((ours * weight).sum(), wanted, allow_unused=True),
        torch.autograd.grad((theirs * weight).sum(), wanted, allow_unused=True),
        strict=True,
    ):
        assert (a is None) is (b is None)
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    take = getattr(model, "layers", getattr(model, "policy", None))
    if take is None:
        return
    if as_one:
        take()
    else:
        with pytest.raises(ValueError, match="one operation for the whole network would skip"):
            take()


@pytest.mark.parametrize("name", NETWORKS)
def test_dropout_in_training(name: str) -> None:
    """It drops; nothing pretends that it did."""
    model, net = made(name)
    net.insert(1, nn.Dropout(0.5))
    x = torch.randn(4, 7, dtype=torch.float64)
    call = NETWORKS[name][1]
    model.train()
    torch.manual_seed(3)
    ours = call(model, x)
    torch.manual_seed(3)
    torch.testing.assert_close(ours, one_by_one(net, x), rtol=1e-6, atol=1e-8)
    assert not torch.equal(call(model, x), ours)
    if isinstance(net, MLP):
        with pytest.raises(ValueError, match=r"layer 1 \(Dropout\) .* p=0.5 in training mode"):
            net.layers()
    model.eval()
    torch.testing.assert_close(call(model, x), call(model, x), rtol=0.0, atol=0.0)


HOOKS: dict[str, Callable[[nn.Module, Callable[..., None]], Any]] = {
    "forward": lambda m, f: m.register_forward_hook(f),
    "forward with keywords": lambda m, f: m.register_forward_hook(f, with_kwargs=True),
    "pre": lambda m, f: m.register_forward_pre_hook(f),
    "full backward": lambda m, f: m.register_full_backward_hook(f),
    "backward pre": lambda m, f: m.register_full_backward_pre_hook(f),
}


@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize("name", NETWORKS)
def test_hooks_fire(name: str, kind: str) -> None:
    """Of every module of a network, once, and no more once they are removed."""
    model, _ = made(name)
    call = NETWORKS[name][1]
    x = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    for where, module in model.named_modules():
        if not list(module.parameters()) and not isinstance(module, Mish):
            continue
        fired: list[str] = []
        handle = HOOKS[kind](module, lambda *_, fired=fired: fired.append("x"))
        y = call(model, x)
        y.sum().backward()
        assert fired == ["x"], where
        handle.remove()
        seen: list[str] = []
        with select.observed(lambda operation, *_, seen=seen: seen.append(operation)):
            call(model, x)
        assert seen == ["mlp"] and fired == ["x"]


@contextmanager
def counted() -> Iterator[list[nn.Module]]:
    """Counts modules by hooks of all modules."""
    seen: list[nn.Module] = []
    handle = globals_of_torch.register_module_forward_hook(lambda m, *_: seen.append(m))
    try:
        yield seen
    finally:
        handle.remove()


@pytest.mark.parametrize("name", NETWORKS)
def test_hooks_of_all_modules(name: str) -> None:
    model, net = made(name)
    x = torch.randn(4, 7, dtype=torch.float64)
    expected = NETWORKS[name][1](model, x)
    with counted() as seen:
        ours = NETWORKS[name][1](model, x)
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-8)
    assert {id(m) for m in seen} >= {id(m) for m in model.modules() if m is not net or net is model}
    with counted() as seen:
        fast = accelerate(plain(model))
        fast(torch.randn(4, 7))
    assert {id(m) for m in fast.children()} <= {id(m) for m in seen}


@pytest.mark.parametrize("kind", ["flow", "flow, projected", "mlp"])
def test_world_models(kind: str) -> None:
    """Every way into a world model fires the hooks of what it computes; whole operations refuse."""
    model = small_model(True, kind=kind[:4].rstrip(","), project="projected" in kind)
    z, obs = ops.simnorm(torch.randn(4, D).double()), torch.randn(4, OBS).double()
    a, actions = torch.randn(4, ACTION).double(), torch.randn(3, 4, ACTION).double()
    calls: dict[str, tuple[str, Callable[[LatentModel], Tensor | None]]] = {
        "encode": ("_encoder", lambda m: m.encode(obs)),
        "next": ("_transition", lambda m: m.next(z, a)),
        "rollout": ("_transition", lambda m: m.rollout(z, actions)),
        "reward": ("_reward", lambda m: m.reward(z, a)),
        "termination": ("_termination", lambda m: m.termination(z, a)),
    }
    if kind != "mlp":
        times = (0.3, torch.rand(()).double(), torch.rand(4).double(), torch.rand(4, 1).double())
        for i, tau in enumerate(times):
            calls[f"velocity {i}"] = (
                "_transition",
                lambda m, tau=tau: m.velocity(z, a, tau),  # type: ignore[attr-defined]
            )
    for name, (part, call) in calls.items():
        expected = call(model)
        net = model._transition() if part == "_transition" else getattr(model, part)
        for module in (net, net[0], net[0].ln, net[-1]):
            fired: list[int] = []
            handle = module.register_forward_hook(lambda *_, fired=fired: fired.append(1))
            torch.testing.assert_close(call(model), expected, rtol=1e-9, atol=1e-11)
            assert fired, (name, type(module))
            with pytest.raises(ValueError, match="has hooks, which one operation"):
                model.encoder_layers()
                model.dynamics()
                model.heads()
            handle.remove()
        with counted() as seen:
            torch.testing.assert_close(call(model), expected, rtol=1e-9, atol=1e-11)
        assert net in seen and net[0].ln in seen
    model.encoder_layers(), model.dynamics(), model.heads()


def test_actor_and_critics_refuse_whole_operations() -> None:
    actor = GaussianActor(7, 2, (9,))
    handle = actor.mu_net.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="Sequential has hooks, which one operation"):
        actor.policy()
    handle.remove()
    actor.policy()
    handle = actor.register_forward_hook(lambda *_: None)  # actor(z) calls it
    with pytest.raises(ValueError, match="GaussianActor has hooks, which one operation"):
        actor.policy()
    handle.remove()
    actor.policy()
    assert len(CriticEnsemble(7, (9,)).layers()) == 2
    net = act_norm_mlp(7, [9], 2, 1.0)
    net[2] = nn.LayerNorm(9, elementwise_affine=False)
    actor.mu_net = net
    x = torch.randn(3, 7)
    torch.testing.assert_close(actor(x), torch.tanh(one_by_one(net, x)))
    with pytest.raises(ValueError, match=r"layer 2 \(LayerNorm\) is a LayerNorm without weight"):
        actor.policy()


@pytest.mark.parametrize("act", ["mish", "simnorm", "none"])
def test_normed_linear_alone(act: Any) -> None:
    layer = NormedLinear(7, 16, act)
    randomize_(layer)
    x = torch.randn(4, 7)
    expected = layer(x)
    fired: list[int] = []
    handle = layer.ln.register_forward_hook(lambda *_: fired.append(1))
    torch.testing.assert_close(layer(x), expected)
    assert fired
    handle.remove()
    layer.ln = nn.Identity()
    h = nn.functional.linear(x, layer.weight, layer.bias)
    wanted = {"mish": ops.mish, "simnorm": ops.simnorm, "none": lambda h: h}[act](h)
    torch.testing.assert_close(layer(x), wanted)


def test_accelerated_stacks_that_change() -> None:
    """What is no longer what was matched runs by itself; its layers are not to be had."""

    def lose_norm(fast: Any) -> None:
        fast[1].weight, fast[1].bias = None, None

    changes: dict[str, Callable[[Any], Any]] = {
        "a Linear becomes a Dropout": lambda fast: fast.__setitem__(0, nn.Dropout(0.5).eval()),
        "norm without parameters": lose_norm,
        "norm without bias": lambda fast: fast[1].register_parameter("bias", None),
        "Dropout": lambda fast: fast.__setitem__(2, nn.Dropout(0.3).eval()),
        "pruning": lambda fast: prune.l1_unstructured(fast[0], "weight", 0.5),
        "weight_norm by hook": lambda fast: nn.utils.weight_norm(fast[3]),
    }
    for name, change in changes.items():
        fast: Any = accelerate(
            nn.Sequential(nn.Linear(9, 9), nn.LayerNorm(9), nn.Mish(), nn.Linear(9, 3))
        )
        assert isinstance(fast, AcceleratedStack) and len(fast.layers()) == 2, name
        change(fast)
        x = torch.randn(4, 9)
        torch.testing.assert_close(fast(x), one_by_one(fast, x))
        with pytest.raises(ValueError, match="modules or hooks have changed since"):
            fast.layers()


def test_hooks_of_an_accelerated_stack_itself() -> None:
    """They run around the one operation; who takes its layers is told."""
    fast: Any = accelerate(plain(nn.Module()))
    fired: list[int] = []
    handle = fast.register_forward_hook(lambda *_: fired.append(1))
    fast(torch.randn(4, 7))
    assert fired == [1] and fast.intact()
    with pytest.raises(ValueError, match="modules or hooks have changed since"):
        fast.layers()
    handle.remove()
    assert len(fast.layers()) == 2
