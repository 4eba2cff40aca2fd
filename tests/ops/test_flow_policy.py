"""Flow policies against plain PyTorch and against closed forms."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck

import pwm_fast
from pwm_fast import ops
from pwm_fast.backends.native import why_missing
from pwm_fast.ops import FlowPolicy, Layer
from pwm_fast.ops.extend import act
from pwm_fast.ops.mlp import reference_mlp
from tests.helpers import assert_2x, random_layer, tensors_of, with_tensors

D, A, E, B, H, U = 8, 3, 2, 5, 3, 9
needs_native = pytest.mark.skipif(why_missing() is not None, reason="no native kernels")
native = pytest.param("native", marks=needs_native)
FORMS = [
    (form, method, order)
    for form, method, order in product(
        ("ode", "gated", "meanflow"), ("euler", "heun"), ("norm_act", "act_norm")
    )
    if (form, method) != ("meanflow", "heun")
]


def net(inputs: int, outputs: int) -> list[Layer]:
    return [random_layer(inputs, U, "mish"), random_layer(U, outputs, norm=False)]


def policy_of(
    form: str = "ode",
    method: str = "euler",
    order: str = "norm_act",
    *,
    substeps: int = 3,
    task: bool = False,
    latent: int = D,
    action: int = A,
) -> FlowPolicy:
    inputs = action + latent + 1 + (E if task else 0) + (form == "meanflow")
    layers = net(inputs, 2 * action if form == "gated" else action)
    std = 0.3 + torch.rand(action, dtype=torch.float64)
    return FlowPolicy(layers, std, form, substeps, method, order, task)  # type: ignore[arg-type]


def arguments(
    policy: FlowPolicy, batch: int = B, horizon: int = H, latent: int = D
) -> dict[str, Any]:
    action = policy.width
    return {
        "z0": torch.randn(batch, latent, dtype=torch.float64),
        "policy": policy,
        "dynamics": ops.ResidualMLP(net(latent + E + action, latent)),
        "heads": ops.Heads(net(latent + E + action, 1)),
        "noise": torch.randn(horizon, batch, action, dtype=torch.float64),
        "task": torch.randn(batch, E, dtype=torch.float64),
    }


def cast(x: Any, dtype: torch.dtype) -> Any:
    """All tensors of some arguments, as leaves."""
    if isinstance(x, Tensor):
        return x.detach().to(dtype).requires_grad_()
    if isinstance(x, dict):
        return {k: cast(v, dtype) for k, v in x.items()}
    if isinstance(x, tuple) and hasattr(x, "_fields"):
        return type(x)(*(cast(v, dtype) for v in x))
    return [cast(v, dtype) for v in x] if isinstance(x, list) else x


def replaced(x: Any, moved: dict[int, Tensor]) -> Any:
    """The arguments with other tensors in the place of some."""
    if isinstance(x, Tensor):
        return moved.get(id(x), x)
    if isinstance(x, dict):
        return {k: replaced(v, moved) for k, v in x.items()}
    if isinstance(x, tuple) and hasattr(x, "_fields"):
        return type(x)(*(replaced(v, moved) for v in x))
    return [replaced(v, moved) for v in x] if isinstance(x, list) else x


def leaves(x: Any) -> list[Tensor]:
    if isinstance(x, Tensor):
        return [x]
    found = x.values() if isinstance(x, dict) else x if isinstance(x, list | tuple) else ()
    return [t for v in found for t in leaves(v)]


# --- a second implementation; no function of pwm_fast is used below -------------------------------


def slow_net(layers: Sequence[Layer], order: str, *inputs: Tensor) -> Tensor:
    x = torch.cat(inputs, -1)
    for p in layers:
        h = F.linear(x, p.weight, p.bias)
        if p.ln_weight is None:
            x = h
        elif order == "norm_act":
            x = F.mish(F.layer_norm(h, h.shape[-1:], p.ln_weight, p.ln_bias, p.eps))
        else:
            x = F.layer_norm(F.mish(h), h.shape[-1:], p.ln_weight, p.ln_bias, p.eps)
    return x


def slow_action(p: FlowPolicy, z: Tensor, eps: Tensor, task: Tensor | None) -> Tensor:
    x, size = p.std * eps, 1.0 / p.substeps

    def velocity(x: Tensor, tau: float) -> Tensor:
        columns = [x, z, z.new_full((len(z), 1), tau)]
        if p.task_input:
            assert task is not None
            columns.append(task)
        if p.form == "meanflow":
            columns.append(z.new_full((len(z), 1), size))
        y = slow_net(p.layers, p.order, *columns)
        if p.form != "gated":
            return y
        width = y.shape[1] // 2
        return (y[:, :width] - x) / (1.0 + torch.exp(-y[:, width:]))

    for k in range(p.substeps):
        slope = velocity(x, k * size)
        if p.method == "heun":
            slope = (slope + velocity(x + size * slope, (k + 1) * size)) / 2
        x = x + size * slope
    return torch.tanh(x)


def slow_rollout(given: dict[str, Any], detach: bool) -> tuple[Tensor, Tensor, Tensor]:
    z, task, policy = given["z0"], given["task"], given["policy"]
    latents, actions, rewards = [z], [], []
    for eps in given["noise"]:
        a = slow_action(policy, z.detach() if detach else z, eps, task)
        rewards.append(slow_net(given["heads"].reward, "norm_act", z, task, a)[:, 0])
        z = z + slow_net(given["dynamics"].net, "norm_act", z, task, a)
        actions.append(a)
        latents.append(z)
    return torch.stack(latents), torch.stack(actions), torch.stack(rewards)


def results(given: dict[str, Any], outputs: Sequence[Tensor], *, noise: bool) -> list[Tensor]:
    """Outputs and the gradients of all inputs; a fused pass has none of noise."""
    wanted = [x for x in leaves(given) if noise or x is not given["noise"]]
    loss = sum((x.square().sum() + x.sum() for x in outputs), torch.zeros(()))
    grads = torch.autograd.grad(loss, wanted, allow_unused=True)
    zeros = (torch.zeros_like(x) if g is None else g for x, g in zip(wanted, grads, strict=True))
    return [*outputs, *zeros]


# --- values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("form", "method", "order"), FORMS)
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_values_and_gradients(backend: str, form: str, method: str, order: str) -> None:
    torch.manual_seed(0)
    detach = order == "norm_act"
    given = cast(arguments(policy_of(form, method, order, task=True)), torch.float64)
    found = ops.imagine(**given, detach=detach, backend=backend)[:3]
    ours = results(given, found, noise=True)
    for x, expected in zip(
        ours, results(given, slow_rollout(given, detach), noise=True), strict=True
    ):
        torch.testing.assert_close(x, expected, rtol=1e-10, atol=1e-11)


@needs_native
@pytest.mark.parametrize(
    ("latent", "action", "batch"),
    [(5, 1, 1), (24, 7, 33), pytest.param(D, A, B, marks=pytest.mark.repeats)],
)
@pytest.mark.parametrize(("form", "method", "order"), FORMS)
def test_native_in_float32(
    form: str, method: str, order: str, latent: int, action: int, batch: int
) -> None:
    """At most twice PyTorch's own error, also for actions narrower than any vector."""
    torch.manual_seed(1)
    policy = policy_of(form, method, order, latent=latent, action=action)
    draw = cast(arguments(policy, batch, 2, latent), torch.float32)

    @cache
    def pair(i: int) -> list[tuple[Tensor, Tensor]]:
        """PyTorch's results and the truth, at the inputs (0) and close to them."""
        generator = torch.Generator().manual_seed(i)
        near = [torch.randn(x.shape, generator=generator) for x in leaves(draw)] if i else []
        moved = {id(x): x * (1.0 + 0.01 * n) for x, n in zip(leaves(draw), near, strict=bool(i))}
        at = cast(replaced(draw, moved), torch.float32)
        plain = results(at, slow_rollout(at, True), noise=False)
        at = cast(at, torch.float64)
        return list(zip(plain, results(at, slow_rollout(at, True), noise=False), strict=True))

    given = cast(draw, torch.float32)
    given["noise"] = given["noise"].detach()
    ours = results(given, ops.imagine(**given, backend="native")[:3], noise=False)
    for i, (x, theirs) in enumerate(zip(ours, pair(0), strict=True)):
        assert_2x(x, *theirs, f"tensor {i}", (pair(n)[i] for n in range(1, 9)))


