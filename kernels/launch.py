"""How kernels are launched: on the tensors' device, and with how many rows and warps a program."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.runtime.jit import JITFunction

#: Kernels run in Triton's interpreter, on CPU tensors (``TRITON_INTERPRET=1`` when triton was
#: imported).
INTERPRETING = bool(triton.knobs.runtime.interpret)

#: The widest row that a program keeps in registers.
MAX_WIDTH = 8192


class Tile(NamedTuple):
    """What a program of a row-wise kernel works on.

    Attributes:
        rows: at a time.
        block: columns, a power of two.
        warps: of the program.
    """

    rows: int
    block: int
    warps: int

    def grid(self, *shape: int) -> tuple[int, ...]:
        """Programs for so many rows, or for rows by columns."""
        return tuple(triton.cdiv(n, step) for n, step in zip(shape, self, strict=False))

    @property
    def options(self) -> dict[str, int]:
        """What a kernel with constants ROWS and BLOCK is launched with."""
        return {"ROWS": self.rows, "BLOCK": self.block, "num_warps": self.warps}


@lru_cache(maxsize=256)
def row_tile(n: int) -> Tile:
    """Whole rows of ``n`` features: one, or several where they are short.

    At least 512 numbers a program, 4 to 8 a thread: so 128 rows of 512 reach every multiprocessor,
    and rows up to 4096 stay within the registers of a full one.

    Raises:
        ValueError: the row does not fit.
    """
    if n > MAX_WIDTH:
        raise ValueError(f"rows of {n} features do not fit: at most {MAX_WIDTH}")
    block = max(triton.next_power_of_2(n), 16)
    rows = max(1, 512 // block)
    return Tile(rows, block, min(max(rows * block // 128, 1), 16))


def launch(
    kernel: Any,
    grid: Sequence[int],
    *args: Any,
    num_warps: int = 4,
    num_stages: int = 2,
    **constants: Any,
) -> None:
    """Run a kernel on the device of its first tensor; nothing if the grid is empty.

    Products and sums may be fused: our kernels are written for that, and a later Triton no longer
    does so unless told.
    """
    if 0 in grid:
        return
    settle(kernel)
    with _on(args):
        kernel[tuple(grid)](
            *args,
            num_warps=num_warps,
            num_stages=num_stages,
            enable_fp_fusion=True,
            **constants,
        )


def check_dense(name: str, x: Tensor, shape: Sequence[int], dtype: torch.dtype) -> None:
    """Check a tensor that a kernel takes without strides.

    Raises:
        ValueError: it is of another shape or dtype, or not contiguous.
    """
    if x.shape != torch.Size(shape) or x.dtype != dtype or not x.is_contiguous():
        raise ValueError(
            f"{name} must be a contiguous {list(shape)} of {dtype}, got {list(x.shape)} of "
            f"{x.dtype} with strides {x.stride()}"
        )


def settle(function: Any) -> None:
    """Hash what a kernel calls before the kernel, so that its key in Triton's cache is always one.

    Where a callee has no hash yet, Triton's key of the caller leaves the callee's constants out
    (triton-lang/triton#10494): a process whose first launches come in another order would compile
    again what lies in the cache.
    """
    if getattr(function, "hash", "") is not None:
        return  # it has one, or is none of Triton's compiled functions
    scope, names = function.fn.__globals__, function.fn.__code__.co_names
    found = [scope.get(name) for name in names]
    for module in [x for x in found if isinstance(x, ModuleType)]:
        found += [getattr(module, name, None) for name in names]
    for callee in found:
        own = isinstance(callee, JITFunction) and not callee.fn.__module__.startswith("triton.")
        if own and callee is not function:
            settle(callee)
    function.cache_key  # noqa: B018  it is kept


def _on(args: Sequence[Any]) -> AbstractContextManager[Any]:
    device = next(x.device for x in args if isinstance(x, Tensor))
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)
