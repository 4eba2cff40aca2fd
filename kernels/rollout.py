"""The persistent rollout: whole macro steps of a folded flow in one launch.

For networks of two hidden layers, each Linear, LayerNorm and Mish, under a plain linear head that
is folded into the first layer's weights (:mod:`pwm_fast.fused.rollout`). Each program keeps a
slice of both hidden weights in shared memory for as long as the launch lasts, and the programs of a
group of rows exchange activations through the L2 cache (:mod:`pwm_fast.kernels.rollout_device`).

**Widths.** Tensors of U features are zero-padded to ``Up``, a multiple of 64, and centred: ``p``,
``c``, ``w_tau``, ``w2``, ``b2``, ``w13`` and ``b13`` have mean 0 over the features they lead to. A
LayerNorm sees only what is left of its input without the mean, and so without ever subtracting one

    h1 = p + c + tau w_tau        C h1 = C p + C c + tau C w_tau
    p += dt (w13 m2 + b13)        C p += dt (C w13 m2 + C b13)

for the projection C off the mean: a centred ``p`` stays centred, and normalises to what the plain
one does. Gradients are the centred tensors'; where a weight was centred, its transpose takes
the mean out of what passes through it.

**Precision.** Weights, exchanged activations and gradients, and saved ``xhat`` have the weights'
dtype; pre-activations, ``p``, sums and statistics are float32. fp16 gradients have a power of two a
row.

Source: section 2 (d) of this project's kernel design; Diamos et al. 2016, Persistent RNNs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pwm_fast.kernels.launch import INTERPRETING, check_dense, launch
from pwm_fast.kernels.rollout_backward import rollout_backward_kernel
from pwm_fast.kernels.rollout_device import rollout_forward_kernel
from pwm_fast.kernels.rollout_exchange import Workspace
from pwm_fast.kernels.rollout_plan import (
    LAYOUTS,
    RolloutLayout,
    check_tuned,
    choose_layout,
    tuning_key,
    why_not,
)

__all__ = [
    "LAYOUTS",
    "Backward",
    "Forward",
    "GradBuffers",
    "Network",
    "RolloutLayout",
    "Saved",
    "Scheme",
    "Workspace",
    "check_tuned",
    "choose_layout",
    "rollout_backward",
    "rollout_forward",
    "tuning_key",
    "why_not",
]

#: Polls of a counter before a program gives its rows up as NaN: seconds, where microseconds do.
LIMIT = 2000 if INTERPRETING else 1 << 23

_DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


class Forward(NamedTuple):
    """What :func:`rollout_forward` returns.

    Attributes:
        total: ``[T, B, Up]``: of each macro step, the step-weighted sum of the last hidden layer's
            outputs; the latent grows by ``total W3^T + b3`` (with the weights dt in the sum).
        p: ``[B, Up]`` after the last macro step.
    """

    total: Tensor
    p: Tensor


class Saved(NamedTuple):
    """What the backward pass needs, one row a row of every evaluation, in the order of evaluation.

    Attributes:
        xhat1: ``[T E, B, Up]``, compute dtype.
        rstd1: ``[T E, B]`` float32.
        xhat2: as ``xhat1``.
        rstd2: as ``rstd1``.
        y1: the first layer's outputs, as ``xhat1``, for gradients of weights; or None.
        y2: the second's, float32.
    """

    xhat1: Tensor
    rstd1: Tensor
    xhat2: Tensor
    rstd2: Tensor
    y1: Tensor | None = None
    y2: Tensor | None = None


class GradBuffers(NamedTuple):
    """What gradients of the weights are made of.

    Attributes:
        dh2: ``[T E, B, Up]`` compute dtype, towards the second layer's pre-activation.
        dh2_scale: ``[T E, B]``: row scales of ``dh2``; None unless it is fp16.
        dq: likewise towards ``w13 m2 + b13``.
        dq_scale: likewise.
    """

    dh2: Tensor
    dh2_scale: Tensor | None
    dq: Tensor
    dq_scale: Tensor | None


class Backward(NamedTuple):
    """What :func:`rollout_backward` returns.

    Attributes:
        dc: ``[T, B, Up]``.
        lp: ``[B, Up]``, towards the ``p`` that the rollout began with.
        sums: ``[7, Up]`` float64, if asked for: gradients of the first layer's gamma and beta, of
            the second's, of ``b2``, of ``b13``, and of ``w_tau``.
    """

    dc: Tensor
    lp: Tensor
    sums: Tensor | None


class Network(NamedTuple):
    """The folded network's tensors, centred and padded; all but the weights are ``[Up]`` float32.

    Attributes:
        w_tau: what flow time is multiplied with; zeros where there is none.
        w2: ``[Up, Up]``, second layer.
        b2: its bias.
        w13: ``[Up, Up]``, from the second layer's output to the change of ``p``.
        b13: its bias.
        gamma1: of the first LayerNorm, 0 on the padding.
        beta1: likewise.
        gamma2: of the second.
        beta2: likewise.
    """

    w_tau: Tensor
    w2: Tensor
    b2: Tensor
    w13: Tensor
    b13: Tensor
    gamma1: Tensor
    beta1: Tensor
    gamma2: Tensor
    beta2: Tensor


class Scheme(NamedTuple):
    """The integration and LayerNorm.

    Attributes:
        method: ``"heun"`` or ``"euler"``.
        substeps: K.
        width: U, features of the first hidden layer without padding.
        eps1: of the first LayerNorm.
        eps2: of the second.
        tf32: float32 weights are multiplied in tf32.
        width2: features of the second hidden layer, if it has others.
    """

    method: str
    substeps: int
    width: int
    eps1: float = 1e-5
    eps2: float = 1e-5
    tf32: bool = True
    width2: int | None = None

    @property
    def evals(self) -> int:
        """Evaluations of a macro step."""
        return self.substeps * (2 if self.method == "heun" else 1)


# --- launches -----------------------------------------------------------------------------------


def rollout_forward(
    p: Tensor,
    c: Tensor,
    network: Network,
    scheme: Scheme,
    plan: RolloutLayout,
    *,
    saved: Saved | None = None,
    total: Tensor | None = None,
    workspace: Workspace | None = None,
) -> Forward:
    """T macro steps from ``p`` under hoisted terms ``c``.

    Args:
        p: ``[B, Up]`` float32, the first layer's GEMM with the latent.
        c: ``[T, B, Up]`` float32: the rest of its pre-activation but for flow time.
        network: tensors of the folded network.
        scheme: what a macro step does.
        plan: layout, of :func:`choose_layout`.
        saved: buffers to fill for a backward pass; with ``y1`` and ``y2`` one for weights too.
        total: ``[T, B, Up]`` float32, or rounded to the weights' dtype, written and returned; None
            for a new one in float32.
        workspace: what the programs exchange through; None for a new one.

    Raises:
        ValueError: shapes, dtypes or the plan do not fit.
    """
    steps, batch, padded = _check(p, c, "c", network, scheme, plan)
    p_out = torch.empty_like(p)
    if total is None:
        total = torch.empty_like(c)
    compute = network.w2.dtype
    rounded = total.dtype == compute
    _buffer("total", total, c.shape, compute if rounded else torch.float32, p)
    work = _workspace(workspace, plan, batch, padded, compute, p.device)
    keep = saved is not None and saved.y1 is not None
    if saved is not None:
        _check_saved(saved, steps * scheme.evals, batch, padded, compute)
    none = p  # stands for what the constants of the launch leave unused
    kept = Saved(none, none, none, none) if saved is None else saved
    launch(
        rollout_forward_kernel,
        (work.programs,),
        p,
        c,
        network.w_tau,
        network.w2,
        network.b2,
        network.w13,
        network.b13,
        network.gamma1,
        network.beta1,
        network.gamma2,
        network.beta2,
        total,
        p_out,
        kept.xhat1,
        kept.rstd1,
        kept.xhat2,
        kept.rstd2,
        kept.y1 if kept.y1 is not None else none,
        kept.y2 if kept.y2 is not None else none,
        *work.tensors,
        batch,
        steps,
        scheme.evals,
        scheme.substeps,
        *network.w2.stride(),
        *network.w13.stride(),
        work.begin(4 * steps * scheme.evals),
        LIMIT,
        float(scheme.width),
        float(scheme.width2 or scheme.width),
        scheme.eps1,
        scheme.eps2,
        1.0 / scheme.substeps,
        0.0,
        **constants_of(padded, plan, compute, scheme),
        SAVE=saved is not None,
        KEEP=keep,
        **options_of(plan),
    )
    return Forward(total, p_out)


def rollout_backward(
    g: Tensor,
    lp: Tensor,
    network: Network,
    scheme: Scheme,
    plan: RolloutLayout,
    saved: Saved,
    *,
    grads: GradBuffers | None = None,
    workspace: Workspace | None = None,
) -> Backward:
    """Backward pass of :func:`rollout_forward`.

    Args:
        g: ``[T, B, Up]`` float32: gradients towards ``total``.
        lp: ``[B, Up]`` float32: gradient towards the ``p`` after the last macro step.
        network: tensors of the folded network, as in the forward pass.
        scheme: what a macro step does.
        plan: layout, of :func:`choose_layout`.
        saved: filled by the forward pass.
        grads: buffers to fill for gradients of the weights; the sums are formed with them.
        workspace: what the programs exchange through; None for a new one.

    Raises:
        ValueError: shapes, dtypes or the plan do not fit.
    """
    steps, batch, padded = _check(lp, g, "g", network, scheme, plan)
    compute = network.w2.dtype
    evals = steps * scheme.evals
    _check_saved(saved, evals, batch, padded, compute)
    scaled = compute == torch.float16
    if grads is not None:
        _check_grads(grads, evals, batch, padded, compute)
    dc, lp_out = torch.empty_like(g), torch.empty_like(lp)
    work = _workspace(workspace, plan, batch, padded, compute, lp.device)
    sums = lp.new_empty(work.groups, 7, padded) if grads is not None else lp
    none = lp
    kept = GradBuffers(none, none, none, none) if grads is None else grads
    w2, w13 = network.w2.t(), network.w13.t()
    launch(
        rollout_backward_kernel,
        (work.programs,),
        g,
        lp,
        w2,
        w13,
        network.gamma1,
        network.beta1,
        network.gamma2,
        network.beta2,
        saved.xhat1,
        saved.rstd1,
        saved.xhat2,
        saved.rstd2,
        dc,
        lp_out,
        kept.dh2,
        kept.dh2_scale if kept.dh2_scale is not None else none,
        kept.dq,
        kept.dq_scale if kept.dq_scale is not None else none,
        sums,
        *work.tensors,
        batch,
        steps,
        scheme.evals,
        scheme.substeps,
        *w2.stride(),
        *w13.stride(),
        work.begin(1 + 4 * evals),
        LIMIT,
        float(scheme.width),
        float(scheme.width2 or scheme.width),
        1.0 / scheme.substeps,
        0.0,
        **constants_of(padded, plan, compute, scheme),
        KEEP=grads is not None,
        SCALED=scaled,
        **options_of(plan),
    )
    if grads is None:
        return Backward(dc, lp_out, None)
    return Backward(dc, lp_out, sums.sum(0, dtype=torch.float64))


def _workspace(
    given: Workspace | None,
    plan: RolloutLayout,
    batch: int,
    padded: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Workspace:
    if given is None:
        return Workspace(plan, batch, padded, dtype, device)
    if given.fits != (plan, batch, padded, dtype):
        raise ValueError(
            f"workspace must be for {(plan, batch, padded, dtype)}, it is for {given.fits}"
        )
    return given


def constants_of(
    padded: int, plan: RolloutLayout, compute: torch.dtype, scheme: Scheme
) -> dict[str, Any]:
    """What both kernels are compiled for."""
    return {
        "UP": padded,
        "KP": triton.next_power_of_2(padded),
        "BM": plan.bm,
        "BN": plan.bn,
        "DTYPE": _DTYPES[compute],
        # Of no account to 16-bit operands, so that it makes no second variant of them.
        "PRECISION": "tf32" if scheme.tf32 or compute.itemsize == 2 else "ieee",
        "CHUNKS": plan.chunks,
        "FLIP": plan.bm > 8,
        "WORDS": plan.exchange == "words",
        "WARPS": plan.warps,
        "HEUN": scheme.method == "heun",
    }


def options_of(plan: RolloutLayout) -> dict[str, Any]:
    """How both kernels are compiled and launched."""
    # No pipelining: see the device code. Programs wait for each other: all must be resident.
    return {
        "num_warps": plan.warps,
        "num_stages": 1,
        "maxnreg": 255,  # or ptxas spills to stay within 128, for a second program that never comes
        "launch_cooperative_grid": True,
    }


# --- checks -------------------------------------------------------------------------------------


def _check(
    p: Tensor, c: Tensor, name: str, network: Network, scheme: Scheme, plan: RolloutLayout
) -> tuple[int, int, int]:
    if c.dim() != 3 or p.dim() != 2 or c.shape[1:] != p.shape:
        raise ValueError(
            f"{name} must be [T, B, Up] and p [B, Up], got {list(c.shape)} and {list(p.shape)}"
        )
    steps, batch, padded = c.shape
    if scheme.method not in ("heun", "euler") or scheme.substeps < 1:
        raise ValueError(
            f"scheme must be heun or euler with at least 1 substep, got {scheme.method!r} with "
            f"{scheme.substeps}"
        )
    for name_of, width in (("width", scheme.width), ("width2", scheme.width2 or scheme.width)):
        if not 0 < width <= padded:
            raise ValueError(f"scheme.{name_of} must be in 1 to {padded}, got {width}")
    if batch < 1 or steps < 1:
        raise ValueError(f"{name} must hold at least one row and macro step, got {list(c.shape)}")
    if padded % plan.bn:
        raise ValueError(f"width {padded} must be a multiple of the plan's {plan.bn} features")
    for field, x in zip(Network._fields, network, strict=True):
        weight = field in ("w2", "w13")
        shape = (padded, padded) if weight else (padded,)
        dtype = network.w2.dtype if weight else torch.float32
        if x.shape != shape or x.dtype != dtype or x.device != p.device:
            raise ValueError(
                f"{field} must be {list(shape)} {dtype} on {p.device}, got {list(x.shape)} "
                f"{x.dtype} on {x.device}"
            )
        if not weight and not x.is_contiguous():
            raise ValueError(f"{field} must be contiguous, got stride {x.stride()}")
    if network.w2.dtype not in _DTYPES:
        raise ValueError(f"w2 must be float16, bfloat16 or float32, got {network.w2.dtype}")
    _buffer("p", p, p.shape, torch.float32, p)
    _buffer(name, c, c.shape, torch.float32, p)
    return steps, batch, padded


def _check_saved(saved: Saved, evals: int, batch: int, padded: int, compute: torch.dtype) -> None:
    like = saved.xhat1
    for field, x in zip(Saved._fields, saved, strict=True):
        if x is None:
            continue
        if field.startswith("rstd"):
            _buffer(field, x, (evals, batch), torch.float32, like)
        else:
            dtype = torch.float32 if field == "y2" else compute
            _buffer(field, x, (evals, batch, padded), dtype, like)
    if (saved.y1 is None) != (saved.y2 is None):
        raise ValueError("y1 and y2 must both be given, or neither")


def _check_grads(
    grads: GradBuffers, evals: int, batch: int, padded: int, compute: torch.dtype
) -> None:
    scaled = compute == torch.float16
    for field, x in zip(GradBuffers._fields, grads, strict=True):
        if x is None:
            if scaled or not field.endswith("scale"):
                raise ValueError(f"{field} must be given for weights in {compute}")
        elif field.endswith("scale"):
            _buffer(field, x, (evals, batch), torch.float32, grads.dh2)
        else:
            _buffer(field, x, (evals, batch, padded), compute, grads.dh2)


def _buffer(name: str, x: Tensor, shape: tuple[int, ...], dtype: torch.dtype, like: Tensor) -> None:
    check_dense(name, x, shape, dtype)
    if x.device != like.device:
        raise ValueError(f"{name} must be on {like.device}, got {x.device}")
