"""Rollouts and imagination as programs that run block of rows by block.

They keep what :class:`pwm_fast.fused.dynamics.Dynamics` keeps, and compute the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pwm_fast.backends.base import Kernels
from pwm_fast.backends.specs import DynamicsSpec, LayerParams
from pwm_fast.fused.blocked_mlp import PROGRAMS, Specs, layer_tensors
from pwm_fast.fused.dynamics import DynamicsWeights, saved_by_dynamics
from pwm_fast.fused.row_program import (
    Builder,
    LayerSlots,
    Operand,
    Stack,
    Widths,
    indexed,
    layer_slots,
)
from pwm_fast.fused.saved import saved_buffers


class _Sizes(NamedTuple):
    """Of a rollout: H, D, U, the widths of the layers, and of the last hidden one."""

    horizon: int
    latent: int
    hidden: int
    widths: tuple[int, ...]
    last: int


def _sizes(weights: DynamicsWeights, horizon: int) -> _Sizes:
    hidden, latent = weights.w_z.shape
    widths = tuple(p.weight.shape[0] for p in weights.layers)
    return _Sizes(horizon, latent, hidden, widths, weights.layers[-1].weight.shape[1])


class _Macro:
    """Macro steps in a program: their tensors, and the steps of one, forward or backward."""

    def __init__(
        self, b: Builder, spec: DynamicsSpec, sizes: _Sizes, *, save: bool, wgrad: bool
    ) -> None:
        self.b, self.spec, self.sizes = b, spec, sizes
        self.wgrad = wgrad
        self.w_z = Operand(b.weight("w_z", sizes.hidden, sizes.latent))
        self.w_tau = Operand(b.shared("w_tau", sizes.hidden)) if spec.timed else None
        self.layers = self._declare("layer")
        self.head = self._declare_head("head") if spec.fold else None
        evals = sizes.horizon * len(spec.stages)
        self.inputs: list[int] = []
        if wgrad and spec.fold:
            last = sizes.last
            self.inputs = [b.rows("sums", last, sizes.horizon), b.rows("hidden", last, evals)]
        elif wgrad:
            self.inputs = [b.rows("inputs", sizes.latent, evals)]
        hidden = len(spec.layers) - spec.fold
        self.stack = Stack(
            b,
            spec.layers[:hidden],
            sizes.widths[:hidden],
            self.layers[:hidden],
            evals,
            save=save,
            wgrad=wgrad,
        )
        self.stages = len(spec.stages)
        self.dt = 1.0 / spec.substeps

    def _declare(self, name: str) -> list[LayerSlots]:
        widths = self.sizes.widths
        return [
            layer_slots(
                self.b,
                f"{name} {i}",
                spec,
                Widths(widths[i], widths[i - 1] if i else 0),
                1,
                weight=i > 0,
                bias=i > 0,
            )
            for i, spec in enumerate(self.spec.layers)
        ]

    def _declare_head(self, name: str) -> LayerSlots:
        spec = self.spec.layers[-1]
        return layer_slots(self.b, name, spec, Widths(self.sizes.latent, self.sizes.last), 1)

    def declare_grads(self) -> None:
        """Declare the gradients of all parameters."""
        b, sizes = self.b, self.sizes
        self.dw_z = Operand(b.weight("gradient of w_z", sizes.hidden, sizes.latent))
        if self.w_tau is not None:
            self.dw_tau = Operand(b.shared("gradient of w_tau", sizes.hidden))
        self.grads = self._declare("gradients of layer")
        if self.spec.fold:
            self.head_grads = self._declare_head("gradients of head")

    # --- forward --------------------------------------------------------------------------------

    def start(self, z: Operand) -> None:
        """Before the first macro step, from the latent ``z``."""
        if self.spec.fold:
            self._p = self.b.gemm(self.b.scratch("p0", self.sizes.hidden), z, self.w_z)

    def step(self, t: int, z: Operand, c: Operand, out: Operand) -> None:
        """Macro step ``t``: ``out`` from ``z`` and the hoisted term ``c``."""
        if self.spec.fold:
            self._folded_step(t, z, c, out)
        elif self.spec.method == "map":
            self._evaluate(t, 0, self._keep(t * self.stages, z), c, out)
        else:
            self._flow_step(t, z, c, out)

    def _evaluate(
        self, t: int, e: int, x: Operand, c: Operand, out: Operand | None = None
    ) -> Operand:
        """The MLP of the latent ``x``."""
        n, tau = t * self.stages + e, self.spec.stages[e]
        h = self.b.gemm(self.stack.first(n, out), x, self.w_z)
        return self.stack.forward(n, h, out, add=c, tau=tau, w_tau=self.w_tau)

    def _keep(self, n: int, x: Operand) -> Operand:
        """What evaluation ``n`` starts from, kept where weight gradients need it."""
        if not self.wgrad:
            return x
        kept = Operand(self.inputs[0], n)
        return x if x == kept else self.b.combine(kept, x)

    def _stage(self, n: int, name: str) -> Operand:
        """Where a latent that evaluation ``n`` starts from is written."""
        if self.wgrad:
            return Operand(self.inputs[0], n)
        return self.b.scratch(name, self.sizes.latent)

    def _flow_step(self, t: int, z: Operand, c: Operand, out: Operand) -> None:
        b, dt = self.b, self.dt
        for i in range(self.spec.substeps):
            last = i == self.spec.substeps - 1
            per = self.spec.per_substep
            e = i * per
            n = t * self.stages + e
            z = self._keep(n, z)
            target = out if last else self._stage(n + per, f"z{i % 2}")
            velocity = self._velocity(t, e, z, c, "v1")
            if per == 1:
                b.combine(target, z, velocity, dt)
            else:
                middle = b.combine(self._stage(n + 1, "middle"), z, velocity, dt)
                second = self._velocity(t, e + 1, middle, c, "v2")
                b.combine(target, z, velocity, 0.5 * dt, second, 0.5 * dt)
            z = target

    def _velocity(self, t: int, e: int, x: Operand, c: Operand, name: str) -> Operand:
        return self._evaluate(t, e, x, c, self.b.scratch(name, self.sizes.latent))

    def _folded_step(self, t: int, z: Operand, c: Operand, out: Operand) -> None:
        b, dt, per = self.b, self.dt, self.spec.per_substep
        w13, last = self.layers[-1], self.sizes.last
        assert w13.weight is not None and self.head is not None and self.head.weight is not None
        total: Operand | None = None
        into = Operand(self.inputs[0], t) if self.wgrad else b.scratch("sum", last)
        p = self._p
        for i in range(self.spec.substeps):
            e = i * per
            following = b.scratch(
                "p1" if p == b.scratch("p0", self.sizes.hidden) else "p0", self.sizes.hidden
            )
            m1 = self._hidden(t, e, p, c, "m1")
            q1 = b.gemm(b.scratch("q1", self.sizes.hidden), m1, w13.weight, w13.bias)
            if per == 1:
                b.combine(following, p, q1, dt)
                total = b.combine(into, total, m1, dt)
            else:
                stage = b.combine(b.scratch("stage", self.sizes.hidden), p, q1, dt)
                m2 = self._hidden(t, e + 1, stage, c, "m2")
                q2 = b.gemm(b.scratch("q2", self.sizes.hidden), m2, w13.weight, w13.bias)
                b.combine(following, p, q1, 0.5 * dt, q2, 0.5 * dt)
                total = b.combine(into, total, m1, 0.5 * dt, m2, 0.5 * dt)
            p = following
        self._p = p
        assert total is not None
        velocity = b.scratch("v1", self.sizes.latent)
        b.gemm(velocity, total, self.head.weight, self.head.bias)
        b.combine(out, z, velocity, 1.0)

    def _hidden(self, t: int, e: int, p: Operand, c: Operand, name: str) -> Operand:
        """The last hidden layer's output for the pre-activation ``p``."""
        n = t * self.stages + e
        out = Operand(self.inputs[1], n) if self.wgrad else self.b.scratch(name, self.sizes.last)
        tau = self.spec.stages[e]
        return self.stack.forward(n, p, out, add=c, tau=tau, w_tau=self.w_tau)

    # --- backward -------------------------------------------------------------------------------

    def start_backward(self, dz: Operand) -> None:
        """From the gradient towards the last latent."""
        b, sizes = self.b, self.sizes
        self.grad = b.combine(b.scratch("grad", sizes.latent), dz)
        if self.spec.fold:
            self.dp = b.combine(b.scratch("dp", sizes.hidden), None)

    def step_backward(self, t: int, dc: Operand) -> None:
        """Macro step ``t``: :attr:`grad` from that towards ``z_{t+1}`` to that towards ``z_t``.

        ``dc`` is where the gradient towards its hoisted term goes.
        """
        self._dc, self._dc_started = dc, False
        per = self.spec.per_substep
        if self.spec.fold:
            self._folded_backward(t, per)
        elif self.spec.method == "map":
            dh = self._evaluate_backward(t, 0, self.grad)
            self.b.dgrad(self.grad, dh, self.w_z)
        else:
            for i in range(self.spec.substeps - 1, -1, -1):
                self._substep_backward(t, i * per, per)

    def _substep_backward(self, t: int, e: int, per: int) -> None:
        b, dt, grad = self.b, self.dt, self.grad
        half = b.scratch("half", self.sizes.latent)
        if per == 1:
            dh = self._evaluate_backward(t, e, b.combine(half, None, grad, dt))
        else:
            b.combine(half, None, grad, 0.5 * dt)
            dh = self._evaluate_backward(t, e + 1, half)
            ds = b.dgrad(b.scratch("ds", self.sizes.latent), dh, self.w_z)
            b.combine(half, half, ds, dt)
            dh = self._evaluate_backward(t, e, half)
            b.combine(grad, grad, ds, 1.0)
        b.dgrad(grad, dh, self.w_z, grad)

    def _evaluate_backward(self, t: int, e: int, dy: Operand) -> Operand:
        n = t * self.stages + e
        dh = self.stack.backward(n, dy, self.grads if self.wgrad else None)
        self._first_grads(e, dh)
        if self.wgrad:
            self.b.weight_grad(self.dw_z, dh, Operand(self.inputs[0], n))
        return dh

    def _first_grads(self, e: int, dh: Operand) -> None:
        """Towards the hoisted term, and the flow time's weight."""
        b, tau = self.b, self.spec.stages[e]
        b.combine(self._dc, self._dc if self._dc_started else None, dh, 1.0)
        self._dc_started = True
        if self.wgrad and self.w_tau is not None:
            b.column_sum(self.dw_tau, dh, tau)

    def _folded_backward(self, t: int, per: int) -> None:
        b, dt, sizes = self.b, self.dt, self.sizes
        assert self.head is not None and self.head.weight is not None
        if self.wgrad:
            assert self.head_grads.weight is not None
            b.weight_grad(self.head_grads.weight, self.grad, Operand(self.inputs[0], t))
            if self.head_grads.bias is not None:
                b.column_sum(self.head_grads.bias, self.grad)
        # Towards the sum of the stages' hidden outputs, as each stage weighs in it.
        g = b.dgrad(b.scratch("g", sizes.last), self.grad, self.head.weight)
        b.combine(g, None, g, dt if per == 1 else 0.5 * dt)
        dp = self.dp
        half, stage = b.scratch("half p", sizes.hidden), b.scratch("stage", sizes.hidden)
        for i in range(self.spec.substeps - 1, -1, -1):
            e = i * per
            if per == 1:
                dh = self._stage_backward(t, e, b.combine(half, None, dp, dt), g)
                b.combine(dp, dp, dh, 1.0)
                continue
            b.combine(half, None, dp, 0.5 * dt)
            dh = self._stage_backward(t, e + 1, half, g)
            b.combine(stage, half, dh, dt)
            b.combine(dp, dp, dh, 1.0)
            dh = self._stage_backward(t, e, stage, g)
            b.combine(dp, dp, dh, 1.0)

    def _stage_backward(self, t: int, e: int, dq: Operand, g: Operand) -> Operand:
        b, w13, n = self.b, self.layers[-1], t * self.stages + e
        assert w13.weight is not None
        if self.wgrad:
            own = self.grads[-1]
            assert own.weight is not None
            b.weight_grad(own.weight, dq, Operand(self.inputs[1], n))
            if own.bias is not None:
                b.column_sum(own.bias, dq)
        dm = b.dgrad(b.scratch("dm", self.sizes.last), dq, w13.weight, g)
        dh = self.stack.backward(n, dm, self.grads[:-1] if self.wgrad else None)
        self._first_grads(e, dh)
        return dh

    def finish_backward(self, z0: Operand, dz0: Operand) -> None:
        """After macro step 0: ``dz0``, and what is left."""
        if not self.spec.fold:
            self.b.combine(dz0, self.grad)
            return
        self.b.dgrad(dz0, self.dp, self.w_z, self.grad)
        if self.wgrad:
            self.b.weight_grad(self.dw_z, self.dp, z0)


