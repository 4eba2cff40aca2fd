"""Shortcut dynamics against their definition, written out in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from pwm_fast import ops
from pwm_fast.ops.extend import Transitions
from pwm_fast.ops.shortcut import CONSISTENCIES, LEVELS, _tangent
from tests.helpers import random_layer

H, B, D, A, E = 3, 8, 16, 2, 3


def network(task: bool, seed: int = 0) -> list[ops.Layer]:
    g = torch.Generator().manual_seed(seed)
    inputs = D + A + 2 + (E if task else 0)
    return [
        random_layer(inputs, 13, "mish", generator=g, dtype=torch.float64),
        random_layer(13, D, norm=False, generator=g, dtype=torch.float64),
    ]


def u(net: list[ops.Layer], z: Tensor, a: Tensor, tau: Tensor, d: Tensor, task: Any) -> Tensor:
    parts = [z, a, tau.unsqueeze(-1), *(() if task is None else (task,)), d.unsqueeze(-1)]
    x = torch.cat(parts, -1)
    h = torch.nn.functional.linear(x, net[0].weight, net[0].bias)
    h = torch.nn.functional.layer_norm(h, (13,), net[0].ln_weight, net[0].ln_bias)
    return torch.nn.functional.linear(torch.nn.functional.mish(h), net[1].weight, net[1].bias)


def transitions(task: bool, seed: int = 1, **changes: Any) -> Transitions:
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    found = Transitions(
        normal(H, B, D).requires_grad_(),
        normal(H, B, A),
        None,
        normal(H, B, D),
        normal(H, B, E) if task else None,
        torch.float64,
        torch.rand(H, B, generator=g, dtype=torch.float64),
    )
    return found._replace(**changes)


def truth(
    net: list[ops.Layer], steps: Transitions, consistency: str, share: float, draw: Tensor
) -> Tensor:
    """Row by row; the average velocity's derivative by central differences."""
    assert steps.tau is not None
    errors = torch.zeros(H, B, dtype=torch.float64)
    taught = math.ceil(share * B)
    for t in range(H):
        for b in range(B):
            z, e, a = steps.z[t, b], steps.target[t, b], steps.action[t, b]
            task = None if steps.task is None else steps.task[t, b]
            tau, d = steps.tau[t, b], torch.zeros((), dtype=torch.float64)
            if b < taught and consistency == "shortcut":
                level = min(int(draw[t, b] * LEVELS), LEVELS - 1)
                d = torch.tensor(0.5**level, dtype=torch.float64)
                tau = torch.floor(tau / d) * d
            elif b < taught:
                d = draw[t, b] * (1 - tau)
            point, goal = (1 - tau) * z + tau * e, e - z
            if b < taught:
                with torch.no_grad():
                    if consistency == "shortcut":
                        half = d / 2
                        told = half if half > 0.5**LEVELS else torch.zeros_like(half)
                        one = u(net, point, a, tau, told, task)
                        two = u(net, point + half * one, a, tau + half, told, task)
                        goal = (one + two) / 2
                    else:
                        s = 1e-5
                        later, earlier = (
                            u(net, point + x * goal, a, tau + x, d - x, task) for x in (s, -s)
                        )
                        goal = goal + d * (later - earlier) / (2 * s)
            errors[t, b] = (u(net, point, a, tau, d, task) - goal).square().mean()
    return errors


