"""Policies with a deviation for each state, task inputs and action masks, beyond the contract."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

import pwm_fast
from pwm_fast import ops
from pwm_fast.backends.native import why_missing
from pwm_fast.ops import Activation, Layer, Policy
from tests.helpers import random_layer, tensors_of, with_tensors

D, A, E, B, H = 8, 3, 2, 5, 4
needs_native = pytest.mark.skipif(why_missing() is not None, reason="no native kernels")
native = pytest.param("native", marks=needs_native)


def net(inputs: int, outputs: int, dtype: torch.dtype) -> list[Layer]:
    hidden = random_layer(inputs, 9, "mish", dtype=dtype)
    return [hidden, random_layer(9, outputs, norm=False, dtype=dtype)]


def arguments(dtype: torch.dtype = torch.float64, *, task: bool = True) -> dict[str, Any]:
    torch.manual_seed(0)
    seen = E if task else 0
    dynamics = ops.LatentMLP([*net(D + seen + A, 7, dtype)[:1], random_layer(9, D, dtype=dtype)])
    return {
        "z0": torch.randn(B, D, dtype=dtype),
        "policy": Policy(net(D + seen, 2 * A, dtype), None, "norm_act", task_input=task),
        "dynamics": dynamics,
        "heads": ops.Heads(net(D + seen + A, 1, dtype)),
        "noise": torch.randn(H, B, A, dtype=dtype),
        "task": torch.randn(B, E, dtype=dtype) if task else None,
        "action_mask": torch.tensor([[1, 1, 1], [1, 0, 1], [0, 0, 0], [1, 1, 0], [0, 1, 1]]).bool(),
    }


def pwm(dtype: torch.dtype) -> Policy:
    """PWM's kind, which one operator runs."""
    return Policy(net(D, A, dtype), torch.full((A,), 0.3, dtype=dtype))


@needs_native
def test_what_runs() -> None:
    """The one operator of whole rollouts for PWM's policy alone; else each network is fused."""
    whole = {"policy": pwm(torch.float32), "action_mask": None}
    changes: dict[str, dict[str, Any]] = {
        "a deviation for each state": {"action_mask": None},
        "a mask": {**whole, "action_mask": torch.ones(B, A)},
        "the other order": {**whole, "policy": whole["policy"]._replace(order="norm_act")},
        "a task": {**whole, "policy": Policy(net(D + E, A, torch.float32), torch.ones(A),
                                             task_input=True)},
    }  # fmt: skip
    given = arguments(torch.float32)
    for name, change in changes.items():
        said = pwm_fast.explain(ops.imagine, **given | change, backend="native")
        assert said.backend == "native" and "pwm_fast::imagine" not in str(said), name
        assert f"{2 * H + 1} times pwm_fast::mlp" in str(said), name
    for mask in (None, torch.tensor([True, False, True])):
        change = whole | {"action_mask": mask}
        said = pwm_fast.explain(ops.imagine, **given | change, backend="native")
        assert any(name.startswith("pwm_fast::imagine") for name in said.operators)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_masks(backend: str) -> None:
    """Of any dtype; what is left out is 0 and cannot be told from what its noise is."""
    given = arguments()
    mask = given["action_mask"]
    found = ops.imagine(**given, backend=backend)
    assert not found.action[:, ~mask].any() and found.action[:, mask].all()
    same = ops.imagine(**given | {"action_mask": mask.float()}, backend=backend)
    assert all(torch.equal(x, y) for x, y in zip(found[:3], same[:3], strict=True))
    other = torch.where(mask, given["noise"], torch.randn(H, B, A, dtype=torch.float64))
    other = ops.imagine(**given | {"noise": other}, backend=backend)
    assert all(torch.equal(x, y) for x, y in zip(found[:3], other[:3], strict=True))
    noise = given["noise"].clone().requires_grad_()
    rollout = ops.imagine(**given | {"noise": noise}, detach=False, backend=backend)
    (grad,) = torch.autograd.grad(rollout.reward.sum(), noise)
    assert not grad[:, ~mask].any() and grad[0, mask].all()


