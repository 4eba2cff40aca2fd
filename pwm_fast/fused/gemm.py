"""GEMMs with a weight: forward, and towards the input (dgrad)."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from pwm_fast.backends.base import Kernels
from pwm_fast.fused import weight_cache

VARIABLE = "PWM_FAST_GEMM"
CHOICES = ("auto", "torch", "onednn", "native")
_WIDEST = 640  # layer whose GEMMs are native ones
_CHUNK = 128  # longest sum of a prepacked GEMM
_PREPACKED_ROWS, _PREPACKED_WORK = 16, 3 * 2**19  # least rows and multiply-adds of one
_SMALL = 2**17  # numbers that a CPU rounds sooner than it finds that their copy is still right
ALIGNED = 8  # 16-bit numbers: rows of operands begin on 16 bytes


@lru_cache(maxsize=1)
def _onednn_works() -> bool:
    """Whether torch has, and this CPU runs, oneDNN's Linear on a prepacked weight.

    The operators are PyTorch's own, but private: they are tried once, with their result checked,
    which is the same in whatever mode, and leaves the caller's random numbers alone.
    """
    try:
        with _disable_current_modes(), torch.no_grad():
            numbers = torch.Generator().manual_seed(0)
            x, weight = (
                torch.randn(n, 533, generator=numbers, dtype=torch.float32, device="cpu")
                for n in (5, 17)
            )
            operator = torch.ops.mkldnn._reorder_linear_weight
            y = _prepacked(x, [operator(part.contiguous(), 5) for part in _chunks(weight)])
            return bool(torch.allclose(y, x @ weight.t(), rtol=1e-4, atol=1e-3))
    except (AttributeError, RuntimeError, NotImplementedError, TypeError):
        return False


def stored_variables(names: Sequence[str]) -> Callable[[], tuple[Any, ...]]:
    """A function that tells environment variables as they are stored, None where one is not set.

    ``os.environ`` decodes what it is asked for, which would take a tenth of a small call.
    """
    data: Any = getattr(os.environ, "_data", None)
    if not isinstance(data, dict):
        return lambda: tuple(map(os.environ.get, names))
    keys = tuple(map(os.environ.encodekey, names))
    return lambda: tuple(map(data.get, keys))


_stored = stored_variables((VARIABLE,))


def _choice() -> str:
    if _stored() == (None,):
        return "auto"
    choice = os.environ.get(VARIABLE) or "auto"
    if choice not in CHOICES:
        raise ValueError(f"{VARIABLE} must be one of {', '.join(CHOICES)}, got {choice!r}")
    return choice


@lru_cache(maxsize=1)
def _intel() -> bool:
    """Whether this is a CPU of Intel's, as far as Linux tells."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return any("GenuineIntel" in line for line in file)
    except OSError:
        return False


def native_widths() -> float:
    """The widest layer whose fp32 GEMMs are our own (:mod:`pwm_fast.fused.row_program`).

    ``PWM_FAST_GEMM=native`` takes them at any width, ``torch`` and ``onednn`` at none, ``auto``
    where they are faster (docs/performance.md).

    Raises:
        ValueError: the environment variable has another value.
    """
    return {"auto": _WIDEST, "native": math.inf}.get(_choice(), 0)


def prepacks(weight: Tensor, rows: int | None = None) -> bool:
    """Whether fp32 GEMMs with ``weight`` run on oneDNN with a prepacked copy.

    ``PWM_FAST_GEMM`` says ``torch``, ``onednn``, or ``auto``: oneDNN on AMD's CPUs with AVX-512,
    which MKL does not use there, so that oneDNN is twice as fast as torch's own GEMMs
    (docs/performance.md). It is not on Intel's, nor on AVX2, nor for GEMMs so small that the call
    takes longer than they.

    Args:
        weight: of the GEMMs.
        rows: that are multiplied with it; None for many.

    Raises:
        ValueError: the environment variable is neither of them.
    """
    choice = _choice()
    if choice in ("torch", "native") or weight.dim() != 2 or weight.numel() == 0 or rows == 0:
        return False
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        return False
    if choice == "auto":
        if not torch.backends.cpu.get_cpu_capability().startswith("AVX512") or _intel():
            return False
        few = rows is not None and rows < _PREPACKED_ROWS
        if few or (rows is not None and rows * weight.numel() < _PREPACKED_WORK):
            return False
    return _onednn_works()