def _dynamics_tensors(weights: DynamicsWeights) -> list[Tensor]:
    head = [] if weights.head is None else [indexed(weights.head[0]), weights.head[1]]
    tau = [] if weights.w_tau is None else [weights.w_tau]
    own = layer_tensors(weights.layers, first=False)
    return [indexed(weights.w_z), *tau, *own, *(x for x in head if x is not None)]


class _Gradients(NamedTuple):
    """Room for the gradients of dynamics' parameters."""

    w_z: Tensor | None
    w_tau: Tensor | None
    params: list[Tensor | None]

    def tensors(self) -> list[Tensor]:
        return [x for x in (self.w_z, self.w_tau, *self.params) if x is not None]


def _empty_gradients(weights: DynamicsWeights, params: Sequence[Tensor], wgrad: bool) -> _Gradients:
    if not wgrad:
        return _Gradients(None, None, [None] * len(params))
    like = [weights.w_z, *([] if weights.w_tau is None else [weights.w_tau]), *params]
    made = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in like]
    tau = None if weights.w_tau is None else made[1]
    return _Gradients(made[0], tau, list(made[len(made) - len(params) :]))


@lru_cache(maxsize=PROGRAMS)
def _rollout_forward(make: Any, spec: DynamicsSpec, sizes: _Sizes, save: bool, wgrad: bool) -> Any:
    b = Builder(make)
    z = b.rows("z", sizes.latent, sizes.horizon + 1)
    c = b.rows("c", sizes.hidden, sizes.horizon)
    macro = _Macro(b, spec, sizes, save=save, wgrad=wgrad)
    macro.start(Operand(z, 0))
    for t in range(sizes.horizon):
        macro.step(t, Operand(z, t), Operand(c, t), Operand(z, t + 1))
    return b.build()


