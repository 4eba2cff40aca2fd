"""The kernels in CUDA C++ (``csrc/cuda``), part of the native extension where nvcc built it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pwm_fast.backends import native
from pwm_fast.backends.base import Backend, Call, reduction_why_not
from pwm_fast.backends.precision import Precision
from pwm_fast.backends.transforms import constant_result

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@constant_result
def why_not(device: int) -> str | None:
    """Why the kernels cannot run on CUDA device ``device``; None if they can."""
    if native.why_missing() is not None:
        return native.why_missing()
    extension = native.extension()
    if not hasattr(extension, "cuda_why_not"):
        return "the native extension is of an older version: reinstall"
    return extension.cuda_why_not(device) or None


class CudaEsnr:
    """See :class:`pwm_fast.backends.esnr.EsnrReduction`; float32, bfloat16 and float16.

    Launches go to the current stream of the tensors' device. They copy nothing from the host's
    memory and wait for nothing, so a CUDA graph can capture them.
    """

    _prefix = "cuda_esnr"

    def __init__(self) -> None:
        self._c = native.extension()

    def moments(self, grads: Sequence[Tensor], samples: int) -> tuple[Tensor, Tensor]:
        """See :class:`EsnrReduction`."""
        count = len(grads) // samples
        whole = [g.contiguous() for g in grads]  # named: alive until the launches are made
        signal, noise = _results(count, whole[0].device)
        self._call("", whole, samples, signal=signal, noise=noise, m=samples)
        return signal, noise

    def update(
        self,
        grads: Sequence[Tensor],
        origins: Sequence[Tensor],
        sums: Sequence[Tensor],
        squares: Tensor,
    ) -> None:
        """See :class:`EsnrReduction`."""
        whole = [g.contiguous() for g in grads]
        self._call("_update", [*whole, *origins, *sums], 3, squares=squares)

    def result(
        self, origins: Sequence[Tensor], sums: Sequence[Tensor], squares: Tensor, samples: int
    ) -> tuple[Tensor, Tensor]:
        """See :class:`EsnrReduction`."""
        signal, noise = _results(len(origins), squares.device)
        results = {"signal": signal, "noise": noise}
        self._call("_result", [*origins, *sums], 2, squares=squares, m=samples, **results)
        return signal, noise

    def _call(self, task: str, tensors: Sequence[Tensor], rows: int, **rest: Tensor | int) -> None:
        """Run a kernel on ``rows`` rows of as many tensors each; ``rest`` are its own arguments."""
        first, count = tensors[0], len(tensors) // rows
        addresses = native.words(x.data_ptr() for x in tensors)
        sizes = native.words(x.numel() for x in tensors[:count])
        words = self._c.esnr_workspace_words(sizes.data_ptr(), count, rows)
        workspace = torch.empty(words, dtype=torch.int64, device=first.device)
        getattr(self._c, self._prefix + task)(
            rows=addresses.data_ptr(),
            sizes=sizes.data_ptr(),
            type=_TYPES[first.dtype],
            **{k: x.data_ptr() if isinstance(x, Tensor) else x for k, x in rest.items()},
            tensors=count,
            workspace=workspace.data_ptr(),
            words=words,
            **self._where(first.device),
        )

    def _where(self, device: torch.device) -> dict[str, Any]:
        """Device and stream of a call."""
        stream = torch.cuda.current_stream(device).cuda_stream
        return {"device": device.index, "stream": stream}


def _results(count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    signal = torch.empty(count, dtype=torch.float64, device=device)
    return signal, torch.empty_like(signal)


class Cuda(Backend):
    """CUDA C++: reductions on a GPU."""

    name = "cuda"
    families = frozenset({"reduction", "stream"})

    def why_not(self, family: str, call: Call) -> str | None:
        """See :class:`Backend`."""
        first = call.tensors[0]
        if first.device.type != "cuda":
            return f"the tensors are on {first.device}; it runs on CUDA GPUs"
        return reduction_why_not(call) or why_not(first.device.index or 0)

    def kernels(self, family: str, precision: Precision) -> CudaEsnr:
        """See :class:`Backend`."""
        return CudaEsnr()
