"""Whatever the benchmarks take of pwm_fast beyond its public faces, so that it is few and seen.

The tuner runs single kernels, the fake device and the counts of launches look inside operations.
What imports Triton is imported where it is asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from pwm_fast.backends import select
from pwm_fast.backends.base import Kernels
from pwm_fast.backends.native import why_missing
from pwm_fast.backends.precision import EXACT, FAST, TF32
from pwm_fast.backends.specs import DynamicsSpec, LayerParams, LayerSpec
from pwm_fast.backends.torch import TorchKernels
from pwm_fast.fused import folded, gemm, imagine, layered, mlp_backward, weight_cache, wgrad
from pwm_fast.fused.dynamics import Dynamics, DynamicsWeights
from pwm_fast.fused.fingerprint import fingerprint
from pwm_fast.fused.folded import Folded
from pwm_fast.kernels import plan as planning
from pwm_fast.kernels import tuning
from pwm_fast.kernels.cost import CONSTANTS

_TRITON = {
    "rollout_kernels": "pwm_fast.kernels.rollout",
    "persistent": "pwm_fast.fused.persistent",
    "triton_backend": "pwm_fast.backends.triton",
    "triton_gemm": "pwm_fast.backends.triton_gemm",
}

__all__ = [
    "CONSTANTS",
    "EXACT",
    "FAST",
    "TF32",
    "Dynamics",
    "DynamicsSpec",
    "DynamicsWeights",
    "Folded",
    "Kernels",
    "LayerParams",
    "LayerSpec",
    "TorchKernels",
    "fingerprint",
    "folded",
    "gemm",
    "imagine",
    "layered",
    "mlp_backward",
    "planning",
    "select",
    "tuning",
    "weight_cache",
    "wgrad",
    "why_missing",
]


def __getattr__(name: str) -> Any:
    if name in _TRITON:
        return import_module(_TRITON[name])
    raise AttributeError(name)
