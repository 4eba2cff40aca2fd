"""The elementwise kernels in Triton (:mod:`pwm_fast.kernels`): float32 tensors on a CUDA GPU.

This module imports triton: :mod:`pwm_fast.backends.triton_support` says before whether it can.

With ``TRITON_INTERPRET=1`` in the environment they run on CPU tensors, in Triton's interpreter: far
too slowly for anything but tests.
"""

from __future__ import annotations

from pwm_fast.backends.fused_gemm import FusedGemms
from pwm_fast.backends.precision import EXACT, Precision
from pwm_fast.backends.triton_gemm import TritonGemms
from pwm_fast.kernels import act_norm, axpby, centre, norm_act, simnorm, two_hot


class TritonKernels:
    """See :class:`pwm_fast.backends.base.Kernels`."""

    name = "triton"
    wgrad_16bit = True
    cast_at_once = True
    persistent = True

    norm_act_fwd = staticmethod(norm_act.norm_act_fwd)
    norm_act_bwd = staticmethod(norm_act.norm_act_bwd)
    act_norm_fwd = staticmethod(act_norm.act_norm_fwd)
    act_norm_bwd = staticmethod(act_norm.act_norm_bwd)
    cast = staticmethod(axpby.cast)
    scaled_rows = staticmethod(axpby.scaled_rows)
    axpby = staticmethod(axpby.axpby)  # after the others: the name then is no module
    centre = staticmethod(centre.centre)
    simnorm_fwd = staticmethod(simnorm.simnorm_fwd)
    simnorm_bwd = staticmethod(simnorm.simnorm_bwd)
    two_hot_decode_fwd = staticmethod(two_hot.two_hot_decode_fwd)
    two_hot_decode_bwd = staticmethod(two_hot.two_hot_decode_bwd)
    two_hot_ce_fwd = staticmethod(two_hot.two_hot_ce_fwd)
    two_hot_ce_bwd = staticmethod(two_hot.two_hot_ce_bwd)

    def __init__(self, precision: Precision = EXACT) -> None:
        self.precision = precision
        self.gemms: FusedGemms | None = TritonGemms(precision)
