"""Ways to write to weights, most of which move no version counter, for tests of what is kept."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters

Writer = Callable[[list[Tensor], list[Tensor]], None]  # of weights, and what they are to be


def _each(write: Callable[[Tensor, Tensor], object]) -> Writer:
    def run(weights: list[Tensor], new: list[Tensor]) -> None:
        for p, x in zip(weights, new, strict=True):
            write(p, x)

    return run


def _no_grad(p: Tensor, x: Tensor) -> None:
    with torch.no_grad():
        p.copy_(x)


def _set(p: Tensor, x: Tensor) -> None:
    with torch.no_grad():
        p.set_(x.clone())


def _memory(p: Tensor, x: Tensor) -> None:
    x = x.contiguous()
    assert p.is_contiguous()
    ctypes.memmove(p.data_ptr(), x.data_ptr(), 4 * p.numel())


def _vector(weights: list[Tensor], new: list[Tensor]) -> None:
    vector_to_parameters(parameters_to_vector(new), weights)


def _step(make: Any, weights: list[Tensor], new: list[Tensor]) -> None:
    """One step of an optimiser that ``make`` makes, towards the new values."""
    for p, x in zip(weights, new, strict=True):
        flag, p.requires_grad = p.requires_grad, True
        p.grad = p.detach() - x
        make([p]).step()
        p.grad, p.requires_grad = None, flag


_adam = partial(_step, partial(torch.optim.Adam, lr=0.05, fused=True))
_sgd = partial(_step, partial(torch.optim.SGD, lr=1.0, fused=True))


def _swap(p: Tensor, x: Tensor) -> None:
    if p.dim() == 1:
        p.data.copy_(x)
    else:
        p.data[..., [0, 1], :] = p.data[..., [1, 0], :]


def _one_bit(p: Tensor, x: Tensor) -> None:
    words = p.detach().numpy().view("int32").reshape(-1)
    words[-1] ^= 1 << 22  # half of its mantissa


WRITERS: dict[str, Writer] = {
    "no_grad copy_": _each(_no_grad),
    "data.copy_": _each(lambda p, x: p.data.copy_(x)),
    "data.lerp_": _each(lambda p, x: p.data.lerp_(x, 0.7)),
    "data.mul_": _each(lambda p, x: p.data.mul_(1.25)),
    "data.neg_": _each(lambda p, x: p.data.neg_()),
    "data, rows swapped": _each(_swap),
    "out=data": _each(lambda p, x: torch.lerp(p.data, x, 0.5, out=p.data)),
    "data=": _each(lambda p, x: setattr(p, "data", x.clone())),
    "set_": _each(_set),
    "foreach on data": lambda weights, new: torch._foreach_lerp_(
        [p.data for p in weights], new, 0.7
    ),
    "numpy": _each(lambda p, x: p.detach().numpy().__setitem__(..., x.numpy())),
    "dlpack": _each(lambda p, x: torch.from_dlpack(p.detach()).copy_(x)),
    "one bit": _each(_one_bit),
    "memory": _each(_memory),
    "vector_to_parameters": _vector,
    "fused Adam": _adam,
    "fused SGD": _sgd,
}


def from_another_process(weights: list[Tensor], new: list[Tensor]) -> None:
    """``weights`` are of :func:`mapped`: another process writes to their file."""
    name = weights[0].untyped_storage().filename
    with tempfile.NamedTemporaryFile() as file:
        torch.cat([x.detach().flatten() for x in new]).numpy().tofile(file.name)
        subprocess.run([sys.executable, "-c", _CHILD, name, file.name], check=True)


_CHILD = """
import sys
import numpy  # and no torch, which would take seconds to import
new = numpy.fromfile(sys.argv[2], dtype="float32")
flat = numpy.memmap(sys.argv[1], dtype="float32", mode="r+")
flat[: len(new)] = new
"""


def mapped(weights: list[Tensor], path: str) -> list[Tensor]:
    """The same numbers in the memory of a file, which any process may write to."""
    count = sum(x.numel() for x in weights)
    flat = torch.from_file(path, shared=True, size=count, dtype=torch.float32)
    parts = flat.split([x.numel() for x in weights])
    for part, x in zip(parts, weights, strict=True):
        part.copy_(x.detach().flatten())
    return [part.view(x.shape) for part, x in zip(parts, weights, strict=True)]
