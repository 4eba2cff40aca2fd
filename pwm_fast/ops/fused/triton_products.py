"""Fused products in Triton. Imports triton.

Kernels are :mod:`pwm_fast.kernels.linear_norm_act`, ``linear_act_norm`` and ``linear_axpby``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pwm_fast.kernels import linear_act_norm, linear_axpby, linear_norm_act
from pwm_fast.kernels.plan import Exchange, Plan, Product, device_plan
from pwm_fast.ops.fused.precision import EXACT, Precision
from pwm_fast.ops.fused.products import FusedBackward, FusedForward, FusedUpdate

_OPERANDS = (torch.float32, torch.float16, torch.bfloat16)


class TritonProducts:
    """See :class:`pwm_fast.ops.fused.products.Products`.

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
        """See :class:`pwm_fast.ops.fused.products.Products`."""
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
        """See :class:`pwm_fast.ops.fused.products.Products`."""
        if members and order == "norm_act":
            return None
        return self._fused(f"linear_{order}_bwd", rows, n, k, operand, device, members)

    def update(
        self, rows: int, n: int, k: int, operand: torch.dtype, device: torch.device
    ) -> FusedUpdate | None:
        """See :class:`pwm_fast.ops.fused.products.Products`."""
        return self._fused("linear_axpby", rows, n, k, operand, device)

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
        product = Product(
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
        plan: Plan,
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


#: What runs a plan, by kernel.
FUSED: dict[str, type[_Fused]] = {
    "linear_norm_act_fwd": _Forward,
    "linear_norm_act_bwd": _Backward,
    "linear_act_norm_fwd": _ActNormForward,
    "linear_act_norm_bwd": _ActNormBackward,
    "linear_axpby": _Update,
}