def rollout_forward(
    kernels: Kernels,
    z0: Tensor,
    c: Tensor,
    spec: DynamicsSpec,
    weights: DynamicsWeights,
    save: bool,
    wgrad: bool,
) -> tuple[Tensor, list[Tensor]]:
    """See :func:`pwm_fast.fused.rollout.rollout_forward`."""
    horizon, batch = c.shape[:2]
    saved = saved_by_dynamics(kernels, spec, weights, horizon, batch, save=save, wgrad=wgrad)
    z = z0.new_empty(horizon + 1, *z0.shape)
    z[0] = z0
    if horizon:
        _rollout_forward(kernels.row_program, spec, _sizes(weights, horizon), save, wgrad).run(
            [z, indexed(c), *_dynamics_tensors(weights), *saved], batch, torch.get_num_threads()
        )
    return z, saved


@lru_cache(maxsize=PROGRAMS)
def _rollout_backward(make: Any, spec: DynamicsSpec, sizes: _Sizes, wgrad: bool) -> Any:
    b = Builder(make)
    dz = b.rows("dz", sizes.latent, sizes.horizon + 1)
    z0, dz0 = Operand(b.rows("z0", sizes.latent)), Operand(b.rows("dz0", sizes.latent))
    dc = b.rows("dc", sizes.hidden, sizes.horizon)
    macro = _Macro(b, spec, sizes, save=True, wgrad=wgrad)
    if wgrad:
        macro.declare_grads()
    macro.start_backward(Operand(dz, sizes.horizon))
    for t in range(sizes.horizon - 1, -1, -1):
        macro.step_backward(t, Operand(dc, t))
        b.combine(macro.grad, macro.grad, Operand(dz, t), 1.0)
    macro.finish_backward(z0, dz0)
    return b.build()


