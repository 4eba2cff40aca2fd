"""The elementwise kernels in C++ (``csrc/``): float32 tensors on the CPU."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pwm_fast.backends.base import Backend, Call, PlainKernels, fused_why_not
from pwm_fast.backends.esnr import TorchEsnr
from pwm_fast.backends.optimizer import Group
from pwm_fast.backends.precision import EXACT, Precision


def _load() -> tuple[Any, str | None, str | None]:
    """The extension on torch's own OpenMP threads, that runtime's path, and why there is none."""
    try:
        from pwm_fast import _C
    except ImportError as error:
        return None, None, f"the native extension does not load ({error})"
    if not hasattr(_C, "KERNELS"):
        return None, None, "the native extension is of an older version: reinstall"
    if not hasattr(Tensor, "__dlpack_c_exchange_api__"):
        return (
            None,
            None,
            f"torch {torch.__version__} is too old for it: install torch 2.11 or later",
        )
    _C.set_thread_count(torch.get_num_threads)
    path = _openmp_runtime()
    shared = path is not None and _C.set_openmp(path)
    return _C, path if shared else None, None


def _openmp_runtime() -> str | None:
    """Path of the OpenMP runtime that torch has loaded; None where it cannot be told."""
    try:
        with open("/proc/self/maps") as maps:
            for line in maps:
                path = line.rpartition(" ")[2].strip()
                name = path.rpartition("/")[2]
                if name.startswith(("libgomp", "libiomp", "libomp")):
                    return path
    except OSError:
        pass
    return None


# When this module is imported, not at the first call: torch.compile can follow the choice of a
# backend, but not the loading of a library.
_EXTENSION, _OPENMP, _MISSING = _load()


def extension() -> Any:
    """``pwm_fast._C``, on torch's own OpenMP threads.

    Raises:
        ImportError: it was not built, or does not load.
    """
    if _EXTENSION is None:
        raise ImportError(_MISSING)
    return _EXTENSION


def openmp_runtime() -> str | None:
    """Path of the OpenMP runtime that torch and the kernels share; None where they share none."""
    return _OPENMP


def why_missing() -> str | None:
    """Why the native kernels cannot run here; None if they can."""
    return _MISSING


class NativeKernels(PlainKernels):
    """The kernels of ``csrc/cpu/ops.def``, by their names: functions of the extension.

    They are those of :class:`pwm_fast.backends.base.Kernels`, and those of operations over rows
    (``simnorm_fwd``, ...). ``pwm_fast/_C.pyi`` has their signatures.

    Raises:
        ValueError: a tensor's size, dtype, stride or device is wrong; the message names it.
        TypeError: an argument is missing, unknown, or no tensor.
    """

    name = "native"

    if TYPE_CHECKING:  # what the extension brings
        norm_act_fwd: Any
        norm_act_bwd: Any
        act_norm_fwd: Any
        act_norm_bwd: Any

        def __getattr__(self, name: str) -> Any: ...

    def __init__(self, precision: Precision = EXACT) -> None:
        self._axpby = extension().axpby
        self.precision = precision
        self.row_program = extension().RowProgram

    def axpby(self, *given: Any, cast: Tensor | None = None, **scales: None) -> None:
        """See :class:`pwm_fast.backends.base.Kernels`; scales are for fp16, so None here."""
        self._axpby(*given)
        if cast is not None:
            cast.copy_(given[3])

    def cast(self, x: Tensor, out: Tensor, scale: Tensor | None) -> None:
        """See :class:`pwm_fast.backends.base.Kernels`."""
        out.copy_(x)


if _EXTENSION is not None:
    # Not methods that pass their arguments on: that would cost more than a small kernel.
    for _name in _EXTENSION.KERNELS:
        if _name not in vars(NativeKernels):
            setattr(NativeKernels, _name, getattr(_EXTENSION, _name))


def words(numbers: Iterable[int]) -> Tensor:
    """A table for native code, in the CPU's memory: torch's default device may be another."""
    return torch.tensor([*numbers], dtype=torch.int64, device="cpu")


class NativeEsnr(TorchEsnr):
    """See :class:`pwm_fast.backends.esnr.EsnrReduction`; only the moments are native."""

    def __init__(self) -> None:
        self._esnr = extension().esnr

    def moments(self, grads: Sequence[Tensor], samples: int) -> tuple[Tensor, Tensor]:
        """See :class:`EsnrReduction`."""
        tensors = len(grads) // samples
        whole = [g.contiguous() for g in grads]  # named: alive until the call is over
        pointers = words(g.data_ptr() for g in whole)
        sizes = words(g.numel() for g in whole[:tensors])
        signal = torch.empty(tensors, dtype=torch.float64, device="cpu")
        noise = torch.empty_like(signal)
        self._esnr(grads=pointers.view(samples, tensors), sizes=sizes, signal=signal, noise=noise)
        return signal, noise


class NativeAdam:
    """See :class:`pwm_fast.backends.optimizer.GuardedStep`: one call for all tensors."""

    def __init__(self) -> None:
        self._adam = extension().adam

    def guarded_step(
        self,
        groups: Sequence[Group],
        options: Tensor,
        loss: Tensor,
        skipped: Tensor,
        in_a_row: Tensor,
        *,
        keep: bool = False,
    ) -> Tensor:
        """See :class:`GuardedStep`.

        Raises:
            ValueError: a tensor's size, dtype, stride or device is wrong; the message names it.
        """
        if loss.dtype not in (torch.float32, torch.float64):
            loss = loss.double()
        norm = torch.empty((), dtype=torch.float32, device="cpu")
        self._adam(
            options=options,
            params=[p for group in groups for p in group.params],
            grads=[g for group in groups for g in group.grads],
            means=[m for group in groups for m in group.means],
            squares=[v for group in groups for v in group.squares],
            steps=[group.steps for group in groups],
            rates=[group.rate for group in groups],
            loss=loss,
            norm=norm,
            skipped=skipped,
            in_a_row=in_a_row,
            keep=keep,
        )
        return norm


class Native(Backend):
    """C++ on the CPU: float32."""

    name = "native"
    families = frozenset({"gemm", "rows", "reduction", "optimizer"})
    runs_all = True

    def why_not(self, family: str, call: Call) -> str | None:
        """See :class:`Backend`."""
        first = call.tensors[0]
        if first.device.type != "cpu":
            return f"the tensors are on {first.device}; it runs on the CPU"
        if first.dtype != torch.float32:
            return f"the tensors are {first.dtype}; it computes in float32"
        if call.precision not in ("auto", "exact", "bf16"):
            return f"precision {call.precision!r} is asked for; it has exact and bf16"
        return why_missing() or fused_why_not(call)

    def kernels(self, family: str, precision: Precision) -> NativeKernels | NativeEsnr | NativeAdam:
        """See :class:`Backend`."""
        if family == "reduction":
            return NativeEsnr()
        return NativeAdam() if family == "optimizer" else NativeKernels(precision)