@lru_cache(maxsize=1)
def cpu_multiplies_bf16() -> bool:
    """Whether this CPU multiplies bf16 in hardware (AVX512_BF16 or AMX)."""
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, bool)() for name in probes)


class Gemm:
    """``x W^T`` and ``dy W`` for a weight ``[N, K]``, or one ``[E, N, K]`` of an ensemble.

    Operands are rounded to the compute dtype of the kernels' precision, results are fp32 (or the
    weight's dtype). Where the CPU multiplies bf16 in hardware, so does this, with results in bf16
    that :class:`Kernels` read as they are; elsewhere on a CPU the rounded operands are multiplied
    in fp32, which is no faster and rounds less.

    Args:
        kernels: elementwise kernels, which say the precision.
        weight: the weight.
        rows: rows of a GEMM.
    """

    def __init__(self, kernels: Kernels, weight: Tensor, rows: int = 0) -> None:
        self.kernels, self.weight = kernels, weight
        self.precision = kernels.precision
        self._rows = rows
        self._prepack = self.precision.compute is None and prepacks(weight, rows)
        self._copies: dict[bool, Tensor] = {}
        self._reordered: dict[bool, tuple[Tensor, ...]] = {}
        self._rounded: Tensor | None = None

    def __call__(self, x: Tensor, members: int = 0, *, fp32: bool = True) -> Tensor:
        """``x W^T``: ``[R, K]`` to ``[R, N]``; rows are those of all members one after another.

        ``fp32=False`` lets the result be of the compute dtype.
        """
        if self._prepack and not members:
            return _prepacked(x, self._packed(False))
        if self.precision.compute is not None and x.dtype != self.precision.compute:
            x, _ = self._cast(x, False)
        return self._mm(x, self._copy(False), members, fp32)

    def shared(self, x: Tensor, members: int = 0) -> Tensor:
        """``x W^T`` of rows ``[R, K]`` that all members have in common, to ``[E R, N]``."""
        if not members:
            return self(x)
        x, _ = self.cast(x, None, scaled=False)
        return self._mm(x.expand(members, -1, -1), self._copy(False), members, True)

    def dgrad(self, dy: Tensor) -> Tensor:
        """``dy W``: ``[R, N]`` to ``[R, K]``."""
        return self.scaled_dgrad(dy, 0, None, fp32=True)[0]

    def scaled_dgrad(
        self, dy: Tensor, members: int, scale: Tensor | None, *, fp32: bool
    ) -> tuple[Tensor, Tensor | None]:
        """``dy W`` and its row scales or None; ``scale`` holds those of ``dy``.

        ``fp32`` asks for an fp32 result without row scales.
        """
        if self._prepack and not members:
            return _prepacked(dy, self._packed(True)), None
        dy, scale = self.cast(dy, scale, scaled=self.precision.scaled)
        dx = self._mm(dy, self._copy(True), members, fp32)
        if fp32 and scale is not None:
            return dx.mul_(scale.unsqueeze(-1)), None
        return dx, scale

    def _cast(self, x: Tensor, scaled: bool) -> tuple[Tensor, Tensor | None]:
        x = x if x.stride(-1) == 1 else x.contiguous()
        out = torch.empty(x.shape, dtype=self.precision.compute, device=x.device)
        scale = x.new_empty(x.shape[0]) if scaled else None
        self.kernels.cast(x, out, scale)
        return out, scale

    def _copy(self, transposed: bool) -> Tensor:
        """The second operand of a GEMM: the weight, or its transpose for the forward one."""
        if transposed not in self._copies:
            self._copies[transposed] = self._make_copy(transposed)
        return self._copies[transposed]

    def _packed(self, transposed: bool) -> tuple[Tensor, ...]:
        """The weight, or its transpose, in oneDNN's order."""
        if transposed in self._reordered:
            return self._reordered[transposed]
        rows = self._rows

        def reorder(w: Tensor) -> tuple[Tensor, ...]:
            parts = _chunks(w.t() if transposed else w)
            operator = torch.ops.mkldnn._reorder_linear_weight
            return tuple(operator(part.contiguous(), rows) for part in parts)

        packed: tuple[Tensor, ...] = weight_cache.kept(
            ("onednn", rows, transposed), (self.weight,), reorder
        )
        self._reordered[transposed] = packed
        return packed

    def cast_weight(self) -> Tensor:
        """The weight in the compute dtype."""
        compute = self.precision.compute
        if compute is None:
            return self.weight
        if self._rounded is None:
            self._rounded = cast_weight(self.weight, compute)
        return self._rounded

    def cast(
        self, x: Tensor, scale: Tensor | None, *, scaled: bool
    ) -> tuple[Tensor, Tensor | None]:
        """``x`` in the compute dtype and its row scales; new ones where ``scaled``."""
        if self.precision.compute is None or x.dtype == self.precision.compute:
            return x, scale
        return self._cast(x, scaled)

    def _make_copy(self, transposed: bool) -> Tensor:
        compute = self.precision.compute
        if compute is None:
            return self.weight.transpose(-1, -2) if not transposed else self.weight
        if self._emulated(self.weight):
            rounded = _kept_copy(
                ("emulated", compute), self.weight, lambda w: w.to(compute).float()
            )
        else:
            rounded = self.cast_weight()
        return rounded.transpose(-1, -2) if not transposed else rounded

    def _emulated(self, x: Tensor) -> bool:
        return x.device.type == "cpu" and not (
            self.precision.compute is torch.bfloat16 and cpu_multiplies_bf16()
        )

    def _mm(self, a: Tensor, b: Tensor, members: int, fp32: bool) -> Tensor:
        """``a @ b`` of operands, ``[R, N]``."""
        if members and a.dim() == 2:
            a = a.view(members, -1, a.shape[-1])
        if a.dtype != b.dtype:  # emulated
            a = a.to(b.dtype)
        mm = torch.bmm if members else torch.mm
        if not a.is_cuda:
            y = mm(a, b)
            if fp32 and y.dtype == torch.bfloat16:
                y = y.float()
        elif self.precision.compute is not None:
            y = mm_fp32(a, b)
        else:
            with fp32_mode(self.precision.tf32, a):
                y = mm(a, b)
        return y.view(-1, y.shape[-1]) if members else y


