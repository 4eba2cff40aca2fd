"""Velocity fields and their integration: values, orders of convergence, derivatives."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from pwm_fast import ops
from pwm_fast.ops import Layer
from tests.helpers import random_layer, tensors_of, with_tensors

ORDERS = [pytest.param("euler", 1, id="euler"), pytest.param("heun", 2, id="heun")]
METHODS = ("euler", "heun")


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def assert_same(ours: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-13)


def velocity_net(latent: int, action: int, task: int = 0, hidden: int = 6) -> list[Layer]:
    inputs = latent + action + 1 + task
    return [random_layer(inputs, hidden, "mish"), random_layer(hidden, latent, norm=False)]


# Integration


def slope(errors: list[float], substeps: list[int]) -> float:
    """Fit log2(error) against log2(dt)."""
    return np.polyfit(-np.log2(substeps), np.log2(errors), 1)[0]


@pytest.mark.parametrize(("method", "order"), ORDERS)
def test_order_on_a_scalar_ode(method: str, order: int) -> None:
    """dz/dtau = z cos(3 tau) ends at z exp(sin(3) / 3): wrong stage times would cost the order."""
    z = torch.tensor([1.3, -0.4], dtype=torch.float64)
    exact = z * math.exp(math.sin(3.0) / 3.0)
    substeps = [128, 256, 512, 1024]
    errors = []
    for k in substeps:
        ours = ops.integrate(lambda z, tau: z * math.cos(3.0 * tau), z, k, method)
        errors.append((ours - exact).abs().max().item())
    assert abs(slope(errors, substeps) - order) < 0.15


@pytest.mark.parametrize(("method", "order"), ORDERS)
def test_order_on_a_linear_system(method: str, order: int) -> None:
    """dz/dtau = A z ends at expm(A) z."""
    a, z = normal(5, 5), normal(5)
    exact = torch.linalg.matrix_exp(a) @ z
    substeps = [32, 64, 128, 256, 512]
    errors = [
        (ops.integrate(lambda z, tau: a @ z, z, k, method) - exact).norm().item() for k in substeps
    ]
    assert abs(slope(errors, substeps) - order) < 0.15


@pytest.mark.parametrize(("method", "order"), ORDERS)
def test_order_of_flow_step(method: str, order: int) -> None:
    """A linear velocity net is a linear ODE driven by tau: exact by one matrix exponential."""
    z, a, layer = normal(4, 3), normal(4, 2), random_layer(6, 3, norm=False)
    w_z, w_a, w_tau = layer.weight.split((3, 2, 1), dim=1)
    system = torch.zeros(4, 5, 5, dtype=torch.float64)  # on (z, tau, 1)
    system[:, :3, :3], system[:, :3, 3:4] = w_z, w_tau
    system[:, :3, 4] = a @ w_a.T + layer.bias
    system[:, 3, 4] = 1.0
    start = torch.cat((z, torch.zeros(4, 1), torch.ones(4, 1)), dim=1)
    exact = (torch.linalg.matrix_exp(system) @ start[..., None])[:, :3, 0]
    substeps = [16, 32, 64, 128, 256]
    errors = [(ops.flow_step(z, a, [layer], k, method) - exact).norm().item() for k in substeps]
    assert abs(slope(errors, substeps) - order) < 0.15


@pytest.mark.parametrize("substeps", [1, 2, 3, 7, 10, 49, 64])
def test_velocity_evaluations(substeps: int) -> None:
    """Euler asks for K velocities, Heun for 2K; Heun's last one is at tau = 1 exactly.

    49 and others have k/K + 1/K other than (k+1)/K in floating point.
    """
    calls: dict[str, list[float]] = {}
    for method in METHODS:
        taus: list[float] = []

        def velocity(z: Tensor, tau: float, taus: list[float] = taus) -> Tensor:
            taus.append(tau)
            return z

        ops.integrate(velocity, torch.zeros(1), substeps, method)
        calls[method] = taus
    starts = [k / substeps for k in range(substeps)]
    ends = [(k + 1) / substeps for k in range(substeps)]
    assert calls["euler"] == starts
    assert calls["heun"] == [tau for stage in zip(starts, ends, strict=True) for tau in stage]
    assert calls["heun"][-1] == 1.0
    assert all(type(tau) is float for taus in calls.values() for tau in taus)


def test_methods_are_exact_where_theory_says() -> None:
    """Euler integrates constants exactly; Heun, a trapezoidal rule, also what is linear in tau."""
    z = normal(3)
    for substeps in (1, 3):
        assert_same(
            ops.integrate(lambda z, tau: torch.full_like(z, 2.0), z, substeps, "euler"), z + 2
        )
        linear = ops.integrate(lambda z, tau: torch.full_like(z, 4.0 * tau), z, substeps, "heun")
        assert_same(linear, z + 2)


@pytest.mark.parametrize("method", METHODS)
def test_integrate_leaves_its_start_alone(method: str) -> None:
    z = normal(2, 3)
    before = z.clone()
    ops.integrate(lambda z, tau: z + tau, z, 2, method)
    assert torch.equal(z, before)


def test_defaults_are_heun_with_2_substeps() -> None:
    z, a, net = normal(4, 3), normal(4, 2), velocity_net(3, 2)
    assert torch.equal(ops.flow_step(z, a, net), ops.flow_step(z, a, net, 2, "heun"))

    def velocity(z: Tensor, tau: float) -> Tensor:
        return z * tau

    assert torch.equal(ops.integrate(velocity, z), ops.integrate(velocity, z, 2, "heun"))


@pytest.mark.parametrize("method", METHODS)
def test_state_keeps_its_dtype(method: str) -> None:
    """16-bit slopes are summed in the dtype of a float32 state, as hand-written steps do it."""
    z = torch.randn(50)

    def velocity(z: Tensor, tau: float) -> Tensor:
        return (z * (1.0 + tau)).bfloat16()

    expected = z
    for k in range(3):
        k1 = velocity(expected, k / 3).float()
        if method == "heun":
            k1 = 0.5 * (k1 + velocity(expected + k1 / 3, (k + 1) / 3).float())
        expected = expected + k1 / 3
    ours = ops.integrate(velocity, z, 3, method)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)


def test_flow_step_under_autocast() -> None:
    """The net runs in bfloat16, the state and its sums stay float32."""
    z, a = torch.randn(9, 8), torch.randn(9, 2)
    net = [random_layer(11, 8, norm=False, dtype=torch.float32)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = ops.flow_step(z, a, net, 2)
        expected = z
        for k in range(2):
            start, end = (torch.full((9,), (k + s) / 2) for s in (0, 1))
            k1 = ops.velocity_field(expected, a, start, net)
            assert k1.dtype == torch.bfloat16
            k2 = ops.velocity_field(expected + 0.5 * k1.float(), a, end, net)
            expected = expected + 0.25 * (k1.float() + k2.float())
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)


# Velocity fields and flow steps


@pytest.mark.parametrize("lead", [(), (4,), (2, 3), (0,)], ids=str)
@pytest.mark.parametrize("task", [0, 2])
def test_velocity_field_is_the_net_on_z_a_tau_task(lead: tuple[int, ...], task: int) -> None:
    """In this order, for every way to give tau."""
    z, a, e = normal(*lead, 3), normal(*lead, 2), normal(*lead, task)
    net = velocity_net(3, 2, task)
    extra = {"task": e} if task else {}
    per_row = torch.rand(lead, dtype=torch.float64)
    expected = ops.mlp([torch.cat((z, a, per_row[..., None], e), dim=-1)], net)
    assert expected.shape == z.shape
    assert_same(ops.velocity_field(z, a, per_row, net, **extra), expected)
    assert_same(ops.velocity_field(z, a, per_row[..., None], net, **extra), expected)
    scalar = torch.tensor(0.3, dtype=torch.float64)
    assert_same(
        ops.velocity_field(z, a, scalar, net, **extra),
        ops.velocity_field(z, a, scalar.expand(lead), net, **extra),
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("substeps", [1, 2, 3, 8])
@pytest.mark.parametrize("task", [0, 2])
def test_flow_step_integrates_the_velocity_field(method: str, substeps: int, task: int) -> None:
    z, a, net = normal(5, 3), normal(5, 2), velocity_net(3, 2, task)
    extra = {"task": normal(5, task)} if task else {}

    def velocity(z: Tensor, tau: float) -> Tensor:
        return ops.velocity_field(z, a, torch.tensor(tau, dtype=z.dtype), net, **extra)

    ours = ops.flow_step(z, a, net, substeps, method, **extra)
    assert_same(ours, ops.integrate(velocity, z, substeps, method))


@pytest.mark.parametrize("substeps", [1, 2, 5])
def test_flow_step_equals_steps_by_hand(substeps: int) -> None:
    z, a, net = normal(5, 3), normal(5, 2), velocity_net(3, 2)

    def velocity(z: Tensor, tau: float) -> Tensor:
        return ops.mlp((z, a, torch.full((5, 1), tau, dtype=z.dtype)), net)

    dt = 1.0 / substeps
    euler = heun = z
    for k in range(substeps):
        euler = euler + dt * velocity(euler, k * dt)
        k1 = velocity(heun, k * dt)
        k2 = velocity(heun + dt * k1, k * dt + dt)
        heun = heun + dt / 2.0 * (k1 + k2)
    assert_same(ops.flow_step(z, a, net, substeps, "euler"), euler)
    assert_same(ops.flow_step(z, a, net, substeps, "heun"), heun)


@pytest.mark.parametrize("lead", [(), (2, 3), (0,)], ids=str)
def test_flow_step_of_any_leading_shape(lead: tuple[int, ...]) -> None:
    z, a, e, net = normal(*lead, 3), normal(*lead, 2), normal(*lead, 4), velocity_net(3, 2, 4)
    ours = ops.flow_step(z, a, net, task=e)
    rows = ops.flow_step(z.reshape(-1, 3), a.reshape(-1, 2), net, task=e.reshape(-1, 4))
    assert ours.shape == z.shape
    assert_same(ours, rows.reshape(z.shape))


# The flow-matching path


@pytest.mark.parametrize("lead", [(), (4,), (2, 3), (0,)], ids=str)
def test_flow_interpolate_value(lead: tuple[int, ...]) -> None:
    z0, z1, tau = normal(*lead, 3), normal(*lead, 3), torch.rand(lead, dtype=torch.float64)
    t = tau.numpy()[..., None]
    expected = (1.0 - t) * z0.numpy() + t * z1.numpy()
    for given in (tau, tau[..., None]):
        z_tau, target = ops.flow_interpolate(z0, z1, given)
        np.testing.assert_allclose(z_tau.numpy(), expected, rtol=1e-14, atol=1e-15)
        assert torch.equal(target, z1 - z0)


def test_flow_interpolate_ends_and_slope() -> None:
    """The path starts at z0 and ends at z1 exactly; its derivative by tau is the target."""
    z0, z1 = normal(4, 3), normal(4, 3)
    for tau, end in ((0.0, z0), (1.0, z1)):
        assert torch.equal(ops.flow_interpolate(z0, z1, torch.tensor(tau))[0], end)
    slope = torch.autograd.functional.jacobian(
        lambda tau: ops.flow_interpolate(z0, z1, tau)[0], torch.tensor(0.7, dtype=torch.float64)
    )
    assert_same(slope, z1 - z0)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
def test_dtype_is_kept(dtype: torch.dtype) -> None:
    """tau of any dtype does not change that of a velocity."""
    z, a = torch.randn(3, 4, dtype=dtype), torch.randn(3, 2, dtype=dtype)
    net = [random_layer(7, 4, dtype=dtype)]
    for tau_dtype in (dtype, torch.float32):
        tau = torch.rand(3, dtype=tau_dtype)
        assert ops.velocity_field(z, a, tau, net).dtype == dtype
    assert ops.flow_step(z, a, net).dtype == dtype
    assert all(y.dtype == dtype for y in ops.flow_interpolate(z, -z, torch.rand(3, dtype=dtype)))


# Derivatives


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [x.detach().requires_grad_() for x in tensors]


@pytest.mark.parametrize("method", METHODS)
def test_integrate_derivatives(method: str) -> None:
    """In the start and in what the velocity uses."""

    def call(z: Tensor, a: Tensor) -> Tensor:
        return ops.integrate(lambda z, tau: torch.sin(a * z) + tau * a, z, 3, method)

    inputs = leaves(normal(3, 2), normal(2))
    assert gradcheck(call, inputs)
    assert gradgradcheck(call, inputs)


def split_net(net: list[Layer], tensors: tuple[Tensor, ...]) -> list[Layer]:
    first = len(tensors_of(net[0]))
    return [
        with_tensors(net[0], list(tensors[:first])),
        with_tensors(net[1], list(tensors[first:])),
    ]


def test_velocity_field_derivatives() -> None:
    net = velocity_net(3, 2, 2, hidden=4)

    def call(z: Tensor, a: Tensor, tau: Tensor, task: Tensor, *tensors: Tensor) -> Tensor:
        return ops.velocity_field(z, a, tau, split_net(net, tensors), task=task)

    data = normal(3, 3), normal(3, 2), torch.rand(3, dtype=torch.float64), normal(3, 2)
    inputs = leaves(*data, *tensors_of(net[0]), *tensors_of(net[1]))
    assert gradcheck(call, inputs)
    assert gradgradcheck(call, inputs)


@pytest.mark.parametrize("method", METHODS)
def test_flow_step_derivatives(method: str) -> None:
    """In latents, actions, tasks and all parameters."""
    net = velocity_net(3, 2, 2, hidden=4)

    def call(z: Tensor, a: Tensor, task: Tensor, *tensors: Tensor) -> Tensor:
        return ops.flow_step(z, a, split_net(net, tensors), 2, method, task=task)

    inputs = leaves(normal(3, 3), normal(3, 2), normal(3, 2))
    inputs += leaves(*tensors_of(net[0]), *tensors_of(net[1]))
    assert gradcheck(call, inputs)
    assert gradgradcheck(call, inputs)


def test_flow_interpolate_derivatives() -> None:
    inputs = leaves(normal(3, 2), normal(3, 2), torch.rand(3, dtype=torch.float64))
    assert gradcheck(ops.flow_interpolate, inputs)
    assert gradgradcheck(ops.flow_interpolate, inputs)