@pytest.mark.parametrize("backend", ["torch", native])
def test_a_mask_of_ones(backend: str) -> None:
    """What PWM's policy does in one operator, step by step: the same but for rounding."""
    given = arguments(torch.float32, task=False) | {"policy": pwm(torch.float32)}
    for x in (*tensors_of(given["policy"].layers[0]), given["policy"].std):
        x.requires_grad_()
    wanted = [*tensors_of(given["policy"].layers[0]), given["policy"].std]
    found = []
    for mask in (None, torch.ones(B, A, dtype=torch.bool)):
        out = ops.imagine(**given | {"action_mask": mask}, detach=False, backend=backend)
        grads = torch.autograd.grad(out.reward.sum() + out.z.square().sum(), wanted)
        found.append([*out[:3], *grads])
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def ending(dtype: torch.dtype, act: Activation, *, norm: bool) -> Policy:
    """A policy of PWM's kind whose last layer is more than a Linear."""
    last = random_layer(9, A, act, norm=norm, dtype=dtype)
    return Policy([*net(D, A, dtype)[:1], last], torch.ones(A, dtype=dtype))


POLICIES: dict[str, Callable[[torch.dtype], Policy]] = {
    "pwm": pwm,
    "tdmpc2": lambda dtype: Policy(net(D, 2 * A, dtype), None, "norm_act"),
    "norm at the end": lambda dtype: ending(dtype, "none", norm=True),
    "mish at the end": lambda dtype: ending(dtype, "mish", norm=False),
}


