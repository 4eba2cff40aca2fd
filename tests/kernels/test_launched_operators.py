"""All that the operators launch takes the path of a GPU, and every kernel is launched somewhere.

See test_launched_updates.py.
"""

from __future__ import annotations

import pkgutil
from importlib import import_module

import pytest
import torch

pytest.importorskip("triton")

if torch.cuda.is_available():
    pytest.skip("stands in for a GPU where there is none", allow_module_level=True)

import triton

import pwm_fast.kernels
from bench.launches import count
from bench.plain import algorithm
from pwm_fast.backends import select
from pwm_fast.ops import registration
from tests.kernels.launched import (
    OPERATIONS,
    PRECISIONS,
    Watched,
    needs_launcher,
    run_esnr,
    run_operation,
)
from tests.ops.contract import Case

BATCH, WIDTH = 7, 33
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def run(cuda: Watched, precision: str, case: Case, shift: int = 0) -> None:
    """One operation of the contract, forward and backward."""
    inputs = case.inputs(BATCH, min(WIDTH, case.widths[-1]), torch.float32)
    with cuda, select.backend("triton"), select.precision(precision):
        run_operation(case, inputs, shift)


@needs_launcher
@pytest.mark.slow
@pytest.mark.parametrize(
    "precision",
    [
        # Kernels of "fast" on another dtype, which whole updates in bf16 launch too.
        pytest.param(x, marks=pytest.mark.repeats) if x == "bf16" else x
        for x in PRECISIONS
    ],
)
def test_operators_are_launched(precision: str) -> None:
    cuda = Watched()
    for case in OPERATIONS:
        run(cuda, precision, case)
    assert len(cuda.kernels) > 10


@needs_launcher
@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fast", "exact"])
def test_operators_on_unaligned_tensors_are_launched(precision: str) -> None:
    cuda = Watched()
    for case in OPERATIONS:
        run(cuda, precision, case, shift=1)
    assert len(cuda.kernels) > 10


@needs_launcher
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_esnr_is_launched(dtype: torch.dtype) -> None:
    cuda = Watched()
    with cuda:
        run_esnr(dtype)
    assert len(cuda.kernels) == 4


def entries() -> set[str]:
    """Kernels that the modules launch; what they call from these has other names."""
    names = [info.name for info in pkgutil.iter_modules(pwm_fast.kernels.__path__)]
    modules = [import_module(f"pwm_fast.kernels.{name}") for name in names]
    functions = [f for module in modules for f in vars(module).values()]
    jitted = {f.__name__ for f in functions if isinstance(f, triton.JITFunction)}
    return {name for name in jitted if name.endswith("_kernel")}


@pytest.mark.slow
def test_every_operator_and_every_kernel_is_among_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """A part of what these two files launch, without compiling it again."""
    called = set()
    for name, inside in registration.IMPLEMENTATIONS.items():

        def implementation(*args, _name=name, _inside=inside):
            called.add(_name)
            return _inside(*args)

        monkeypatch.setitem(registration.IMPLEMENTATIONS, name, implementation)
    cuda = Watched(compile=False)
    for precision in ("fast", "exact"):
        for case in OPERATIONS:
            run(cuda, precision, case)
    with cuda:
        run_esnr(torch.float32)
    assert called == set(registration.IMPLEMENTATIONS)
    count(algorithm("pwm_5M_flow"), "triton", "fast", cuda=cuda)
    assert cuda.kernels == entries()
