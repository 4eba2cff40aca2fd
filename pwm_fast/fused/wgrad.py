"""Gradients of weights: GEMMs over all rows of all evaluations."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pwm_fast.backends.base import Kernels
from pwm_fast.fused.gemm import ALIGNED, fp32_mode, mm_fp32

THIN = 16  # columns of a side that MKL sums row after row
_RUN, _FEW = 32, 1024  # rows of a short sum; up to how many rows a sum is cut
_SUMMED = 16  # rows that are summed in float32


def weight_grad(
    kernels: Kernels,
    dh: Tensor,
    x: Tensor,
    scale: Tensor | None = None,
    largest: Tensor | None = None,
    *,
    several: bool = True,
) -> Tensor:
    """``dh^T x``: ``[R, N]`` and ``[R, K]`` to ``[N, K]``, or each of an ensemble ``[E, R, .]``.

    On a CPU the GEMM is fp32 in every precision. Where one of the sides has few columns, MKL sums
    all rows one after another and the error grows with their number (5 times that of step-by-step
    gradients at 600 rows and width 7): such a GEMM, cheap as it is, is done in float64. A few
    rows of each of several steps are likewise added up in short runs: one long sum errs more than
    the step-by-step gradients that it stands for.

    Args:
        kernels: elementwise kernels, which say the precision.
        dh: gradients towards the layer's pre-activations.
        x: the layer's inputs.
        scale: row scales of ``dh``, or None.
        largest: the largest of them; None to look for it.
        several: the rows are of several steps; those of one are one sum, as its gradient is.
    """
    if takes_16bit(kernels, dh):
        return weight_grad_16bit(kernels, dh, x, scale, largest)
    if scale is not None:
        dh = dh.float() * scale.unsqueeze(-1)
    dtype = torch.promote_types(dh.dtype, torch.float32)
    dh, x = dh.to(dtype), x.to(dtype)
    mm = torch.bmm if dh.dim() == 3 else torch.mm
    if min(dh.shape[-1], x.shape[-1]) < THIN:
        return mm(dh.double().transpose(-1, -2), x.double()).to(dtype)
    if dh.is_cuda:
        with fp32_mode(kernels.precision.tf32, dh):
            return mm(dh.transpose(-1, -2), x)
    rows = dh.shape[-2]
    if dh.dim() == 2 and several and _RUN < rows <= _FEW:
        total = torch.mm(dh[:_RUN].t(), x[:_RUN])
        for start in range(_RUN, rows, _RUN):
            total.addmm_(dh[start : start + _RUN].t(), x[start : start + _RUN])
        return total
    return mm(dh.transpose(-1, -2), x)


def sum_rows(x: Tensor, out: Tensor) -> None:
    """Sums ``[.., N]`` in float64 over the rows of ``[.., R, N]``.

    On a CPU torch would convert all of ``x`` first, which takes six times as long: runs of 16 rows
    are summed in their own dtype, and these sums in float64.
    """
    rows = x.shape[-2]
    whole = rows - rows % _SUMMED
    if x.is_cpu and x.dtype == torch.float32 and whole > _SUMMED:
        runs = x[..., :whole, :].unflatten(-2, (-1, _SUMMED)).sum(-2)
        torch.sum(runs, -2, dtype=torch.float64, out=out)
        if rows > whole:
            out += x[..., whole:, :].sum(-2, dtype=torch.float64)
        return
    torch.sum(x, -2, dtype=torch.float64, out=out)


def takes_16bit(kernels: Kernels, dh: Tensor) -> bool:
    """Whether weight gradients take 16-bit operands: on a GPU, not where a CPU emulates them."""
    return kernels.precision.compute is not None and (dh.is_cuda or kernels.wgrad_16bit)


def grad_to_16bit(
    kernels: Kernels, dh: Tensor, scale: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Gradients in the 16-bit compute dtype, and their row scales."""
    compute = kernels.precision.compute
    if compute is None or dh.dtype == compute:
        return dh, scale
    rounded = torch.empty(dh.shape, dtype=compute, device=dh.device)
    scale = dh.new_empty(dh.shape[:-1]) if kernels.precision.scaled else None
    rows = None if scale is None else scale.flatten()
    kernels.cast(dh.flatten(0, -2), rounded.flatten(0, -2), rows)
    return rounded, scale


def side_by_side(inputs: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """Room for inputs ``[..., K_i]`` as one ``[..., K]``, rows aligned, and the part of each."""
    first = inputs[0]
    widths = [x.shape[-1] for x in inputs]
    width = sum(widths)
    whole = torch.empty(
        (*first.shape[:-1], -(-width // ALIGNED) * ALIGNED), dtype=dtype, device=first.device
    )[..., :width]
    return whole, list(whole.split(widths, -1))


def weight_grad_16bit(
    kernels: Kernels,
    dh: Tensor,
    x: Tensor | Sequence[Tensor],
    scale: Tensor | None = None,
    largest: Tensor | None = None,
) -> Tensor:
    """The GEMM of 16-bit operands; one scale for all rows can leave its sum, row scales cannot.

    ``sum_r s_r dh_r x_r = s sum_r dh_r ((s_r / s) x_r)`` with ``s`` the largest: an exact power of
    two for each row, and what underflows is below the rounding of the largest. ``x`` may be several
    inputs, side by side. ``largest`` is ``s`` where ``scale`` is given and it is known already.
    """
    dh, scale = grad_to_16bit(kernels, dh, scale)
    inputs = [x] if isinstance(x, Tensor) else list(x)
    if scale is not None and largest is None:
        largest = scale.amax() if scale.numel() else scale.new_ones(())
    if largest is None and len(inputs) == 1 and inputs[0].dtype == dh.dtype:
        whole = inputs[0]
    else:
        whole, parts = side_by_side(inputs, dh.dtype)
        for each, out in zip(inputs, parts, strict=True):
            _scaled_rows(kernels, each, out, scale, largest)
    total = mm_fp32(dh.transpose(-1, -2), whole)
    return total if largest is None else total.mul_(largest)


def _scaled_rows(
    kernels: Kernels, x: Tensor, out: Tensor, scale: Tensor | None, largest: Tensor | None
) -> None:
    """``out``: ``x`` in its dtype, its rows times ``scale / largest`` where these are given."""
    run = kernels.scaled_rows
    if scale is None or largest is None:
        out.copy_(x)
    elif run is None:
        out.copy_(x * (scale / largest).unsqueeze(-1))
    else:
        shared = x.dim() == 3 and x.stride(0) == 0  # by the members of an ensemble
        rows = x[0] if shared else x.flatten(0, -2)
        rows = rows if rows.stride(-1) == 1 else rows.contiguous()
        run(rows, out.flatten(0, -2), scale.flatten(), largest)
