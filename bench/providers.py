"""Who computes a case: names, labels, and how each way of computing is switched on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib import import_module
from typing import Any

import torch

from pwm_fast import dispatch
from pwm_fast.ops.fused.gemm import cpu_multiplies_bf16

LABELS = {
    "published": "eager fp32 as published",
    "published_baseline": "MLP baseline, eager fp32 as published",
    "separate": "a tensor a field, episodes not kept apart",
    "frozen": "eager fp32, frozen",
    "autocast": "eager bf16 autocast",
    "tf32": "eager tf32",
    "compile": "torch.compile fp32",
    "graph": "CUDA graph of eager fp32",
    "reference": "pwm_fast, reference backend",
    "algebra": "pwm_fast, torch backend",
    "fast": "pwm_fast fp32",
    "fast_bf16": "pwm_fast bf16",
    "floor": "floor",
    "floor_bf16": "floor in bf16",
}

BF16_PEERS = ("autocast", "floor_bf16")  # plain PyTorch in bf16
BACKENDS = {"reference": "reference", "algebra": "torch", "fast": "auto"}


class Absent(Exception):
    """A provider cannot run here; the message says why. Its row is left out, never made up."""


def backend(provider: str, device: torch.device) -> AbstractContextManager[Any]:
    """The context in which ``pwm_fast`` computes as the provider says.

    Raises:
        Absent: nothing here computes so.
    """
    need(provider, device)
    if provider == "fast_bf16":
        return dispatch.precision("bf16")
    return dispatch.backend(BACKENDS[provider])


def pointless(provider: str, device: torch.device) -> str | None:
    """Why a row would take long to show what everybody knows; None if it is worth its time."""
    capability = torch.backends.cpu.get_cpu_capability()
    if provider in BF16_PEERS and device.type == "cpu" and not capability.startswith("AVX512"):
        return f"PyTorch emulates bf16 on this CPU ({capability}), many times slower than fp32"
    if provider == "fast_bf16" and device.type == "cpu" and not cpu_multiplies_bf16():
        return "this CPU has no bf16 products: rounded operands are multiplied in fp32, no faster"
    return None


def need(provider: str, device: torch.device) -> None:
    """Raise :class:`Absent` if ``pwm_fast`` cannot compute as the provider says.

    ``auto`` would fall back on the reference, whose numbers must not stand in a row of ``fast``.
    """
    if provider in ("reference", "algebra"):
        return
    if device.type == "cpu":
        try:
            import_module("pwm_fast._C")
        except ImportError as error:
            raise Absent(f"the native extension does not load: {error}") from error
        return
    x = torch.zeros(1, 1, device=device)
    if dispatch.select("mlp", "auto", dispatch.Call([x])) == "reference":
        raise Absent(f"no fast backend runs on {device.type} yet")


@contextmanager
def tf32() -> Iterator[None]:
    """Products of fp32 tensors in tf32 on the tensor cores."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def eager(provider: str, device: torch.device) -> AbstractContextManager[Any]:
    """The context of a plain PyTorch provider."""
    if provider == "autocast":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    if provider == "tf32":
        return tf32()
    return nullcontext()


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.compile`` of a function for one shape, with errors as :class:`Absent`.

    One macro step or one operation is compiled, not a rollout of 16: that would take minutes.
    """
    # Every case brings shapes of its own; Dynamo would give up after 8 and run eagerly.
    torch.compiler.reset()
    target = torch.compile(function, dynamic=False, fullgraph=True)

    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return target(*args, **kwargs)
        except Exception as error:
            if "compiler" in str(error).lower() and "InvalidCxxCompiler" in type(error).__name__:
                raise Absent(f"torch.compile finds no C++ compiler: {error}") from error
            raise

    return call