def rollout_backward(
    kernels: Kernels,
    dz: Tensor,
    z0: Tensor,
    spec: DynamicsSpec,
    weights: DynamicsWeights,
    params: Sequence[Tensor],
    saved: Sequence[Tensor],
    wgrad: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, list[Tensor | None]]:
    """See :func:`pwm_fast.fused.rollout.rollout_backward`."""
    horizon, batch = dz.shape[0] - 1, dz.shape[1]
    sizes = _sizes(weights, horizon)
    dz0, dc = torch.empty_like(dz[0]), dz.new_empty(horizon, batch, sizes.hidden)
    grads = _empty_gradients(weights, params, wgrad)
    _rollout_backward(kernels.row_program, spec, sizes, wgrad).run(
        [
            *(dz, indexed(z0), dz0, dc),
            *_dynamics_tensors(weights),
            *saved,
            *grads.tensors(),
        ],
        batch,
        torch.get_num_threads(),
    )
    return dz0, dc, grads.w_z, grads.w_tau, grads.params


# --- imagination --------------------------------------------------------------------------------


class _Actor(NamedTuple):
    """A policy between macro steps: its layers, what it is made for, and A."""

    specs: Specs
    widths: tuple[int, ...]
    shared_base: bool


def _actor_slots(
    b: Builder, actor: _Actor, sizes: _Sizes, *, save: bool, wgrad: bool
) -> tuple[list[LayerSlots], Callable[[], Stack]]:
    """The policy's tensors, and what makes its stack once all tensors before it are declared."""
    widths = (sizes.latent, *actor.widths)
    layers = [
        layer_slots(b, f"actor {i}", spec, Widths(widths[i + 1], widths[i]), 1)
        for i, spec in enumerate(actor.specs)
    ]

    def make() -> Stack:
        return Stack(
            b,
            actor.specs,
            actor.widths,
            layers,
            sizes.horizon,
            save=save,
            wgrad=wgrad,
            name="actor",
        )

    return layers, make


