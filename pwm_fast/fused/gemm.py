"""Matrix products with a weight: forward, towards the input, and towards the weight."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from pwm_fast.backends.base import Kernels
from pwm_fast.fused import weight_cache

VARIABLE = "PWM_FAST_GEMM"
CHOICES = ("auto", "torch", "onednn")
_NARROW = 16
_RUN, _FEW = 32, 1024  # rows of a short sum of a weight gradient; up to how many rows it is cut
_CHUNK = 128  # longest sum of a prepacked product
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


def prepacks(weight: Tensor, rows: int | None = None) -> bool:
    """Whether float32 products with ``weight`` run on oneDNN with a prepacked copy.

    ``PWM_FAST_GEMM`` says ``torch``, ``onednn``, or ``auto``: oneDNN on CPUs with AVX-512, where it
    was measured at twice the speed of torch's own products (docs/performance.md); not on AVX2, nor
    for products so small that the call takes longer than they.

    Args:
        weight: of the products.
        rows: that are multiplied with it; None for many.

    Raises:
        ValueError: the environment variable is neither of them.
    """
    choice = os.environ.get(VARIABLE) or "auto"
    if choice not in CHOICES:
        raise ValueError(f"{VARIABLE} must be one of {', '.join(CHOICES)}, got {choice!r}")
    if choice == "torch" or weight.dim() != 2 or weight.numel() == 0 or rows == 0:
        return False
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        return False
    if choice == "auto":
        if not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
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

    Operands are rounded to what the kernels' precision says, results are float32 (or the weight's
    dtype). Where the CPU multiplies bf16 in hardware, so does this, with results in bf16 that
    :class:`Kernels` read as they are; elsewhere on a CPU the rounded operands are multiplied in
    float32, which is no faster and rounds less.

    Args:
        kernels: element kernels, which say the precision.
        weight: the weight.
        rows: rows of a product.
    """

    def __init__(self, kernels: Kernels, weight: Tensor, rows: int = 0) -> None:
        self.kernels, self.weight = kernels, weight
        self.precision = kernels.precision
        self._rows = rows
        self._prepack = self.precision.operand is None and prepacks(weight, rows)
        self._copies: dict[bool, Tensor] = {}
        self._reordered: dict[bool, tuple[Tensor, ...]] = {}
        self._narrow: Tensor | None = None

    def __call__(self, x: Tensor, members: int = 0, *, wide: bool = True) -> Tensor:
        """``x W^T``: ``[R, K]`` to ``[R, N]``; rows are those of all members one after another.

        ``wide=False`` lets the result be of the operands' dtype.
        """
        if self._prepack and not members:
            return _prepacked(x, self._packed(False))
        if self.precision.operand is not None and x.dtype != self.precision.operand:
            x, _ = self._operand(x, False)
        return self._product(x, self._copy(False), members, wide)

    def shared(self, x: Tensor, members: int = 0) -> Tensor:
        """``x W^T`` of rows ``[R, K]`` that all members have in common, to ``[E R, N]``."""
        if not members:
            return self(x)
        x, _ = self.operand(x, None, scaled=False)
        return self._product(x.expand(members, -1, -1), self._copy(False), members, True)

    def dgrad(self, dy: Tensor, members: int = 0) -> Tensor:
        """``dy W``: ``[R, N]`` to ``[R, K]``."""
        return self.scaled_dgrad(dy, members, None, wide=True)[0]

    def scaled_dgrad(
        self, dy: Tensor, members: int, scale: Tensor | None, *, wide: bool
    ) -> tuple[Tensor, Tensor | None]:
        """``dy W`` and the factors of its rows or None; ``scale`` holds those of ``dy``.

        ``wide`` asks for a float32 result without factors.
        """
        if self._prepack and not members:
            return _prepacked(dy, self._packed(True)), None
        dy, scale = self.operand(dy, scale, scaled=self.precision.scaled)
        dx = self._product(dy, self._copy(True), members, wide)
        if wide and scale is not None:
            return dx.mul_(scale.unsqueeze(-1)), None
        return dx, scale

    def _operand(self, x: Tensor, scaled: bool) -> tuple[Tensor, Tensor | None]:
        x = x if x.stride(-1) == 1 else x.contiguous()
        out = torch.empty(x.shape, dtype=self.precision.operand, device=x.device)
        scale = x.new_empty(x.shape[0]) if scaled else None
        self.kernels.to_operand(x, out, scale)
        return out, scale

    def _copy(self, transposed: bool) -> Tensor:
        """What the second operand of a product is, ``[N, K]`` for both directions."""
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

    def operand_weight(self) -> Tensor:
        """The weight in the operands' dtype."""
        operand = self.precision.operand
        if operand is None:
            return self.weight
        if self._narrow is None:
            self._narrow = operand_copy(self.weight, operand)
        return self._narrow

    def operand(
        self, x: Tensor, scale: Tensor | None, *, scaled: bool
    ) -> tuple[Tensor, Tensor | None]:
        """``x`` as products take it and the factors of its rows; new ones where ``scaled``."""
        if self.precision.operand is None or x.dtype == self.precision.operand:
            return x, scale
        return self._operand(x, scaled)

    def _make_copy(self, transposed: bool) -> Tensor:
        operand = self.precision.operand
        if operand is None:
            return self.weight.transpose(-1, -2) if not transposed else self.weight
        if self._emulated(self.weight):
            narrow = _kept_copy(("widened", operand), self.weight, lambda w: w.to(operand).float())
        else:
            narrow = self.operand_weight()
        return narrow.transpose(-1, -2) if not transposed else narrow

    def _emulated(self, x: Tensor) -> bool:
        return x.device.type == "cpu" and not (
            self.precision.operand is torch.bfloat16 and cpu_multiplies_bf16()
        )

    def _product(self, a: Tensor, b: Tensor, members: int, wide: bool) -> Tensor:
        """``a @ b`` of operands, ``[R, N]``."""
        if members and a.dim() == 2:
            a = a.view(members, -1, a.shape[-1])
        if a.dtype != b.dtype:  # emulated
            a = a.to(b.dtype)
        product = torch.bmm if members else torch.mm
        if not a.is_cuda:
            y = product(a, b)
            if wide and y.dtype == torch.bfloat16:
                y = y.float()
        elif self.precision.operand is not None:
            y = _wide_product(a, b)
        else:
            with fp32_products(self.precision.tf32, a):
                y = product(a, b)
        return y.view(-1, y.shape[-1]) if members else y


