"""The persistent rollout: whole macro steps of a folded flow in one launch.

For networks of two hidden layers, each Linear, LayerNorm and Mish, under a plain linear head that
is folded into the first layer's weights (:mod:`pwm_fast.ops.fused.rollout`). Each program keeps a
slice of both hidden weights in shared memory for as long as the launch lasts, and the programs of a
group of rows exchange activations through the L2 cache (:mod:`pwm_fast.kernels.rollout_device`).

**Widths.** Tensors of U features are zero-padded to ``Up``, a multiple of 64, and centred: ``p``,
``c``, ``w_tau``, ``w2``, ``b2``, ``w13`` and ``b13`` have mean 0 over the features they lead to. A
LayerNorm sees only what is left of its input without the mean, and so without ever subtracting one

    h1 = p + c + tau w_tau        C h1 = C p + C c + tau C w_tau
    p += dt (w13 m2 + b13)        C p += dt (C w13 m2 + C b13)

for the projection C off the mean: a centred ``p`` stays centred, and normalises to what the plain
one does. Adjoints are those of the centred tensors; where a weight was centred, its transpose takes
the mean out of what passes through it.

**Precision.** Weights, exchanged activations and adjoints, and saved ``xhat`` have the weights'
dtype; pre-activations, ``p``, sums and statistics are float32. fp16 adjoints have a power of two a
row.

Source: section 2 (d) of this project's kernel design; Diamos et al. 2016, Persistent RNNs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pwm_fast.kernels import rollout_device as device
from pwm_fast.kernels.aot import Case, signature
from pwm_fast.kernels.launch import INTERPRETING, launch

#: Polls of a counter before a program gives its rows up as NaN: seconds, where microseconds do.
LIMIT = 2000 if INTERPRETING else 1 << 23

_DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
_COUNTER = 32  # int32s from one group's counter to the next: a cache line each


class Plan(NamedTuple):
    """How a rollout is laid out on a device.

    Attributes:
        bm: rows of a group.
        bn: features of a program.
        warps: of a program.
        chunks: independent parts of a product's sum.
    """

    bm: int
    bn: int
    warps: int
    chunks: int


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
        xhat1: ``[T E, B, Up]``, operand dtype.
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


class Adjoints(NamedTuple):
    """What gradients of the weights are made of.

    Attributes:
        dh2: ``[T E, B, Up]`` operand dtype, towards the second layer's pre-activation.
        dh2_scale: ``[T E, B]``: factors of the rows of ``dh2``; None unless it is fp16.
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


# --- layout -------------------------------------------------------------------------------------


def shared_bytes(plan: Plan, padded: int, size: int) -> int:
    """Shared memory of a program: two slices of weights, one operand, a tile in another layout."""
    span = triton.next_power_of_2(padded)
    return (2 * plan.bn + plan.bm) * span * size + 8 * plan.bm * plan.bn


# In the order of preference: few rows a program before few features, because the exchanged bytes
# grow with the rows of all programs of a group.
_LAYOUTS = (Plan(8, 64, 8, 4), Plan(16, 64, 8, 4), Plan(32, 64, 8, 2))
_NARROW_LAYOUTS = (Plan(8, 32, 8, 4), Plan(16, 32, 8, 4), Plan(32, 32, 8, 2))
LAYOUTS = (*_LAYOUTS, *_NARROW_LAYOUTS)