@lru_cache(maxsize=PROGRAMS)
def _imagine_forward(
    make: Any,
    spec: DynamicsSpec,
    sizes: _Sizes,
    actor: _Actor,
    save: bool,
    wgrad: bool,
    actor_wgrad: bool,
) -> Any:
    b = Builder(make)
    width = actor.widths[-1]
    z, action = b.rows("z", sizes.latent, sizes.horizon + 1), b.rows("action", width, sizes.horizon)
    noise, std = b.rows("noise", width, sizes.horizon), Operand(b.shared("std", width))
    base = Operand((b.shared if actor.shared_base else b.rows)("base", sizes.hidden))
    w_a = Operand(b.weight("w_a", sizes.hidden, width))
    layers, make = _actor_slots(b, actor, sizes, save=save, wgrad=actor_wgrad)
    macro = _Macro(b, spec, sizes, save=save, wgrad=wgrad)
    policy = make()
    mu = b.scratch("mu", width)
    c = b.scratch("c", sizes.hidden)
    first = layers[0]
    assert first.weight is not None
    macro.start(Operand(z, 0))
    for t in range(sizes.horizon):
        start = first.bias if actor.specs[0].plain else None
        h = b.gemm(policy.first(t, mu), Operand(z, t), first.weight, start)
        b.policy(Operand(action, t), policy.forward(t, h, mu), Operand(noise, t), std)
        b.gemm(c, Operand(action, t), w_a, base)
        macro.step(t, Operand(z, t), c, Operand(z, t + 1))
    return b.build()


