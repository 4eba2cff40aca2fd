"""Fails where a computation asks the device for a value: what makes a GPU's host wait.

On a GPU, work is queued and the host runs ahead. The host has to wait where Python needs a number
(``item``, ``float``, ``if tensor``: all of them are ``aten._local_scalar_dense``), where the shape
of a result depends on values (``nonzero``, boolean indexing, ``unique``, ...), and where data moves
to the host. The first two are visible without a GPU: each is an operator that passes the dispatcher
on every device, so a dispatch mode sees it on the CPU too, in the backward pass as well. Operators
whose CUDA kernels wait inside (``embedding_renorm_``) are listed by name. ``tolist``, ``numpy`` and
``cpu`` do nothing on a CPU that an operator would show: a function mode sees them by their names.
Other copies between devices are not visible on a CPU; the tests marked ``gpu`` have CUDA's own
check for them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

FORBIDDEN = {
    "_local_scalar_dense",
    "item",
    "is_nonzero",
    "equal",
    "allclose",
    "nonzero",
    "nonzero_numpy",
    "argwhere",
    "masked_select",
    "unique_dim",
    "unique_consecutive",
    "_unique",
    "_unique2",
    "bincount",
    "repeat_interleave",  # without output_size
    "embedding_renorm_",
    "multinomial",  # checks its probabilities
    "_linalg_check_errors",
}


FORBIDDEN_METHODS = {Tensor.tolist, Tensor.numpy, Tensor.cpu, Tensor.__array__}


class HostSyncError(AssertionError):
    """A value was asked for."""


class NoSync(TorchDispatchMode):
    """Raises :class:`HostSyncError` at operators that wait for the device; counts the others."""

    def __init__(self) -> None:
        super().__init__()
        self.operators = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        name = func.overloadpacket.__name__
        if name in FORBIDDEN or (name.startswith(("index", "_index")) and _boolean(args)):
            raise HostSyncError(f"{func} waits for the device")
        self.operators += 1
        return func(*args, **(kwargs or {}))


class _NoHostMethods(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func in FORBIDDEN_METHODS:
            raise HostSyncError(f"Tensor.{func.__name__} waits for the device")
        return func(*args, **(kwargs or {}))


def _boolean(args: tuple[Any, ...]) -> bool:
    """A boolean or byte mask among the indices: its number of entries set is asked for."""
    indices = args[1] if len(args) > 1 and isinstance(args[1], list | tuple) else ()
    return any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in indices)


@contextmanager
def no_sync(device: torch.device | str = "cpu") -> Iterator[NoSync]:
    """Inside, waiting for the device is an error; on CUDA also where CUDA itself sees it."""
    cuda = torch.device(device).type == "cuda"
    before = torch.cuda.get_sync_debug_mode() if cuda else 0
    if cuda:
        torch.cuda.set_sync_debug_mode("error")
    try:
        with _NoHostMethods(), NoSync() as mode:
            yield mode
    finally:
        if cuda:
            torch.cuda.set_sync_debug_mode(before)
