"""Runs the tests marked ``gpu`` without a GPU, to find what is wrong in the tests themselves.

::

    python -m pytest -p tests.fake_gpu -m gpu tests

They run on PyTorch's fake tensors (:mod:`bench.fake_cuda`), at their full sizes: nothing is
computed or launched, a number that is asked for is 1, and comparisons come out as they should. What
shows is wrong code: names, arguments, shapes, and tensors on the wrong device. Values show in
Triton's interpreter, which runs the same functions on small sizes (``tests/kernels/harness.py``).
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from bench.fake_cuda import PROPERTIES, FakeCuda

_NUMBERS = {"_local_scalar_dense", "item"}
_YES = {"equal", "allclose", "is_nonzero"}


class Pretending(FakeCuda):
    """Answers what asks for a value."""

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        name = func.overloadpacket.__name__
        if name in _NUMBERS:
            return _one(args[0].dtype)
        if name in _YES:
            return True
        if name == "nonzero":
            return args[0].new_zeros((args[0].numel(), args[0].dim()), dtype=torch.int64)
        if name in ("index", "index_put_", "index_put"):
            values = [args[0].new_zeros(()) if x.dim() == 0 else x for x in args[2:3]]
            args = (args[0], _all_of(args[1]), *values, *args[3:])
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _refuse_host(self, func: Any, values: Any) -> None:
        """The tests may copy."""


def _all_of(indices: Any) -> list[Tensor | None]:
    """Masks as indices, of all entries."""
    found: list[Tensor | None] = []
    for i in indices:
        masks = isinstance(i, Tensor) and i.dtype == torch.bool
        found += [i.new_zeros(i.numel(), dtype=torch.int64)] * i.dim() if masks else [i]
    return found


def _one(dtype: torch.dtype) -> bool | int | float:
    if dtype == torch.bool:
        return True
    return 1.0 if dtype.is_floating_point else 1


class _Methods(TorchFunctionMode):
    """What reads memory in C++, without an operator."""

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is Tensor.tolist:
            return _list(args[0].shape, _one(args[0].dtype))
        return func(*args, **(kwargs or {}))


def _list(shape: torch.Size, value: Any) -> Any:
    return [_list(shape[1:], value) for _ in range(shape[0])] if shape else value


class _Generator(torch.Generator):
    def __new__(cls, device: Any = "cpu") -> _Generator:
        return super().__new__(cls)


class _Graph(mock.MagicMock):
    """Nothing is recorded or replayed."""


def _context(*_: Any, **__: Any) -> Any:
    return mock.MagicMock()


_CUDA = {
    "is_available": lambda: True,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "get_device_properties": lambda *_: PROPERTIES,
    "get_device_capability": lambda *_: (9, 0),
    "get_device_name": lambda *_: PROPERTIES.name,
    "mem_get_info": lambda *_: (2**36, 2**36),
    "memory_reserved": lambda *_: 0,
    "get_sync_debug_mode": lambda: 0,
    "set_sync_debug_mode": lambda mode: None,
    "set_per_process_memory_fraction": lambda *_: None,
    "synchronize": lambda *_: None,
    "_sleep": lambda cycles: None,
    "Stream": _context,
    "Event": _context,
    "current_stream": _context,
    "stream": _context,
    "device": _context,
    "CUDAGraph": _Graph,
    "graph": _context,
}
# Before any test is imported: marks ask whether there is a GPU.
for _name, _value in _CUDA.items():
    setattr(torch.cuda, _name, _value)
torch.Generator = _Generator  # type: ignore[misc]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, None, None]:
    same = mock.Mock()
    with (
        mock.patch.object(torch.testing, "assert_close", same),
        mock.patch("tests.helpers._distance", lambda x, ref: 0.0 * (x.double() - ref).dim()),
        Pretending(),
        _Methods(),
    ):
        return (yield)