def operand_copy(weight: Tensor, operand: torch.dtype) -> Tensor:
    """The weight rounded to a product's operand."""
    copy = weight_cache.attached(weight, operand)
    if copy is not None:
        return copy
    return _kept_copy(("operand", operand), weight, lambda w: w.to(operand))


def _kept_copy(
    kind: tuple[object, ...], weight: Tensor, make: Callable[[Tensor], Tensor]
) -> Tensor:
    if weight.is_cpu and weight.numel() <= _SMALL:
        return make(weight)
    copy: Tensor = weight_cache.kept(kind, (weight,), make)
    return copy


def round_together(kernels: Kernels, weights: Sequence[Tensor]) -> None:
    """Make the copies of :func:`operand_copy` that are missing in one launch, if they are kept."""
    operand = kernels.precision.operand
    if operand is None or not weights[0].is_cuda:  # what launches nothing gains nothing
        return

    def make(*some: Tensor) -> list[Tensor]:
        copies = [torch.empty_like(w, dtype=operand) for w in some]
        torch._foreach_copy_(copies, list(some))
        return copies

    own = [w for w in weights if weight_cache.attached(w, operand) is None]
    weight_cache.keep_each(("operand", operand), own, make)


@contextmanager
def fp32_products(tf32: bool, like: Tensor) -> Iterator[None]:
    """Whether float32 products of CUDA tensors use tf32, whatever the process has set."""
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


def weight_grad(
    kernels: Kernels,
    dh: Tensor,
    x: Tensor,
    scale: Tensor | None = None,
    largest: Tensor | None = None,
) -> Tensor:
    """``dh^T x``: ``[R, N]`` and ``[R, K]`` to ``[N, K]``, or each of an ensemble ``[E, R, .]``.

    On a CPU the product is float32 in every precision. Where one of the sides is narrow, MKL sums
    all rows one after another and the error grows with their number (5 times that of step-by-step
    gradients at 600 rows and width 7): such a product, cheap as it is, is formed in float64. A few
    rows of each of several steps are likewise added up in short runs: one long sum errs more than
    the step-by-step gradients that it stands for.

    Args:
        kernels: element kernels, which say the precision.
        dh: adjoints.
        x: what the weight was multiplied with.
        scale: factors of the rows of ``dh``, or None.
        largest: the largest of them; None to look for it.
    """
    if takes_narrow(kernels, dh):
        return narrow_weight_grad(kernels, dh, x, scale, largest)
    if scale is not None:
        dh = dh.float() * scale.unsqueeze(-1)
    wide = torch.promote_types(dh.dtype, torch.float32)
    dh, x = dh.to(wide), x.to(wide)
    product = torch.bmm if dh.dim() == 3 else torch.mm
    if min(dh.shape[-1], x.shape[-1]) < _NARROW:
        return product(dh.double().transpose(-1, -2), x.double()).to(wide)
    if dh.is_cuda:
        with fp32_products(kernels.precision.tf32, dh):
            return product(dh.transpose(-1, -2), x)
    rows = dh.shape[-2]
    if dh.dim() == 2 and _RUN < rows <= _FEW:
        total = torch.mm(dh[:_RUN].t(), x[:_RUN])
        for start in range(_RUN, rows, _RUN):
            total.addmm_(dh[start : start + _RUN].t(), x[start : start + _RUN])
        return total
    return product(dh.transpose(-1, -2), x)