def why_not(plan: Plan, batch: int, padded: int, size: int, sms: int, shared: int) -> str | None:
    """Why a layout does not fit a device of so many multiprocessors and bytes of shared memory."""
    if padded % plan.bn:
        return f"width {padded} is no multiple of {plan.bn}"
    programs = -(-batch // plan.bm) * (padded // plan.bn)
    if programs > sms:
        return (
            f"{batch} rows of {padded} features take {programs} programs ({plan.bm} rows x "
            f"{plan.bn} features each), which must run at once on {sms} multiprocessors"
        )
    if size == 4 and plan.bm > 16:
        return f"{plan.bm} rows of float32 operands a program spill 300 bytes a thread"
    need = shared_bytes(plan, padded, size)
    if need > shared:
        return (
            f"two slices of {plan.bn} x {padded} weights take {need} bytes of shared memory, the "
            f"device has {shared}"
        )
    return None


def tuning_key(batch: int, padded: int, dtype: torch.dtype) -> str:
    """Under what a tuned file keeps the layout of these sizes, for kernel ``"rollout"``."""
    return f"{str(dtype).removeprefix('torch.')} B{batch} U{padded}"


def check_tuned(key: str, entry: Mapping[str, int], sms: int, shared: int) -> None:
    """Raise ValueError where a tuned layout does not fit the sizes of its key, or the device."""
    dtype, batch, padded = key.split()
    operand = getattr(torch, dtype)
    _tuned_plan(entry, int(batch[1:]), int(padded[1:]), operand, sms, shared)


def plan(
    batch: int,
    padded: int,
    dtype: torch.dtype,
    sms: int,
    shared: int,
    tuned: Mapping[str, Mapping[str, int]] | None = None,
) -> Plan | str:
    """The layout for B rows of Up features, or why there is none.

    Args:
        batch: B.
        padded: Up.
        dtype: of the weights.
        sms: multiprocessors; every program needs one of its own, as they wait for each other.
        shared: bytes of shared memory that a program may have.
        tuned: layouts measured on the GPU, by :func:`tuning_key`: the fields of a :class:`Plan`,
            or ``{"bm": 0}`` where layer by layer was faster.

    Raises:
        ValueError: a tuned layout is none, or does not fit.
    """
    if batch < 1:
        return "there are no rows"
    entry = (tuned or {}).get(tuning_key(batch, padded, dtype))
    if entry is not None and not INTERPRETING:
        return _tuned_plan(entry, batch, padded, dtype, sms, shared)
    if INTERPRETING:  # programs run one after another: one a group
        if triton.next_power_of_2(padded) != padded:
            return f"Triton's interpreter needs a power of two for a width, got {padded}"
        return Plan(8 if batch < 16 else 16, padded, 4, 2)
    found = {p: why_not(p, batch, padded, dtype.itemsize, sms, shared) for p in LAYOUTS}
    fitting = (p for p, reason in found.items() if reason is None)
    return next(fitting, str(found[LAYOUTS[0]]))


def _tuned_plan(
    entry: Mapping[str, int], batch: int, padded: int, dtype: torch.dtype, sms: int, shared: int
) -> Plan | str:
    if dict(entry) == {"bm": 0}:
        return "layer by layer was measured to be faster"
    if set(entry) != set(Plan._fields):
        raise ValueError(f"a tuned rollout has {', '.join(Plan._fields)}, got {dict(entry)}")
    layout = Plan(**entry)
    if layout not in LAYOUTS:
        known = ", ".join(str(tuple(p)) for p in LAYOUTS)
        raise ValueError(f"a tuned rollout must be one of {known}, got {tuple(layout)}")
    wrong = why_not(layout, batch, padded, dtype.itemsize, sms, shared)
    if wrong is not None:
        raise ValueError(f"the tuned rollout {layout} does not fit: {wrong}")
    return layout


# --- launches -----------------------------------------------------------------------------------


def rollout_forward(
    p: Tensor,
    c: Tensor,
    network: Network,
    scheme: Scheme,
    plan: Plan,
    *,
    saved: Saved | None = None,
    total: Tensor | None = None,
    counters: Tensor | None = None,
) -> Forward:
    """T macro steps from ``p`` under hoisted terms ``c``.

    Args:
        p: ``[B, Up]`` float32, the first layer's product with the latent.
        c: ``[T, B, Up]`` float32: the rest of its pre-activation but for flow time.
        network: tensors of the folded network.
        scheme: what a macro step does.
        plan: layout, of :func:`plan`.
        saved: buffers to fill for a backward pass; with ``y1`` and ``y2`` one for weights too.
        total: ``[T, B, Up]`` float32, or rounded to the weights' dtype, written and returned; None
            for a new one in float32.
        counters: of this launch, one of :func:`counters`; None for new ones.

    Raises:
        ValueError: shapes, dtypes or the plan do not fit.
    """
    steps, batch, padded = _check(p, c, "c", network, scheme, plan)
    p_out = torch.empty_like(p)
    if total is None:
        total = torch.empty_like(c)
    operand = network.w2.dtype
    narrow = total.dtype == operand
    _buffer("total", total, c.shape, operand if narrow else torch.float32, p)
    work = _Workspace(plan, p, padded, operand, 1, counters)
    keep = saved is not None and saved.y1 is not None
    if saved is not None:
        _check_saved(saved, steps * scheme.evals, batch, padded, operand)
    none = p  # stands for what the constants of the launch leave unused
    kept = Saved(none, none, none, none) if saved is None else saved
    launch(
        device.rollout_forward_kernel,
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
        LIMIT,
        float(scheme.width),
        float(scheme.width2 or scheme.width),
        scheme.eps1,
        scheme.eps2,
        1.0 / scheme.substeps,
        0.0,
        **_constants(padded, plan, operand, scheme),
        SAVE=saved is not None,
        KEEP=keep,
        **_options(plan),
    )
    return Forward(total, p_out)


def rollout_backward(
    g: Tensor,
    lp: Tensor,
    network: Network,
    scheme: Scheme,
    plan: Plan,
    saved: Saved,
    *,
    adjoints: Adjoints | None = None,
    counters: Tensor | None = None,
) -> Backward:
    """Adjoint of :func:`rollout_forward`.

    Args:
        g: ``[T, B, Up]`` float32: gradients towards ``total``.
        lp: ``[B, Up]`` float32: gradient towards the ``p`` after the last macro step.
        network: tensors of the folded network, as in the forward pass.
        scheme: what a macro step does.
        plan: layout, of :func:`plan`.
        saved: filled by the forward pass.
        adjoints: buffers to fill for gradients of the weights; the sums are formed with them.
        counters: of this launch, one of :func:`counters`; None for new ones.

    Raises:
        ValueError: shapes, dtypes or the plan do not fit.
    """
    steps, batch, padded = _check(lp, g, "g", network, scheme, plan)
    operand = network.w2.dtype
    evals = steps * scheme.evals
    _check_saved(saved, evals, batch, padded, operand)
    scaled = operand == torch.float16
    if adjoints is not None:
        _check_adjoints(adjoints, evals, batch, padded, operand)
    dc, lp_out = torch.empty_like(g), torch.empty_like(lp)
    work = _Workspace(plan, lp, padded, operand, 3, counters)
    sums = lp.new_empty(work.groups, 7, padded) if adjoints is not None else lp
    none = lp
    kept = Adjoints(none, none, none, none) if adjoints is None else adjoints
    w2, w13 = network.w2.t(), network.w13.t()
    launch(
        device.rollout_backward_kernel,
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
        LIMIT,
        float(scheme.width),
        float(scheme.width2 or scheme.width),
        1.0 / scheme.substeps,
        0.0,
        **_constants(padded, plan, operand, scheme),
        KEEP=adjoints is not None,
        SCALED=scaled,
        **_options(plan),
    )
    if adjoints is None:
        return Backward(dc, lp_out, None)
    return Backward(dc, lp_out, sums.sum(0, dtype=torch.float64))


def counters(plan: Plan, batch: int, launches: int, device: torch.device) -> Tensor:
    """What the programs of several launches meet at, ``[launches, ...]``: zeros, one for each."""
    groups = -(-batch // plan.bm)
    return torch.zeros(launches, groups * _COUNTER, dtype=torch.int32, device=device)


class _Workspace:
    """What the programs exchange through, of one launch's own: streams do not meet in it."""

    def __init__(
        self,
        plan: Plan,
        like: Tensor,
        padded: int,
        dtype: torch.dtype,
        slots: int,
        met: Tensor | None,
    ) -> None:
        self.groups = -(-like.shape[0] // plan.bm)
        tiles = padded // plan.bn
        self.programs = self.groups * tiles
        rows = self.groups * plan.bm
        boards = torch.empty(2, rows, padded, dtype=dtype, device=like.device)
        parts = like.new_empty(2, self.groups * slots * tiles * plan.bm)
        if met is None:
            met = counters(plan, like.shape[0], 1, like.device)[0]
        _buffer("counters", met, (self.groups * _COUNTER,), torch.int32, like)
        self.tensors = (*boards, *parts, met)


def _constants(padded: int, plan: Plan, operand: torch.dtype, scheme: Scheme) -> dict[str, Any]:
    return {
        "UP": padded,
        "KP": triton.next_power_of_2(padded),
        "BM": plan.bm,
        "BN": plan.bn,
        "DTYPE": _DTYPES[operand],
        # Of no account to 16-bit operands, so that it makes no second variant of them.
        "PRECISION": "tf32" if scheme.tf32 or operand.itemsize == 2 else "ieee",
        "CHUNKS": plan.chunks,
        "FLIP": plan.bm > 8,
        "HEUN": scheme.method == "heun",
    }


def _options(plan: Plan) -> dict[str, Any]:
    # No pipelining: see the device code. Programs wait for each other: all must be resident.
    return {
        "num_warps": plan.warps,
        "num_stages": 1,
        "maxnreg": 255,  # or ptxas spills to stay within 128, for a second program that never comes
        "launch_cooperative_grid": True,
    }


# --- checks -------------------------------------------------------------------------------------


def _check(
    p: Tensor, c: Tensor, name: str, network: Network, scheme: Scheme, plan: Plan
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


def _check_saved(saved: Saved, evals: int, batch: int, padded: int, operand: torch.dtype) -> None:
    like = saved.xhat1
    for field, x in zip(Saved._fields, saved, strict=True):
        if x is None:
            continue
        if field.startswith("rstd"):
            _buffer(field, x, (evals, batch), torch.float32, like)
        else:
            dtype = torch.float32 if field == "y2" else operand
            _buffer(field, x, (evals, batch, padded), dtype, like)
    if (saved.y1 is None) != (saved.y2 is None):
        raise ValueError("y1 and y2 must both be given, or neither")


def _check_adjoints(
    adjoints: Adjoints, evals: int, batch: int, padded: int, operand: torch.dtype
) -> None:
    scaled = operand == torch.float16
    for field, x in zip(Adjoints._fields, adjoints, strict=True):
        if x is None:
            if scaled or not field.endswith("scale"):
                raise ValueError(f"{field} must be given for weights in {operand}")
        elif field.endswith("scale"):
            _buffer(field, x, (evals, batch), torch.float32, adjoints.dh2)
        else:
            _buffer(field, x, (evals, batch, padded), operand, adjoints.dh2)


def _buffer(name: str, x: Tensor, shape: tuple[int, ...], dtype: torch.dtype, like: Tensor) -> None:
    if x.shape != torch.Size(shape) or x.dtype != dtype or not x.is_contiguous():
        raise ValueError(
            f"{name} must be a contiguous {list(shape)} of {dtype}, got {list(x.shape)} of "
            f"{x.dtype} with stride {x.stride()}"
        )
    if x.device != like.device:
        raise ValueError(f"{name} must be on {like.device}, got {x.device}")


# --- what is compiled ---------------------------------------------------------------------------

_OPERANDS = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
_PLAIN = ("batch", "steps", "evals", "substeps", "limit")


def _case(
    direction: str,
    plan: Plan,
    padded: int,
    dtype: str,
    archs: tuple[int, ...],
    *,
    keep: bool,
    spill: int = 0,
) -> Case:
    """One launch; ``keep`` with what gradients of the weights need."""
    forward = direction == "fwd"
    fn = device.rollout_forward_kernel if forward else device.rollout_backward_kernel
    operand = _OPERANDS[dtype]
    narrow = ("w2", "w13", "xhat1", "xhat2", "y1", "dh2", "dq", "board1", "board2")
    types = {f"{name}_ptr": f"*{dtype}" for name in narrow}
    types |= {name: "*fp32" for name in fn.arg_names if name.endswith("_ptr") and name not in types}
    types |= {"counters_ptr": "*i32"}
    if forward and not keep:
        types["sum_ptr"] = f"*{dtype}"  # no gradient takes the sums, a product does
    types |= dict.fromkeys((*_PLAIN, "w2_n", "w2_k", "w13_n", "w13_k"), "i32")
    types |= dict.fromkeys(("width1", "width2", "eps1", "eps2", "dt", "nil"), "fp32")
    constants: dict[str, Any] = _constants(padded, plan, operand, Scheme("heun", 4, padded))
    constants |= {"KEEP": keep}
    # Contiguous weights, read as they are or as their transposes.
    constants |= {"SAVE": True, "w2_k": 1, "w13_k": 1} if forward else {"w2_n": 1, "w13_n": 1}
    if not forward:
        constants["SCALED"] = operand == torch.float16
    options = _options(plan)
    words = (f"U{padded}", dtype, f"{plan.bm}x{plan.bn}", "weights" if keep else "")
    return Case(
        " ".join(w for w in (f"rollout_{direction}", *words) if w),
        fn,
        signature(fn, types, constants),
        constants,
        unaligned=frozenset(_PLAIN),
        num_warps=options.pop("num_warps"),
        num_stages=options.pop("num_stages"),
        options=options,
        tensor_cores=True,
        max_spill=spill,
        archs=archs,
    )


def cases() -> list[Case]:
    """Launches of the plans: 5M-class nets (510 features padded to 512) and twice as wide ones."""
    few, middle, many = _LAYOUTS
    few_narrow, middle_narrow, many_narrow = _NARROW_LAYOUTS
    found = []
    for layout, padded, dtype, archs, spill, forward_spill in (
        (few, 512, "fp16", (80, 90, 100), 16, 0),
        (middle, 512, "fp16", (80, 90, 100), 0, 0),
        # Seven sums a feature over 32 rows, for the smaller gradients, beside fragments of weights
        # and activations: too many registers, in a pass that mostly waits for exchanges.
        (many, 512, "fp16", (90, 100), 128, 16),
        # Rows of 1024 in chunks of 256 or 512: fragments of both operands of a product.
        (few_narrow, 1024, "fp16", (80, 90, 100), 64, 0),
        (middle_narrow, 1024, "fp16", (90, 100), 128, 96),
        (many_narrow, 1024, "fp16", (90, 100), 128, 96),
        (few_narrow, 512, "fp32", (80, 90, 100), 0, 0),
        (middle_narrow, 512, "fp32", (90, 100), 0, 0),
        (few, 512, "bf16", (80, 90, 100), 16, 0),
    ):
        found.append(_case("fwd", layout, padded, dtype, archs, keep=True, spill=forward_spill))
        found.append(_case("bwd", layout, padded, dtype, archs, keep=True, spill=spill))
        if padded == 512 and dtype == "fp16":
            found.append(
                _case("fwd", layout, padded, dtype, archs, keep=False, spill=forward_spill)
            )
            found.append(_case("bwd", layout, padded, dtype, archs, keep=False))
    return found
