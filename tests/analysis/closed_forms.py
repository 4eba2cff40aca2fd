"""Models whose every diagnosed quantity is known."""

from __future__ import annotations

import torch
from torch import Tensor

from pwm_fast import ops
from pwm_fast.analysis.prediction import HeldOut

D, A = 16, 3


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


class LinearField:
    """The velocity ``v(z, a, tau) = W z + U a + tau c``, integrated as flow dynamics are."""

    def __init__(self, substeps: int, method: str) -> None:
        self.w, self.u, self.c = 0.3 * normal(D, D), normal(D, A), normal(D)
        self.substeps, self.method = substeps, method

    def step(self, z: Tensor, a: Tensor) -> Tensor:
        def velocity(state: Tensor, tau: float) -> Tensor:
            return state @ self.w.T + a @ self.u.T + tau * self.c

        return ops.integrate(velocity, z, self.substeps, self.method)  # type: ignore[arg-type]

    def jacobians(self) -> tuple[Tensor, Tensor]:
        """``dF/dz`` and ``dF/da``, from the recurrence of the method."""
        dt, one = 1.0 / self.substeps, torch.eye(D, dtype=torch.float64)
        if self.method == "euler":
            m, n = one + dt * self.w, dt * self.u
        else:
            m = one + dt * self.w + 0.5 * dt**2 * self.w @ self.w
            n = dt * self.u + 0.5 * dt**2 * self.w @ self.u
        of_z, of_a = one, torch.zeros(D, A, dtype=torch.float64)
        for _ in range(self.substeps):
            of_z, of_a = m @ of_z, m @ of_a + n
        return of_z, of_a


def quadratic(z: Tensor, a: Tensor) -> Tensor:
    """``F_i = z_i + z_i^2 / 2 + 2 a_0 a_1 [i = 0]``.

    ``J_z = diag(1 + z)`` and row 0 of ``J_a`` is ``(2 a_1, 2 a_0, 0, ...)``.
    """
    first = torch.zeros(z.shape[-1], dtype=z.dtype)
    first[0] = 1.0
    return z + 0.5 * z.square() + (2.0 * a[..., 0] * a[..., 1])[..., None] * first


def unit_probes(points: int, width: int = D) -> Tensor:
    """The unit vectors times sqrt(width) as probes: estimates are then exact."""
    eye = torch.eye(width, dtype=torch.float64) * width**0.5
    return eye[:, None].expand(width, points, width)


def whole_windows(obs: Tensor, action: Tensor, reward: Tensor) -> HeldOut:
    """Windows ``[H+1, B, O]`` whose episodes go on."""
    flags = torch.zeros(reward.shape, dtype=torch.bool)
    return HeldOut(obs, action, reward, flags, ~flags)
