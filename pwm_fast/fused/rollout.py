"""Latent rollouts: H macro steps of a velocity field or of one-shot dynamics, and their adjoint.

The first layer's product is linear in its inputs, so everything in it that does not change within
a macro step (action, task, bias) arrives as one term ``c``, and the flow time as a rank-1 term.
With a linear velocity head the hidden pre-activation ``p = W1z z`` can be carried through the
substeps in place of ``z`` (*fold*): ``W13 = W1z W3`` then takes the place of two products.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pwm_fast.backends.base import Kernels
from pwm_fast.backends.specs import DynamicsSpec, LayerParams
from pwm_fast.fused.architecture import Sizes, persistent_plan
from pwm_fast.fused.gemm import Gemm, takes_narrow, weight_grad
from pwm_fast.fused.gemm_axpby import Update
from pwm_fast.fused.stack import LayerGrads, Stack, saved_buffers

if TYPE_CHECKING:
    from pwm_fast.fused.persistent import Persistent
    from pwm_fast.kernels.rollout import Plan


class DynamicsWeights:
    """Tensors of a dynamics network, its first layer split by inputs.

    Attributes:
        w_z: ``[U, D]``, the part of the first weight that takes the latent.
        w_tau: ``[U]``, the part that takes the flow time, or None.
        layers: parameters a layer; the first one's ``weight`` is ``w_z``. With fold the last one's
            are ``W13 [U, U]`` and ``b13``.
        head: fold's ``W3 [D, U]`` and ``b3``, or None.
    """

    def __init__(
        self,
        w_z: Tensor,
        w_tau: Tensor | None,
        layers: list[LayerParams],
        head: tuple[Tensor, Tensor | None] | None,
    ) -> None:
        self.w_z, self.w_tau, self.layers, self.head = w_z, w_tau, layers, head


@dataclass
class DynamicsGrads:
    """Gradients of a rollout; parameters' are None unless they were asked for."""

    z0: Tensor
    c: Tensor
    w_z: Tensor | None = None
    w_tau: Tensor | None = None
    layers: list[LayerGrads] | None = None
    head_weight: Tensor | None = None
    head_bias: Tensor | None = None