@pytest.mark.parametrize("backend", ["reference", "torch", native])
def test_a_field_that_looks_at_latents_alone_is_a_gaussian_policy(backend: str) -> None:
    torch.manual_seed(0)
    policy = policy_of("ode", order="act_norm")
    first = policy.layers[0]
    weight = first.weight.clone()
    weight[:, :A] = 0.0
    weight[:, A + D :] = 0.0
    layers = [first._replace(weight=weight), *policy.layers[1:]]
    dtype = torch.float32 if backend == "native" else torch.float64
    given = cast(arguments(policy._replace(layers=layers)), dtype)
    given["noise"] = given["noise"].detach()
    found = ops.imagine(**given, backend=backend)
    own = given["policy"].layers
    mean = [own[0]._replace(weight=own[0].weight[:, A : A + D]), *own[1:]]
    given["policy"] = ops.Policy(mean, given["policy"].std)
    for x, expected in zip(found[:3], ops.imagine(**given, backend="reference")[:3], strict=True):
        torch.testing.assert_close(x, expected)


@pytest.mark.parametrize("method", ["euler", "heun"])
@pytest.mark.parametrize("substeps", [1, 2, 5])
def test_closed_forms(method: str, substeps: int) -> None:
    """Linear fields: ``x' = w x`` and a gate that does not move, towards a point that does not."""
    torch.manual_seed(0)
    z, eps = torch.zeros(4, D, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)
    std = torch.tensor([0.5, 2.0], dtype=torch.float64)
    size, rates = 1.0 / substeps, torch.tensor([0.7, -1.3], dtype=torch.float64)

    def growth(rate: Tensor) -> Tensor:
        step = size * rate
        return (1.0 + step + (0.5 * step.square() if method == "heun" else 0.0)) ** substeps

    weight = torch.zeros(2, 2 + D + 1, dtype=torch.float64)
    weight[:, :2] = torch.diag(rates)
    policy = FlowPolicy([Layer(weight)], std, "ode", substeps, method)  # type: ignore[arg-type]
    expected = torch.tanh(std * eps * growth(rates))
    torch.testing.assert_close(act(policy, z, eps, None, None, reference_mlp), expected)

    bias = torch.tensor([0.2, -0.4, 1.0, -2.0], dtype=torch.float64)
    layers = [Layer(torch.zeros(4, 2 + D + 1, dtype=torch.float64), bias)]
    policy = FlowPolicy(layers, std, "gated", substeps, method)  # type: ignore[arg-type]
    kept = growth(-torch.sigmoid(bias[2:]))
    expected = torch.tanh(kept * std * eps + (1.0 - kept) * bias[:2])
    torch.testing.assert_close(act(policy, z, eps, None, None, reference_mlp), expected)
    deterministic = torch.tanh((1.0 - kept) * bias[:2]).expand(4, 2)
    torch.testing.assert_close(act(policy, z, None, None, None, reference_mlp), deterministic)