def imagine_forward(
    kernels: Kernels,
    z0: Tensor,
    noise: Tensor,
    base: Tensor,
    w_a: Tensor,
    spec: DynamicsSpec,
    weights: DynamicsWeights,
    std: Tensor,
    actor_specs: Specs,
    actor: Sequence[LayerParams],
    save: bool,
    wgrad: bool,
    actor_wgrad: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """See :func:`pwm_fast.fused.imagine.imagine_forward`."""
    horizon, batch, width = noise.shape
    like = z0.new_empty
    saved: list[Tensor] = []
    actor_saved: list[Tensor] = []
    if save:
        saved = saved_by_dynamics(kernels, spec, weights, horizon, batch, save=save, wgrad=wgrad)
    actor_saved = saved_buffers(kernels, actor_specs, actor, horizon, batch, save, actor_wgrad)
    z, action = like(horizon + 1, *z0.shape), like(horizon, batch, width)
    z[0] = z0
    what = _Actor(actor_specs, tuple(p.weight.shape[0] for p in actor), base.shape[0] == 1)
    sizes = _sizes(weights, horizon)
    _imagine_forward(kernels.row_program, spec, sizes, what, save, wgrad, actor_wgrad).run(
        [
            *(z, action, indexed(noise), std.contiguous(), indexed(base), indexed(w_a)),
            *layer_tensors(actor),
            *_dynamics_tensors(weights),
            *saved,
            *actor_saved,
        ],
        batch,
        torch.get_num_threads(),
    )
    return z, action, [*saved, *actor_saved]


@lru_cache(maxsize=PROGRAMS)
def _imagine_backward(
    make: Any,
    spec: DynamicsSpec,
    sizes: _Sizes,
    actor: _Actor,
    detach: bool,
    wgrad: bool,
    actor_wgrad: bool,
) -> Any:
    b = Builder(make)
    width, horizon = actor.widths[-1], sizes.horizon
    dz, daction = b.rows("dz", sizes.latent, horizon + 1), b.rows("daction", width, horizon)
    z, action = b.rows("z", sizes.latent, horizon + 1), b.rows("action", width, horizon)
    noise = b.rows("noise", width, horizon)
    w_a = Operand(b.weight("w_a", sizes.hidden, width))
    layers, make = _actor_slots(b, actor, sizes, save=True, wgrad=actor_wgrad)
    macro = _Macro(b, spec, sizes, save=True, wgrad=wgrad)
    policy = make()
    dz0 = Operand(b.rows("dz0", sizes.latent))
    dbase = Operand((b.shared if actor.shared_base else b.rows)("dbase", sizes.hidden))
    dw_a = Operand(b.weight("gradient of w_a", sizes.hidden, width))
    dstd = Operand(b.shared("dstd", width))
    if wgrad:
        macro.declare_grads()
    grads = None
    if actor_wgrad:
        widths = (sizes.latent, *actor.widths)
        grads = [
            layer_slots(b, f"gradients of actor {i}", s, Widths(widths[i + 1], widths[i]), 1)
            for i, s in enumerate(actor.specs)
        ]
    dc, da = b.scratch("dc", sizes.hidden), b.scratch("da", width)
    first = layers[0]
    assert first.weight is not None
    macro.start_backward(Operand(dz, horizon))
    for t in range(horizon - 1, -1, -1):
        macro.step_backward(t, dc)
        b.combine(macro.grad, macro.grad, Operand(dz, t), 1.0)
        b.weight_grad(dw_a, dc, Operand(action, t))
        if actor.shared_base:
            b.column_sum(dbase, dc)
        else:
            b.combine(dbase, dbase if t < horizon - 1 else None, dc, 1.0)
        b.dgrad(da, dc, w_a, Operand(daction, t))
        dmu = b.policy_backward(da, da, Operand(action, t))
        b.column_sum(dstd, dmu, 1.0, Operand(noise, t))
        dh = policy.backward(t, dmu, grads)
        if grads is not None:
            assert grads[0].weight is not None
            b.weight_grad(grads[0].weight, dh, Operand(z, t))
        if not detach:
            b.dgrad(macro.grad, dh, first.weight, macro.grad)
    macro.finish_backward(Operand(z, 0), dz0)
    return b.build()


def imagine_backward(
    kernels: Kernels,
    dz: Tensor,
    daction: Tensor,
    z: Tensor,
    action: Tensor,
    noise: Tensor,
    base: Tensor,
    w_a: Tensor,
    spec: DynamicsSpec,
    weights: DynamicsWeights,
    params: Sequence[Tensor],
    std: Tensor,
    actor_specs: Specs,
    actor: Sequence[LayerParams],
    actor_params: Sequence[Tensor],
    saved: Sequence[Tensor],
    detach: bool,
    wgrad: bool,
    actor_wgrad: bool,
) -> tuple[
    Tensor,
    Tensor,
    Tensor,
    Tensor | None,
    Tensor | None,
    list[Tensor | None],
    Tensor,
    list[Tensor | None],
]:
    """See :func:`pwm_fast.fused.imagine.imagine_backward`."""
    horizon, batch = noise.shape[:2]
    contiguous = torch.contiguous_format
    dz0, dstd = torch.empty_like(dz[0]), torch.empty_like(std, memory_format=contiguous)
    dbase = torch.empty_like(base, memory_format=contiguous)
    dw_a = torch.empty_like(w_a, memory_format=contiguous)
    grads = _empty_gradients(weights, params, wgrad)
    dactor: list[Tensor] = []
    if actor_wgrad:
        dactor = [torch.empty_like(x, memory_format=contiguous) for x in actor_params]
    what = _Actor(actor_specs, tuple(p.weight.shape[0] for p in actor), base.shape[0] == 1)
    sizes = _sizes(weights, horizon)
    _imagine_backward(kernels.row_program, spec, sizes, what, detach, wgrad, actor_wgrad).run(
        [
            *(dz, daction, indexed(z), indexed(action), indexed(noise), indexed(w_a)),
            *layer_tensors(actor),
            *_dynamics_tensors(weights),
            *saved,
            *(dz0, dbase, dw_a, dstd),
            *grads.tensors(),
            *dactor,
        ],
        batch,
        torch.get_num_threads(),
    )
    found: list[Tensor | None] = list(dactor) if actor_wgrad else [None] * len(actor_params)
    return dz0, dbase, dw_a, grads.w_z, grads.w_tau, grads.params, dstd, found
