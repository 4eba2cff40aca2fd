"""Jacobians against closed forms, in float64."""

from __future__ import annotations

import pytest
import torch

from pwm_fast.agent.view import view_of
from pwm_fast.analysis.jacobians import (
    jacobian_smoothness,
    rademacher,
    tangent_directions,
    vector_jacobian_products,
)
from tests.agent.agents import AGENTS, make_agent
from tests.analysis.closed_forms import A, D, LinearField, normal, quadratic, unit_probes
from tests.models.builders import simplex

METHODS = [(1, "euler"), (3, "euler"), (1, "heun"), (2, "heun"), (4, "heun")]


@pytest.mark.parametrize(("substeps", "method"), METHODS)
def test_linear_field(substeps: int, method: str) -> None:
    """Known Jacobians, which are the same everywhere: all changes are 0."""
    field = LinearField(substeps, method)
    of_z, of_a = field.jacobians()
    z, a = normal(5, D), normal(5, A)
    result = jacobian_smoothness(field.step, z, a, unit_probes(5), radius_z=0.1, radius_a=0.1)
    norm_z, norm_a = torch.linalg.norm(of_z).item(), torch.linalg.norm(of_a).item()
    assert result["norm_z"] == pytest.approx(norm_z, rel=1e-12)
    assert result["norm_a"] == pytest.approx(norm_a, rel=1e-12)
    singular = torch.linalg.svdvals(of_a).square().mean().sqrt().item()
    assert result["gain_a"] == pytest.approx(singular, rel=1e-12)
    assert result["gain_z"] == pytest.approx(norm_z / D**0.5, rel=1e-12)
    for name, value in result.items():
        if name.startswith(("change", "slope")) or name.endswith("_error"):
            assert value == pytest.approx(0.0, abs=1e-12), name


def test_the_identity_has_gain_1() -> None:
    result = jacobian_smoothness(
        lambda z, a: z + 0.0 * a.sum(-1, keepdim=True),
        normal(4, D),
        normal(4, A),
        rademacher(3, normal(4, D)),
        radius_z=0.1,
        radius_a=0.1,
    )
    assert result["gain_z"] == pytest.approx(1.0, rel=1e-12), "signs are exact for a diagonal"
    assert result["norm_a"] == 0.0


def test_a_step_that_ignores_the_action() -> None:
    result = jacobian_smoothness(
        lambda z, a: 2.0 * z, normal(4, D), normal(4, A), unit_probes(4), radius_z=1, radius_a=1
    )
    assert result["norm_a"] == 0.0 and result["gain_z"] == pytest.approx(2.0)


def test_random_probes_are_unbiased() -> None:
    """The estimate of many probes is within five standard errors, and its error shrinks."""
    field = LinearField(2, "heun")
    exact = torch.linalg.norm(field.jacobians()[0]).square().item()
    z, a = normal(1, D), normal(1, A)
    estimates = vector_jacobian_products(field.step, z, a, rademacher(4000, z))[0].square().sum(-1)
    error = (estimates.std() / 4000**0.5).item()
    assert 0 < error < 0.05 * exact
    assert abs(estimates.mean().item() - exact) < 5 * error


@pytest.mark.parametrize("radius", [1e-3, 0.1, 2.0])
def test_change_of_a_quadratic_map(radius: float) -> None:
    """``J_z = diag(1 + z)``: going a distance r changes it by r, wherever and to wherever."""
    z, a = normal(6, D), normal(6, A)
    result = jacobian_smoothness(
        quadratic, z, a, unit_probes(6), radius_z=radius, radius_a=3 * radius
    )
    norm_z = (1 + z).square().sum(-1).mean().sqrt().item()
    assert result["norm_z"] == pytest.approx(norm_z, rel=1e-12)
    assert result["slope_z_near_z"] == pytest.approx(1.0, rel=1e-9)
    assert result["change_z_near_z"] == pytest.approx(radius / norm_z, rel=1e-9)
    assert result["change_z_near_a"] == result["change_a_near_z"] == 0.0
    # Row 0 of J_a is 2 (a_1, a_0, 0, ...): its change is twice the direction's first two entries.
    assert 0.0 < result["slope_a_near_a"] < 2.0
    following = quadratic(z, a)
    moved = (following - z).square().sum(-1).mean().sqrt().item()
    assert result["slope_z_step"] == pytest.approx(1.0, rel=1e-9)
    assert result["change_z_step"] == pytest.approx(moved / norm_z, rel=1e-9)
    assert result["change_a_step"] == 0.0


def test_change_with_the_action() -> None:
    """Two actions: ``|J_a' - J_a| = 2 r`` exactly."""
    z, a = normal(6, D), normal(6, 2)
    result = jacobian_smoothness(quadratic, z, a, unit_probes(6), radius_z=0.1, radius_a=0.3)
    norm_a = 2 * a.square().sum(-1).mean().sqrt().item()
    assert result["norm_a"] == pytest.approx(norm_a, rel=1e-12)
    assert result["slope_a_near_a"] == pytest.approx(2.0, rel=1e-9)
    assert result["change_a_near_a"] == pytest.approx(0.6 / norm_a, rel=1e-9)


def test_standard_error_over_points() -> None:
    z, a = normal(500, D), normal(500, A)
    result = jacobian_smoothness(quadratic, z, a, unit_probes(500), radius_z=0.1, radius_a=0.1)
    squares = (1 + z).square().sum(-1)
    expected = squares.std() / 500**0.5 / (2 * squares.mean().sqrt())
    assert result["norm_z_error"] == pytest.approx(expected.item(), rel=1e-12)


def test_directions_stay_in_the_simplices() -> None:
    u = tangent_directions(normal(20, D), 8)
    assert torch.allclose(torch.linalg.vector_norm(u, dim=-1), torch.ones(20, dtype=torch.float64))
    assert u.reshape(20, 2, 8).sum(-1).abs().max() < 1e-12
    generator = torch.Generator().manual_seed(1)
    first = tangent_directions(normal(3, D), 8, generator)
    assert torch.equal(first, tangent_directions(normal(3, D), 8, generator.manual_seed(1)))


@pytest.mark.parametrize("name", AGENTS)
def test_agents(name: str) -> None:
    """Baseline and flow, with task embeddings and without: against torch's own Jacobian."""
    agent = make_agent(double=True, **AGENTS[name])
    view = view_of(agent, torch.tensor(1))  # agents of one task do not look at it
    width, on_simplices = agent.world_model.latent_dim, agent.world_model.simplices
    z = simplex(3, width) if on_simplices else torch.randn(3, width, dtype=torch.float64)
    a = 2 * torch.rand(3, 2, dtype=torch.float64) - 1
    result = jacobian_smoothness(
        view.step,
        z,
        a,
        unit_probes(3, width),
        radius_z=0.05,
        radius_a=0.1,
        group=8 if on_simplices else None,
    )
    of_z, of_a = zip(
        *(torch.autograd.functional.jacobian(view.step, (z[i], a[i])) for i in range(3)),
        strict=True,
    )
    for key, blocks in (("norm_z", of_z), ("norm_a", of_a)):
        expected = torch.stack(blocks).square().sum((-1, -2)).mean().sqrt().item()
        assert result[key] == pytest.approx(expected, rel=1e-9)
    assert all(value > 0 for value in result.values())
    assert all(p.grad is None for p in agent.world_model.parameters())
