"""Macro steps layer by layer, of any dynamics: each evaluation starts from the latent."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pwm_fast.fused.dynamics import Dynamics, DynamicsGrads, to_fp32
from pwm_fast.fused.gemm_axpby import GemmAxpby
from pwm_fast.fused.wgrad import weight_grad


class Layered(Dynamics):
    """See :class:`Dynamics`; for flows by Euler or Heun, residual networks, and one-shot maps."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        # A velocity head that is a Linear alone ends in the integrator's update.
        linear = self.spec.method != "map" and len(self.specs) > 1 and self.specs[-1].plain
        bias = self.weights.layers[-1].bias
        self._head = GemmAxpby(self.mlp.gemms[-1], self.batch, bias) if linear else None
        self._dgrad = GemmAxpby(self.w_z, self.batch, dgrad=True)

    # --- forward --------------------------------------------------------------------------------

    def step(self, t: int, z: Tensor, c: Tensor, out: Tensor) -> None:
        """See :class:`Dynamics`."""
        if self.spec.method == "map":
            out.copy_(self._evaluate(t, 0, z, self._cast, c))
            self._cast = None
            return
        dt = 1.0 / self.spec.substeps
        e, cast = 0, self._cast
        for i in range(self.spec.substeps):
            last = i == self.spec.substeps - 1
            target = out if last else torch.empty_like(z)
            # No GEMM takes the rollout's last latent.
            stages = self.spec.per_substep
            end = last and t == self.horizon - 1
            following = None if end else self._cast_buffer(t, e + stages, z)
            if stages == 1:
                self._advance(t, e, (z, cast), c, z, (target, following), dt)
                e += 1
            else:
                middle = self._stage_buffer(t, e + 1, z), self._cast_buffer(t, e + 1, z)
                half = 0.5 * dt
                v1 = self._advance(t, e, (z, cast), c, z, middle, dt, keep=True)
                self._advance(t, e + 1, middle, c, z, (target, following), half, v1, half)
                e += 2
            z, cast = target, following
        self._cast = cast

    def _advance(
        self,
        t: int,
        e: int,
        x: tuple[Tensor, Tensor | None],
        c: Tensor,
        z: Tensor,
        out: tuple[Tensor, Tensor | None],
        c2: float,
        k1: Tensor | None = None,
        c1: float = 0.0,
        *,
        keep: bool = False,
    ) -> Tensor | None:
        """``out = z + c1 k1 + c2 v(x)``; the result is ``v`` if it is to be kept.

        ``x`` and ``out`` are pairs of a latent and of it in the compute dtype, or None.
        """
        state, cast = out
        y = self._evaluate(t, e, *x, c, head=self._head is None)
        if self._head is not None:
            return self._head(y, z, state, c2, k1=k1, c1=c1, keep=keep, cast=cast)
        if k1 is None:
            self.kernels.axpby(z, y, None, state, c2, 0.0, cast=cast)
        else:
            self.kernels.axpby(z, k1, y, state, c1, c2, cast=cast)
        return y if keep else None

    def _evaluate(
        self, t: int, e: int, z: Tensor, cast: Tensor | None, c: Tensor, *, head: bool = True
    ) -> Tensor:
        """The MLP of the latent ``z``, which may be ``cast`` already."""
        if self.wgrad:
            kept = self.inputs[0][t * self.stages + e]
            if self.inputs_16bit:
                if cast is None:
                    self.kernels.cast(z, kept, None)
                cast = kept
            elif kept.data_ptr() != z.data_ptr():
                kept.copy_(z)
        w_tau = self.weights.w_tau
        return self.mlp.forward(
            t * self.stages + e,
            self.w_z(z if cast is None else cast),
            add=c,
            tau=None if w_tau is None else self.taus[e],
            w_tau=w_tau,
            head=head,
        )

    def _stage_buffer(self, t: int, e: int, like: Tensor) -> Tensor:
        if self.wgrad and not self.inputs_16bit:
            return self.inputs[0][t * self.stages + e]
        return torch.empty_like(like)

    # --- backward -------------------------------------------------------------------------------

    def step_backward(self, t: int, dz: Tensor) -> Tensor:
        """See :class:`Dynamics`."""
        n = t * self.stages
        if self.spec.method == "map":
            dh, scale = self._backward.backward(n, dz.clone())
            return self.w_z.scaled_dgrad(dh, 0, scale, fp32=True)[0]
        dt = 1.0 / self.spec.substeps
        substep = self._heun_backward if self.spec.per_substep == 2 else self._euler_backward
        stages = self.spec.per_substep
        dz = dz.contiguous()
        for i in range(self.spec.substeps - 1, -1, -1):
            dz = substep(n + i * stages, dz, dt)
        return dz

    def _euler_backward(self, n: int, dz: Tensor, dt: float) -> Tensor:
        out = torch.empty_like(dz)
        dh, scale = self._backward.backward(n, dz * dt)
        self._dgrad(dh, dz, out, 1.0, scale=scale)
        return out

    def _heun_backward(self, n: int, dz: Tensor, dt: float) -> Tensor:
        out = torch.empty_like(dz)
        half = dz * (0.5 * dt)
        # A plain layer at the end leaves the gradient that comes in as it is.
        top = half if self.specs[-1].plain else half.clone()
        dh, scale = self._backward.backward(n + 1, top)
        ds2 = self._dgrad(dh, half, half, dt, keep=True, scale=scale)
        dh, scale = self._backward.backward(n, half)
        self._dgrad(dh, dz, out, 1.0, k1=ds2, c1=1.0, scale=scale)
        return out

    def finish_backward(self, dz: Tensor, z0: Tensor) -> DynamicsGrads:
        """See :class:`Dynamics`."""
        first, scale = self._backward.first_gradients()
        fp32 = to_fp32(first, scale)
        grads = DynamicsGrads(dz, self._c_grads(fp32))
        if self.wgrad:
            grads.w_tau = self._w_tau_grad(fp32)
            grads.layers = self._backward.param_grads(None)
            flat = None if scale is None else scale.flatten()
            x = self.inputs[0].flatten(0, 1)
            grads.w_z = weight_grad(self.kernels, first.flatten(0, 1), x, flat)
        return grads
