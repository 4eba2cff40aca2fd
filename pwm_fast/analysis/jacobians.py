"""How large the Jacobian of the macro step is, and how fast it changes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Step = Callable[[Tensor, Tensor], Tensor]
Products = tuple[Tensor, Tensor]  # J_z^T v [K, B, D] and J_a^T v [K, B, A]


def rademacher(probes: int, like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Random signs ``[K, *like.shape]``: ``E[v v^T] = I``, of less variance than normal numbers."""
    device = generator.device if generator is not None else like.device
    signs = torch.randint(0, 2, (probes, *like.shape), generator=generator, device=device)
    return (2 * signs - 1).to(like)


def vector_jacobian_products(step: Step, z: Tensor, a: Tensor, probes: Tensor) -> Products:
    """``J_z^T v`` and ``J_a^T v`` of ``step`` at every point, for every probe.

    Args:
        step: the macro step; every row of its result depends on the same row of ``z`` and ``a``.
        z: latents ``[B, D]``.
        a: actions ``[B, A]``.
        probes: v, ``[K, B, D]``.
    """
    with torch.enable_grad():
        z, a = z.detach().requires_grad_(), a.detach().requires_grad_()
        following = step(z, a)
        products = [
            torch.autograd.grad(
                following, (z, a), v, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            for v in probes
        ]
    of_z, of_a = zip(*products, strict=True)
    return torch.stack(of_z), torch.stack(of_a)


def tangent_directions(
    z: Tensor, group: int | None, generator: torch.Generator | None = None
) -> Tensor:
    """Uniform unit directions ``[B, D]``; along simplices every ``group`` of them sums to 0."""
    device = generator.device if generator is not None else z.device
    u = torch.randn(z.shape, generator=generator, device=device, dtype=z.dtype).to(z.device)
    if group is None:
        return _unit(u)
    groups = u.unflatten(-1, (-1, group))
    return _unit((groups - groups.mean(-1, keepdim=True)).flatten(-2))


def jacobian_smoothness(
    step: Step,
    z: Tensor,
    a: Tensor,
    probes: Tensor,
    *,
    radius_z: float,
    radius_a: float,
    group: int | None = 8,
    generator: torch.Generator | None = None,
) -> dict[str, float]:
    """Size and change of the Jacobians ``J_z = dF/dz`` and ``J_a = dF/da`` of a macro step F.

    Squared Frobenius norms are estimated without bias by random vector-Jacobian products,
    ``E |J^T v|^2 = |J|_F^2`` for ``E[v v^T] = I`` (Hutchinson 1990; for Jacobians of networks
    Hoffman et al. 2019, arXiv 1908.02729). Differences of Jacobians are estimated in the same way,
    with the same probes at both points: ``E |(J' - J)^T v|^2 = |J' - J|_F^2``. All means are over
    points and probes; the results are roots of means of squares.

    Args:
        step: F, as :func:`vector_jacobian_products` takes it.
        z: latents ``[B, D]``.
        a: actions ``[B, A]``.
        probes: v, ``[K, B, D]``, such as :func:`rademacher` draws. The D unit vectors times sqrt(D)
            make the estimate exact.
        radius_z: distance of the nearby latent, in a uniform direction (along the simplices).
        radius_a: distance of the nearby action, in a uniform direction.
        group: width of the simplices; None where latents do not lie on any.
        generator: of the directions.

    Returns:
        For X in z, a:

        - ``norm_X``: root mean square of ``|J_X|_F``, ``norm_X_error`` its standard error over the
          points, and ``gain_X = norm_X / sqrt(min(D, width of X))``, the root mean square of
          the singular values (1 for the identity);
        - for each other point, ``near_z`` (z + radius_z u, a), ``near_a`` (z, a + radius_a u) and
          ``step`` (F(z, a), a): ``change_X_POINT`` = ``|J_X' - J_X|_F / |J_X|_F`` and
          ``slope_X_POINT`` = ``|J_X' - J_X|_F`` over the distance of the points.
    """
    base = vector_jacobian_products(step, z, a, probes)
    with torch.no_grad():
        following = step(z, a)
        directions = torch.randn(
            a.shape,
            generator=generator,
            device=generator.device if generator is not None else a.device,
            dtype=a.dtype,
        ).to(a.device)
        points = {
            "near_z": (z + radius_z * tangent_directions(z, group, generator), a),
            "near_a": (z, a + radius_a * _unit(directions)),
            "step": (following, a),
        }
    result: dict[str, float] = {}
    squares = {}
    for name, products in zip(("z", "a"), base, strict=True):
        per_point = _squares(products)
        square = squares[name] = per_point.mean()
        norm = square.sqrt()
        # Of a root: half the standard error of the square, over the root.
        error = per_point.std() / (2.0 * norm * len(per_point) ** 0.5)
        rank = min(z.shape[-1], products.shape[-1])
        result[f"norm_{name}"] = norm.item()
        result[f"norm_{name}_error"] = error.item()
        result[f"gain_{name}"] = norm.item() / rank**0.5
    for point, (near_z, near_a) in points.items():
        distance = (near_z - z).double().square().sum(-1) + (near_a - a).double().square().sum(-1)
        other = vector_jacobian_products(step, near_z, near_a, probes)
        for name, before, after in zip(("z", "a"), base, other, strict=True):
            change = _squares(after - before).mean()
            result[f"change_{name}_{point}"] = (change / squares[name]).sqrt().item()
            result[f"slope_{name}_{point}"] = (change / distance.mean()).sqrt().item()
    return result


def _squares(products: Tensor) -> Tensor:
    """Estimates of ``|J|_F^2`` ``[B]``, float64, from products ``[K, B, n]``."""
    return products.double().square().sum(-1).mean(0)


def _unit(x: Tensor) -> Tensor:
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True)