def cast_weight(weight: Tensor, compute: torch.dtype) -> Tensor:
    """The weight rounded to a compute dtype."""
    copy = weight_cache.attached(weight, compute)
    if copy is not None:
        return copy
    return _kept_copy(("cast", compute), weight, lambda w: w.to(compute))


def _kept_copy(
    kind: tuple[object, ...], weight: Tensor, make: Callable[[Tensor], Tensor]
) -> Tensor:
    if weight.is_cpu and weight.numel() <= _SMALL:
        return make(weight)
    copy: Tensor = weight_cache.kept(kind, (weight,), make)
    return copy


def cast_together(kernels: Kernels, weights: Sequence[Tensor]) -> None:
    """Make the copies of :func:`cast_weight` that are missing in one launch, if they are kept."""
    compute = kernels.precision.compute
    if compute is None or not weights[0].is_cuda:  # what launches nothing gains nothing
        return

    def make(*some: Tensor) -> list[Tensor]:
        copies = [torch.empty_like(w, dtype=compute) for w in some]
        torch._foreach_copy_(copies, list(some))
        return copies

    own = [w for w in weights if weight_cache.attached(w, compute) is None]
    weight_cache.keep_each(("cast", compute), own, make)


@contextmanager
def fp32_mode(tf32: bool, like: Tensor) -> Iterator[None]:
    """Whether fp32 GEMMs of CUDA tensors use tf32, whatever the process has set."""
    if like.dtype != torch.float32:
        yield
        return
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _chunks(x: Tensor) -> tuple[Tensor, ...]:
    """Columns in runs of at most 128, nearly equal.

    oneDNN adds up a whole row in one accumulator: at 1788 columns its error was 2.1 times (largest
    entry: 3.7 times) that of MKL, which adds up in blocks. In runs of 128 it is 0.85 times.
    """
    count = max(1, -(-x.shape[1] // _CHUNK))
    width = -(-x.shape[1] // (16 * count)) * 16
    return x.split(max(width, 1), 1)


def _prepacked(x: Tensor, packed: Sequence[Tensor]) -> Tensor:
    linear = torch.ops.mkldnn._linear_pointwise
    first, *others = _chunks(x)
    y = linear(first, packed[0], None, "none", [], "")
    for part, weight in zip(others, packed[1:], strict=True):
        y = linear.binary(part, y, weight, None, "add")
    return y


def mm_fp32(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` of 16-bit operands in fp32."""
    mm = torch.bmm if a.dim() == 3 else torch.mm
    if not a.is_cuda:
        return mm(a.float(), b.float())
    return mm(a, b, out_dtype=torch.float32)