@pytest.mark.parametrize("consistency", CONSISTENCIES)
@pytest.mark.parametrize("task", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_error_is_the_definition(
    consistency: str, task: bool, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, steps = network(task), transitions(task)
    draw = torch.rand(H, math.ceil(share * B), dtype=torch.float64)
    draw[:, :1] = 0.0  # a step of size 1, or of size 0
    monkeypatch.setattr(torch, "rand", lambda *_, **__: draw)
    dynamics = ops.Shortcut(net, 1, consistency, share)  # type: ignore[arg-type]
    ours, slow = dynamics.error(steps), truth(net, steps, consistency, share, draw)
    torch.testing.assert_close(ours, slow, rtol=1e-7, atol=1e-9)
    params = [steps.z, *(x for p in net for x in p[:4] if x is not None)]
    for x in params:
        x.requires_grad_()
    ours, slow = dynamics.error(steps), truth(net, steps, consistency, share, draw)
    for mine, theirs in zip(
        torch.autograd.grad(ours.sum(), params),
        torch.autograd.grad(slow.sum(), params),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("consistency", CONSISTENCIES)
def test_straight_paths_are_consistent(consistency: str) -> None:
    """Where the average velocity is the displacement everywhere, there is nothing to learn."""
    shift = torch.randn(D, dtype=torch.float64)
    net = [ops.Layer(torch.zeros(D, D + A + 2, dtype=torch.float64), shift)]
    steps = transitions(False)
    steps = steps._replace(target=steps.z.detach() + shift)
    dynamics = ops.Shortcut(net, 1, consistency, 0.5)  # type: ignore[arg-type]
    assert dynamics.error(steps).max() < 1e-24
    for k in (1, 4):
        z = ops.latent_rollout(steps.z[0].detach(), steps.action, ops.Shortcut(net, k))
        torch.testing.assert_close(z[-1], steps.z[0].detach() + H * shift)


def test_sizes_and_times_of_steps() -> None:
    dynamics = ops.Shortcut(network(False), 1, "shortcut")
    tau = torch.cat((torch.rand(200, 40), torch.ones(200, 1)), 1)
    times, size = dynamics._times(tau, torch.rand(200, 41))
    assert sorted(size.unique().tolist()) == [0.25, 0.5, 1.0]
    assert times.min() == 0.0 and (times + size).max() == 1.0
    assert torch.equal(times / size, torch.floor(times / size))
    times, size = ops.Shortcut(network(False), 1, "meanflow")._times(tau, torch.rand(200, 30))
    assert torch.equal(times, tau) and (size[:, 30:] == 0).all()
    assert size.min() >= 0.0 and (times + size).max() <= 1.0


def test_rollouts_tell_the_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """K Euler steps of 1/K each, whichever backend runs them."""
    for k in (1, 2):
        for task in (False, True):
            net, steps = network(task), transitions(task)
            z = steps.z[0].detach()
            embedding = None if steps.task is None else steps.task[0]
            expected = [z]
            for a in steps.action:
                for i in range(k):
                    tau, d = (torch.full((B,), x, dtype=torch.float64) for x in (i / k, 1 / k))
                    z = z + u(net, z, a, tau, d, embedding) / k
                expected.append(z)
            for backend in ("reference", "torch"):
                found = ops.latent_rollout(
                    expected[0],
                    steps.action,
                    ops.Shortcut(net, k),
                    task=embedding,
                    backend=backend,
                )
                torch.testing.assert_close(found, torch.stack(expected))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"substeps": 0}, "dynamics.substeps"),
        ({"substeps": 3}, "dynamics.substeps must be one of 1, 2, 4"),
        ({"consistency": "none"}, "dynamics.consistency must be one of shortcut, meanflow"),
        ({"share": 1.5}, r"dynamics.share must lie in \[0, 1\], got 1.5"),
        ({"net": [random_layer(D + A + 1, D)]}, r"dynamics.net\[0\].weight takes"),
        ({"net": [random_layer(D + A + 2, D)], "fold": True}, "dynamics.fold needs a linear"),
    ],
)
def test_errors(change: dict[str, Any], message: str) -> None:
    dynamics = ops.Shortcut(network(False))._replace(**change)
    with pytest.raises(ValueError, match=message):
        ops.latent_rollout(torch.zeros(B, D).double(), torch.zeros(H, B, A).double(), dynamics)


def test_the_tangent_is_the_derivative() -> None:
    """Of every kind of layer."""
    g = torch.Generator().manual_seed(0)
    net = [
        random_layer(5, 12, "mish", generator=g, dtype=torch.float64),
        random_layer(12, 16, "simnorm", generator=g, dtype=torch.float64),
        random_layer(16, 9, "mish", norm=False, generator=g, dtype=torch.float64),
        random_layer(9, 3, norm=False, bias=False, generator=g, dtype=torch.float64),
    ]
    x, t = torch.randn(2, 4, 5, dtype=torch.float64), torch.randn(2, 4, 5, dtype=torch.float64)
    _, expected = torch.func.jvp(lambda x: ops.mlp((x,), net), (x,), (t,))
    torch.testing.assert_close(_tangent(x, t, net), expected)


@pytest.mark.parametrize("consistency", CONSISTENCIES)
def test_targets_are_constants_in_forward_mode(
    consistency: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The derivative along a weight is the same both ways."""
    net, steps = network(False), transitions(False)
    steps = steps._replace(z=steps.z.detach())
    draw = torch.rand(H, 4, dtype=torch.float64)
    monkeypatch.setattr(torch, "rand", lambda *_, **__: draw)
    along = torch.randn_like(net[0].weight)

    def loss(weight: Tensor) -> Tensor:
        layers = [net[0]._replace(weight=weight), *net[1:]]
        dynamics = ops.Shortcut(layers, 1, consistency, 0.5)  # type: ignore[arg-type]
        return dynamics.error(steps).sum()

    _, forward = torch.func.jvp(loss, (net[0].weight,), (along,))
    weight = net[0].weight.detach().requires_grad_()
    (grad,) = torch.autograd.grad(loss(weight), weight)
    torch.testing.assert_close(forward, (grad * along).sum())


def test_frozen_weights_are_packed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    net = [p._replace(**{k: getattr(p, k).detach().float() for k in p._fields[:4]
                         if getattr(p, k) is not None}) for p in network(False)]  # fmt: skip
    dynamics = ops.Shortcut(net, 1)
    with torch.no_grad():
        first, second = dynamics.fused().net[0], ops.Shortcut(net, 1).fused().net[0]
        assert first.weight is second.weight and first.bias is second.bias
        assert ops.Shortcut(net, 2).fused().net[0].bias is not first.bias
        net[0].weight.mul_(2.0)
        assert dynamics.fused().net[0].weight is not first.weight
