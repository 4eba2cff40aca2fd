"""A launch begins with a function that Triton generates from the kernel's arguments.

Neither the interpreter nor compiling ahead of time makes it, and it has names of its own, which no
argument may take.
"""

from __future__ import annotations

import pkgutil
from importlib import import_module
from typing import Any

import pytest

pytest.importorskip("triton")

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime import jit

import pwm_fast.kernels

MODULES = sorted(info.name for info in pkgutil.iter_modules(pwm_fast.kernels.__path__))


def kernels_of(name: str) -> list[Any]:
    """The functions of one module that are jitted there, helpers and kernels alike."""
    module = import_module(f"pwm_fast.kernels.{name}")
    functions = (f for f in vars(module).values() if isinstance(f, triton.JITFunction))
    return [f for f in functions if f.__module__ == module.__name__]


def bind(kernel: Any) -> tuple[dict[str, Any], list[Any], dict[str, Any]]:
    """What a launch with a 1 for every argument, and with two options, makes of them."""
    backend = make_backend(GPUTarget("cuda", 90, 32))
    binder = jit.create_function_from_signature(kernel.signature, kernel.params, backend)
    return binder(*(1 for _ in kernel.params), num_warps=4, num_stages=2)


@pytest.mark.parametrize("name", MODULES)
def test_arguments_reach_the_launch(name: str) -> None:
    for kernel in kernels_of(name):
        bound, specialization, options = bind(kernel)
        assert bound == {p.name: 1 for p in kernel.params}
        assert len(specialization) == len(kernel.params)
        assert options == {"num_warps": 4, "num_stages": 2}


def test_kernels_are_found() -> None:
    found = {name: len(kernels_of(name)) for name in MODULES}
    assert found["adam"] == 4  # two kernels and two helpers
    assert sum(found.values()) > 60


@triton.jit
def _takes_options(x_ptr, options):
    tl.store(x_ptr, tl.load(options))


@triton.jit
def _takes_params(x_ptr, params):
    tl.store(x_ptr, tl.load(params))


@pytest.mark.parametrize(
    ("kernel", "error"), [(_takes_options, SyntaxError), (_takes_params, TypeError)]
)
def test_its_own_names_are_refused(kernel: Any, error: type[Exception]) -> None:
    """Else the test above would say nothing about them."""
    with pytest.raises(error):
        bind(kernel)
