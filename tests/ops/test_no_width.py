"""Axes of features without an element: what PyTorch's own functions give, or a ValueError.

An observation without a number, an action of a robot without motors, a layer without units.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pwm_fast import ops
from pwm_fast.backends import native, select
from pwm_fast.ops import Activation, Layer
from tests.helpers import random_layer, tensors_of


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, requires_grad=True)


def layer(k: int, n: int, act: Activation = "mish", members: tuple[int, ...] = ()) -> Layer:
    return random_layer(k, n, act, members=members, dtype=torch.float32)


def head(k: int, n: int, members: tuple[int, ...] = ()) -> Layer:
    return random_layer(k, n, norm=False, members=members, dtype=torch.float32)


def torch_mlp(x: Tensor, layers: list[Layer], *, first_act: bool = False) -> Tensor:
    """PyTorch's own composition, of either order."""
    for p in layers:
        x = F.linear(x, p.weight, p.bias)
        if first_act and p.act == "mish":
            x = F.mish(x)
        if p.ln_weight is not None:
            x = F.layer_norm(x, x.shape[-1:], p.ln_weight, p.ln_bias)
        if not first_act and p.act == "mish":
            x = F.mish(x)
    return x


def torch_flow(z: Tensor, a: Tensor, net: list[Layer]) -> Tensor:
    def v(z: Tensor, tau: float) -> Tensor:
        return torch_mlp(torch.cat([z, a, z.new_full((*z.shape[:-1], 1), tau)], -1), net)

    for k in range(2):
        k1 = v(z, k / 2)
        z = z + 0.25 * (k1 + v(z + 0.5 * k1, (k + 1) / 2))
    return z


WIDTHS = {"inputs": (0, 8, 3), "hidden": (5, 0, 3), "outputs": (5, 8, 0), "all": (0, 0, 0)}
BATCHES = ((0,), (3,), (2, 3), (2, 0))


@pytest.mark.parametrize("batch", BATCHES, ids=str)
@pytest.mark.parametrize("order", ["norm_act", "act_norm"])
@pytest.mark.parametrize("widths", WIDTHS.values(), ids=WIDTHS)
def test_mlp(widths: tuple[int, int, int], order: str, batch: tuple[int, ...]) -> None:
    k, hidden, n = widths
    net = [layer(k, hidden), head(hidden, n)]
    parameters = [p.requires_grad_() for p in [*tensors_of(net[0]), *tensors_of(net[1])]]
    x, nothing = leaf(*batch, k), leaf(*batch, 0)
    ours = ops.mlp([nothing, x], net, order=order)  # type: ignore[arg-type]
    theirs = torch_mlp(x, net, first_act=order == "act_norm")
    torch.testing.assert_close(ours, theirs)
    wanted = [x, nothing, *parameters]
    for a, b in zip(
        torch.autograd.grad(ours.square().sum(), wanted, allow_unused=True),
        torch.autograd.grad(theirs.square().sum(), wanted, allow_unused=True),
        strict=True,
    ):
        if a is not None and b is not None:
            torch.testing.assert_close(a, b)
    one = ops.linear_act_norm if order == "act_norm" else ops.linear_norm_act
    torch.testing.assert_close(one(x, net[0]), torch_mlp(x, net[:1], first_act=order == "act_norm"))


@pytest.mark.parametrize("batch", [0, 3])
@pytest.mark.parametrize("widths", WIDTHS.values(), ids=WIDTHS)
@pytest.mark.parametrize("order", ["norm_act", "act_norm"])
@pytest.mark.parametrize("members", [2, 0])
def test_ensemble(members: int, order: str, widths: tuple[int, int, int], batch: int) -> None:
    k, hidden, n = widths
    net = [layer(k, hidden, members=(members,)), head(hidden, n, members=(members,))]
    x = leaf(batch, k)
    y = ops.mlp([x], net, order=order)  # type: ignore[arg-type]
    assert y.shape == (members, batch, n)
    for e in range(members):
        own = [Layer(*(t[e] for t in tensors_of(p)), act=p.act) for p in net]
        torch.testing.assert_close(y[e], torch_mlp(x, own, first_act=order == "act_norm"))
    y.square().sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape


@pytest.mark.parametrize("batch", BATCHES, ids=str)
def test_rows(batch: tuple[int, ...]) -> None:
    x, w, b = leaf(*batch, 0), leaf(0), leaf(0)
    results = [
        ops.simnorm(x),
        ops.simnorm(x, 3),
        ops.project_simplex(x),
        ops.mish(x),
        ops.symlog(x),
        ops.symexp(x),
        ops.layer_norm_act(x, w, b),
        ops.layer_norm_act(x, w, b, act="simnorm"),
        *ops.flow_interpolate(x, x, torch.rand(batch)),
        ops.integrate(lambda z, tau: -z, x),
    ]
    for y in results:
        assert y.shape == x.shape
        for g in torch.autograd.grad(y.sum(), [x, w, b], allow_unused=True, retain_graph=True):
            assert g is None or g.numel() == 0
    assert ops.two_hot_encode(x, 5).shape == (*batch, 0, 5)
    rewards, values = leaf(2, *batch, 0), leaf(3, *batch, 0)
    assert ops.td_lambda(rewards, values).shape == rewards.shape
    for head_of in (
        lambda: ops.two_hot_decode(x),
        lambda: ops.two_hot_cross_entropy(x, torch.zeros(batch)),
    ):
        with pytest.raises(ValueError, match="at least 2 bins, got 0"):
            head_of()


@pytest.mark.parametrize("batch", [0, 3])
@pytest.mark.parametrize(
    ("latent", "action", "task", "hidden"),
    [(4, 0, 0, 7), (4, 2, None, 0), (0, 2, None, 7), (4, 0, 3, 7), (4, 2, 0, 7), (0, 0, None, 7)],
)
def test_dynamics(batch: int, latent: int, action: int, task: int | None, hidden: int) -> None:
    """A step, a rollout, and an imagined one, against PyTorch's own composition."""
    z, a = leaf(batch, latent), leaf(batch, action)
    e = None if task is None else leaf(batch, task)
    extra = 0 if task is None else task
    net = [layer(latent + action + 1 + extra, hidden), head(hidden, latent)]
    y = ops.flow_step(z, a, net, task=e)
    if e is None:
        torch.testing.assert_close(y, torch_flow(z, a, net))
    assert y.shape == z.shape
    y.sum().backward()
    actions = a.detach().expand(2, batch, action)
    path = ops.latent_rollout(z, actions, ops.Flow(net), task=e)
    torch.testing.assert_close(path[1], y)
    inputs = latent + extra + action
    out = ops.imagine(
        z,
        ops.Policy([layer(latent, 7), head(7, action)], torch.rand(action)),
        ops.Flow(net),
        ops.Heads([layer(inputs, 7), head(7, 5)], value=[head(latent, 1, (2,))]),
        noise=torch.randn(2, batch, action),
        task=e,
    )
    assert out.z.shape == (3, batch, latent) and out.action.shape == (2, batch, action)
    assert out.reward.shape == (2, batch) and out.value is not None
    assert out.value.shape == (3, batch)
    (out.reward.sum() + out.value.sum()).backward()
    assert z.grad is not None and z.grad.isfinite().all()


@pytest.mark.parametrize(("obs", "action"), [(0, 2), (4, 0), (0, 0)])
@pytest.mark.parametrize("flow", [True, False])
def test_window(flow: bool, obs: int, action: int) -> None:
    def loss(latent: int) -> ops.WindowLoss:
        net = [layer(latent + action + flow, 7), head(7, latent)]
        return ops.world_model_loss(
            torch.randn(3, 4, obs),
            torch.randn(2, 4, action),
            torch.randn(2, 4),
            encoder=[layer(obs, 7), head(7, latent)],
            dynamics=ops.Flow(net) if flow else ops.LatentMap(net),
            heads=ops.Heads([layer(latent + action, 7), head(7, 11)]),
        )

    found = loss(8)
    assert found.dynamics.isfinite() and found.reward.isfinite()
    with pytest.raises(ValueError, match="encoder has output width 0"):
        loss(0)


def test_esnr() -> None:
    found = ops.esnr([[torch.zeros(0), torch.randn(3)] for _ in range(3)])
    assert found.ratio.isfinite() and found.tensor_signal[0] == 0.0


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_who_asks_for_kernels_is_told(backend: str) -> None:
    if backend == "native" and native.why_missing() is not None:
        pytest.skip("no native kernels")
    calls: dict[str, Callable[[], object]] = {
        "mlp": lambda: ops.mlp([leaf(3, 0)], [layer(0, 4)], backend=backend),
        "flow_step": lambda: ops.flow_step(leaf(3, 4), leaf(3, 0), [layer(5, 4)], backend=backend),
        "simnorm": lambda: ops.simnorm(leaf(3, 0), backend=backend),
    }
    for name, call in calls.items():
        has = any(b.name == backend for b in select.OPERATIONS[name].backends)
        message = "has no features, which only the reference" if has else "has no backend"
        with pytest.raises(select.BackendError, match=message):
            call()
    with pytest.raises(select.BackendError, match=r"weight \(4, 0\) of no size|no features"):
        ops.mlp([leaf(3, 0)], [layer(0, 4)], backend=backend)
    assert prod(ops.mlp([leaf(3, 0)], [layer(0, 4)]).shape) == 12
    ops.mlp([leaf(0, 3)], [layer(3, 4)], backend=backend)  # an empty batch is none
