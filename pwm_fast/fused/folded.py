"""Macro steps of a folded flow, layer by layer.

With a linear velocity head the hidden pre-activation ``p = W1z z`` can be carried through the
substeps in place of ``z`` (*fold*): ``W13 = W1z W3`` then takes the place of two GEMMs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pwm_fast.fused.dynamics import Dynamics, DynamicsGrads, to_fp32
from pwm_fast.fused.gemm import Gemm
from pwm_fast.fused.gemm_axpby import GemmAxpby
from pwm_fast.fused.mlp_backward import LayerGrads
from pwm_fast.fused.wgrad import takes_16bit, weight_grad


def folded(w_z: Tensor, *head: Tensor) -> tuple[Tensor, ...]:
    """``W1z W3`` and ``W1z b3``, in float64: their rounding would enter every evaluation."""
    left = w_z.double()
    return tuple((left @ x.double()).to(w_z.dtype) for x in head)


class Folded(Dynamics):
    """See :class:`Dynamics`; its spec is folded.

    Backward the gradient towards ``p`` is kept apart until :meth:`finish_backward`.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        head, weights = self.weights.head, self.weights
        assert head is not None
        self.w13 = Gemm(self.kernels, weights.layers[-1].weight, self.batch)
        self.b13 = weights.layers[-1].bias
        self.w3, self.b3 = Gemm(self.kernels, head[0], self.batch), head[1]
        self._carry = GemmAxpby(self.w13, self.batch, self.b13)
        self._latent_step = GemmAxpby(self.w3, self.batch, self.b3)
        self._p: Tensor | None = None

    # --- forward --------------------------------------------------------------------------------

    def step(self, t: int, z: Tensor, c: Tensor, out: Tensor) -> None:
        """See :class:`Dynamics`."""
        k = self.kernels
        p = self._p
        if p is None:
            p = self.w_z(z if self._cast is None else self._cast)
        dt = 1.0 / self.spec.substeps
        heun = self.spec.method == "heun"
        total: Tensor | None = None
        e = 0
        for _ in range(self.spec.substeps):
            m1 = self._evaluate(t, e, p, c)
            following = torch.empty_like(p)
            if heun:
                stage = torch.empty_like(p)
                q1 = self._carry(m1, p, stage, dt, keep=True)
                m2 = self._evaluate(t, e + 1, stage, c)
                self._carry(m2, p, following, 0.5 * dt, k1=q1, c1=0.5 * dt)
                if total is None:
                    total = self._total(t, m1)
                k.axpby(total, m1, m2, total, 0.5 * dt, 0.5 * dt)
                e += 2
            else:
                self._carry(m1, p, following, dt)
                if total is None:
                    total = self._total(t, m1)
                k.axpby(total, m1, None, total, dt, 0.0)
                e += 1
            p = following
        assert total is not None
        goes_on = self._cast_wanted and t + 1 < self.horizon
        self._cast = self._cast_buffer(t + 1, 0, z) if goes_on else None
        self._latent_step(total, z, out, 1.0, cast=self._cast)
        self._p = p

    def _total(self, t: int, like: Tensor) -> Tensor:
        """Zeros for the sum of macro step ``t``'s hidden outputs."""
        return self.inputs[0][t].zero_() if self.wgrad else torch.zeros_like(like)

    def _evaluate(self, t: int, e: int, p: Tensor, c: Tensor) -> Tensor:
        w_tau = self.weights.w_tau
        n = t * self.stages + e
        kept = self.inputs[1][n] if self.wgrad else None
        m = self.mlp.forward(
            n,
            p,
            add=c,
            tau=None if w_tau is None else self.taus[e],
            w_tau=w_tau,
            own=False,
            out=kept,
        )
        if kept is not None and kept.data_ptr() != m.data_ptr():
            kept.copy_(m)
        return m

    # --- backward -------------------------------------------------------------------------------

    def start_backward(self) -> None:
        """See :class:`Dynamics`."""
        super().start_backward()
        like, kernels = self.weights.w_z, self.kernels
        self._dp = like.new_zeros(self.batch, self.hidden)
        if self.wgrad:
            shape = (self.horizon * self.stages, self.batch)
            rounded = takes_16bit(kernels, like)
            dtype = self.compute_dtype if rounded else like.dtype
            self._dq = like.new_empty(*shape, self.hidden, dtype=dtype)
            scaled = rounded and kernels.precision.scaled
            self._dq_scale = like.new_empty(shape) if scaled else None
            self._dz = like.new_empty(self.horizon, self.batch, self.latent)

    def step_backward(self, t: int, dz: Tensor) -> Tensor:
        """See :class:`Dynamics`."""
        if self.wgrad:
            self._dz[t].copy_(dz)
        g = self.w3.dgrad(dz)  # towards the sum of the stages' hidden outputs
        dt = 1.0 / self.spec.substeps
        substep = self._heun_backward if self.spec.per_substep == 2 else self._euler_backward
        stages = self.spec.per_substep
        for i in range(self.spec.substeps - 1, -1, -1):
            self._dp = substep(t * self.stages + i * stages, self._dp, g, dt)
        return dz

    def _euler_backward(self, n: int, dp: Tensor, g: Tensor, dt: float) -> Tensor:
        dh, scale = self._stage_backward(n, dp * dt, g, dt)
        out = torch.empty_like(dp)
        self.kernels.axpby(dp, dh, None, out, 1.0, 0.0, k1_scale=scale)
        return out

    def _heun_backward(self, n: int, dp: Tensor, g: Tensor, dt: float) -> Tensor:
        half = dp * (0.5 * dt)
        dh2, scale2 = self._stage_backward(n + 1, half, g, 0.5 * dt)
        stage = torch.empty_like(half)
        self.kernels.axpby(half, dh2, None, stage, dt, 0.0, k1_scale=scale2)
        dh1, scale1 = self._stage_backward(n, stage, g, 0.5 * dt)
        out = torch.empty_like(dp)
        self.kernels.axpby(dp, dh2, dh1, out, 1.0, 1.0, k1_scale=scale2, k2_scale=scale1)
        return out

    def _stage_backward(
        self, n: int, dq: Tensor, g: Tensor, weight: float
    ) -> tuple[Tensor, Tensor | None]:
        scale: Tensor | None = None
        if self.wgrad and self._dq.dtype != dq.dtype:
            scale = None if self._dq_scale is None else self._dq_scale[n]
            self.kernels.cast(dq, self._dq[n], scale)
            dq = self._dq[n]
        elif self.wgrad:
            self._dq[n].copy_(dq)
        return self._backward.backward_below(n, self.w13, (dq, scale), g, weight)

    def finish_backward(self, dz: Tensor, z0: Tensor) -> DynamicsGrads:
        """See :class:`Dynamics`."""
        first = to_fp32(*self._backward.first_gradients())
        grads = DynamicsGrads(dz + self.w_z.dgrad(self._dp), self._c_grads(first))
        if self.wgrad:
            grads.w_tau = self._w_tau_grad(first)
            grads.layers = [*self._backward.param_grads(None), self._folded_grads()]
            self._head_grads(grads, z0)
        return grads

    def _folded_grads(self) -> LayerGrads:
        """Gradients of ``W13`` and ``b13``."""
        dq, m = self._dq.flatten(0, 1), self.inputs[1].flatten(0, 1)
        scale = None if self._dq_scale is None else self._dq_scale.flatten()
        bias = None if self.b13 is None else _column_sum(to_fp32(dq, scale))
        return LayerGrads(weight_grad(self.kernels, dq, m, scale), bias, None, None)

    def _head_grads(self, grads: DynamicsGrads, z0: Tensor) -> None:
        """Gradients of the head and of W1z."""
        dz = self._dz.flatten(0, 1)
        grads.head_weight = weight_grad(self.kernels, dz, self.inputs[0].flatten(0, 1))
        grads.head_bias = None if self.b3 is None else _column_sum(dz)
        # p_0 = W1z z_0 is the only use of W1z here; the rest went into W13.
        grads.w_z = weight_grad(self.kernels, self._dp, z0)


def _column_sum(x: Tensor) -> Tensor:
    return x.sum(0, dtype=torch.float64).to(x.dtype)