def test_a_gate_bounds_the_gradient_of_the_noise() -> None:
    """Through many steps, where that of a plain field with the same weights explodes."""
    torch.manual_seed(0)
    weight = torch.zeros(2, 1 + D + 1, dtype=torch.float64)
    weight[0, 0] = 30.0  # the candidate, or the velocity, grows with x
    weight = weight / 3.0
    z = torch.zeros(1, D, dtype=torch.float64)
    std, steps = torch.ones(1, dtype=torch.float64), 32

    def slope(policy: FlowPolicy) -> float:
        eps = torch.full((1, 1), 1e-9, dtype=torch.float64, requires_grad=True)
        a = act(policy, z, eps, None, None, reference_mlp)
        return torch.autograd.grad(a.sum(), eps)[0].item()

    plain = slope(FlowPolicy([Layer(weight[:1])], std, "ode", steps))
    closed = torch.tensor([0.0, -50.0], dtype=torch.float64)
    gated = slope(FlowPolicy([Layer(weight, closed)], std, "gated", steps))
    assert plain > 1e3 and gated == pytest.approx(1.0)
    open_to_a_constant = torch.tensor([0.3, 5.0], dtype=torch.float64)
    layers = [Layer(torch.zeros_like(weight), open_to_a_constant)]
    assert 0.0 < slope(FlowPolicy(layers, std, "gated", steps)) < 0.5


# --- what runs, and edges -------------------------------------------------------------------------


@needs_native
def test_what_runs() -> None:
    """The whole flow in one operator a macro step where there is one; else each evaluation."""
    whole = f"{H} times pwm_fast::rollout"
    each = f"{3 * H + H + 1} times pwm_fast::mlp"  # and those of the dynamics and the head
    for form, order, mask, expected in (
        ("ode", "norm_act", None, whole),
        ("meanflow", "norm_act", None, whole),
        ("gated", "norm_act", None, each),
        ("ode", "act_norm", None, each),
        ("ode", "norm_act", torch.ones(B, A), each),
    ):
        given = cast(arguments(policy_of(form, order=order)), torch.float32)
        given["noise"] = given["noise"].detach()
        said = pwm_fast.explain(ops.imagine, **given, action_mask=mask, backend="native")
        assert said.backend == "native" and expected in str(said), (form, order, str(said))
        with ops.algebra(hoist=False):
            said = pwm_fast.explain(ops.imagine, **given, action_mask=mask, backend="native")
        assert "rollout" not in str(said.operators)


