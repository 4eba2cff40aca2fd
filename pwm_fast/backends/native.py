"""The element kernels in C++ (``csrc/``): float32 tensors on the CPU."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from pwm_fast.backends.base import Backend, Call, fused_why_not
from pwm_fast.backends.esnr import TorchEsnr
from pwm_fast.backends.precision import EXACT, Precision

_ACTS = {"none": 0, "mish": 1, "simnorm": 2}
_FP32 = 0
_TYPES = {torch.float32: _FP32, torch.bfloat16: 1}


def _load() -> tuple[Any, str | None, str | None]:
    """The extension on torch's own OpenMP threads, that runtime's path, and why there is none."""
    try:
        from pwm_fast import _C
    except ImportError as error:
        return None, None, f"the native extension does not load ({error})"
    if not hasattr(_C, "checksum"):
        return None, None, "the native extension is of an older version: reinstall"
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


def _ptr(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _type(x: Tensor | None) -> int:
    return _FP32 if x is None else _TYPES[x.dtype]


class NativeKernels:
    """See :class:`pwm_fast.backends.base.Kernels`; row-wise tensors are contiguous."""

    name = "native"

    def __init__(self, precision: Precision = EXACT) -> None:
        self._c = extension()
        self.precision = precision

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
        """See :class:`Kernels`."""
        rows, n = x.shape
        self._c.norm_act_fwd(
            x.data_ptr(),
            n,
            _TYPES[x.dtype],
            _ptr(add),
            n,
            1 if add is None else add.shape[0],
            _ptr(tau),
            0 if tau is None or tau.numel() == 1 else 1,
            _ptr(w_tau),
            _ptr(bias),
            gamma.data_ptr(),
            beta.data_ptr(),
            y.data_ptr(),
            n,
            _TYPES[y.dtype],
            _ptr(xhat),
            _type(xhat),
            _ptr(rstd),
            rows,
            n,
            _ACTS[act],
            group,
            eps,
            torch.get_num_threads(),
            width,
        )

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
        """See :class:`Kernels`; scales belong to fp16, which these kernels do not have."""
        rows, n = dy.shape
        self._c.norm_act_bwd(
            dy.data_ptr(),
            n,
            _TYPES[dy.dtype],
            xhat.data_ptr(),
            _TYPES[xhat.dtype],
            rstd.data_ptr(),
            gamma.data_ptr(),
            beta.data_ptr(),
            _ptr(y),
            n,
            _type(y),
            dx.data_ptr(),
            n,
            _TYPES[dx.dtype],
            _ptr(dgamma),
            _ptr(dbeta),
            _ptr(dbias),
            rows,
            n,
            _ACTS[act],
            group,
            torch.get_num_threads(),
            width,
        )

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
        """See :class:`Kernels`."""
        rows, n = x.shape
        self._c.act_norm_fwd(
            x.data_ptr(),
            n,
            _TYPES[x.dtype],
            _ptr(bias),
            _ptr(gamma),
            _ptr(beta),
            y.data_ptr(),
            n,
            _TYPES[y.dtype],
            _ptr(u),
            _type(u),
            _ptr(mean),
            _ptr(rstd),
            rows,
            n,
            _ACTS[act],
            rows_per_member,
            eps,
            torch.get_num_threads(),
        )

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
        """See :class:`Kernels`; scales belong to fp16, which these kernels do not have."""
        rows, n = dy.shape
        self._c.act_norm_bwd(
            dy.data_ptr(),
            n,
            _TYPES[dy.dtype],
            u.data_ptr(),
            _TYPES[u.dtype],
            _ptr(mean),
            _ptr(rstd),
            _ptr(gamma),
            dx.data_ptr(),
            n,
            _TYPES[dx.dtype],
            _ptr(dgamma),
            _ptr(dbeta),
            _ptr(dbias),
            rows,
            n,
            _ACTS[act],
            rows_per_member,
            torch.get_num_threads(),
        )

    def axpby(
        self,
        z: Tensor,
        k1: Tensor,
        k2: Tensor | None,
        out: Tensor,
        c1: float,
        c2: float,
        *,
        operand: Tensor | None = None,
        k1_scale: Tensor | None = None,
        k2_scale: Tensor | None = None,
    ) -> None:
        """See :class:`Kernels`; scales belong to fp16, which these kernels do not have."""
        self._c.axpby(
            z.data_ptr(),
            k1.data_ptr(),
            _ptr(k2),
            out.data_ptr(),
            c1,
            c2,
            z.numel(),
            torch.get_num_threads(),
        )
        if operand is not None:
            operand.copy_(out)

    def to_operand(self, x: Tensor, out: Tensor, scale: Tensor | None) -> None:
        """See :class:`Kernels`."""
        out.copy_(x)

    # --- what has no twin in the fused algebra: rows are contiguous ----------------------------

    def simnorm_fwd(self, x: Tensor, y: Tensor, group: int) -> None:
        """``y = softmax`` over groups of ``x [R, n]``."""
        rows, n = x.shape
        self._c.simnorm_fwd(
            x.data_ptr(), n, y.data_ptr(), n, rows, n, group, torch.get_num_threads()
        )

    def simnorm_bwd(self, dy: Tensor, y: Tensor, dx: Tensor, group: int) -> None:
        """Gradient of :meth:`simnorm_fwd`, from its result ``y``."""
        rows, n = y.shape
        self._c.simnorm_bwd(
            dy.data_ptr(),
            n,
            y.data_ptr(),
            n,
            dx.data_ptr(),
            n,
            rows,
            n,
            group,
            torch.get_num_threads(),
        )

    def two_hot_decode_fwd(
        self,
        logits: Tensor,
        value: Tensor,
        mean: Tensor,
        lse: Tensor,
        vmin: float,
        vmax: float,
        transform: bool,
    ) -> None:
        """Expectation of logits ``[R, bins]`` over the centres; saves mean and log-sum-exp."""
        rows, bins = logits.shape
        self._c.two_hot_decode_fwd(
            logits.data_ptr(),
            bins,
            _FP32,
            value.data_ptr(),
            mean.data_ptr(),
            lse.data_ptr(),
            rows,
            bins,
            vmin,
            vmax,
            transform,
            torch.get_num_threads(),
        )

    def two_hot_decode_bwd(
        self,
        dvalue: Tensor,
        logits: Tensor,
        mean: Tensor,
        lse: Tensor,
        dlogits: Tensor,
        vmin: float,
        vmax: float,
        transform: bool,
    ) -> None:
        """Gradient of :meth:`two_hot_decode_fwd`."""
        rows, bins = logits.shape
        self._c.two_hot_decode_bwd(
            dvalue.data_ptr(),
            logits.data_ptr(),
            bins,
            _FP32,
            mean.data_ptr(),
            lse.data_ptr(),
            dlogits.data_ptr(),
            bins,
            rows,
            bins,
            vmin,
            vmax,
            transform,
            torch.get_num_threads(),
        )

    def two_hot_ce_fwd(
        self,
        logits: Tensor,
        x: Tensor,
        loss: Tensor,
        lse: Tensor,
        vmin: float,
        vmax: float,
        transform: bool,
    ) -> None:
        """Cross-entropy of logits ``[R, bins]`` against the two-hot code of ``x [R]``."""
        rows, bins = logits.shape
        self._c.two_hot_ce_fwd(
            logits.data_ptr(),
            bins,
            _FP32,
            x.data_ptr(),
            loss.data_ptr(),
            lse.data_ptr(),
            rows,
            bins,
            vmin,
            vmax,
            transform,
            torch.get_num_threads(),
        )

    def two_hot_ce_bwd(
        self,
        dloss: Tensor,
        logits: Tensor,
        x: Tensor,
        lse: Tensor,
        dlogits: Tensor,
        vmin: float,
        vmax: float,
        transform: bool,
    ) -> None:
        """Gradient of :meth:`two_hot_ce_fwd` towards the logits."""
        rows, bins = logits.shape
        self._c.two_hot_ce_bwd(
            dloss.data_ptr(),
            logits.data_ptr(),
            bins,
            _FP32,
            x.data_ptr(),
            lse.data_ptr(),
            dlogits.data_ptr(),
            bins,
            rows,
            bins,
            vmin,
            vmax,
            transform,
            torch.get_num_threads(),
        )


def words(numbers: Iterable[int]) -> Tensor:
    """A table for native code, in the CPU's memory: torch's default device may be another."""
    return torch.tensor([*numbers], dtype=torch.int64, device="cpu")


class NativeEsnr(TorchEsnr):
    """See :class:`pwm_fast.backends.esnr.EsnrKernels`; only the moments are native."""

    def __init__(self) -> None:
        self._c = extension()

    def moments(self, grads: Sequence[Tensor], samples: int) -> tuple[Tensor, Tensor]:
        """See :class:`EsnrKernels`."""
        tensors = len(grads) // samples
        whole = [g.contiguous() for g in grads]  # named: alive until the call is over
        pointers, sizes = words(g.data_ptr() for g in whole), words(g.numel() for g in whole)
        signal = torch.empty(tensors, dtype=torch.float64, device="cpu")
        noise = torch.empty_like(signal)
        self._c.esnr(
            pointers.data_ptr(),
            sizes.data_ptr(),
            signal.data_ptr(),
            noise.data_ptr(),
            samples,
            tensors,
            torch.get_num_threads(),
        )
        return signal, noise


class Native(Backend):
    """C++ on the CPU: float32."""

    name = "native"
    families = frozenset({"gemm", "rows", "reduction"})
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

    def kernels(self, family: str, precision: Precision) -> NativeKernels | NativeEsnr:
        """See :class:`Backend`."""
        return NativeEsnr() if family == "reduction" else NativeKernels(precision)
