"""Macro steps of a folded flow on the persistent kernels, for :class:`Dynamics`."""

from __future__ import annotations

import torch
from torch import Tensor

from pwm_fast.backends.base import Kernels
from pwm_fast.backends.specs import LayerParams, LayerSpec
from pwm_fast.fused.gemm import operand_copy, weight_grad
from pwm_fast.fused.stack import LayerGrads, Stack
from pwm_fast.kernels.rollout import (
    Adjoints,
    Network,
    RolloutLayout,
    Saved,
    Scheme,
    Workspace,
    rollout_backward,
    rollout_forward,
)


class Persistent:
    """Runs of macro steps, forward and backward.

    Args:
        kernels: element kernels, which say the precision.
        method: ``"heun"`` or ``"euler"``.
        substeps: K.
        specs: of the two hidden layers.
        params: of the two hidden layers and of the folded head.
        w_tau: what flow time is multiplied with, or None.
        stack: of the hidden layers; its buffers are filled and read.
        last: ``[T E, B, U]`` float32, for the last layer's outputs; None without weight gradients.
        plan: layout of the launches.
    """

    def __init__(
        self,
        kernels: Kernels,
        method: str,
        substeps: int,
        specs: tuple[LayerSpec, LayerSpec],
        params: list[LayerParams],
        w_tau: Tensor | None,
        stack: Stack,
        last: Tensor | None,
        plan: RolloutLayout,
    ) -> None:
        self.kernels, self.plan = kernels, plan
        first, second, head = params
        like = first.weight
        operand = kernels.precision.dtype(like.dtype)

        def vector(x: Tensor | None) -> Tensor:
            return like.new_zeros(like.shape[0]) if x is None else x.contiguous()

        def weight(x: Tensor) -> Tensor:
            return x if x.dtype == operand else operand_copy(x, operand)

        self.network = Network(
            vector(w_tau),
            weight(second.weight),
            vector(second.bias),
            weight(head.weight),
            vector(head.bias),
            vector(first.gamma),
            vector(first.beta),
            vector(second.gamma),
            vector(second.beta),
        )
        self.has_bias = second.bias is not None, head.bias is not None
        precision = kernels.precision
        self.scheme = Scheme(
            method,
            substeps,
            specs[0].width,
            specs[0].eps,
            specs[1].eps,
            precision.tf32,
            specs[1].width,
        )
        self._buffers = {
            "xhat1": stack.buffer(0, "hat"),
            "rstd1": stack.buffer(0, "rstd"),
            "xhat2": stack.buffer(1, "hat"),
            "rstd2": stack.buffer(1, "rstd"),
            "y1": stack.buffer(0, "y"),
            "y2": last,
        }
        self._operand = operand
        self._adjoints: Adjoints | None = None
        self._sums: Tensor | None = None
        self._workspace: Workspace | None = None

    def _saved(self, t: int, steps: int) -> Saved | None:
        """The buffers of macro steps ``t`` and on."""
        begin, end = t * self.scheme.evals, (t + steps) * self.scheme.evals
        cut = {n: None if x is None else x[begin:end] for n, x in self._buffers.items()}
        if cut["xhat1"] is None:
            return None
        return Saved(**cut)  # type: ignore[arg-type]

    def _meeting_place(self, batch: int) -> Workspace:
        """What the launches of a pass exchange through, cleared once for all of them."""
        if self._workspace is None:
            like = self.network.b2
            self._workspace = Workspace(self.plan, batch, like.shape[0], self._operand, like.device)
        return self._workspace

    def forward(
        self, t: int, p: Tensor, c: Tensor, total: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Macro steps ``t`` and on under ``c [T, B, U]``: sums of outputs ``[T, B, U]``, and p.

        The sums are written to ``total`` where it is given.
        """
        result = rollout_forward(
            p.contiguous(),
            c.contiguous(),
            self.network,
            self.scheme,
            self.plan,
            saved=self._saved(t, c.shape[0]),
            total=total,
            workspace=self._meeting_place(p.shape[0]),
        )
        return result.total, result.p

    def start_backward(self, evals: int, batch: int, wgrad: bool) -> None:
        """Make the buffers of the backward pass."""
        self._workspace = None  # of its own: it may be captured, or repeated, without the forward
        if not wgrad:
            return
        like = self.network.b2
        width = like.shape[0]

        def scale() -> Tensor | None:
            return like.new_empty(evals, batch) if self._operand == torch.float16 else None

        def wide() -> Tensor:
            return torch.empty(evals, batch, width, dtype=self._operand, device=like.device)

        self._adjoints = Adjoints(wide(), scale(), wide(), scale())

    def backward(self, t: int, g: Tensor, lp: Tensor) -> tuple[Tensor, Tensor]:
        """Adjoint of macro steps ``t`` and on: gradients towards ``c [T, B, U]`` and p."""
        steps = g.shape[0]
        saved = self._saved(t, steps)
        assert saved is not None
        adjoints = self._adjoints
        if adjoints is not None:
            begin, end = t * self.scheme.evals, (t + steps) * self.scheme.evals
            rows = (x if x is None else x[begin:end] for x in adjoints)
            adjoints = Adjoints(*rows)  # type: ignore[arg-type]
        result = rollout_backward(
            g.contiguous(),
            lp.contiguous(),
            self.network,
            self.scheme,
            self.plan,
            saved,
            adjoints=adjoints,
            workspace=self._meeting_place(lp.shape[0]),
        )
        if result.sums is not None:
            self._sums = result.sums if self._sums is None else self._sums.add_(result.sums)
        return result.dc, result.lp

    def grads(self, dtype: torch.dtype) -> tuple[list[LayerGrads], Tensor]:
        """Gradients of the hidden layers' and the folded head's parameters, and of ``w_tau``.

        Not that of the first weight. Only after a backward pass with weight gradients over all
        macro steps, of which there may be none.
        """
        assert self._adjoints is not None
        if self._sums is None:
            self._sums = self.network.b2.new_zeros(7, self.network.b2.shape[0])
        dh2, dh2_scale, dq, dq_scale = self._adjoints
        y1, y2 = self._buffers["y1"], self._buffers["y2"]
        assert y1 is not None and y2 is not None
        gamma1, beta1, gamma2, beta2, b2, b13, w_tau = self._sums.to(dtype)
        has_b2, has_b13 = self.has_bias
        layers = [
            LayerGrads(None, None, gamma1, beta1),
            LayerGrads(
                self._weight_grad(dh2, dh2_scale, y1), b2 if has_b2 else None, gamma2, beta2
            ),
            LayerGrads(self._weight_grad(dq, dq_scale, y2), b13 if has_b13 else None, None, None),
        ]
        return layers, w_tau

    def _weight_grad(self, dh: Tensor, scale: Tensor | None, x: Tensor) -> Tensor:
        flat = None if scale is None else scale.flatten()
        return weight_grad(self.kernels, dh.flatten(0, 1), x.flatten(0, 1), flat)