@pytest.mark.parametrize("form", ["ode", "gated", "meanflow"])
@pytest.mark.parametrize("backend", ["reference", "torch", native])
def test_masks(backend: str, form: str) -> None:
    """What is left out is 0, and the rest cannot be told from what its noise is."""
    torch.manual_seed(0)
    dtype = torch.float32 if backend == "native" else torch.float64
    given = cast(arguments(policy_of(form)), dtype)
    mask = torch.tensor([[1, 1, 1], [1, 0, 1], [0, 0, 0], [1, 1, 0], [0, 1, 1]]).bool()
    noise = given["noise"].detach()
    other = torch.where(mask, noise, torch.randn_like(noise))
    one, two, floating = (
        ops.imagine(**given | {"noise": n, "action_mask": m}, backend=backend)
        for n, m in ((noise, mask), (other, mask), (noise, mask.to(dtype)))
    )
    assert not one.action[:, ~mask].any() and one.action[:, mask].all()
    for changed in (two, floating):
        assert all(torch.equal(x, y) for x, y in zip(one[:3], changed[:3], strict=True))
    shared = torch.tensor([True, False, True])
    for said in (shared, shared.expand(B, A)):
        found = ops.imagine(**given | {"noise": noise, "action_mask": said}, backend=backend)
        assert not found.action[..., 1].any() and found.action[..., ::2].all()
    assert not torch.equal(found.action[1:], one.action[1:])


@pytest.mark.parametrize("form", ["ode", "gated", "meanflow"])
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_derivatives(backend: str, form: str) -> None:
    """By differences: latents, noise, task, mask, deviation and the network."""
    torch.manual_seed(0)
    given = arguments(policy_of(form, "euler", task=True), horizon=2)
    params = [x for layer in given["policy"].layers for x in tensors_of(layer)]
    mask = torch.tensor([1, 0, 1, 1, 1]).double()[:, None].expand(B, A).clone()
    inputs = [given["z0"], given["noise"], given["task"], mask, given["policy"].std, *params]

    def call(z0: Tensor, noise: Tensor, task: Tensor, mask: Tensor, std: Tensor, *p: Tensor) -> Any:
        rest = iter(p)
        layers = [
            with_tensors(layer, [next(rest) for _ in tensors_of(layer)])
            for layer in given["policy"].layers
        ]
        own = given["policy"]._replace(layers=layers, std=std)
        changed = {"z0": z0, "noise": noise, "task": task, "policy": own}
        return ops.imagine(
            **given | changed, action_mask=mask, detach=False, backend=backend
        ).action

    assert gradcheck(call, [x.requires_grad_() for x in inputs], fast_mode=True)


@pytest.mark.parametrize("batch", [0, 1])
@pytest.mark.parametrize("horizon", [0, 2])
@pytest.mark.parametrize("form", ["ode", "gated", "meanflow"])
def test_nothing_or_one(form: str, batch: int, horizon: int) -> None:
    for dtype in (torch.float64, torch.float32):
        given = cast(arguments(policy_of(form), batch, horizon), dtype)
        given["noise"] = given["noise"].detach()
        out = ops.imagine(**given)
        assert out.z.shape == (horizon + 1, batch, D) and out.reward.shape == (horizon, batch)
        assert out.action.shape == (horizon, batch, A)


