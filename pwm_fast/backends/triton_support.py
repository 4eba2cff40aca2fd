"""Whether Triton's kernels can run, without importing triton before they do."""

from __future__ import annotations

import importlib.util
import os

import torch

_CAPABILITY = (8, 0)


@torch.compiler.assume_constant_result
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
