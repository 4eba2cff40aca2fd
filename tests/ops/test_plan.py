"""MPPI against a second implementation, and what follows from its definition alone."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import pwm_fast
from bench.fake_cuda import DEVICE, FakeCuda
from pwm_fast import ops
from pwm_fast.backends.native import why_missing
from pwm_fast.ops import MPPI, Layer, PlanNoise, ValueEnsemble
from tests.agent.no_sync import no_sync
from tests.helpers import assert_2x, random_layer, tensors_of, with_tensors

D, A, E, BINS = 16, 3, 5, 11
GENERATOR = torch.Generator()
BACKENDS = ["reference", "torch", pytest.param("native", marks=pytest.mark.skipif(
    why_missing() is not None, reason=f"no native kernels: {why_missing()}"))]  # fmt: skip


class Problem(NamedTuple):
    """What a plan is made of, and the options to make it with."""

    z0: Tensor
    policy: ops.Policy | None
    dynamics: Any
    heads: ops.Heads
    values: ValueEnsemble | None
    options: MPPI
    noise: PlanNoise
    previous: Tensor | None = None
    first: Tensor | None = None
    task: Tensor | None = None
    gamma: float | Tensor = 0.95
    mask: Tensor | None = None

    def plan(self, **changes: Any) -> ops.Plan:
        given = self._replace(**{k: v for k, v in changes.items() if k in self._fields})
        more = {k: v for k, v in changes.items() if k not in self._fields}
        z0, policy, dynamics, heads, *_ = given
        return ops.plan(
            z0,
            policy,
            dynamics,
            heads,
            values=given.values,
            options=given.options,
            gamma=given.gamma,
            previous=given.previous,
            first=given.first,
            noise=given.noise,
            task=given.task,
            action_mask=given.mask,
            **more,
        )

    def to(self, dtype: torch.dtype) -> Problem:
        return _map(self, lambda x: x.to(dtype) if x.is_floating_point() else x)


def _map(x: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same of other tensors."""
    if isinstance(x, Tensor):
        return change(x)
    if isinstance(x, tuple) and hasattr(x, "_fields"):
        return type(x)(*(_map(part, change) for part in x))
    return [_map(part, change) for part in x] if isinstance(x, list) else x


def _is_tensor(x: Any) -> bool:
    return isinstance(x, Tensor)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=GENERATOR)


def net(widths: Sequence[int], **options: Any) -> list[Layer]:
    """Linear, LayerNorm and Mish, or Linear, Mish and LayerNorm; the last one is linear."""
    options["generator"] = GENERATOR
    layers = [random_layer(k, n, "mish", **options) for k, n in pairwise(widths[:-1])]
    return [*layers, random_layer(*widths[-2:], norm=False, **options)]