@pytest.mark.parametrize("backend", ["torch", native])
def test_strided_inputs(backend: str) -> None:
    torch.manual_seed(0)
    given = cast(arguments(policy_of()), torch.float32)
    given["noise"] = given["noise"].detach()
    expected = ops.imagine(**given, backend=backend)
    for key in ("z0", "noise", "task"):
        x = given[key].detach()
        wide = torch.stack((x, x), -1)[..., 0]
        assert not wide.is_contiguous()
        found = ops.imagine(**given | {key: wide}, backend=backend)
        assert all(torch.equal(x, y) for x, y in zip(expected[:3], found[:3], strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes_are_kept(dtype: torch.dtype) -> None:
    given = cast(arguments(policy_of("gated")), dtype)
    assert all(x.dtype == dtype for x in ops.imagine(**given)[:3])


@pytest.mark.parametrize("form", ["ode", "gated", "meanflow"])
def test_plans(form: str) -> None:
    """Its trajectories are imagination's; Q functions see its deterministic action."""
    torch.manual_seed(0)
    given = arguments(policy_of(form, task=True))
    options = ops.MPPI(horizon=2, iterations=1, samples=6, elites=2, policy_trajectories=2)
    q = ops.ValueEnsemble([net(D + E + A, 1)], "norm_act", on_action=True, reduce="min")
    noise = ops.PlanNoise.draw(B, A, options, q, dtype=torch.float64)
    own = {k: given[k] for k in ("policy", "dynamics", "heads")}
    found = ops.plan(given["z0"], **own, values=q, options=options, noise=noise, task=given["task"])
    assert noise.policy is not None
    for i in range(2):
        rollout = ops.imagine(**given | {"noise": noise.policy[:, :, i]})
        torch.testing.assert_close(found.trajectories[:, :, i], rollout.action)
    values = ops.extend.trajectory_values(
        given["z0"], found.trajectories, given["dynamics"], given["heads"], values=q,
        policy=given["policy"], gamma=0.5, task=given["task"],
    )  # fmt: skip
    steps = given | {"policy": None}
    z = given["z0"]
    total = torch.zeros(B, dtype=torch.float64)
    for t, a in enumerate(found.trajectories[:, :, 3]):
        reward = slow_net(given["heads"].reward, "norm_act", z, steps["task"], a)[:, 0]
        total = total + 0.5**t * reward
        z = z + slow_net(given["dynamics"].net, "norm_act", z, steps["task"], a)
    a = slow_action(given["policy"], z, torch.zeros(B, A, dtype=torch.float64), steps["task"])
    last = slow_net(q.layers[0], "norm_act", z, steps["task"], a)[:, 0]  # type: ignore[arg-type]
    torch.testing.assert_close(values[:, 3], total + 0.25 * last)


def test_mapped_over() -> None:
    """``torch.vmap`` over latents and noise."""
    torch.manual_seed(0)
    given = arguments(policy_of("ode"))
    del given["task"]
    given["dynamics"] = ops.ResidualMLP(net(D + A, D))
    given["heads"] = ops.Heads(net(D + A, 1))
    z0, noise = (torch.stack((x, 0.5 * x)) for x in (given["z0"], given["noise"]))

    def run(z0: Tensor, noise: Tensor) -> Tensor:
        return ops.imagine(**given | {"z0": z0, "noise": noise}).z

    mapped = torch.vmap(run)(z0, noise)
    torch.testing.assert_close(mapped, torch.stack([run(z0[i], noise[i]) for i in (0, 1)]))


# --- errors ---------------------------------------------------------------------------------------

Change = Callable[[FlowPolicy], FlowPolicy]
ERRORS: dict[str, tuple[Change, str]] = {
    "form": (
        lambda p: p._replace(form="flow"),  # type: ignore[arg-type]
        "policy.form must be one of ode, gated, meanflow, got 'flow'",
    ),
    "order": (
        lambda p: p._replace(order="norm"),  # type: ignore[arg-type]
        "policy.order must be one of norm_act, act_norm, got 'norm'",
    ),
    "substeps": (
        lambda p: p._replace(substeps=0),
        "policy.substeps must be a positive integer, got 0",
    ),
    "method": (lambda p: p._replace(method="rk4"), "method must be"),  # type: ignore[arg-type]
    "average": (
        lambda p: policy_of("meanflow")._replace(method="heun"),
        "policy.method must be euler for form meanflow, got 'heun'",
    ),
    "deviation": (lambda p: p._replace(std=torch.ones(1)), "policy.std must be [3], got (1,)"),
    "outputs": (
        lambda p: p._replace(form="gated"),
        "policy.layers must have 6 outputs for form gated and noise of width 3, got 3",
    ),
    "inputs": (
        lambda p: p._replace(form="meanflow"),
        "policy.layers[0].weight takes 12 inputs, but 13 arrive",
    ),
    "task": (
        lambda p: p._replace(task_input=True),
        "policy.layers[0].weight takes 12 inputs, but 14 arrive",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str) -> None:
    change, message = ERRORS[name]
    policy = policy_of()
    with pytest.raises(ValueError, match=re.escape(message)):
        ops.imagine(**arguments(policy) | {"policy": change(policy)})


def test_a_missing_task() -> None:
    given = arguments(policy_of(task=True)) | {"task": None}
    given["dynamics"], given["heads"] = ops.ResidualMLP(net(D + A, D)), ops.Heads(net(D + A, 1))
    with pytest.raises(ValueError, match=r"policy.task_input needs task embeddings, got task=None"):
        ops.imagine(**given)
