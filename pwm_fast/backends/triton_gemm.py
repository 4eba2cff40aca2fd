"""Fused GEMMs in Triton. Imports triton.

Kernels are :mod:`pwm_fast.kernels.linear_norm_act`, ``linear_act_norm``, ``linear_axpby`` and
``policy``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pwm_fast.backends.fused_gemm import (
    FusedBackward,
    FusedForward,
    FusedGemmAxpby,
    FusedPolicy,
    GemmCall,
)
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


class TritonGemms:
    """See :class:`pwm_fast.backends.fused_gemm.FusedGemms`.

    Args:
        precision: of GEMMs of float32 operands.
    """

    def __init__(self, precision: Precision = EXACT) -> None:
        self.input_precision = "tf32" if precision.tf32 else "ieee"

    def forward(self, shape: GemmCall, order: str) -> FusedForward | None:
        """See :class:`pwm_fast.backends.fused_gemm.FusedGemms`."""
        if shape.members and order == "norm_act":
            return None
        return self._fused(f"linear_{order}_fwd", shape)

    def backward(self, shape: GemmCall, order: str) -> FusedBackward | None:
        """See :class:`pwm_fast.backends.fused_gemm.FusedGemms`."""
        if shape.members and order == "norm_act":
            return None
        return self._fused(f"linear_{order}_bwd", shape)

    def gemm_axpby(self, shape: GemmCall) -> FusedGemmAxpby | None:
        """See :class:`pwm_fast.backends.fused_gemm.FusedGemms`."""
        return self._fused("linear_axpby", shape)

    def policy(
        self,
        specs: Sequence[LayerSpec],
        widths: Sequence[int],
        rows: int,
        compute: torch.dtype | None,
        device: torch.device,
    ) -> FusedPolicy | None:
        """See :class:`pwm_fast.backends.fused_gemm.FusedGemms`."""
        *hidden, head = specs
        if compute is None or rows == 0 or not head.plain or not fusion_wanted():
            return None
        if any(spec.order != "act_norm" or not spec.norm for spec in hidden):
            return None
        acts = [spec.act for spec in hidden]
        limits = device_limits(device)[1] if device.type == "cuda" else Limits(1)
        if policy.why_not(widths[:-1], acts, widths[-1], compute, limits.shared) is not None:
            return None
        return _Policy(hidden, policy.rows_of(rows, limits.sms))

    def _fused(self, kernel: str, shape: GemmCall) -> Any:
        """Of :data:`FUSED`, or None."""
        if shape.dtype not in _OPERANDS:
            return None
        rows, n, k, dtype, device, members = shape
        count, precision = max(members, 1), self.input_precision
        gemm = GemmShape(kernel, rows // count, n, k, count, dtype.itemsize, precision)
        plan = device_plan(gemm, device)
        if plan is None:
            return None
        return FUSED[kernel](plan, rows, device, precision, members)


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
        self.plan, self.precision = plan, {"input_precision": input_precision}
        self.exchange = (
            Exchange(plan, rows, linear_norm_act.PLANES, device) if plan.synced else None
        )
        self.blocks = -(-(rows // max(members, 1)) // plan.block_m)


# Their calls are declared in FusedForward, FusedBackward and FusedGemmAxpby; the kernels' own
# functions take the same arguments but for what is said here.


class _NormActForward(_Fused):
    def __call__(self, *tensors: Any, mean: None = None, **options: Any) -> None:
        launch: Callable[..., None] = linear_norm_act.linear_norm_act_fwd
        launch(*tensors, **options, plan=self.plan, exchange=self.exchange, **self.precision)


class _NormActBackward(_Fused):
    def __call__(self, *tensors: Any, mean: None = None, **options: Any) -> None:
        launch: Callable[..., None] = linear_norm_act.linear_norm_act_bwd
        launch(*tensors, **options, plan=self.plan, exchange=self.exchange, **self.precision)


class _ActNormForward(_Fused):
    def __call__(
        self, *tensors: Any, mean: Tensor | None = None, group: int, width: int, **options: Any
    ) -> None:
        *others, rstd = tensors
        launch: Callable[..., None] = linear_act_norm.linear_act_norm_fwd
        launch(*others, mean, rstd, **options, plan=self.plan, **self.precision)


class _ActNormBackward(_Fused):
    def __call__(
        self,
        *tensors: Any,
        mean: Tensor | None = None,
        beta: Tensor,
        width: int,
        add: None = None,
        add_factor: float = 1.0,
        **options: Any,
    ) -> None:
        assert mean is not None and add is None
        *others, rstd = tensors
        launch: Callable[..., None] = linear_act_norm.linear_act_norm_bwd
        launch(*others, mean, rstd, **options, plan=self.plan, **self.precision)


class _GemmAxpby(_Fused):
    def __call__(self, *arguments: Any, **options: Any) -> None:
        *tensors, c1, c2 = arguments
        launch: Callable[..., None] = linear_axpby.linear_axpby
        launch(*tensors, 1.0, c1, c2, **options, plan=self.plan, **self.precision)


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
    "linear_norm_act_fwd": _NormActForward,
    "linear_norm_act_bwd": _NormActBackward,
    "linear_act_norm_fwd": _ActNormForward,
    "linear_act_norm_bwd": _ActNormBackward,
    "linear_axpby": _GemmAxpby,
}