def problem(
    batch: int,
    options: MPPI,
    *,
    flow: bool = False,
    values: str = "q",
    reduce: Any = "two",
    policy: bool | str = True,
    task: int = 0,
    sees: bool | None = None,
    masked: bool = False,
    terminates: bool = False,
    scalar: bool = False,
    warm: bool = True,
    seed: int = 0,
) -> Problem:
    """A random one in float64; ``values``: q, q stacked, v, v apart, none.

    With ``policy="tdmpc2"`` each state has its own deviation, and the policy sees the task.
    ``masked`` gives each env its own components of actions, and its own discount.
    """
    GENERATOR.manual_seed(seed)
    pair, bins = D + task + A, 1 if scalar else BINS
    last = random_layer(17, D, "simnorm", generator=GENERATOR)
    dynamics = (
        ops.Flow(net([pair + 1, 17, D]), substeps=2)
        if flow
        else ops.LatentMLP([*net([pair, 17, 9])[:1], last])
    )
    heads = ops.Heads(
        net([pair, 9, bins]),
        -3.0,
        4.0,
        symlog=not flow,
        termination=net([pair, 7, 1]) if terminates else None,
    )
    told = task if sees or (sees is None and values[0] == "q") else 0
    widths = [D + told + (A if values[0] == "q" else 0), 10, bins]
    ensemble = None
    if values in ("q", "v apart"):
        order = "norm_act" if values == "q" else "act_norm"
        ensemble = ValueEnsemble([net(widths) for _ in range(E)], order)
    elif values != "none":
        order = "norm_act" if values == "q stacked" else "act_norm"
        ensemble = ValueEnsemble(net(widths, members=(E,)), order)
    if ensemble is not None:
        ensemble = ensemble._replace(
            on_action=values[0] == "q",
            reduce=reduce,
            vmin=-2.0,
            vmax=5.0,
            scale=0.7,
            task_input=sees,
        )
    horizon = options.horizon
    return Problem(
        torch.softmax(normal(batch, D // 8, 8), -1).flatten(1),
        actor(policy, task),
        dynamics,
        heads,
        ensemble,
        options,
        PlanNoise.draw(batch, A, options, ensemble, generator=GENERATOR, dtype=torch.float64),
        previous=torch.tanh(normal(horizon, batch, A)) if warm else None,
        first=torch.arange(batch) % 3 == 1 if warm else None,
        task=normal(batch, task) if task else None,
        gamma=torch.linspace(0.8, 1.0, batch, dtype=torch.float64) if masked else 0.95,
        mask=torch.arange(A) < 1 + torch.arange(batch)[:, None] % A if masked else None,
    )


def actor(kind: bool | str, task: int) -> ops.Policy | None:
    if kind == "tdmpc2":
        return ops.Policy(net([D + task, 8, 2 * A]), None, "norm_act", task > 0, -3.0, 1.0)
    return ops.Policy(net([D, 8, A]), normal(A).exp() * 0.3) if kind else None


# --- a second implementation, env by env; no function of pwm_fast is used below ------------------


def run_net(layers: Sequence[Layer], x: Tensor, act_first: bool = False) -> Tensor:
    def normed(h: Tensor) -> Tensor:
        if layer.ln_weight is None:
            return h
        return torch.nn.functional.layer_norm(h, h.shape[-1:], layer.ln_weight, layer.ln_bias)

    def activated(h: Tensor) -> Tensor:
        if layer.act == "simnorm":
            return torch.softmax(h.unflatten(-1, (-1, 8)), -1).flatten(-2)
        return torch.nn.functional.mish(h) if layer.act == "mish" else h

    for layer in layers:
        h = x @ layer.weight.T + layer.bias
        x = normed(activated(h)) if act_first else activated(normed(h))
    return x


def decoded(out: Tensor, vmin: float, vmax: float, symlog: bool) -> Tensor:
    if out.shape[-1] == 1:
        return out[..., 0]
    bins = torch.linspace(vmin, vmax, out.shape[-1], dtype=out.dtype)
    value = (torch.softmax(out, -1) * bins).sum(-1)
    return torch.sign(value) * torch.expm1(value.abs()) if symlog else value


def slow_step(p: Problem, z: Tensor, a: Tensor, task: list[Tensor]) -> Tensor:
    if isinstance(p.dynamics, ops.LatentMLP):
        return run_net(p.dynamics.net, torch.cat([z, *task, a], -1))

    def velocity(z: Tensor, tau: float) -> Tensor:
        column = torch.full_like(z[:, :1], tau)
        return run_net(p.dynamics.net, torch.cat([z, a, column, *task], -1))

    dt = 1.0 / p.dynamics.substeps
    for k in range(p.dynamics.substeps):
        k1 = velocity(z, k * dt)
        z = z + dt / 2 * (k1 + velocity(z + dt * k1, (k + 1) * dt))
    return z


def member(layers: Any, e: int) -> list[Layer]:
    if not isinstance(layers[0], Layer):
        return layers[e]
    return [with_tensors(layer, [x[e] for x in tensors_of(layer)]) for layer in layers]


def slow_action(p: Problem, b: int, z: Tensor, eps: Tensor) -> Tensor:
    """Masked before the tanh, as in TD-MPC2."""
    assert p.policy is not None
    mask = torch.ones(A, dtype=z.dtype) if p.mask is None else p.mask[b].to(z.dtype)
    if p.policy.std is not None:
        mu = run_net(p.policy.layers, z, act_first=True)
        return torch.tanh(mu * mask + p.policy.std * mask * eps * mask)
    x = z if p.task is None else torch.cat([z, p.task[b].expand(len(z), -1)], -1)
    out = run_net(p.policy.layers, x)
    log_std = -3.0 + 0.5 * (1.0 + 3.0) * (torch.tanh(out[:, A:]) + 1)
    return torch.tanh(out[:, :A] * mask + (log_std * mask).exp() * (eps * mask))


def slow_value(p: Problem, b: int, i: int, actions: Tensor) -> Tensor:
    """Values ``[N]`` of actions ``[H, N, A]``."""
    n = actions.shape[1]
    z, weight, total = p.z0[b].expand(n, D), torch.ones(n, dtype=p.z0.dtype), 0.0
    task = [] if p.task is None else [p.task[b].expand(n, -1)]
    for a in actions:
        x = torch.cat([z, *task, a], -1)
        logits = run_net(p.heads.reward, x)
        total = total + weight * decoded(logits, p.heads.vmin, p.heads.vmax, p.heads.symlog)
        weight = (p.gamma[b] if isinstance(p.gamma, Tensor) else p.gamma) * weight
        if p.heads.termination is not None:
            weight = weight * (1 - torch.sigmoid(run_net(p.heads.termination, x)[:, 0]))
        z = slow_step(p, z, a, task)
    v = p.values
    if v is None:
        return total
    x = z
    if v.on_action:
        assert p.noise.last_action is not None
        a = slow_action(p, b, z, p.noise.last_action[i, b])
        x = torch.cat([z, *([] if v.task_input is False else task), a], -1)
    elif v.task_input:
        x = torch.cat([z, *task], -1)
    outs = [run_net(member(v.layers, e), x, v.order == "act_norm") for e in range(E)]
    each = torch.stack([decoded(out, v.vmin, v.vmax, v.symlog) for out in outs])
    if v.reduce == "two":
        assert p.noise.members is not None
        last = each[p.noise.members[i]].sum(0) / 2
    else:
        last = each.min(0).values if v.reduce == "min" else each.mean(0)
    return total + weight * v.scale * last


def slow_plan(p: Problem, eval_mode: bool = False) -> ops.Plan:
    o, found = p.options, []
    for b in range(len(p.z0)):
        prior = torch.empty(o.horizon, 0, A, dtype=p.z0.dtype)
        if p.noise.policy is not None:
            z, drawn = p.z0[b].expand(o.policy_trajectories, D), []
            task = [] if p.task is None else [p.task[b].expand(len(z), -1)]
            for eps in p.noise.policy[:, b]:
                drawn.append(slow_action(p, b, z, eps))
                z = slow_step(p, z, drawn[-1], task)
            prior = torch.stack(drawn)
        mean = torch.zeros(o.horizon, A, dtype=p.z0.dtype)
        if p.previous is not None and not (p.first is not None and p.first[b]):
            for t in range(o.horizon - 1):
                mean[t] = p.previous[t + 1, b]
        std = torch.full_like(mean, o.max_std)
        for i in range(o.iterations):
            free = (mean[:, None] + std[:, None] * p.noise.samples[i, :, b]).clip(-1, 1)
            actions = torch.cat([prior, free], 1)
            if p.mask is not None:
                actions = actions * p.mask[b]
            value = slow_value(p, b, i, actions)
            order = value.argsort(descending=True)[: o.elites]
            score = torch.exp(o.temperature * (value[order] - value.max()))
            score = score / score.sum()
            elites = actions[:, order]
            mean = (score[None, :, None] * elites).sum(1)
            spread = (score[None, :, None] * (elites - mean[:, None]) ** 2).sum(1)
            std = spread.sqrt().clip(o.min_std, o.max_std)
            if p.mask is not None:
                mean, std = mean * p.mask[b], std * p.mask[b]
        taken = int((score.log() + p.noise.choice[b]).argmax())
        action = elites[0, taken]
        if not eval_mode:
            action = action + std[0] * p.noise.action[b]
        found.append((action.clip(-1, 1), mean, std, actions, value))
    action, mean, std, actions, value = zip(*found, strict=True)
    stacked = (torch.stack(x, 1) for x in (mean, std, actions))
    return ops.Plan(torch.stack(action), *stacked, torch.stack(value))


# --- against it -----------------------------------------------------------------------------------

SMALL = MPPI(iterations=3, samples=20, elites=6, policy_trajectories=4, horizon=3)
CASES: dict[str, Callable[..., Problem]] = {
    "TD-MPC2": partial(problem, 3, SMALL),
    "TD-MPC2 with tasks and ends": partial(
        problem, 3, SMALL, task=2, terminates=True, values="q stacked"
    ),
    "TD-MPC2 on many tasks": partial(
        problem, 4, SMALL, policy="tdmpc2", task=2, masked=True, values="q stacked"
    ),
    "TD-MPC2 with its policy": partial(problem, 3, SMALL, policy="tdmpc2", reduce="mean"),
    "PWM on many tasks": partial(
        problem, 3, SMALL, flow=True, values="v", sees=True, task=2, masked=True, terminates=True
    ),
    "Q functions without a task": partial(problem, 2, SMALL, task=2, sees=False),
    "PWM": partial(problem, 5, SMALL, flow=True, values="v", reduce="min", scalar=True),
    "PWM with tasks and ends": partial(
        problem, 2, SMALL, flow=True, values="v", task=3, terminates=True
    ),
    "mean of critics apart": partial(problem, 2, SMALL, values="v apart", reduce="mean"),
    "two of critics apart": partial(problem, 2, SMALL, values="v apart"),
    "least of Q functions": partial(problem, 2, SMALL, reduce="min"),
    "one env, one step": partial(
        problem, 1, MPPI(horizon=1, samples=7, elites=3, policy_trajectories=1, iterations=2)
    ),
    "rewards alone": partial(
        problem, 3, MPPI(samples=21, elites=5, policy_trajectories=0), values="none", policy=False
    ),
    "critics without a policy": partial(
        problem, 2, MPPI(samples=9, elites=2, policy_trajectories=0), values="v", policy=False
    ),
    "all are elites": partial(
        problem, 3, MPPI(samples=13, elites=13, policy_trajectories=5, temperature=2.0)
    ),
    "the policy alone": partial(
        problem, 3, MPPI(samples=8, elites=4, policy_trajectories=8), warm=False
    ),
    "one elite": partial(problem, 3, MPPI(samples=11, elites=1, policy_trajectories=2)),
    "no temperature": partial(
        problem, 2, MPPI(samples=9, elites=4, temperature=0.0, policy_trajectories=1)
    ),
}


@pytest.mark.parametrize("eval_mode", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_whole_plans_in_float64(name: str, eval_mode: bool) -> None:
    p = CASES[name]()
    expected = slow_plan(p, eval_mode)
    for backend in ("reference", "torch"):
        found = p.plan(eval_mode=eval_mode, backend=backend)
        for field in ops.Plan._fields:
            torch.testing.assert_close(
                getattr(found, field), getattr(expected, field), rtol=1e-9, atol=1e-10, msg=field
            )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_values_of_trajectories_in_float32(name: str, backend: str) -> None:
    """Of the first iteration: after it the elites differ by a rounding error, and all with them."""
    p = first_iteration(CASES[name]())
    truth, plain = slow_plan(p.to(torch.float64)), slow_plan(p)
    found = p.plan(backend=backend)
    assert found.value.dtype == found.action.dtype == torch.float32

    def nearby() -> Iterator[tuple[Tensor, Tensor]]:
        for seed in range(1, 6):
            other = first_iteration(CASES[name](seed=seed))
            yield slow_plan(other).value, slow_plan(other.to(torch.float64)).value

    assert_2x(found.value, plain.value, truth.value, "value", nearby())
    assert_2x(found.trajectories, plain.trajectories, truth.trajectories, "trajectories")


def first_iteration(p: Problem) -> Problem:
    """In float32."""
    noise = p.noise._replace(
        samples=p.noise.samples[:1],
        last_action=None if p.noise.last_action is None else p.noise.last_action[:1],
        members=None if p.noise.members is None else p.noise.members[:1],
    )
    options = MPPI(**{**vars(p.options), "iterations": 1})
    return p._replace(options=options, noise=noise).to(torch.float32)


@pytest.mark.parametrize("width", [7, 33])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_plan_of_the_published_size(backend: str, width: int) -> None:
    """512 trajectories of 3 steps, 64 elites, 6 iterations: all numbers are finite and in range."""
    z0 = torch.rand(2, width)
    layer = random_layer(width + A, width, "mish", dtype=torch.float32)
    heads = ops.Heads([random_layer(width + A, 101, norm=False, dtype=torch.float32)])
    policy = ops.Policy([random_layer(width, A, norm=False, dtype=torch.float32)], torch.ones(A))
    found = ops.plan(z0, policy, ops.LatentMLP([layer]), heads, backend=backend)
    assert found.value.shape == (2, 512) and found.trajectories.shape == (3, 2, 512, A)
    assert all(x.isfinite().all() for x in found)
    assert found.trajectories.abs().max() <= 1.0 and found.action.abs().max() <= 1.0
    assert found.std.min() >= MPPI().min_std and found.std.max() <= MPPI().max_std


# --- what follows from the definition -------------------------------------------------------------


def test_the_next_plan_starts_one_step_on() -> None:
    """Without noise all trajectories are the mean that a plan starts from."""
    still = MPPI(samples=4, elites=2, policy_trajectories=0, min_std=0.0, max_std=0.0)
    p = problem(4, still, values="none", policy=False)
    assert p.previous is not None and p.first is not None
    expected = torch.cat([p.previous[1:], torch.zeros(1, 4, A)])
    torch.testing.assert_close(p.plan(first=None).mean, expected)
    expected[:, p.first] = 0.0
    torch.testing.assert_close(p.plan().mean, expected)
    torch.testing.assert_close(p.plan().action, expected[0])
    assert not p.plan(previous=None).mean.any()


def test_envs_do_not_touch_one_another() -> None:
    p = CASES["TD-MPC2"]()
    whole = p.plan()
    for b in range(3):
        own = slice(b, b + 1)
        noise = PlanNoise(
            p.noise.samples[:, :, own],
            p.noise.choice[own],
            p.noise.action[own],
            p.noise.policy[:, own],  # type: ignore[index]
            p.noise.last_action[:, own],  # type: ignore[index]
            p.noise.members,
        )
        assert p.previous is not None and p.first is not None
        alone = p.plan(z0=p.z0[own], noise=noise, previous=p.previous[:, own], first=p.first[own])
        torch.testing.assert_close(alone.action, whole.action[own])


@pytest.mark.parametrize("name", ["TD-MPC2 on many tasks", "PWM on many tasks"])
def test_masks(name: str) -> None:
    """What is left out is 0 all along, and neither its noise nor the last plan matters there."""
    p = CASES[name]()
    assert p.mask is not None and p.previous is not None
    out = ~p.mask
    found = p.plan(eval_mode=False)
    assert not found.action[out].any() and found.action[p.mask].all()
    for x in (found.mean, found.std, found.trajectories.transpose(1, 2).flatten(0, 1)):
        assert not x[:, out].any() and x[:, p.mask].any()
    other = p._replace(
        noise=_map(p.noise, lambda x: x if x.dtype == torch.int64 else x.clone()),
        previous=torch.where(p.mask, p.previous, 0.5),
        mask=p.mask.double(),
    )
    other.noise.action[out] = 3.0
    for noise in (other.noise.samples, other.noise.policy, other.noise.last_action):
        if noise is not None:  # [..., B, N, A]
            noise.masked_fill_(out.unsqueeze(1), -2.0)
    again = other.plan(eval_mode=False)
    assert all(torch.equal(x, y) for x, y in zip(found, again, strict=True))
    lost = p.plan(z0=torch.full_like(p.z0, math.nan), first=None)  # the last plan stays
    assert not lost.mean[:, out].any() and lost.mean[:-1, p.mask].all()
    whole = p.plan(mask=torch.ones_like(p.mask))
    assert torch.equal(whole.action, p.plan(mask=None).action)
    assert whole.action.all()
    same = torch.arange(A) < A - 1  # of all envs
    for ours, expected in zip(p.plan(mask=same), p.plan(mask=same.expand_as(p.mask)), strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("name", ["TD-MPC2", "PWM with tasks and ends", "rewards alone"])
def test_discounts_of_each_env(name: str) -> None:
    """To the bit what a number gives; another env's does not matter."""
    p = CASES[name]().to(torch.float32)
    batch = len(p.z0)
    same = p.plan(gamma=torch.full((batch,), 0.95))
    assert all(torch.equal(x, y) for x, y in zip(same, p.plan(), strict=True))
    gamma = torch.full((batch,), 0.95)
    gamma[0] = 0.5
    found = p.plan(gamma=gamma)
    assert torch.equal(found.value[1:], same.value[1:])
    assert torch.equal(found.value[:1], p.plan(gamma=0.5).value[:1])
    assert not torch.allclose(found.value[0], same.value[0])


def test_no_env() -> None:
    for name in ("TD-MPC2", "TD-MPC2 on many tasks", "PWM with tasks and ends", "rewards alone"):
        p = CASES[name]()
        noise = PlanNoise.draw(0, A, p.options, p.values, dtype=torch.float64)
        none = {k: x[:0] for k in ("z0", "task", "mask", "gamma") if _is_tensor(x := getattr(p, k))}
        found = p.plan(noise=noise, previous=None, first=None, **none)
        assert found.action.shape == (0, A) and found.mean.shape == (p.options.horizon, 0, A)
        assert found.value.shape == (0, p.options.samples)


def test_members_that_are_not_drawn_are_not_computed() -> None:
    """NaN in all their parameters reaches nothing."""
    for values in ("q", "q stacked", "v", "v apart"):
        p = problem(2, SMALL, values=values)
        members = torch.tensor([[4, 1]] * SMALL.iterations)
        p = p._replace(noise=p.noise._replace(members=members))
        expected = p.plan()
        assert p.values is not None
        for e in (0, 2, 3):
            for layer in member(p.values.layers, e):
                for x in tensors_of(layer):
                    x.fill_(math.nan)
        assert torch.equal(p.plan().action, expected.action), values


@pytest.mark.skipif(why_missing() is not None, reason="no native kernels")
def test_calls() -> None:
    """All envs and trajectories are rows of one rollout, and all members of one call."""
    p = problem(3, SMALL, values="v").to(torch.float32)
    said = str(pwm_fast.explain(ops.plan, p.z0, *p[1:4], values=p.values, options=SMALL))
    # The policy's trajectories once. Then an iteration's actions, rewards and values.
    assert "pwm_fast::imagine" in said and "3 times pwm_fast::rollout" in said
    assert "9 times pwm_fast::mlp" in said and "3 times pwm_fast::two_hot_decode" not in said
    assert "6 times pwm_fast::two_hot_decode" in said


def test_a_trajectory_without_a_finite_value_has_no_weight() -> None:
    """Rewards overflow where an action is above 0, so that the plan keeps below."""
    first = torch.zeros(A, D + A)
    first[:, D:] = 1e20 * torch.eye(A)
    heads = ops.Heads([Layer(first, act="mish"), Layer(torch.full((1, A), 1e30))])
    dynamics = ops.LatentMLP([random_layer(D + A, D, "mish", dtype=torch.float32)])
    options = MPPI(samples=256, elites=200, policy_trajectories=0, iterations=2, horizon=2)
    z0 = torch.rand(3, D)
    z0[1] = math.nan
    previous = torch.full((2, 3, A), -0.5)
    for backend in ("reference", "torch"):
        found = ops.plan(
            z0, None, dynamics, heads, options=options, eval_mode=True, backend=backend,
            previous=previous, generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
        assert found.value[0].isinf().any() and found.value[0].isfinite().any()
        for b in (0, 2):
            assert (found.mean[:, b] < 0.0).all() and (found.action[b] < 0.0).all()
        # Nothing is made up for an env whose latents are NaN; the others do not notice.
        assert found.action[1].isnan().all() and found.value[1].isnan().all()
        assert torch.equal(found.mean[:, 1], torch.tensor([[-0.5] * A, [0.0] * A]))


def test_gradients_and_inputs_are_left_alone() -> None:
    p = problem(2, SMALL, values="v")
    for layer in (*p.dynamics.net, *p.heads.reward, *p.policy.layers):  # type: ignore[union-attr]
        for x in tensors_of(layer):
            x.requires_grad_()
    given = [p.z0.clone(), p.previous.clone()]  # type: ignore[union-attr]
    found = p.plan(z0=p.z0.requires_grad_())
    assert not any(x.requires_grad for x in found)
    assert torch.equal(given[0], p.z0) and torch.equal(given[1], p.previous)  # type: ignore[arg-type]


def test_nothing_waits_for_a_gpu() -> None:
    """On a made-up one, and with what a host would wait for forbidden."""
    tasks = CASES["TD-MPC2 on many tasks"]()
    for p in (*(problem(2, SMALL, values=values) for values in ("q", "q stacked", "v")), tasks):
        p = p.to(torch.float32)
        with no_sync() as mode:
            p.plan()
        assert mode.operators > 50
    for p in (problem(2, SMALL), tasks):
        if torch.cuda.is_available():
            break
        p = p.to(torch.float32)
        with FakeCuda():
            here = _map(p, lambda x: torch.empty(x.shape, dtype=x.dtype, device=DEVICE))
            assert here.plan(noise=None).action.device == DEVICE
            assert here.plan(noise=None).value.shape == (len(p.z0), 20)


def test_generators() -> None:
    p = CASES["TD-MPC2"]()
    before = torch.get_rng_state()

    def act(seed: int) -> Tensor:
        return p.plan(noise=None, generator=torch.Generator().manual_seed(seed)).action

    assert torch.equal(act(1), act(1)) and not torch.equal(act(1), act(2))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(3)
    drawn = p.plan(noise=None).action
    torch.manual_seed(3)
    assert torch.equal(p.plan(noise=None).action, drawn)
    assert not torch.equal(p.plan(noise=None).action, drawn)


def test_random_numbers() -> None:
    """Of the standard Gumbel and normal distributions; pairs of members all alike often."""
    options = MPPI(samples=2000, elites=2000, iterations=5, policy_trajectories=10)
    ensemble = ValueEnsemble(net([D, 1], members=(E,)), on_action=True)
    drawn = PlanNoise.draw(
        50, A, options, ensemble, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    gumbel = drawn.choice.flatten()
    assert gumbel.mean().item() == pytest.approx(0.5772, abs=0.02)
    assert gumbel.var().item() == pytest.approx(math.pi**2 / 6, abs=0.05)
    for x in (drawn.samples, drawn.last_action):
        assert x is not None
        assert abs(x.mean()) < 0.01 and abs(x.std() - 1) < 0.01
    assert drawn.policy is not None and drawn.policy.shape == (3, 50, 10, A)
    many = MPPI(samples=1, elites=1, policy_trajectories=0, iterations=4000)
    members = PlanNoise.draw(1, 1, many, ensemble).members
    assert members is not None and members.dtype == torch.int64
    assert (members[:, 0] != members[:, 1]).all()
    counts = torch.bincount(members[:, 0] * E + members[:, 1], minlength=E * E).view(E, E)
    off = counts[~torch.eye(E, dtype=torch.bool)]
    assert counts.diagonal().sum() == 0 and off.min() > 140 and off.max() < 260


@pytest.mark.parametrize("name", ["PWM", "TD-MPC2 on many tasks"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bits(dtype: torch.dtype, name: str) -> None:
    p = CASES[name]().to(dtype)
    found = p.plan()
    assert found.action.dtype == found.trajectories.dtype == dtype
    assert found.mean.dtype == found.std.dtype == found.value.dtype == torch.float32
    assert all(x.isfinite().all() for x in found)


def test_autocast() -> None:
    p = CASES["TD-MPC2"]().to(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = p.plan()
    assert all(x.dtype == torch.float32 and x.isfinite().all() for x in found)
    torch.testing.assert_close(found.trajectories[:, :, :4], p.plan().trajectories[:, :, :4],
                               atol=0.05, rtol=0.0)  # fmt: skip


# --- a control problem ----------------------------------------------------------------------------


def test_a_mass_on_a_track() -> None:
    """Position and velocity under a force, with their cost as the reward: the model is exact.

    The prior drives the mass too gently: it costs more than twice as much as a plan. One iteration
    of narrow trajectories needs the plan before to start from.
    """
    dt = 0.3
    step = torch.tensor([[1.0, dt, 0.5 * dt * dt], [0.0, 1.0, dt]])
    # mish(k x) + mish(-k x) is even: a parabola at 0, |k x| further out.
    k = torch.tensor([[4.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.3]])
    cost = [Layer(torch.cat([k, -k]), act="mish"), Layer(-torch.ones(1, 6))]
    dynamics, heads = ops.LatentMLP([Layer(step)]), ops.Heads(cost)
    feedback = torch.tensor([[-0.2, -0.1]])
    policy = ops.Policy([Layer(feedback)], torch.tensor([0.3]))
    options = MPPI(horizon=8, iterations=4, samples=128, elites=16, policy_trajectories=8)
    starts = torch.tensor([[2.0, 0.0], [-1.0, 1.5], [0.5, -2.0]])

    def total(act: Callable[[Tensor], Tensor]) -> Tensor:
        z, reward = starts, torch.zeros(3)
        for _ in range(25):
            a = act(z)
            x = torch.cat([z, a], 1)
            reward = reward + run_net([layer._replace(bias=torch.zeros(len(layer.weight)))
                                       for layer in cost], x)[:, 0]  # fmt: skip
            z = x @ step.T
        return reward

    def planner(warm: bool, options: MPPI = options) -> Callable[[Tensor], Tensor]:
        generator, previous = torch.Generator().manual_seed(0), None

        def act(z: Tensor) -> Tensor:
            nonlocal previous
            found = ops.plan(
                z, policy, dynamics, heads, options=options, gamma=1.0, previous=previous,
                generator=generator, eval_mode=True,
            )  # fmt: skip
            previous = found.mean if warm else None
            return found.action

        return act

    prior = total(lambda z: torch.tanh(z @ feedback.T))
    planned = total(planner(True))
    assert (planned > 0.5 * prior).all(), (planned, prior)
    few = MPPI(8, 1, samples=64, elites=8, policy_trajectories=0, max_std=0.3)
    assert (total(planner(True, few)) > 0.9 * total(planner(False, few))).all()


# --- errors ---------------------------------------------------------------------------------------

OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "horizon": ({"horizon": 0}, "horizon must be a positive integer, got 0"),
    "iterations": ({"iterations": 2.5}, "iterations must be a positive integer, got 2.5"),
    "samples": ({"samples": True}, "samples must be a positive integer, got True"),
    "elites": ({"elites": 600}, "elites must be at most samples=512, got 600"),
    "negative": (
        {"policy_trajectories": -1},
        "policy_trajectories must be an integer of 0 or more, got -1",
    ),
    "policy": (
        {"policy_trajectories": 513},
        "policy_trajectories must be at most samples=512, got 513",
    ),
    "std": ({"min_std": 3.0}, "max_std must be at least min_std=3.0, got 2.0"),
    "nan": ({"max_std": math.nan}, "max_std must be a finite number of 0 or more, got nan"),
    "temperature": (
        {"temperature": -1.0},
        "temperature must be a finite number of 0 or more, got -1.0",
    ),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_out_of_range(name: str) -> None:
    changes, message = OPTIONS[name]
    with pytest.raises(ValueError, match=re.escape(message)):
        MPPI(**changes)


P = CASES["TD-MPC2"]()
V = P.values
assert V is not None
ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "z0": ({"z0": P.z0[0]}, "z0 must be [B, D], got (16,)"),
    "gammas": ({"gamma": torch.ones(2)}, "gamma must be a number or [3], got (2,)"),
    "mask": (
        {"mask": torch.ones(3, A + 1)},
        "or bool [3] for all rows, got (3, 4)",
    ),
    "policy's task": (
        {"policy": P.policy._replace(task_input=True)},  # type: ignore[union-attr]
        "policy.task_input needs task embeddings, got task=None",
    ),
    "policy's outputs": (
        {"policy": P.policy._replace(std=None)},  # type: ignore[union-attr]
        "policy.layers must have 2 * 1 outputs, means and log standard deviations",
    ),
    "values' task": (
        {"values": V._replace(task_input=True)},
        "task must be given to value functions that take it, got None",
    ),
    "gamma": ({"gamma": 1.5}, "gamma must lie in [0, 1], got 1.5"),
    "task": ({"task": torch.zeros(2, 1)}, "task has leading shape (2,), but z0 has (3,)"),
    "policy": (
        {"policy": None},
        "options.policy_trajectories must be 0 without a policy, got 4",
    ),
    "policy width": (
        {"policy": P.policy._replace(std=torch.ones(2))},  # type: ignore[union-attr]
        "policy.layers has output width 3, but policy.std has 2",
    ),
    "dynamics": (
        {"dynamics": ops.LatentMLP(net([D + A, 9]))},
        "dynamics.net has output width 9, but z0 has 16",
    ),
    "reward": (
        {"heads": ops.Heads(net([D + A + 1, 5]))},
        "heads.reward[0].weight takes 20 inputs, but 19 arrive",
    ),
    "value": (
        {"heads": P.heads._replace(value=net([D, 1], members=(2,)))},
        "heads.value must be None: give values=ops.ValueEnsemble(layers, reduce='min')",
    ),
    "reduce": (
        {"values": V._replace(reduce="max")},
        "values.reduce must be one of two, min, mean, got 'max'",
    ),
    "order": (
        {"values": V._replace(order="norm")},
        "values.order must be one of norm_act, act_norm, got 'norm'",
    ),
    "scale": (
        {"values": V._replace(scale=0.0)},
        "values.scale must be a positive number, got 0.0",
    ),
    "no members": ({"values": V._replace(layers=[])}, "values.layers must hold at least one"),
    "inputs of V": (
        {"values": V._replace(on_action=False)},
        "values.layers[0][0].weight takes 19 inputs, but 16 arrive",
    ),
    "unlike members": (
        {"values": V._replace(layers=[*V.layers, net([D + A, 4, BINS])])},
        "values.layers[5] must have the widths and options of values.layers[0]",
    ),
    "previous": (
        {"previous": torch.zeros(2, 3, A)},
        "previous must be [3, 3, 3], got (2, 3, 3)",
    ),
    "first": ({"first": torch.zeros(2, dtype=torch.bool)}, "first must be [3], got (2,)"),
    "noise": (
        {"noise": P.noise._replace(choice=torch.zeros(3, 5))},
        "noise.choice must be [3, 6], got (3, 5)",
    ),
    "noise left out": (
        {"noise": P.noise._replace(policy=None)},
        "noise.policy must be [3, 3, 4, 3], got None",
    ),
    "noise too many": (
        {"values": None},
        "noise.last_action must be None for these options and values",
    ),
    "noise and generator": (
        {"generator": torch.Generator()},
        "generator must be None where noise is given",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str) -> None:
    changes, message = ERRORS[name]
    with pytest.raises(ValueError, match=re.escape(message)):
        P.plan(**changes)


def test_a_backend_that_is_not_there() -> None:
    with pytest.raises(pwm_fast.BackendError, match="has no backend 'cuda'"):
        P.plan(backend="cuda")
    with pwm_fast.backend("torch"):
        assert torch.equal(P.plan().action, P.plan(backend="torch").action)


def test_wrong_types() -> None:
    with pytest.raises(TypeError, match="options must be an MPPI or None, got dict"):
        P.plan(options={})
    with pytest.raises(TypeError, match=r"first must be a bool tensor, got torch.float32"):
        P.plan(first=torch.zeros(3))
    members = torch.zeros(3, 2)
    with pytest.raises(TypeError, match=r"noise.members must be an int64 tensor, got torch.float"):
        P.plan(noise=P.noise._replace(members=members))
    with pytest.raises(ValueError, match=r"values\.on_action needs a policy"):
        ops.plan(
            P.z0, None, P.dynamics, P.heads, values=P.values, options=MPPI(policy_trajectories=0)
        )
