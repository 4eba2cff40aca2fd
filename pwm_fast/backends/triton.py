"""The kernels in Triton (:mod:`pwm_fast.kernels`): float32 tensors on a CUDA GPU.

This module imports triton: :mod:`pwm_fast.backends.triton_support` says before whether it can.

With ``TRITON_INTERPRET=1`` in the environment they run on CPU tensors, in Triton's interpreter: far
too slowly for anything but tests.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from pwm_fast import kernels
from pwm_fast.backends.fused_gemm import FusedGemms
from pwm_fast.backends.precision import EXACT, Precision
from pwm_fast.backends.triton_gemm import TritonGemms
from pwm_fast.kernels import axpby


def kernel(name: str) -> Any:
    """The function ``name`` of ``kernels/<stem>.py``, whose name begins with the stem.

    Raises:
        AttributeError: there is none.
    """
    stem = name
    while stem:
        if stem in kernels.STEMS:
            return getattr(import_module(f"{kernels.__name__}.{stem}"), name)
        stem = stem.rpartition("_")[0]
    raise AttributeError(f"no module of pwm_fast.kernels has a kernel {name!r}")


class TritonKernels:
    """See :class:`pwm_fast.backends.base.Kernels`; kernels are found by their stems."""

    name = "triton"
    wgrad_16bit = True
    cast_at_once = True
    persistent = True
    row_program = None

    cast = staticmethod(axpby.cast)
    scaled_rows = staticmethod(axpby.scaled_rows)

    if TYPE_CHECKING:
        norm_act_fwd: Any
        norm_act_bwd: Any
        act_norm_fwd: Any
        act_norm_bwd: Any
        axpby: Any
        centre: Any

    def __init__(self, precision: Precision = EXACT) -> None:
        self.precision = precision
        self.gemms: FusedGemms | None = TritonGemms(precision)

    def __getattr__(self, name: str) -> Any:
        function = kernel(name)
        setattr(type(self), name, staticmethod(function))
        return function
