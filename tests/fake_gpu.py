"""Runs the tests marked ``gpu`` without a GPU, to find what is wrong in the tests themselves.

::

    python -m pytest -p tests.fake_gpu -m gpu tests

They run on PyTorch's fake tensors (:mod:`bench.fake_cuda`), at their full sizes: nothing is
computed or launched, a number that is asked for is 1, and what is asserted is only evaluated. What
shows is wrong code: names, arguments, shapes, and tensors on the wrong device. Values show in
Triton's interpreter, which runs the same functions on small sizes (``tests/kernels/harness.py``).
Tests that start a Python of their own are skipped: it would have no GPU. One fails, that of a full
memory: this one never is.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Generator
from typing import Any
from unittest import mock

import pytest
import torch
from _pytest.assertion import rewrite
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from bench.fake_cuda import DEVICE, PROPERTIES, FakeCuda

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
            devices = {x.device for x in args[:2] if isinstance(x, Tensor)}
            if len(devices) > 1:
                raise RuntimeError(f"{func} compares tensors on {devices}")
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


def _to(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
    """In the place of ``nn.Module.to``, which would set the data of a fake tensor."""
    for each in module.modules():
        for name, p in each._parameters.items():
            if p is not None:
                moved = p.detach().to(*args, **kwargs)
                each._parameters[name] = nn.Parameter(moved, p.requires_grad)
        for name, x in each._buffers.items():
            each._buffers[name] = None if x is None else x.to(*args, **kwargs)
    return module


class _Methods(TorchFunctionMode):
    """What reads memory in C++, without an operator, and which CUDA device is meant."""

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is Tensor.tolist:
            return _list(args[0].shape, _one(args[0].dtype))
        if func is torch.device:
            return func(*args, **(kwargs or {}))
        if func is Tensor.cuda:
            return args[0].to(DEVICE)
        # Asked for the current one, C++ would name the CPU, whose guard takes the place of CUDA's.
        return func(*map(_indexed, args), **{k: _indexed(v) for k, v in (kwargs or {}).items()})


def _indexed(x: Any) -> Any:
    return DEVICE if isinstance(x, str | torch.device) and str(x) == "cuda" else x


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
    "set_device": lambda device: None,
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


class _Evaluated(ast.NodeTransformer):
    def visit_Assert(self, node: ast.Assert) -> ast.Expr:
        return ast.copy_location(ast.Expr(node.test), node)


# In the place of pytest's rewriting of what is asserted, with files of its own in __pycache__.
rewrite.rewrite_asserts = lambda module, *_: _Evaluated().visit(module)
rewrite.PYC_TAIL = f"-fake-gpu{rewrite.PYC_TAIL}"
pytest.register_assert_rewrite("tests")


def _compared(ours: Any, theirs: Any, **_: Any) -> None:
    """In the place of ``torch.testing.assert_close``."""
    for a, b in zip(tree_leaves(ours), tree_leaves(theirs), strict=True):
        _ = a - b


_FAKE = Pretending()  # one for all: what is kept in caches belongs to it, and so do copies
FakeTensorMode.__deepcopy__ = lambda self, memo: self  # type: ignore[attr-defined]


_start = subprocess.Popen.__init__


def _process(self: Any, command: Any, *args: Any, **kwargs: Any) -> None:
    if sys.executable in command:
        pytest.skip("starts a process, which would have no GPU")
    _start(self, command, *args, **kwargs)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, None, None]:
    with (
        mock.patch.object(torch.testing, "assert_close", _compared),
        mock.patch.object(subprocess.Popen, "__init__", _process),
        _FAKE,
        mock.patch.object(nn.Module, "to", _to),
        _Methods(),
    ):
        return (yield)
