"""Flow policies: noise that a velocity network moves to an action."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from pwm_fast.backends.dtypes import at_least_fp32
from pwm_fast.backends.select import Choice
from pwm_fast.ops import _checks
from pwm_fast.ops.coverage import unsupported_dynamics
from pwm_fast.ops.flow import march
from pwm_fast.ops.mlp import RunNet
from pwm_fast.ops.rollout import fused_rollout
from pwm_fast.ops.shortcut import Shortcut
from pwm_fast.ops.types import ORDERS, FusedStep, Layer, Method, Order
from pwm_fast.ops.weights import pack

Form = Literal["ode", "gated", "meanflow"]

FORMS: tuple[Form, ...] = ("ode", "gated", "meanflow")


class FlowPolicy(NamedTuple):
    """A policy ``a = tanh(x_1)``: a flow leads from ``x_0 = std noise`` to ``x_1`` over tau.

    The network sees ``[x, z, tau, task]``. A field that looks at neither x nor tau is a Gaussian
    policy with that mean and that ``std``. There are three forms:

    - ``"ode"``: its outputs are the velocity of x.
    - ``"gated"`` (Flow-G): its 2A outputs ``[c, g]`` make the velocity ``sigmoid(g) (c - x)``. Of a
      step of size d, ``x + d sigmoid(g) (c - x)``, the derivative in x is ``1 - d sigmoid(g)``,
      between 0 and 1, but for what comes through the network.
    - ``"meanflow"``: it also sees the step's size d, ``[x, z, tau, task, d]``, and its outputs are
      the average velocity over the step. With one step ``a = tanh(x_0 + u(x_0, z, tau=0, d=1))``,
      one evaluation.

    Attributes:
        layers: of the network, the last one a Linear.
        std: ``[A]`` of the noise that the flow starts from.
        form: one of these.
        substeps: K steps of size 1/K.
        method: ``"euler"``, or ``"heun"`` with two evaluations a step, which ``"meanflow"`` has no
            use for.
        order: ``"norm_act"`` or ``"act_norm"`` (PWM's policies).
        task_input: the network sees the task's embedding.

    Source: the gate: Zhang et al. 2025, SAC Flow (arXiv 2509.25756), whose gate and candidate are
    two networks, whose noise has a standard deviation of 1, and which adds noise in every step, to
    have a density. Average velocities: Geng et al. 2025, MeanFlow (arXiv 2505.13447), with time
    from the noise (0) to the action (1).
    """

    layers: Sequence[Layer]
    std: Tensor
    form: Form = "ode"
    substeps: int = 4
    method: Method = "euler"
    order: Order = "norm_act"
    task_input: bool = False

    @property
    def width(self) -> int:
        """A."""
        return self.std.numel()

    def check(self, z0: Tensor, width: int, task: Tensor | None, source: str) -> None:
        """Raise ValueError where it does not fit ``z0 [B, D]`` and the action width."""
        _checks.one_of("policy.form", self.form, FORMS)
        _checks.one_of("policy.order", self.order, ORDERS)
        _checks.positive_int("policy.substeps", self.substeps)
        _checks.method(self.method)
        if self.form == "meanflow" and self.method != "euler":
            raise ValueError(f"policy.method must be euler for form meanflow, got {self.method!r}")
        _checks.floating("policy.std", self.std)
        if tuple(self.std.shape) != (width,):
            raise ValueError(f"policy.std must be [{width}], got {tuple(self.std.shape)}")
        told = () if not self.task_input else (_given(task),)
        inputs = width + z0.shape[-1] + 1 + sum(x.shape[-1] for x in told)
        inputs += self.form == "meanflow"
        outputs = _checks.layers("policy.layers", self.layers, inputs, z0.device)
        wanted = 2 * width if self.form == "gated" else width
        if outputs != wanted:
            raise ValueError(
                f"policy.layers must have {wanted} outputs for form {self.form} and {source} of "
                f"width {width}, got {outputs}"
            )

    def transport(
        self, x: Tensor, z: Tensor, task: Tensor | None, mask: Tensor | None, run: RunNet
    ) -> Tensor:
        """The flow's end, before the tanh, in plain PyTorch around the network.

        Args:
            x: its start ``[..., A]``, in float32 at least.
            z: latents ``[..., D]``.
            task: embeddings ``[..., E]``, or None.
            mask: ``[..., A]``: components that it leaves out stay 0, and so no other one sees their
                noise. None: all of them.
            run: evaluates the network, ``run(inputs, layers, order)``.

        Raises:
            ValueError: the network takes embeddings, and there are none.
        """
        told = (_given(task),) if self.task_input else ()
        rows = x.shape[:-1]
        kept = None if mask is None else mask.to(x.dtype)

        def column(value: float) -> Tensor:
            return torch.full((), value, dtype=z.dtype, device=z.device).expand(*rows, 1)

        def velocity(at: Tensor, tau: float) -> Tensor:
            size = (column(1.0 / self.substeps),) if self.form == "meanflow" else ()
            y = run((at.to(z.dtype), z, column(tau), *told, *size), self.layers, self.order)
            y = y.to(at.dtype)
            if self.form == "gated":
                candidate, gate = y.chunk(2, -1)
                y = torch.sigmoid(gate) * (candidate - at)
            return y if kept is None else y * kept

        start = x if kept is None else x * kept
        return march(velocity, start, self.substeps, self.method, x.dtype)

    def fused(self) -> FusedStep | str:
        """The whole flow as a macro step of x, or why no fused pass covers it."""
        if self.form == "gated":
            return "the velocity is gated"
        if self.order == "act_norm":
            return "the activations come before the LayerNorms"
        reason = unsupported_dynamics(self.layers)
        if reason is not None:
            return reason
        if self.form == "meanflow":
            return Shortcut(self.layers, self.substeps).fused()
        return FusedStep(self.layers, self.method, self.substeps, fold=None)


def fused_transport(
    choice: Choice, step: FusedStep, x: Tensor, z: Tensor, task: Tensor | None
) -> Tensor:
    """The end ``[B, A]`` of :meth:`FlowPolicy.fused` from ``x [B, A]``, in one operator.

    Latents ``[B, D]`` and embeddings ``[B, E]`` are what actions and tasks are to dynamics.
    """
    packed = pack(choice, step, x.shape[-1], z.shape[-1], task, rows=x.shape[0])
    return fused_rollout(choice, packed, x.to(z.dtype), z.unsqueeze(0), task)[1]


def start_of(policy: FlowPolicy, z: Tensor, eps: Tensor | None) -> Tensor:
    """``x_0 [..., A]`` for latents ``[..., D]``, in float32 at least; 0 without noise."""
    std = at_least_fp32(policy.std)
    if eps is None:
        return torch.zeros_like(std).expand(*z.shape[:-1], policy.width)
    return std * at_least_fp32(eps)


def _given(task: Tensor | None) -> Tensor:
    if task is None:
        raise ValueError("policy.task_input needs task embeddings, got task=None")
    return task
