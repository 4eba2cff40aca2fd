"""Who computes a case: names, labels, and how each way of computing is switched on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from importlib import import_module
from typing import Any

import torch

from bench.internals import gemm, select

LABELS = {
    "published": "as published (PyTorch, eager fp32)",
    "published_baseline": "MLP dynamics as published (PyTorch, eager fp32)",
    "separate": "a tensor a field, episodes not kept apart",
    "foreach": "torch.optim.Adam(foreach=True)",
    "fused": "torch.optim.Adam(fused=True)",
    "native": "native MuJoCo on all CPU threads",
    "mujoco_warp": "pwm_fast on mujoco-warp",
    "frozen": "eager fp32, frozen",
    "autocast": "eager bf16 autocast",
    "tf32": "eager tf32",
    "compile": "torch.compile fp32",
    "compile_tf32": "torch.compile tf32, CUDA graph",
    "compile_bf16": "torch.compile bf16 autocast, CUDA graph",
    "compile_max": "torch.compile bf16 autocast, max-autotune, CUDA graph",
    "graph": "CUDA graph of eager fp32",
    "jax": "JAX jit, default precision",
    "jax_bf16": "JAX jit, bf16 operands",
    "diffrax": "JAX jit with diffrax, default precision",
    "reference": "pwm_fast, reference backend",
    "algebra": "pwm_fast, torch backend",
    "fast": "pwm_fast fp32",
    "fast_edit": "pwm_fast fp32, only the Q functions that are used",
    "fast_bf16": "pwm_fast bf16",
    "fast_tf32": "pwm_fast tf32",
    "fast_fp16": "pwm_fast fp16 (fast)",
    "fast_graph": "pwm_fast fp32, CUDA graph",
    "fast_bf16_graph": "pwm_fast bf16, CUDA graph",
    "fast_tf32_graph": "pwm_fast tf32, CUDA graph",
    "fast_fp16_graph": "pwm_fast fp16 (fast), CUDA graph",
    "floor": "floor",
    "floor_tf32": "floor in tf32",
    "floor_bf16": "floor in bf16",
}

BF16_PEERS = ("autocast", "floor_bf16", "compile_bf16", "compile_max")  # plain PyTorch in bf16
BACKENDS = {"reference": "reference", "algebra": "torch"}
# What `select.precision` is told.
PRECISIONS = {"fast": "exact", "fast_tf32": "tf32", "fast_bf16": "bf16", "fast_fp16": "fast"}
OURS = tuple(PRECISIONS)
GRAPH = "_graph"  # ends the name of a provider whose call is replayed from a CUDA graph
CONTEXTS = {
    **dict.fromkeys(("autocast", "compile_bf16", "compile_max"), "autocast"),
    **dict.fromkeys(("tf32", "compile_tf32", "floor_tf32"), "tf32"),
}
MODES = {"compile_max": "max-autotune-no-cudagraphs"}  # of torch.compile

# Whose error a provider's is compared with: plain PyTorch in its precision. fp16 and tf32 have the
# same mantissa; JAX's default precision is tf32 on a GPU.
_TF32_PEERS = ("fast_tf32", "fast_fp16", "compile_tf32", "jax", "diffrax")
_BF16_UNITS = ("autocast", "fast_bf16", "compile_bf16", "compile_max", "jax_bf16")


def unit_of(provider: str, device: torch.device) -> str:
    """The provider of plain PyTorch whose error is the unit of this one's."""
    base = provider.removesuffix(GRAPH)
    if base == "tf32" or base in _TF32_PEERS:
        # A CPU has no tf32: its results are as good as float32's or as bad as bf16's. JAX's are the
        # former.
        if device.type == "cpu" and base in ("jax", "diffrax"):
            return "published"
        return "tf32" if device.type == "cuda" else "autocast"
    return "autocast" if base in _BF16_UNITS else "published"


class Absent(Exception):
    """A provider cannot run here; the message says why. Its row is left out, never made up."""


@contextmanager
def backend(provider: str, device: torch.device, operation: str = "mlp") -> Iterator[None]:
    """The context in which ``pwm_fast`` computes as the provider says.

    Raises:
        Absent: nothing here computes so.
    """
    need(provider, device, operation)
    base = provider.removesuffix(GRAPH)
    with ExitStack() as stack:
        stack.enter_context(select.backend(BACKENDS.get(base, "auto")))
        if base in PRECISIONS:
            stack.enter_context(select.precision(PRECISIONS[base]))
        yield


def pointless(provider: str, device: torch.device) -> str | None:
    """Why a row would take long to show what everybody knows; None if it is worth its time."""
    capability = torch.backends.cpu.get_cpu_capability()
    if provider in BF16_PEERS and device.type == "cpu" and not capability.startswith("AVX512"):
        return f"PyTorch emulates bf16 on this CPU ({capability}), many times slower than fp32"
    if provider == "fast_bf16" and device.type == "cpu" and not gemm.cpu_multiplies_bf16():
        return "this CPU has no bf16 products: rounded operands are multiplied in fp32, no faster"
    return None


def need(provider: str, device: torch.device, operation: str = "mlp") -> None:
    """Raise :class:`Absent` if ``pwm_fast`` cannot compute as the provider says.

    ``auto`` would fall back on the reference, whose numbers must not stand in a row of ``fast``.
    """
    base = provider.removesuffix(GRAPH)
    if base != provider and device.type != "cuda":
        raise Absent("a CUDA graph needs a GPU")
    if base in BACKENDS:
        return
    if base in ("fast_tf32", "fast_fp16") and device.type == "cpu":
        raise Absent(f"{PRECISIONS[base]} is a precision of GPUs")
    if device.type == "cpu":
        try:
            import_module("pwm_fast._C")
        except ImportError as error:
            raise Absent(f"the native extension does not load: {error}") from error
        return
    x = torch.zeros(1, 1, device=device)
    with select.precision(PRECISIONS[base]):
        try:
            taken = select.select(operation, "auto", select.Call([x]))
        except select.BackendError as error:
            raise Absent(str(error)) from error
    if taken == "reference":
        raise Absent(f"no fast backend runs on {device.type} yet")


@contextmanager
def tf32() -> Iterator[None]:
    """GEMMs of fp32 tensors in tf32 on the tensor cores."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def eager(provider: str, device: torch.device) -> AbstractContextManager[Any]:
    """The context of a plain PyTorch provider."""
    context = CONTEXTS.get(provider)
    if context == "autocast":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return tf32() if context == "tf32" else nullcontext()


def compiled(function: Callable[..., Any], mode: str | None = None) -> Callable[..., Any]:
    """``torch.compile`` of a function for one shape, with errors as :class:`Absent`.

    One macro step or one operation is compiled, not a rollout of 16: that would take minutes.
    """
    # Every case brings shapes of its own; Dynamo would give up after 8 and run eagerly.
    torch.compiler.reset()
    target = torch.compile(function, dynamic=False, fullgraph=True, mode=mode)

    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return target(*args, **kwargs)
        except Exception as error:
            if "compiler" in str(error).lower() and "InvalidCxxCompiler" in type(error).__name__:
                raise Absent(f"torch.compile finds no C++ compiler: {error}") from error
            raise

    return call
