"""The reference as a backend: the plain PyTorch that each operation has beside its kernels."""

from __future__ import annotations

from typing import Any

from pwm_fast.backends.base import FAMILIES, Backend, Call
from pwm_fast.backends.precision import Precision


class Reference(Backend):
    """Plain PyTorch: every operation, dtype, device and derivative."""

    name = "reference"
    families = frozenset(FAMILIES)
    is_reference = True

    def why_not(self, family: str, call: Call) -> str | None:
        """See :class:`Backend`."""
        if call.precision not in ("auto", "exact"):
            return (
                f"precision {call.precision!r} is asked for; it computes in the tensors' own dtype"
            )
        return None

    def kernels(self, family: str, precision: Precision) -> Any:
        """It has none: operations run their own plain form."""
        raise NotImplementedError