class Dynamics:
    """H macro steps on B rows, forward and backward."""

    def __init__(
        self,
        kernels: Kernels,
        spec: DynamicsSpec,
        weights: DynamicsWeights,
        horizon: int,
        batch: int,
        *,
        save: bool,
        wgrad: bool,
        saved: Sequence[Tensor] | None = None,
    ) -> None:
        self.kernels, self.spec, self.weights = kernels, spec, weights
        self.horizon, self.batch = horizon, batch
        self.save, self.wgrad = save, wgrad
        stages = len(spec.stages)
        self.stages = stages
        like = weights.w_z
        self.latent = like.shape[1]
        self.hidden = like.shape[0]
        last = weights.layers[-1].weight.shape[1] if spec.fold else 0
        # What the first product took is kept as its weight's gradient takes it.
        self.narrow_inputs = wgrad and not spec.fold and takes_narrow(kernels, like)
        kept = kernels.precision.dtype(like.dtype) if self.narrow_inputs else like.dtype
        shapes = extra_shapes(spec, self.latent, last, horizon, batch, wgrad)
        if saved is None:
            self.inputs, stack_saved = [like.new_empty(shape, dtype=kept) for shape in shapes], None
        else:
            self.inputs, stack_saved = list(saved[: len(shapes)]), saved[len(shapes) :]
        # Folded hidden layers run without the head: its product has two uses.
        self.specs = spec.layers[:-1] if spec.fold else spec.layers
        params = weights.layers[:-1] if spec.fold else weights.layers
        self.stack = Stack(
            kernels,
            self.specs,
            params,
            horizon * stages,
            batch,
            save=save,
            wgrad=wgrad,
            saved=stack_saved,
        )
        self.w_z = Gemm(kernels, weights.w_z, batch)
        if spec.fold:
            assert weights.head is not None
            self.w13 = Gemm(kernels, weights.layers[-1].weight, batch)
            self.b13 = weights.layers[-1].bias
            self.w3, self.b3 = Gemm(kernels, weights.head[0], batch), weights.head[1]
            self._carry = Update(self.w13, batch, self.b13)
            self._latent_step = Update(self.w3, batch, self.b3)
        else:
            # A velocity head that is a Linear alone ends in the integrator's update.
            linear = spec.method != "map" and len(self.specs) > 1 and self.specs[-1].plain
            head = Update(self.stack.gemms[-1], batch, params[-1].bias) if linear else None
            self._head_update = head
            self._adjoint_step = Update(self.w_z, batch, adjoint=True)
        self._p: Tensor | None = None
        # The last macro step's result as the next one's product takes it.
        self._narrow: Tensor | None = None
        self._asked = False  # by somebody else
        # Macro steps in one launch, where the kernels have such a way; None: layer by layer.
        self.persistent = self._persistent()

    @cached_property
    def taus(self) -> list[Tensor]:
        """Flow times of a macro step's evaluations, ``[1]`` each."""
        # Filled on the device: copied from the host they would make it wait, and break a capture.
        return [self.weights.w_z.new_full((1,), t) for t in self.spec.stages]

    def _persistent(self) -> Persistent | None:
        spec, weights = self.spec, self.weights
        sizes = Sizes(self.batch, self.hidden, self.stack.widths[-1])
        k = self.kernels
        plan = persistent_plan(k.name, k.precision, spec, sizes, weights.w_z.device)
        return None if plan is None else self.persistent_on(plan)

    def persistent_on(self, plan: Plan) -> Persistent:
        """Macro steps in one launch of this layout; the networks must be such as have one."""
        from pwm_fast.fused.persistent import Persistent

        spec, weights, k = self.spec, self.weights, self.kernels
        first, second = self.specs
        last = self.inputs[1] if self.wgrad else None
        return Persistent(
            k,
            spec.method,
            spec.substeps,
            (first, second),
            weights.layers,
            weights.w_tau,
            self.stack,
            last,
            plan,
        )

    def saved(self) -> list[Tensor]:
        """What a backward pass needs."""
        return [*self.inputs, *self.stack.saved] if self.save else []

    # --- forward --------------------------------------------------------------------------------

    def rollout(self, z: Tensor, c: Tensor) -> None:
        """All macro steps: ``z[1:]`` from ``z[0]`` of ``z [H+1, B, D]``, and ``c [H, B, U]``."""
        if self.persistent is None:
            for t in range(self.horizon):
                self.step(t, z[t], c[t], z[t + 1])
            return
        if not self.horizon:
            return
        self.persistent.forward(0, self.w_z(z[0]), c, self._totals)
        self.latents(z)

    @cached_property
    def _totals(self) -> Tensor:
        """``[H, B, U]``: of each macro step the sum of its hidden outputs, as a product takes it.

        In float32 where the gradient of a weight will take it too.
        """
        if self.wgrad:
            return self.inputs[0]
        like = self.weights.w_z
        shape = (self.horizon, self.batch, self.stack.widths[-1])
        return like.new_empty(shape, dtype=self.kernels.precision.dtype(like.dtype))

    def hidden_step(self, t: int, z0: Tensor, c: Tensor) -> Tensor:
        """Macro step ``t`` of the hidden state alone: the sum ``[B, U]`` of its hidden outputs.

        For :attr:`persistent` macro steps from ``z0 [B, D]`` on, one after another; the latents
        follow from all of them together (:meth:`latents`).
        """
        assert self.persistent is not None
        p = self.w_z(z0) if self._p is None else self._p
        _, self._p = self.persistent.forward(t, p, c.unsqueeze(0), self._totals[t : t + 1])
        return self._totals[t]

    def latents(self, z: Tensor) -> None:
        """``z[1:]`` of ``z [H+1, B, D]``, after all macro steps, from ``z[0]``."""
        from pwm_fast.kernels.running_sum import running_sum

        increments = self.w3(self._totals.flatten(0, 1))
        if self.b3 is not None:
            increments.add_(self.b3)
        running_sum(z[0], increments.view(z[1:].shape), out=z[1:])

    def operand(self, t: int, z: Tensor) -> Tensor:
        """Macro step ``t``'s latent as products take it, for others too; before :meth:`step`."""
        self._asked = True
        if self._narrow is None:
            narrow = self._operand_like(t, 0, z)
            if narrow is not None:
                self.kernels.to_operand(z, narrow, None)
                self._narrow = narrow
        return z if self._narrow is None else self._narrow

    def step(self, t: int, z: Tensor, c: Tensor, out: Tensor) -> None:
        """Macro step ``t``: ``out [B, D]`` from ``z [B, D]`` and the hoisted term ``c [B, U]``."""
        if self.spec.fold:
            self._folded_step(t, z, c, out)
            return
        if self.spec.method == "map":
            out.copy_(self._evaluate(t, 0, z, self._narrow, c))
            self._narrow = None
            return
        dt = 1.0 / self.spec.substeps
        e, narrow = 0, self._narrow
        for i in range(self.spec.substeps):
            last = i == self.spec.substeps - 1
            target = out if last else torch.empty_like(z)
            # No product takes the rollout's last latent.
            stages = 1 if self.spec.method == "euler" else 2
            end = last and t == self.horizon - 1
            following = None if end else self._operand_like(t, e + stages, z)
            if self.spec.method == "euler":
                self._advance(t, e, (z, narrow), c, z, (target, following), dt)
                e += 1
            else:
                middle = self._stage_buffer(t, e + 1, z), self._operand_like(t, e + 1, z)
                half = 0.5 * dt
                v1 = self._advance(t, e, (z, narrow), c, z, middle, dt, keep=True)
                self._advance(t, e + 1, middle, c, z, (target, following), half, v1, half)
                e += 2
            z, narrow = target, following
        self._narrow = narrow

    def _operand_like(self, t: int, e: int, z: Tensor) -> Tensor | None:
        """For evaluation ``e``'s latent as products take it, None where they take it itself."""
        operand = self.kernels.precision.operand
        if self.narrow_inputs:
            return self.inputs[0][t * self.stages + e]
        return None if operand is None else torch.empty_like(z, dtype=operand)

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

        ``x`` and ``out`` each have beside them what products take, or None.
        """
        state, operand = out
        update = self._head_update
        y = self._evaluate(t, e, *x, c, head=update is None)
        if update is not None:
            return update(y, z, state, c2, k1=k1, c1=c1, keep=keep, operand=operand)
        if k1 is None:
            self.kernels.axpby(z, y, None, state, c2, 0.0, operand=operand)
        else:
            self.kernels.axpby(z, k1, y, state, c1, c2, operand=operand)
        return y if keep else None

    def _evaluate(
        self,
        t: int,
        e: int,
        z: Tensor,
        narrow: Tensor | None,
        c: Tensor,
        *,
        head: bool = True,
    ) -> Tensor:
        if self.wgrad:
            kept = self.inputs[0][t * self.stages + e]
            if self.narrow_inputs:
                if narrow is None:
                    self.kernels.to_operand(z, kept, None)
                narrow = kept
            elif kept.data_ptr() != z.data_ptr():
                kept.copy_(z)
        w_tau = self.weights.w_tau
        return self.stack.forward(
            t * self.stages + e,
            self.w_z(z if narrow is None else narrow),
            add=c,
            tau=None if w_tau is None else self.taus[e],
            w_tau=w_tau,
            head=head,
        )

    def _stage_buffer(self, t: int, e: int, like: Tensor) -> Tensor:
        if self.wgrad and not self.narrow_inputs:
            return self.inputs[0][t * self.stages + e]
        return torch.empty_like(like)

    def _folded_step(self, t: int, z: Tensor, c: Tensor, out: Tensor) -> None:
        k = self.kernels
        p = self._p
        if p is None:
            p = self.w_z(z if self._narrow is None else self._narrow)
        dt = 1.0 / self.spec.substeps
        heun = self.spec.method == "heun"
        total: Tensor | None = None
        e = 0
        for _ in range(self.spec.substeps):
            m1 = self._folded_evaluate(t, e, p, c)
            following = torch.empty_like(p)
            if heun:
                stage = torch.empty_like(p)
                q1 = self._carry(m1, p, stage, dt, keep=True)
                m2 = self._folded_evaluate(t, e + 1, stage, c)
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
        goes_on = self._asked and t + 1 < self.horizon
        self._narrow = self._operand_like(t + 1, 0, z) if goes_on else None
        self._latent_step(total, z, out, 1.0, operand=self._narrow)
        self._p = p

    def _total(self, t: int, like: Tensor) -> Tensor:
        """Zeros for the sum of macro step ``t``'s hidden outputs."""
        return self.inputs[0][t].zero_() if self.wgrad else torch.zeros_like(like)

    def _folded_evaluate(self, t: int, e: int, p: Tensor, c: Tensor) -> Tensor:
        w_tau = self.weights.w_tau
        n = t * self.stages + e
        kept = self.inputs[1][n] if self.wgrad else None
        m = self.stack.forward(
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
        """Begin at the last macro step."""
        like = self.weights.w_z
        self._lp = like.new_zeros(self.batch, self.hidden) if self.spec.fold else None
        if self.persistent is not None:
            evals = self.horizon * self.stages
            self.persistent.start_backward(evals, self.batch, self.wgrad)
            self._dc = like.new_empty(self.horizon, self.batch, self.hidden)
            if self.wgrad:
                self._lz = like.new_empty(self.horizon, self.batch, self.latent)
            return
        self.stack.start_backward(keep_first=True)
        if self.wgrad and self.spec.fold:
            shape = (self.horizon * self.stages, self.batch)
            narrow = takes_narrow(self.kernels, like)
            dtype = self.kernels.precision.dtype(like.dtype) if narrow else like.dtype
            self._dq = like.new_empty(*shape, self.hidden, dtype=dtype)
            scaled = narrow and self.kernels.precision.scaled
            self._dq_scale = like.new_empty(shape) if scaled else None
            self._lz = like.new_empty(self.horizon, self.batch, self.latent)

    def rollout_backward(self, dz: Tensor) -> Tensor:
        """Adjoint of all macro steps: gradient towards ``z_0`` for ``dz [H+1, B, D]`` to them.

        With fold what flows through ``p`` is kept apart until :meth:`finish_backward`.
        """
        if self.persistent is None or not self.horizon:
            adjoint = dz[self.horizon]
            for t in range(self.horizon - 1, -1, -1):
                adjoint = self.step_backward(t, adjoint) + dz[t]
            return adjoint
        from pwm_fast.kernels.running_sum import running_sum

        assert self._lp is not None
        lz = running_sum(None, dz[1:], backward=True)
        g = self.w3.dgrad(lz.flatten(0, 1)).view(self._dc.shape)
        self._dc, self._lp = self.persistent.backward(0, g, self._lp)
        if self.wgrad:
            self._lz = lz
        return lz[0] + dz[0]

    def step_backward(self, t: int, dz: Tensor) -> Tensor:
        """Adjoint of macro step ``t``: gradient towards ``z_t`` for that towards ``z_{t+1}``.

        With fold what flows through ``p`` is kept apart until :meth:`finish_backward`.
        """
        if self.spec.fold:
            return self._folded_backward(t, dz)
        n = t * self.stages
        if self.spec.method == "map":
            dh, scale = self.stack.backward(n, dz.clone())
            return self.w_z.scaled_dgrad(dh, 0, scale, wide=True)[0]
        dt = 1.0 / self.spec.substeps
        e = self.stages
        dz = dz.contiguous()
        step = self._adjoint_step
        for _ in range(self.spec.substeps):
            out = torch.empty_like(dz)
            if self.spec.method == "euler":
                e -= 1
                dh, scale = self.stack.backward(n + e, dz * dt)
                step(dh, dz, out, 1.0, scale=scale)
            else:
                e -= 2
                half = dz * (0.5 * dt)
                # What is plain at its end leaves the adjoint that comes in as it is.
                top = half if self.specs[-1].plain else half.clone()
                dh, scale = self.stack.backward(n + e + 1, top)
                ds2 = step(dh, half, half, dt, keep=True, scale=scale)
                dh, scale = self.stack.backward(n + e, half)
                step(dh, dz, out, 1.0, k1=ds2, c1=1.0, scale=scale)
            dz = out
        return dz

    def _folded_backward(self, t: int, dz: Tensor) -> Tensor:
        k = self.kernels
        dt = 1.0 / self.spec.substeps
        lp = self._lp
        assert lp is not None
        if self.wgrad:
            self._lz[t].copy_(dz)
        g = self.w3.dgrad(dz)  # towards the sum of the stages' hidden outputs
        if self.persistent is not None:
            dc, self._lp = self.persistent.backward(t, g.unsqueeze(0), lp)
            self._dc[t] = dc[0]
            return dz
        n = t * self.stages
        e = self.stages
        for _ in range(self.spec.substeps):
            if self.spec.method == "euler":
                e -= 1
                dh, scale = self._folded_stage(n + e, lp * dt, g, dt)
                out = torch.empty_like(lp)
                k.axpby(lp, dh, None, out, 1.0, 0.0, k1_scale=scale)
                lp = out
                continue
            e -= 2
            half = lp * (0.5 * dt)
            dh2, scale2 = self._folded_stage(n + e + 1, half, g, 0.5 * dt)
            stage = torch.empty_like(half)
            k.axpby(half, dh2, None, stage, dt, 0.0, k1_scale=scale2)
            dh1, scale1 = self._folded_stage(n + e, stage, g, 0.5 * dt)
            out = torch.empty_like(lp)
            k.axpby(lp, dh2, dh1, out, 1.0, 1.0, k1_scale=scale2, k2_scale=scale1)
            lp = out
        self._lp = lp
        return dz

    def _folded_stage(
        self, n: int, dq: Tensor, g: Tensor, weight: float
    ) -> tuple[Tensor, Tensor | None]:
        scale: Tensor | None = None
        if self.wgrad and self._dq.dtype != dq.dtype:
            scale = None if self._dq_scale is None else self._dq_scale[n]
            self.kernels.to_operand(dq, self._dq[n], scale)
            dq = self._dq[n]
        elif self.wgrad:
            self._dq[n].copy_(dq)
        return self.stack.backward_below(n, self.w13, (dq, scale), g, weight)

    def c_grad(self, t: int) -> Tensor:
        """Gradient towards macro step ``t``'s hoisted term, ``[B, U]``."""
        if self.persistent is not None:
            return self._dc[t]
        first, scale = self.stack.first_gradients()
        evals = slice(t * self.stages, (t + 1) * self.stages)
        return _wide(first[evals], None if scale is None else scale[evals]).sum(0)

    def finish_backward(self, dz: Tensor, z0: Tensor) -> DynamicsGrads:
        """All gradients, once macro step 0 is done and ``dz`` is the one towards ``z0``."""
        if self.persistent is not None:
            c = self._dc
        else:
            narrow, scale = self.stack.first_gradients()
            first = _wide(narrow, scale)
            c = first.view(self.horizon, self.stages, self.batch, self.hidden).sum(1)
        if self.spec.fold:
            assert self._lp is not None
            dz = dz + self.w_z.dgrad(self._lp)
        grads = DynamicsGrads(dz, c)
        if not self.wgrad:
            return grads
        k = self.kernels
        if self.persistent is not None:
            grads.layers, w_tau = self.persistent.grads(c.dtype)
            grads.w_tau = None if self.weights.w_tau is None else w_tau
            self._head_grads(grads, z0)
            return grads
        if self.weights.w_tau is not None:
            # float64, as the other sums over rows: one long sum in float32 would lose more than the
            # several short ones of step-by-step gradients.
            taus = torch.cat(self.taus).repeat(self.horizon).double()
            grads.w_tau = (taus @ first.sum(1, dtype=torch.float64)).to(first.dtype)
        if self.spec.fold:
            grads.layers = self.stack.param_grads(None)
            dq = self._dq.flatten(0, 1)
            dq_scale = None if self._dq_scale is None else self._dq_scale.flatten()
            m = self.inputs[1].flatten(0, 1)
            bias = None if self.b13 is None else _column_sum(_wide(dq, dq_scale))
            grads.layers.append(LayerGrads(weight_grad(k, dq, m, dq_scale), bias, None, None))
            self._head_grads(grads, z0)
        else:
            grads.layers = self.stack.param_grads(None)
            flat = None if scale is None else scale.flatten()
            x = self.inputs[0].flatten(0, 1)
            grads.w_z = weight_grad(k, narrow.flatten(0, 1), x, flat)
        return grads

    def _head_grads(self, grads: DynamicsGrads, z0: Tensor) -> None:
        """Fold's gradients of the head and of W1z."""
        assert self._lp is not None
        lz = self._lz.flatten(0, 1)
        grads.head_weight = weight_grad(self.kernels, lz, self.inputs[0].flatten(0, 1))
        grads.head_bias = None if self.b3 is None else _column_sum(lz)
        # p_0 = W1z z_0 is the only use of W1z here; the rest went into W13.
        grads.w_z = weight_grad(self.kernels, self._lp, z0)


def _wide(x: Tensor, scale: Tensor | None) -> Tensor:
    """Adjoints in float32 (or their own, wider dtype), with the factors of their rows."""
    if scale is not None:
        return x * scale.unsqueeze(-1)
    return x.float() if x.dtype == torch.bfloat16 else x


def _column_sum(x: Tensor) -> Tensor:
    return x.sum(0, dtype=torch.float64).to(x.dtype)


def extra_shapes(
    spec: DynamicsSpec, latent: int, last: int, horizon: int, batch: int, wgrad: bool
) -> list[tuple[int, ...]]:
    """Shapes of what :class:`Dynamics` keeps beside its stack's buffers.

    ``last`` is the width of the last hidden layer; only fold uses it.
    """
    if not wgrad:
        return []
    evals = horizon * len(spec.stages)
    if spec.fold:
        return [(horizon, batch, last), (evals, batch, last)]
    return [(evals, batch, latent)]


def dynamics_saved_buffers(
    spec: DynamicsSpec,
    widths: Sequence[int],
    latent: int,
    horizon: int,
    batch: int,
    save: bool,
    wgrad: bool,
    operand: torch.dtype,
    state: torch.dtype,
    narrow: bool,
) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and dtypes of :meth:`Dynamics.saved`, in order; ``widths`` are of all layers.

    ``narrow``: weight gradients take 16-bit operands.
    """
    if not save:
        return []
    specs = spec.layers[:-1] if spec.fold else spec.layers
    evals = horizon * len(spec.stages)
    stack_widths = widths[: len(specs)]
    extra = extra_shapes(
        spec, latent, widths[len(specs) - 1] if spec.fold else 0, horizon, batch, wgrad
    )
    kept = operand if narrow and not spec.fold else state
    return [(shape, kept) for shape in extra] + saved_buffers(
        specs, stack_widths, evals, batch, save, wgrad, operand, state
    )
