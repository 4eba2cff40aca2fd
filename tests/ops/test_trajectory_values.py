"""Values of given action sequences against the plans' second implementation, env by env."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from pwm_fast.ops import extend
from tests.ops.test_plan import BACKENDS, CASES, SMALL, A, Problem, normal, problem, slow_value

N, H = 6, 4
OTHERS = [pytest.param(b) if isinstance(b, str) else b for b in BACKENDS[1:]]


def certain(p: Problem) -> Problem:
    """The policy's mean is what Q functions see, and all members count."""
    noise, values = p.noise, p.values
    if noise.last_action is not None:
        shape = (1, len(p.z0), N, A)
        noise = noise._replace(last_action=torch.zeros(shape, dtype=p.z0.dtype))
    if values is not None and values.reduce == "two":
        values = values._replace(reduce="mean")
    return p._replace(noise=noise, values=values)


def truth(p: Problem, actions: Tensor) -> Tensor:
    p = certain(p)
    if p.mask is not None:
        actions = actions * p.mask[:, None]
    return torch.stack([slow_value(p, b, 0, actions[:, b]) for b in range(len(p.z0))])


def found(p: Problem, actions: Tensor, **changes: Any) -> Tensor:
    given = {"values": p.values, "policy": p.policy, "gamma": p.gamma, "task": p.task, **changes}
    given.setdefault("action_mask", p.mask)
    return extend.trajectory_values(p.z0, actions, p.dynamics, p.heads, **given)


FUSED = ["TD-MPC2 with tasks and ends", "PWM with tasks and ends", "rewards alone"]


@pytest.mark.parametrize(
    ("name", "backend"),
    [(name, "reference") for name in CASES]
    + [pytest.param(n, b.values[0], marks=b.marks) for n in FUSED for b in OTHERS],
)
def test_values_and_gradients(name: str, backend: str) -> None:
    """In float64, and in float32 where the backend has no more."""
    p = CASES[name]()
    actions = torch.tanh(normal(H, len(p.z0), N, A)).requires_grad_()
    z0 = p.z0.clone().requires_grad_()
    expected = truth(p._replace(z0=z0), actions)
    weight = normal(*expected.shape)
    wanted = torch.autograd.grad((weight * expected).sum(), [z0, actions])
    dtype = torch.float32 if backend == "native" else torch.float64
    q = p.to(dtype)
    given = [x.detach().to(dtype).requires_grad_() for x in (z0, actions)]
    value = found(q._replace(z0=given[0]), given[1], backend=backend)
    grads = torch.autograd.grad((weight.to(dtype) * value).sum(), given)
    tol = {"rtol": 2e-3, "atol": 2e-4} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-10}
    for a, b in zip((value, *grads), (expected, *wanted), strict=True):
        torch.testing.assert_close(a.double(), b.detach(), **tol)


def test_they_are_what_a_plan_maximises() -> None:
    p = certain(problem(3, SMALL, values="v", reduce="min"))
    plan = p.plan()
    assert torch.equal(found(p, plan.trajectories), plan.value)


def test_a_mask_of_all_rows() -> None:
    p = problem(3, SMALL)
    mask, actions = torch.tensor([True, False, True]), normal(H, 3, N, A)
    values = [found(p, actions, action_mask=m) for m in (mask, mask.expand(3, A), None)]
    torch.testing.assert_close(values[0], values[1])
    assert (values[0] - values[2]).abs().min() > 1e-6


P = problem(3, SMALL)
GOOD = torch.zeros(H, 3, N, A, dtype=torch.float64)


@pytest.mark.parametrize(
    ("actions", "changes", "message"),
    [
        (GOOD[0], {}, "actions must be [H, 3, N, 3] with an H of 1 or more, got (3, 6, 3)"),
        (GOOD[:0], {}, "got (0, 3, 6, 3)"),
        (GOOD[:, :2], {}, "actions must be [H, 3, N, 3] with an H of 1 or more, got (4, 2, 6, 3)"),
        (GOOD[..., :2], {}, "got (4, 3, 6, 2)"),
        (GOOD, {"policy": None}, "values.on_action needs a policy"),
        (GOOD, {"gamma": 1.5}, "gamma must lie in [0, 1], got 1.5"),
        (GOOD.to("meta"), {}, "actions is on meta, but z0 is on cpu"),
    ],
)
def test_errors(actions: Tensor, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        found(P, actions, **changes)


def test_actions_that_are_no_floats() -> None:
    with pytest.raises(TypeError, match="actions must"):
        found(P, GOOD.long())
