"""What a backend says of itself, and the elementwise kernels that the fused passes are written on.

A kernel fills buffers that its caller made, so that rollouts reuse memory and batch their weight
gradients. Row-wise tensors are ``[R, n]`` with a last stride of 1; statistics are ``[R]``;
accumulators of parameter gradients are float64 and added to.

**Dtypes.** Pre-activations ``x``, parameters and statistics have the state's dtype. What a GEMM
takes (``y``, ``dx``) or what is kept for the backward pass (``xhat``, ``u``) may be 16-bit: kernels
compute in the state's dtype and round once, on writing.

**Row scales.** A 16-bit gradient has a scale a row, ``[R]``, so that fp16 neither overflows nor
loses small rows: it stands for ``dx * dx_scale[:, None]``. A kernel that is given ``dx_scale``
writes it: the power of two that brings the row's largest entry into (0.5, 1], 1 for a row of zeros.

**Width.** ``width > 0`` says that rows are centred and zero-padded: they have mean 0 over their
first ``width`` features and are 0 beyond, as are ``gamma`` and ``beta``. LayerNorm then is
``x / sqrt(sum(x^2) / width + eps)``, and its gradient lacks the subtraction of a mean, which the
centred weight's GEMM makes up for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from pwm_fast.backends.dtypes import autocasts
from pwm_fast.backends.precision import Precision
from pwm_fast.backends.transforms import PLAIN, forward_mode, subclass, transform

if TYPE_CHECKING:
    from pwm_fast.backends.fused_gemm import FusedGemms

#: What a backend may have kernels for. An operation belongs to one of them:
#: ``gemm``: networks and rollouts; ``rows``: one row at a time; ``returns``: scans over time;
#: ``reduction``: moments of lists of tensors; ``stream``: the same, one sample at a time;
#: ``optimizer``: a step of Adam.
FAMILIES = ("gemm", "rows", "returns", "reduction", "stream", "optimizer")


class BackendError(RuntimeError):
    """A backend was asked for that cannot run the operation; the message says why."""


class Call(NamedTuple):
    """What backends look at.

    Attributes:
        tensors: all tensors of the call.
        unsupported: why the fused algebra does not cover these options, or None.
        precision: asked for, of :data:`pwm_fast.backends.precision.NAMES`; ``auto`` for operations
            without GEMMs.
    """

    tensors: Sequence[Tensor]
    unsupported: str | None = None
    precision: str = "auto"


class Backend:
    """One way to run operations. A subclass declares itself; nobody compares its name.

    Attributes:
        name: what users ask for.
        families: of :data:`FAMILIES`, those that it has kernels for.
        automatic: ``auto`` may take it.
        runs_all: a program may run on it as a whole: within the context of its name, operations
            that it has no kernels for run on the reference.
        is_reference: plain PyTorch, the truth for the others.
        tensor_cores: 16-bit GEMMs are faster than float32 ones, so weights are centred, padded and
            folded for them.
        precisions: what ``auto`` means to it, by family; ``exact`` where nothing is said.
    """

    name: str
    families: frozenset[str] = frozenset()
    automatic: bool = True
    runs_all: bool = False
    is_reference: bool = False
    tensor_cores: bool = False
    precisions: Mapping[str, str] = {}

    def why_not(self, family: str, call: Call) -> str | None:
        """Why it cannot run a call of an operation of ``family``; None if it can."""
        raise NotImplementedError

    def kernels(self, family: str, precision: Precision) -> Any:
        """Its kernels of a family: of ``gemm`` and ``rows`` an object as :class:`Kernels`."""
        raise NotImplementedError


def fused_why_not(call: Call) -> str | None:
    """What every backend but the reference needs."""
    if call.unsupported is not None:
        return call.unsupported
    first = call.tensors[0]
    dtype = first.dtype
    if call.precision not in ("auto", "exact") and dtype != torch.float32:
        return f"precision {call.precision!r} needs float32 tensors, they are {dtype}"
    for x in call.tensors:
        if x.dtype != dtype:
            return f"the tensors' dtypes differ: {dtype} and {x.dtype}"
        if type(x) not in PLAIN and (reason := subclass(x)) is not None:  # spares most a call
            return reason
    if autocasts(first):
        return "autocast is on, which only the reference follows"
    return forward_mode(call.tensors) or transform()


_REDUCED = (torch.float32, torch.float16, torch.bfloat16)


def reduction_why_not(call: Call) -> str | None:
    """What a reduction on a GPU needs: tensors on one device, of a dtype that its kernels read."""
    first = call.tensors[0]
    for x in call.tensors:
        if x.device != first.device:
            return f"the tensors are on different devices: {first.device} and {x.device}"
    if first.dtype not in _REDUCED:
        return f"the tensors are {first.dtype}; it takes float32, float16 and bfloat16"
    return fused_why_not(call)


class Kernels(Protocol):
    """What a device provides.

    Attributes:
        name: the backend's.
        precision: of GEMMs.
        gemms: GEMMs fused with what surrounds them, or None.
        centre: packs a layer in one launch (:func:`pwm_fast.kernels.centre.centre`), or None.
        scaled_rows: scales rows in one launch (:func:`pwm_fast.kernels.axpby.scaled_rows`), or
            None.
        wgrad_16bit: weight gradients take 16-bit operands on every device, not on a GPU alone.
        cast_at_once: casting is a launch, so that many vectors are cast as one tensor.
        persistent: there are persistent rollout kernels (:mod:`pwm_fast.kernels.rollout`).
        row_program: makes programs that run block of rows by block
            (:mod:`pwm_fast.fused.row_program`), or None.
    """

    name: str
    precision: Precision
    gemms: FusedGemms | None
    centre: Callable[..., None] | None
    scaled_rows: Callable[..., None] | None
    wgrad_16bit: bool
    cast_at_once: bool
    persistent: bool
    row_program: Any

    def norm_act_fwd(
        self,
        x: Tensor,
        y: Tensor,
        xhat: Tensor | None,
        rstd: Tensor | None,
        *,
        gamma: Tensor,
        beta: Tensor,
        act: str,
        group: int,
        eps: float,
        bias: Tensor | None = None,
        add: Tensor | None = None,
        tau: Tensor | None = None,
        w_tau: Tensor | None = None,
        width: int = 0,
    ) -> None:
        """``y = act(LayerNorm(x + bias + add + tau w_tau))``; ``add [S, n]`` repeats over rows.

        ``tau`` holds one value, or one for each row. ``xhat`` and ``rstd`` are kept for the
        backward pass unless None.
        """

    def norm_act_bwd(
        self,
        dy: Tensor,
        dx: Tensor,
        xhat: Tensor,
        rstd: Tensor,
        *,
        gamma: Tensor,
        beta: Tensor,
        y: Tensor | None,
        act: str,
        group: int,
        dgamma: Tensor | None = None,
        dbeta: Tensor | None = None,
        dbias: Tensor | None = None,
        width: int = 0,
        dy_scale: Tensor | None = None,
        dx_scale: Tensor | None = None,
    ) -> None:
        """Gradient of :meth:`norm_act_fwd` towards its ``x``; ``y`` is needed for SimNorm alone."""

    def act_norm_fwd(
        self,
        x: Tensor,
        y: Tensor,
        u: Tensor | None,
        mean: Tensor | None,
        rstd: Tensor | None,
        *,
        bias: Tensor | None,
        gamma: Tensor | None,
        beta: Tensor | None,
        act: str,
        eps: float,
        rows_per_member: int = 0,
    ) -> None:
        """``y = LayerNorm(act(u))`` with ``u = x + bias``; no LayerNorm where ``gamma`` is None.

        With ``rows_per_member`` parameters are ``[E, n]`` and consecutive rows share a member's.
        """

    def act_norm_bwd(
        self,
        dy: Tensor,
        dx: Tensor,
        u: Tensor,
        mean: Tensor | None,
        rstd: Tensor | None,
        *,
        gamma: Tensor | None,
        act: str,
        rows_per_member: int = 0,
        dgamma: Tensor | None = None,
        dbeta: Tensor | None = None,
        dbias: Tensor | None = None,
        dy_scale: Tensor | None = None,
        dx_scale: Tensor | None = None,
    ) -> None:
        """Gradient of :meth:`act_norm_fwd` towards its ``x``."""

    def axpby(
        self,
        z: Tensor,
        k1: Tensor,
        k2: Tensor | None,
        out: Tensor,
        c1: float,
        c2: float,
        *,
        cast: Tensor | None = None,
        k1_scale: Tensor | None = None,
        k2_scale: Tensor | None = None,
    ) -> None:
        """``out = z + c1 k1 + c2 k2``, and the same in 16 bit into ``cast``.

        Scales belong to rows of ``k1`` and ``k2``.
        """

    def cast(self, x: Tensor, out: Tensor, scale: Tensor | None) -> None:
        """``out = x / scale`` in 16 bit; ``scale`` is written as above, or None for 1.

        What fp16 cannot hold becomes infinite: the loss or a gradient is then not finite, which
        whoever takes the step looks at (:class:`pwm_fast.agent.optim.GuardedAdam`).
        """


class PlainKernels:
    """Kernels without the optional parts of :class:`Kernels`; those of a CPU build on it."""

    gemms: FusedGemms | None = None
    centre: Callable[..., None] | None = None
    scaled_rows: Callable[..., None] | None = None
    wgrad_16bit = False
    cast_at_once = False
    persistent = False
    row_program: Callable[..., Any] | None = None
    row_steps: Mapping[str, int] = {}
