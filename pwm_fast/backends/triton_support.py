"""Triton as a backend, and whether its kernels can run: triton is not imported before they do."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from importlib import import_module
from typing import Any

import torch

from pwm_fast.backends.base import Backend, Call, fused_why_not, reduction_why_not
from pwm_fast.backends.precision import Precision
from pwm_fast.backends.transforms import constant_result

_CAPABILITY = (8, 0)
_MODULES = {"returns": "returns", "optimizer": "adam"}  # of kernels/, by family


@constant_result
def why_not(device: str) -> str | None:
    """Why Triton's kernels cannot run on a device, as ``"cuda:1"``; None if they can."""
    kind = device.partition(":")[0]
    if kind not in ("cuda", "cpu"):
        return f"the tensors are on {device}; it runs on CUDA GPUs"
    interpreting = os.environ.get("TRITON_INTERPRET") == "1"
    if kind == "cpu" and not interpreting:
        return "the tensors are on cpu; it runs on CUDA GPUs"
    if kind == "cuda" and interpreting:
        return "TRITON_INTERPRET=1 is set; the interpreter is for tensors on the CPU"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if kind == "cuda" and torch.cuda.is_available():
        found = torch.cuda.get_device_capability(device)
        if torch.version.hip is not None or found < _CAPABILITY:
            return f"{device} has compute capability {found[0]}.{found[1]}; it needs 8.0 or more"
    return None


class Triton(Backend):
    """Triton on a CUDA GPU: float32, reductions also 16 bits."""

    name = "triton"
    families = frozenset({"gemm", "rows", "returns", "reduction", "stream", "optimizer"})
    tensor_cores = True
    precisions: Mapping[str, str] = {"gemm": "fast"}

    def why_not(self, family: str, call: Call) -> str | None:
        """See :class:`Backend`."""
        first = call.tensors[0]
        reason = why_not(str(first.device))
        if reason is not None:
            return reason
        if family in ("reduction", "stream"):
            return reduction_why_not(call)
        if first.dtype != torch.float32:
            return f"the tensors are {first.dtype}; it computes in float32"
        if call.precision == "tf32" and first.device.type != "cuda":
            return f"precision 'tf32' is CUDA's; the tensors are on {first.device}"
        return fused_why_not(call)

    def kernels(self, family: str, precision: Precision) -> Any:
        """See :class:`Backend`; imports triton."""
        if family in ("reduction", "stream"):
            from pwm_fast.kernels.esnr import TritonEsnr

            return TritonEsnr()
        if family in _MODULES:
            return import_module(f"pwm_fast.kernels.{_MODULES[family]}")
        from pwm_fast.backends.triton import TritonKernels

        return TritonKernels(precision)
