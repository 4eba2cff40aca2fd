"""Whole rollouts and the window loss beyond the numeric contract: memory, gradients, errors."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pwm_fast import ops
from pwm_fast.backends import native, select
from pwm_fast.models import GaussianActor
from pwm_fast.ops import Flow, Heads, LatentMap, Layer, Policy
from tests.helpers import tensors_of, with_tensors
from tests.models.builders import ACTION, OBS, normal, same, small_model

D, A, B, H = 16, 3, 5, 4
Z, ACTIONS, NOISE = torch.zeros(B, D), torch.zeros(H, B, A), torch.zeros(H, B, A)
OBSERVATIONS, REWARDS = torch.zeros(H + 1, B, 6), torch.zeros(H, B)


def layer(n: int, k: int, norm: bool = True, act: ops.Activation = "mish") -> Layer:
    vector = torch.zeros(n)
    if not norm:
        return Layer(torch.zeros(n, k), vector)
    return Layer(torch.zeros(n, k), vector, torch.ones(n), vector, act)


FLOW = Flow([layer(8, D + A + 1), layer(D, 8, norm=False)])
MAP = LatentMap([layer(8, D + A), layer(D, 8, act="simnorm")])
POLICY = Policy([layer(7, D), layer(A, 7, norm=False)], torch.ones(A))
HEADS = Heads([layer(9, D + A), layer(21, 9, norm=False)])
ENCODER = [layer(D, 6, act="simnorm")]


def rollout(**changes) -> Tensor:
    arguments = {"z0": Z, "action": ACTIONS, "dynamics": FLOW} | changes
    return ops.latent_rollout(**arguments)


def imagine(**changes) -> ops.ImaginedRollout:
    arguments = {"z0": Z, "policy": POLICY, "dynamics": FLOW, "heads": HEADS, "noise": NOISE}
    return ops.imagine(**(arguments | changes))


def window(**changes) -> ops.WindowLoss:
    arguments = {
        "obs": OBSERVATIONS,
        "action": ACTIONS,
        "reward": REWARDS,
        "encoder": ENCODER,
        "dynamics": FLOW,
        "heads": HEADS,
    } | changes
    return ops.world_model_loss(**arguments)


def test_the_calls_above_are_right() -> None:
    assert rollout().shape == rollout(dynamics=MAP).shape == (H + 1, B, D)
    assert imagine().reward.shape == imagine(dynamics=MAP).reward.shape == (H, B)
    assert window().dynamics.shape == window(dynamics=MAP).reward.shape == ()


ERRORS: dict[str, tuple[Callable[[], object], str]] = {
    "z0 axes": (lambda: rollout(z0=Z[None]), r"z0 must be \[B, D\], got \(1, 5, 16\)"),
    "action axes": (
        lambda: rollout(action=ACTIONS[0]),
        r"action must be \[H, 5, A\], got \(5, 3\)",
    ),
    "action batch": (lambda: rollout(action=ACTIONS[:, 1:]), r"action must be \[H, 5, A\], got"),
    "net input": (lambda: rollout(action=ACTIONS[..., 1:]), "takes 20 inputs, but 19 arrive"),
    "net output": (
        lambda: rollout(dynamics=LatentMap([layer(8, D + A)])),
        "dynamics.net has output width 8, but z0 has 16",
    ),
    "substeps": (
        lambda: rollout(dynamics=FLOW._replace(substeps=0)),
        "dynamics.substeps must be a positive integer, got 0",
    ),
    "method": (lambda: rollout(dynamics=FLOW._replace(method="rk4")), "method must be one of heun"),
    "share": (
        lambda: rollout(dynamics=FLOW._replace(share=1.5)),
        r"dynamics.share must lie in \[0, 1\], got 1.5",
    ),
    "share of two steps": (
        lambda: rollout(dynamics=FLOW._replace(method="euler", substeps=2, share=0.5)),
        "dynamics.share must be 1 but for one Euler step without projection, got 0.5",
    ),
    "share of Heun": (
        lambda: rollout(dynamics=FLOW._replace(substeps=1, share=0.5)),
        "dynamics.share must be 1 but for one Euler step",
    ),
    "share of flow times": (
        lambda: window(
            dynamics=FLOW._replace(method="euler", substeps=1, share=0.5),
            tau=torch.zeros(H, 2 * B),
        ),
        "tau must be a scalar",
    ),
    "fold": (
        lambda: rollout(dynamics=Flow([layer(D, D + A + 1)], fold=True)),
        "dynamics.fold needs a linear last layer",
    ),
    "task": (lambda: rollout(task=torch.zeros(B + 1, 2)), "task has leading shape"),
    "backend name": (lambda: rollout(backend="cuda9"), "backend must be one of auto, native"),
    "noise": (lambda: imagine(noise=NOISE[0]), r"noise must be \[H, 5, A\], got \(5, 3\)"),
    "policy output": (
        lambda: imagine(policy=POLICY._replace(layers=[layer(7, D)])),
        "policy.layers has output width 7, but noise has 3",
    ),
    "std": (
        lambda: imagine(policy=POLICY._replace(std=torch.ones(2))),
        r"policy.std must be \[3\], got \(2,\)",
    ),
    "window obs": (lambda: window(obs=OBSERVATIONS[1:]), r"obs must be \[5, 5, O\]"),
    "window reward": (lambda: window(reward=REWARDS[1:]), r"reward must be \[4, 5\]"),
    "window axes": (lambda: window(reward=REWARDS[..., None]), "reward must have 2 axes"),
    "window start": (lambda: window(start="middle"), "start must be one of rollout, teacher"),
    "window noise": (lambda: window(start_noise=-1.0), "start_noise must not be negative"),
    "window gamma": (lambda: window(gamma=1.5), r"gamma must lie in \[0, 1\], got 1.5"),
    "window termination": (
        lambda: window(heads=HEADS._replace(termination=[layer(1, D + A, norm=False)])),
        "terminated is needed to train the termination head",
    ),
    "window empty": (
        lambda: window(action=ACTIONS[:0], obs=OBSERVATIONS[:1], reward=REWARDS[:0]),
        "action must hold at least one step",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str) -> None:
    call, message = ERRORS[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_dynamics_are_known_by_their_parts() -> None:
    assert isinstance(MAP, ops.Dynamics) and isinstance(Flow(MAP.net), ops.Dynamics)
    assert not isinstance(MAP.net, ops.Dynamics)


def test_a_backend_that_cannot_run_says_why() -> None:
    with pytest.raises(select.BackendError, match=r"native' cannot run latent_rollout: .*float64"):
        rollout(
            z0=Z.double(),
            action=ACTIONS.double(),
            dynamics=Flow([Layer(*(t.double() for t in p[:4] if t is not None)) for p in FLOW.net]),
            backend="native",
        )
    with pytest.raises(select.BackendError, match="projected onto the simplices"):
        rollout(dynamics=FLOW._replace(project=True), backend="torch")


@pytest.mark.parametrize("kind", ["flow", "mlp"])
def test_rollouts_of_the_models_are_their_steps(kind: str) -> None:
    """``LatentModel.rollout`` is ``next`` repeated, with task embeddings and a projection, too."""
    for changes in ({}, {"task_dim": 3, "num_tasks": 2}, {"project": True, "kind": "flow"}):
        model = small_model(**({"kind": kind} | changes))
        task = torch.tensor([0, 1, 1, 0, 1]) if "task_dim" in changes else None
        z, action = torch.softmax(normal(B, 16), -1), normal(H, B, ACTION)
        expected = [z]
        for a in action:
            expected.append(model.next(expected[-1], a, task))
        same(model.rollout(z, action, task), torch.stack(expected))


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_no_gradient_that_nobody_asked_for(backend: str) -> None:
    """With a frozen world model nothing of it is saved for a weight gradient, and none is given."""
    model = small_model(kind="flow").float().requires_grad_(False)
    actor = GaussianActor(16, ACTION, [12]).float()
    z, noise = torch.softmax(torch.randn(B, 16), -1), torch.randn(H, B, ACTION)

    def run() -> tuple[list[int], Tensor]:
        sizes: list[int] = []

        def pack(x: Tensor) -> Tensor:
            sizes.append(x.numel())
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            result = ops.imagine(
                z, actor.policy(), model.dynamics(), model.heads(), noise=noise, backend=backend
            )
        return sizes, result.reward.sum() + result.z[-1].square().sum()

    frozen_sizes, loss = run()
    assert all(g is not None for g in torch.autograd.grad(loss, list(actor.parameters())))
    model.requires_grad_(True)
    sizes, _ = run()
    assert sum(frozen_sizes) < 0.8 * sum(sizes)


def test_differentiating_twice_is_refused() -> None:
    model = small_model(kind="flow")
    z = torch.softmax(normal(B, 16), -1).requires_grad_()
    for backend in ("torch", "reference"):
        end = ops.latent_rollout(z, normal(H, B, ACTION), model.dynamics(), backend=backend)[-1]
        (gradient,) = torch.autograd.grad(end.square().sum(), z, create_graph=True)
        if backend == "reference":
            torch.autograd.grad(gradient.sum(), z)
            continue
        with pytest.raises(RuntimeError, match=re.escape("use backend='reference'")):
            torch.autograd.grad(gradient.sum(), z)


def test_zero_velocity_starts_as_the_identity() -> None:
    from pwm_fast.models import make_world_model
    from tests.models.builders import small

    z, a = torch.softmax(torch.randn(B, 16), -1), torch.randn(B, ACTION)
    for flag in (True, False):
        model = make_world_model(OBS, ACTION, small(kind="flow", zero_velocity=flag))
        assert torch.equal(model.next(z, a), z) == flag


@pytest.mark.parametrize("backend", ["reference", "torch", "native"])
@pytest.mark.parametrize("dynamics", [FLOW, MAP], ids=["flow", "map"])
def test_no_steps(backend: str, dynamics: ops.Dynamics) -> None:
    """A rollout of no steps is its start, and so is its gradient."""
    if backend == "native" and native.why_missing() is not None:
        pytest.skip("no native kernels")
    net = [
        with_tensors(p, [x.clone().requires_grad_() for x in tensors_of(p)]) for p in dynamics.net
    ]
    own = dynamics._replace(net=net)  # type: ignore[attr-defined]
    z = torch.rand(3, D).requires_grad_()
    found = ops.latent_rollout(z, torch.rand(0, 3, A), own, backend=backend)
    assert found.shape == (1, 3, D) and torch.equal(found[0], z)
    params = [x for p in net for x in tensors_of(p)]
    grads = torch.autograd.grad(found.square().sum(), [z, *params], allow_unused=True)
    torch.testing.assert_close(grads[0], 2.0 * z.detach())
    assert all(g is None or g.eq(0).all() for g in grads[1:])
