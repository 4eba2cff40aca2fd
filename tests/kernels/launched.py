"""What launches on the fake device are checked for, and what is launched there."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.fake_cuda import DEVICE, PROPERTIES, FakeCuda
from bench.fake_driver import last_launch, why_not
from pwm_fast import ops
from tests.ops.contract import CASES, Case
from tests.ops.test_backends import NATIVE

PRECISIONS = ("fast", "tf32", "bf16", "exact")
OPERATIONS = (*NATIVE, *(case for case in CASES if case.name == "td_lambda"))
needs_launcher = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
#: Of a launch before CUDA 12.1.
MOST_BYTES = 4096
_FORMATS = {"i1": "b", "u1": "b", "i32": "i", "u32": "I", "i64": "q", "u64": "Q", "fp32": "f"}


class Watched(FakeCuda):
    """Compiles and launches, and checks what reaches the driver; ``kernels`` are those launched."""

    def __init__(self, compile: bool = True) -> None:
        super().__init__(compile)
        self.kernels: set[str] = set()
        self.cooperative: set[str] = set()

    def _launched(
        self, kernel: Any, args: tuple[Any, ...], options: dict[str, Any], made: Any
    ) -> None:
        super()._launched(kernel, args, options, made)
        name = kernel.fn.__name__
        self.kernels.add(name)
        if made is None:
            return
        launch = last_launch()
        assert launch.function == made.function, name
        assert tuple(launch.grid) == (*options["grid"], 1, 1)[:3], name
        assert tuple(launch.block) == (32 * options["num_warps"], 1, 1), name
        assert launch.registers * launch.block[0] <= PROPERTIES.regs_per_multiprocessor, name
        assert launch.shared == made.metadata.shared, name
        assert launch.shared <= PROPERTIES.shared_memory_per_block_optin, name
        together = options.get("launch_cooperative_grid", False)
        assert launch.cooperative == together, name
        if together:
            self.cooperative.add(name)
        assert launch.bytes <= MOST_BYTES, name
        wanted = parameters(kernel, args, options, made)
        assert bytes(launch.values[: launch.bytes]) == wanted, name


def parameters(kernel: Any, args: tuple[Any, ...], options: dict[str, Any], made: Any) -> bytes:
    """What a kernel should find in its parameters: the given ones, and two scratch pointers.

    Constants and what is specialised like one (None, 1) are none.
    """
    given = dict(zip(kernel.arg_names, args, strict=False)) | options
    found = [
        leaf for name, kind in made.src.signature.items() for leaf in _leaves(kind, given[name])
    ]
    formats = "".join("Q" if kind[0] == "*" else _FORMATS[kind] for kind, _ in found)
    values = [x.data_ptr() if isinstance(x, Tensor) else x for _, x in found]
    return struct.pack(f"@{formats}QQ", *values, 0, 0)


def _leaves(kind: Any, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(kind, tuple):
        for each in zip(kind, value, strict=True):
            yield from _leaves(*each)
    elif kind != "constexpr":
        yield kind, value


def run_operation(case: Case, inputs: dict[str, Tensor], shift: int = 0) -> None:
    """An operation forward and backward on the active fake device.

    Args:
        case: the operation.
        inputs: tensors of the right shapes, on the host.
        shift: elements by which the inputs are off an aligned address.
    """
    leaves = {
        name: _empty(x.shape, shift).requires_grad_(name not in case.constants)
        for name, x in inputs.items()
    }
    outputs = case.call(leaves)
    wanted = [x for x in leaves.values() if x.requires_grad]
    torch.autograd.grad(outputs, wanted, [_empty(y.shape, shift) for y in outputs])


def _empty(shape: torch.Size, shift: int) -> Tensor:
    return torch.empty(shape.numel() + shift, device=DEVICE)[shift:].view(shape)


def run_esnr(dtype: torch.dtype) -> None:
    """Moments of gradient samples at once and one by one, on the active fake device."""
    grads = [[torch.empty(n, dtype=dtype, device=DEVICE) for n in (5000, 3)] for _ in range(3)]
    ops.esnr(grads, backend="triton")
    with torch.device(DEVICE):
        accumulator = ops.EsnrAccumulator(backend="triton")
    for sample in grads:
        accumulator.update(sample)
    accumulator.result()
