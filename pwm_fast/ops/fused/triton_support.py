"""Whether Triton's kernels can run, without importing triton before they do."""

from __future__ import annotations

import importlib.util
import os

import torch


@torch.compiler.assume_constant_result
def why_not(device: str) -> str | None:
    """Why Triton's kernels cannot run on a type of device; None if they can."""
    if device not in ("cuda", "cpu"):
        return f"the tensors are on {device}; it runs on CUDA GPUs"
    interpreting = os.environ.get("TRITON_INTERPRET") == "1"
    if device == "cpu" and not interpreting:
        return "the tensors are on cpu; it runs on CUDA GPUs"
    if device == "cuda" and interpreting:
        return "TRITON_INTERPRET=1 is set; the interpreter is for tensors on the CPU"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return None