def _wide_product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` of 16-bit operands in float32."""
    product = torch.bmm if a.dim() == 3 else torch.mm
    if not a.is_cuda:
        return product(a.float(), b.float())
    return product(a, b, out_dtype=torch.float32)


def takes_narrow(kernels: Kernels, dh: Tensor) -> bool:
    """Whether weight gradients take 16-bit operands: on a GPU, not where a CPU emulates them."""
    return kernels.precision.operand is not None and (dh.is_cuda or kernels.name == "triton")


def adjoint_operand(
    kernels: Kernels, dh: Tensor, scale: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Adjoints as 16-bit products take them, and the factors of their rows."""
    operand = kernels.precision.operand
    if operand is None or dh.dtype == operand:
        return dh, scale
    narrow = torch.empty(dh.shape, dtype=operand, device=dh.device)
    scale = dh.new_empty(dh.shape[:-1]) if kernels.precision.scaled else None
    rows = None if scale is None else scale.flatten()
    kernels.to_operand(dh.flatten(0, -2), narrow.flatten(0, -2), rows)
    return narrow, scale


def side_by_side(inputs: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """Room for operands ``[..., K_i]`` as one ``[..., K]``, rows aligned, and the part of each."""
    first = inputs[0]
    widths = [x.shape[-1] for x in inputs]
    width = sum(widths)
    whole = torch.empty(
        (*first.shape[:-1], -(-width // ALIGNED) * ALIGNED), dtype=dtype, device=first.device
    )[..., :width]
    return whole, list(whole.split(widths, -1))


def narrow_weight_grad(
    kernels: Kernels,
    dh: Tensor,
    x: Tensor | Sequence[Tensor],
    scale: Tensor | None = None,
    largest: Tensor | None = None,
) -> Tensor:
    """The product of 16-bit operands; a factor a row cannot leave it, one for all rows can.

    ``sum_r s_r dh_r x_r = s sum_r dh_r ((s_r / s) x_r)`` with ``s`` the largest: an exact power of
    two for each row, and what underflows is below the rounding of the largest. ``x`` may be several
    inputs, side by side. ``largest`` is ``s`` where ``scale`` is given and it is known already.
    """
    dh, scale = adjoint_operand(kernels, dh, scale)
    inputs = [x] if isinstance(x, Tensor) else list(x)
    if scale is not None and largest is None:
        largest = scale.amax() if scale.numel() else scale.new_ones(())
    if largest is None and len(inputs) == 1 and inputs[0].dtype == dh.dtype:
        whole = inputs[0]
    else:
        whole, parts = side_by_side(inputs, dh.dtype)
        for each, out in zip(inputs, parts, strict=True):
            _scaled_rows(kernels, each, out, scale, largest)
    total = _wide_product(dh.transpose(-1, -2), whole)
    return total if largest is None else total.mul_(largest)


def _scaled_rows(
    kernels: Kernels, x: Tensor, out: Tensor, scale: Tensor | None, largest: Tensor | None
) -> None:
    """``out``: ``x`` in its dtype, its rows times ``scale / largest`` where these are given."""
    run = getattr(kernels, "scaled_rows", None)
    if scale is None or largest is None:
        out.copy_(x)
    elif run is None:
        out.copy_(x * (scale / largest).unsqueeze(-1))
    else:
        shared = x.dim() == 3 and x.stride(0) == 0  # by the members of an ensemble
        rows = x[0] if shared else x.flatten(0, -2)
        rows = rows if rows.stride(-1) == 1 else rows.contiguous()
        run(rows, out.flatten(0, -2), scale.flatten(), largest)