@pytest.mark.parametrize("kind", POLICIES)
@pytest.mark.parametrize("backend", ["reference", "torch", native])
def test_a_mask_of_all_rows(backend: str, kind: str) -> None:
    """The same as one that says it row by row, forward and in every gradient."""
    dtype = torch.float32 if backend == "native" else torch.float64
    given = arguments(dtype, task=False)
    given["policy"] = policy = POLICIES[kind](dtype)
    leaves = [given["z0"], *(x for layer in policy.layers for x in tensors_of(layer))]
    leaves += [] if policy.std is None else [policy.std]
    for x in leaves:
        x.requires_grad_()
    mask, found = torch.tensor([True, False, True]), []
    for said in (mask, mask.expand(B, A)):
        out = ops.imagine(**given | {"action_mask": said}, detach=False, backend=backend)
        assert not out.action[..., 1].any() and out.action[..., ::2].all()
        grads = torch.autograd.grad(out.reward.sum() + out.z.square().sum(), leaves)
        found.append([*out[:3], *grads])
    close = {"rtol": 1e-4, "atol": 1e-5} if backend == "native" else {"rtol": 1e-10, "atol": 1e-12}
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, **close)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_derivatives(backend: str) -> None:
    """In latents, noise, task, mask and all parameters, by differences."""
    given = arguments()
    nets = [given["policy"].layers, given["dynamics"].net, given["heads"].reward]
    mask = given["action_mask"].double()
    params = [x for layers in nets for layer in layers for x in tensors_of(layer)]
    inputs = [given["z0"], given["noise"], given["task"], mask, *params]

    def call(z0: Tensor, noise: Tensor, task: Tensor, mask: Tensor, *params: Tensor) -> Any:
        rest = iter(params)
        policy, dynamics, reward = (
            [with_tensors(p, [next(rest) for _ in tensors_of(p)]) for p in layers]
            for layers in nets
        )
        return ops.imagine(
            z0,
            given["policy"]._replace(layers=policy),
            ops.LatentMLP(dynamics),
            ops.Heads(reward),
            noise=noise,
            detach=False,
            task=task,
            action_mask=mask,
            backend=backend,
        )[:3]

    assert gradcheck(call, [x.requires_grad_() for x in inputs], fast_mode=True)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_detached(backend: str) -> None:
    """No action's gradient reaches a latent, by mean or by deviation; the task's it does."""
    given = arguments()
    z0, task = given["z0"].requires_grad_(), given["task"].requires_grad_()
    for detach in (True, False):
        action = ops.imagine(**given, detach=detach, backend=backend).action
        grads = torch.autograd.grad(action[0].sum(), (z0, task), allow_unused=True)
        assert (grads[0] is None or not grads[0].any()) == detach
        assert grads[1] is not None and grads[1].any()
    early = ops.imagine(**given, detach=True, backend=backend)
    own = given["policy"].layers[0].weight.requires_grad_()
    late = ops.imagine(**given, detach=True, backend=backend)
    (whole,) = torch.autograd.grad(late.action[1].sum(), own)
    at = {"z0": early.z[1].detach(), "noise": given["noise"][1:2]}
    step = ops.imagine(**given | at, detach=True, backend=backend).action.sum()
    torch.testing.assert_close(whole, torch.autograd.grad(step, own)[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes_are_kept(dtype: torch.dtype) -> None:
    out = ops.imagine(**arguments(dtype))
    assert all(x.dtype == dtype for x in out[:3])


@pytest.mark.parametrize("batch", [0, 1])
@pytest.mark.parametrize("horizon", [0, 2])
def test_nothing_or_one(batch: int, horizon: int) -> None:
    given = arguments()
    given |= {k: given[k][:batch] for k in ("z0", "task", "action_mask")}
    given["noise"] = given["noise"][:horizon, :batch]
    one = {k: x.float() for k, x in given.items() if k in ("z0", "noise")}
    one |= {k: arguments(torch.float32, task=False)[k] for k in ("dynamics", "heads", "task")}
    one["policy"] = pwm(torch.float32)
    shared = torch.tensor([True, False, True])
    for case in (given, one | {"action_mask": None}, one | {"action_mask": shared}):
        out = ops.imagine(**case)
        assert out.z.shape == (horizon + 1, batch, D) and out.reward.shape == (horizon, batch)
        assert out.action.shape == (horizon, batch, A)


G = arguments()
ERRORS: dict[str, tuple[Callable[[], Any], str]] = {
    "mask shape": (
        lambda: G | {"action_mask": torch.ones(1, A)},
        "action_mask must be [5, 3], or bool [3] for all rows, got (1, 3)",
    ),
    "odd outputs": (
        lambda: G | {"policy": G["policy"]._replace(layers=net(D + E, 5, torch.float64))},
        "policy.layers must have 2 * 3 outputs, means and log standard deviations",
    ),
    "no task": (
        lambda: arguments(task=False) | {"policy": G["policy"]},
        "policy.task_input needs task embeddings, got task=None",
    ),
    "task of no use": (
        lambda: G | {"policy": G["policy"]._replace(task_input=False)},
        "policy.layers[0].weight takes 10 inputs, but 8 arrive",
    ),
    "order": (
        lambda: G | {"policy": G["policy"]._replace(order="norm")},
        "policy.order must be one of norm_act, act_norm, got 'norm'",
    ),
    "bounds": (
        lambda: G | {"policy": G["policy"]._replace(min_logstd=3.0)},
        "policy.min_logstd must be a finite number of at most policy.max_logstd, got 3.0 and 2.0",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str) -> None:
    given, message = ERRORS[name]
    with pytest.raises(ValueError, match=re.escape(message)):
        ops.imagine(**given())


@pytest.mark.parametrize("mask", [torch.ones(B, A, dtype=torch.int64), [[1] * A] * B])
def test_masks_of_other_types(mask: Any) -> None:
    kind = "torch.int64" if isinstance(mask, Tensor) else "list"
    with pytest.raises(TypeError, match=f"must be a bool or floating tensor, got {kind}"):
        ops.imagine(**G | {"action_mask": mask})
    with pytest.raises(TypeError, match=r"for all rows, \[3\], must be bool, got torch.float32"):
        ops.imagine(**G | {"action_mask": torch.ones(A)})
