"""Macro steps of a folded flow on the persistent kernels (:mod:`pwm_fast.kernels.rollout`)."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pwm_fast.fused.dynamics import DynamicsGrads
from pwm_fast.fused.folded import Folded
from pwm_fast.fused.gemm import cast_weight
from pwm_fast.fused.mlp_backward import LayerGrads
from pwm_fast.fused.policy import Policy
from pwm_fast.fused.wgrad import weight_grad
from pwm_fast.kernels.rollout import (
    GradBuffers,
    Network,
    RolloutLayout,
    Saved,
    Scheme,
    Workspace,
    rollout_backward,
    rollout_forward,
)
from pwm_fast.kernels.running_sum import running_sum


class Persistent(Folded):
    """See :class:`pwm_fast.fused.dynamics.Dynamics`; runs of macro steps are one launch.

    The networks must be such as :func:`pwm_fast.fused.rollout.candidates` takes for it. The hidden
    state goes through the macro steps alone; the latents follow from all of them together.

    Args:
        plan: layout of the launches.
    """

    carries_policy = True

    def __init__(self, *args: Any, plan: RolloutLayout, **options: Any) -> None:
        super().__init__(*args, **options)
        self.plan = plan
        self._network, self._scheme = self._make_network(), self._make_scheme()
        self._buffers = {
            "xhat1": self.mlp.buffer(0, "hat"),
            "rstd1": self.mlp.buffer(0, "rstd"),
            "xhat2": self.mlp.buffer(1, "hat"),
            "rstd2": self.mlp.buffer(1, "rstd"),
            "y1": self.mlp.buffer(0, "y"),
            "y2": self.inputs[1] if self.wgrad else None,
        }
        self._grads: GradBuffers | None = None
        self._sums: Tensor | None = None
        self._workspace: Workspace | None = None

    def _make_network(self) -> Network:
        first, second, head = self.weights.layers
        like = first.weight

        def vector(x: Tensor | None) -> Tensor:
            return like.new_zeros(like.shape[0]) if x is None else x.contiguous()

        def weight(x: Tensor) -> Tensor:
            return x if x.dtype == self.compute_dtype else cast_weight(x, self.compute_dtype)

        return Network(
            vector(self.weights.w_tau),
            weight(second.weight),
            vector(second.bias),
            weight(head.weight),
            vector(head.bias),
            vector(first.gamma),
            vector(first.beta),
            vector(second.gamma),
            vector(second.beta),
        )

    def _make_scheme(self) -> Scheme:
        first, second = self.specs
        return Scheme(
            "heun" if self.spec.per_substep == 2 else "euler",
            self.spec.substeps,
            first.width,
            first.eps,
            second.eps,
            self.kernels.precision.tf32,
            second.width,
        )

    def _saved(self, t: int, steps: int) -> Saved | None:
        """The buffers of macro steps ``t`` and on."""
        begin, end = t * self.stages, (t + steps) * self.stages
        cut = {n: None if x is None else x[begin:end] for n, x in self._buffers.items()}
        if cut["xhat1"] is None:
            return None
        return Saved(**cut)  # type: ignore[arg-type]

    def _exchange(self) -> Workspace:
        """What the launches of a pass exchange through, cleared once for all of them."""
        if self._workspace is None:
            like = self._network.b2
            width = like.shape[0]
            self._workspace = Workspace(
                self.plan, self.batch, width, self.compute_dtype, like.device
            )
        return self._workspace

    # --- forward --------------------------------------------------------------------------------

    def rollout(self, z: Tensor, c: Tensor) -> None:
        """See :class:`pwm_fast.fused.dynamics.Dynamics`."""
        if self.horizon:
            self._launch(0, self.w_z(z[0]), c)
            self._latents(z)

    def imagine(self, policy: Policy, z: Tensor, action: Tensor) -> None:
        """See :class:`pwm_fast.fused.dynamics.Dynamics`."""
        if not self.horizon:
            return
        h, p = policy.first(z[0]), None
        for t in range(self.horizon):
            c = policy.act(t, h, action[t])
            p = self._launch(t, self.w_z(z[0]) if p is None else p, c.unsqueeze(0))
            if t < self.horizon - 1:
                h = policy.follow(self._totals[t], h)
        self._latents(z)

    @cached_property
    def _totals(self) -> Tensor:
        """``[H, B, U]``: of each macro step the sum of its hidden outputs, as a GEMM takes it.

        In fp32 where the gradient of a weight will take it too.
        """
        if self.wgrad:
            return self.inputs[0]
        shape = (self.horizon, self.batch, self.mlp.widths[-1])
        return self.weights.w_z.new_empty(shape, dtype=self.compute_dtype)

    def _launch(self, t: int, p: Tensor, c: Tensor) -> Tensor:
        """Macro steps ``t`` and on under ``c [T, B, U]``, from ``p``: the next ``p``."""
        return rollout_forward(
            p.contiguous(),
            c.contiguous(),
            self._network,
            self._scheme,
            self.plan,
            saved=self._saved(t, c.shape[0]),
            total=self._totals[t : t + c.shape[0]],
            workspace=self._exchange(),
        ).p

    def _latents(self, z: Tensor) -> None:
        """``z[1:]`` of ``z [H+1, B, D]``, after all macro steps, from ``z[0]``."""
        increments = self.w3(self._totals.flatten(0, 1))
        if self.b3 is not None:
            increments.add_(self.b3)
        running_sum(z[0], increments.view(z[1:].shape), out=z[1:])

    # --- backward -------------------------------------------------------------------------------

    def start_backward(self) -> None:
        """See :class:`pwm_fast.fused.dynamics.Dynamics`."""
        self._workspace = None  # of its own: it may be captured, or repeated, without the forward
        like = self.weights.w_z
        evals, batch, width = self.horizon * self.stages, self.batch, self.hidden
        self._dp = like.new_zeros(batch, width)
        self._dc = like.new_empty(self.horizon, batch, width)
        if not self.wgrad:
            return
        self._dz = like.new_empty(self.horizon, batch, self.latent)

        def gradient() -> Tensor:
            return torch.empty(evals, batch, width, dtype=self.compute_dtype, device=like.device)

        def scale() -> Tensor | None:
            return like.new_empty(evals, batch) if self.compute_dtype == torch.float16 else None

        self._grads = GradBuffers(gradient(), scale(), gradient(), scale())

    def rollout_backward(self, dz: Tensor) -> Tensor:
        """See :class:`pwm_fast.fused.dynamics.Dynamics`."""
        if not self.horizon:
            return dz[0]
        sums = running_sum(None, dz[1:], backward=True)
        g = self.w3.dgrad(sums.flatten(0, 1)).view(self._dc.shape)
        self._dc = self._launch_backward(0, g)
        if self.wgrad:
            self._dz = sums
        return sums[0] + dz[0]

    def step_backward(self, t: int, dz: Tensor) -> Tensor:
        """See :class:`pwm_fast.fused.dynamics.Dynamics`."""
        if self.wgrad:
            self._dz[t].copy_(dz)
        g = self.w3.dgrad(dz)  # towards the sum of the stages' hidden outputs
        self._dc[t] = self._launch_backward(t, g.unsqueeze(0))[0]
        return dz

    def _launch_backward(self, t: int, g: Tensor) -> Tensor:
        """Macro steps ``t`` and on backward: gradient towards ``c [T, B, U]``; moves that to p."""
        steps = g.shape[0]
        saved, grads = self._saved(t, steps), self._grads
        assert saved is not None
        if grads is not None:
            begin, end = t * self.stages, (t + steps) * self.stages
            rows = (x if x is None else x[begin:end] for x in grads)
            grads = GradBuffers(*rows)  # type: ignore[arg-type]
        result = rollout_backward(
            g.contiguous(),
            self._dp.contiguous(),
            self._network,
            self._scheme,
            self.plan,
            saved,
            grads=grads,
            workspace=self._exchange(),
        )
        if result.sums is not None:
            self._sums = result.sums if self._sums is None else self._sums.add_(result.sums)
        self._dp = result.lp
        return result.dc

    def c_grad(self, t: int) -> Tensor:
        """See :class:`pwm_fast.fused.dynamics.Dynamics`."""
        return self._dc[t]

    def finish_backward(self, dz: Tensor, z0: Tensor) -> DynamicsGrads:
        """See :class:`pwm_fast.fused.dynamics.Dynamics`."""
        grads = DynamicsGrads(dz + self.w_z.dgrad(self._dp), self._dc)
        if self.wgrad:
            self._param_grads(grads)
            self._head_grads(grads, z0)
        return grads

    def _param_grads(self, grads: DynamicsGrads) -> None:
        """Gradients of the hidden layers' and the folded head's parameters, and of ``w_tau``.

        After all macro steps, of which there may be none.
        """
        assert self._grads is not None
        if self._sums is None:
            self._sums = self._network.b2.new_zeros(7, self._network.b2.shape[0])
        dh2, dh2_scale, dq, dq_scale = self._grads
        gamma1, beta1, gamma2, beta2, b2, b13, w_tau = self._sums.to(self._dc.dtype)
        second, head = self.weights.layers[1:]
        w2 = self._weight_grad(dh2, dh2_scale, self._buffers["y1"])
        w13 = self._weight_grad(dq, dq_scale, self._buffers["y2"])
        grads.layers = [
            LayerGrads(None, None, gamma1, beta1),
            LayerGrads(w2, None if second.bias is None else b2, gamma2, beta2),
            LayerGrads(w13, None if head.bias is None else b13, None, None),
        ]
        grads.w_tau = None if self.weights.w_tau is None else w_tau

    def _weight_grad(self, dh: Tensor, scale: Tensor | None, x: Tensor | None) -> Tensor:
        assert x is not None
        flat = None if scale is None else scale.flatten()
        return weight_grad(self.kernels, dh.flatten(0, 1), x.flatten(0, 1), flat)
