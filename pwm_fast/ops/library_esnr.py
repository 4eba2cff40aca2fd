"""ESNR operators: a reduction over lists of tensors, without gradients.

See :mod:`pwm_fast.ops.library` for the conventions.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from pwm_fast.backends.esnr import EsnrKernels, TorchEsnr
from pwm_fast.ops.library import define, no_gradient, register_gradient


@lru_cache(maxsize=8)
def _esnr_kernels(backend: str) -> EsnrKernels:
    """The kernels of a backend."""
    if backend == "cuda":
        from pwm_fast.backends.cuda import CudaEsnr

        return CudaEsnr()
    if backend == "triton":
        from pwm_fast.kernels.esnr import TritonEsnr

        return TritonEsnr()
    if backend == "native":
        from pwm_fast.backends.native import NativeEsnr

        return NativeEsnr()
    return TorchEsnr()


def _esnr(grads: list[Tensor], samples: int, backend: str) -> tuple[Tensor, Tensor]:
    """Signal and noise of each tensor, float64; ``grads`` holds sample after sample."""
    return _esnr_kernels(backend).moments(grads, samples)


def _esnr_fake(grads: list[Tensor], samples: int, backend: str) -> tuple[Tensor, Tensor]:
    tensors = len(grads) // samples
    return (
        grads[0].new_empty(tensors, dtype=torch.float64),
        grads[0].new_empty(tensors, dtype=torch.float64),
    )


define("esnr", "(Tensor[] grads, int samples, str backend) -> (Tensor, Tensor)", _esnr, _esnr_fake)


def _esnr_setup(ctx: Any, inputs: Any, output: Any) -> None:
    pass


def _esnr_grad(ctx: Any, *grads: Any) -> Any:
    raise no_gradient("esnr", "grads")


register_gradient("esnr", _esnr_grad, _esnr_setup)


def _esnr_update(
    grads: list[Tensor], origins: list[Tensor], sums: list[Tensor], squares: Tensor, backend: str
) -> None:
    """Take a sample into a streamed estimate: see :class:`EsnrKernels`."""
    _esnr_kernels(backend).update(grads, origins, sums, squares)


define(
    "esnr_update",
    "(Tensor[] grads, Tensor[] origins, Tensor(a!)[] sums, Tensor(b!) squares, str backend) -> ()",
    _esnr_update,
    lambda grads, origins, sums, squares, backend: None,
)


def _esnr_result(
    origins: list[Tensor], sums: list[Tensor], squares: Tensor, samples: int, backend: str
) -> tuple[Tensor, Tensor]:
    """Signal and noise of a streamed estimate: see :class:`EsnrKernels`."""
    return _esnr_kernels(backend).result(origins, sums, squares, samples)


define(
    "esnr_result",
    "(Tensor[] origins, Tensor[] sums, Tensor squares, int samples, str backend)"
    " -> (Tensor, Tensor)",
    _esnr_result,
    lambda origins, sums, squares, samples, backend: (
        torch.empty_like(squares),
        torch.empty_like(squares),
    ),
)
