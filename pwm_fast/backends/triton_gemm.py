"""Fused products in Triton. Imports triton.

Kernels are :mod:`pwm_fast.kernels.linear_norm_act`, ``linear_act_norm``, ``linear_axpby`` and
``policy``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pwm_fast.backends.fused_gemm import FusedBackward, FusedForward, FusedPolicy, FusedUpdate
from pwm_fast.backends.precision import EXACT, Precision
from pwm_fast.backends.specs import LayerParams, LayerSpec
from pwm_fast.kernels import linear_act_norm, linear_axpby, linear_norm_act, policy
from pwm_fast.kernels.gemm_tile import Exchange
from pwm_fast.kernels.plan import (
    GemmPlan,
    GemmShape,
    Limits,
    device_limits,
    device_plan,
    fusion_wanted,
)

_OPERANDS = (torch.float32, torch.float16, torch.bfloat16)


class TritonProducts:
    """See :class:`pwm_fast.backends.fused_gemm.Products`.

    Args:
        precision: of products of float32 operands.
    """

    def __init__(self, precision: Precision = EXACT) -> None:
        self.input_precision = "tf32" if precision.tf32 else "ieee"

    def forward(
        self,
        rows: int,
        n: int,
        k: int,
        operand: torch.dtype,
        device: torch.device,
        *,
        order: str = "norm_act",
        members: int = 0,
    ) -> FusedForward | None:
        """See :class:`pwm_fast.backends.fused_gemm.Products`."""
        if members and order == "norm_act":
            return None
        return self._fused(f"linear_{order}_fwd", rows, n, k, operand, device, members)

    def backward(
        self,
        rows: int,
        n: int,
        k: int,
        operand: torch.dtype,
        device: torch.device,
        *,
        order: str = "norm_act",
        members: int = 0,
    ) -> FusedBackward | None:
        """See :class:`pwm_fast.backends.fused_gemm.Products`."""
        if members and order == "norm_act":
            return None
        return self._fused(f"linear_{order}_bwd", rows, n, k, operand, device, members)

    def update(
        self, rows: int, n: int, k: int, operand: torch.dtype, device: torch.device
    ) -> FusedUpdate | None:
        """See :class:`pwm_fast.backends.fused_gemm.Products`."""
        return self._fused("linear_axpby", rows, n, k, operand, device)

    def policy(
        self,
        specs: Sequence[LayerSpec],
        widths: Sequence[int],
        rows: int,
        operand: torch.dtype | None,
        device: torch.device,
    ) -> FusedPolicy | None:
        """See :class:`pwm_fast.backends.fused_gemm.Products`."""
        *hidden, head = specs
        if operand is None or rows == 0 or not head.plain or not fusion_wanted():
            return None
        if any(spec.order != "act_norm" or not spec.norm for spec in hidden):
            return None
        acts = [spec.act for spec in hidden]
        limits = device_limits(device)[1] if device.type == "cuda" else Limits(1)
        if policy.why_not(widths[:-1], acts, widths[-1], operand, limits.shared) is not None:
            return None
        return _Policy(hidden, policy.rows_of(rows, limits.sms))

    def _fused(
        self,
        kernel: str,
        rows: int,
        n: int,
        k: int,
        operand: torch.dtype,
        device: torch.device,
        members: int = 0,
    ) -> Any:
        """Of :data:`FUSED`, or None; ``rows`` are those of all members."""
        if operand not in _OPERANDS:
            return None
        count = max(members, 1)
        product = GemmShape(
            kernel, rows // count, n, k, count, operand.itemsize, self.input_precision
        )
        plan = device_plan(product, device)
        if plan is None:
            return None
        return FUSED[kernel](plan, rows, device, self.input_precision, members)


class _Fused:
    """One kernel's launches by one plan, that follow one another on one stream.

    Args:
        plan: of the launches.
        rows: of the results, of all members.
        device: of the tensors.
        input_precision: of fp32 operands.
        members: of an ensemble, else 0.
    """

    def __init__(
        self,
        plan: GemmPlan,
        rows: int,
        device: torch.device,
        input_precision: str,
        members: int = 0,
    ) -> None:
        self.plan, self.input_precision = plan, input_precision
        self.exchange = (
            Exchange(plan, rows, linear_norm_act.PLANES, device) if plan.synced else None
        )
        self.blocks = -(-(rows // max(members, 1)) // plan.block_m)


# What they are called with is said by FusedForward and FusedBackward; here is what differs.


class _Forward(_Fused):
    def __call__(
        self,
        x: Tensor,
        weight: Tensor,
        y: Tensor,
        xhat: Tensor | None,
        rstd: Tensor | None,
        *,
        mean: Tensor | None = None,
        **options: Any,
    ) -> None:
        linear_norm_act.linear_norm_act_fwd(
            x,
            weight,
            y,
            xhat,
            rstd,
            plan=self.plan,
            exchange=self.exchange,
            input_precision=self.input_precision,
            **options,
        )


class _Backward(_Fused):
    def __call__(
        self,
        dy: Tensor,
        weight: Tensor,
        dx: Tensor,
        xhat: Tensor,
        rstd: Tensor,
        *,
        mean: Tensor | None = None,
        **options: Any,
    ) -> None:
        linear_norm_act.linear_norm_act_bwd(
            dy,
            weight,
            dx,
            xhat,
            rstd,
            plan=self.plan,
            exchange=self.exchange,
            input_precision=self.input_precision,
            **options,
        )


class _ActNormForward(_Fused):
    def __call__(
        self,
        x: Tensor,
        weight: Tensor,
        y: Tensor,
        xhat: Tensor | None,
        rstd: Tensor | None,
        *,
        group: int,
        width: int,
        mean: Tensor | None = None,
        **options: Any,
    ) -> None:
        linear_act_norm.linear_act_norm_fwd(
            x,
            weight,
            y,
            xhat,
            mean,
            rstd,
            plan=self.plan,
            input_precision=self.input_precision,
            **options,
        )


class _ActNormBackward(_Fused):
    def __call__(
        self,
        dy: Tensor,
        weight: Tensor,
        dx: Tensor,
        xhat: Tensor,
        rstd: Tensor,
        *,
        beta: Tensor,
        width: int,
        mean: Tensor | None = None,
        add: Tensor | None = None,
        add_factor: float = 1.0,
        **options: Any,
    ) -> None:
        assert mean is not None and add is None
        linear_act_norm.linear_act_norm_bwd(
            dy,
            weight,
            dx,
            xhat,
            mean,
            rstd,
            plan=self.plan,
            input_precision=self.input_precision,
            **options,
        )


class _Update(_Fused):
    def __call__(
        self,
        x: Tensor,
        weight: Tensor,
        z: Tensor,
        k1: Tensor | None,
        out: Tensor,
        c1: float,
        c2: float,
        *,
        bias: Tensor | None,
        x_scale: Tensor | None,
        raw: Tensor | None,
        operand: Tensor | None,
    ) -> None:
        linear_axpby.linear_axpby(
            x,
            weight,
            z,
            k1,
            out,
            1.0,
            c1,
            c2,
            plan=self.plan,
            bias=bias,
            x_scale=x_scale,
            raw=raw,
            operand=operand,
            input_precision=self.input_precision,
        )


class _Policy:
    """See :class:`pwm_fast.backends.fused_gemm.FusedPolicy`.

    Args:
        specs: of the hidden layers.
        block_m: rows of a program.
    """

    def __init__(self, specs: Sequence[LayerSpec], block_m: int) -> None:
        self.specs, self.block_m = specs, block_m

    def __call__(
        self,
        h: Tensor,
        params: Sequence[LayerParams],
        weights: Sequence[Tensor | None],
        outputs: Sequence[Tensor],
        kept: Sequence[tuple[Tensor | None, Tensor | None, Tensor | None]],
        **rest: Tensor,
    ) -> None:
        layers = []
        *hidden, head = params
        for i, (spec, p) in enumerate(zip(self.specs, hidden, strict=True)):
            assert p.gamma is not None and p.beta is not None
            norm = p.gamma, p.beta, spec.act, spec.eps
            layers.append(policy.PolicyLayer(weights[i], p.bias, *norm, outputs[i], *kept[i]))
        last = weights[-1]
        assert last is not None
        policy.policy_step(h, layers, last, head.bias, block_m=self.block_m, **rest)


#: What runs a plan, by kernel.
FUSED: dict[str, type[_Fused]] = {
    "linear_norm_act_fwd": _Forward,
    "linear_norm_act_bwd": _Backward,
    "linear_act_norm_fwd": _ActNormForward,
    "linear_act_norm_bwd": _ActNormBackward,
    "linear_axpby": _Update,
}
