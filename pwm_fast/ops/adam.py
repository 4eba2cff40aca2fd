"""What a guarded step of Adam needs: the gradients' norm, and the whole step where kernels have it.

:class:`pwm_fast.agent.optim.GuardedAdam` keeps the state.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pwm_fast.backends.base import Call
from pwm_fast.backends.optimizer import Group, GuardedStep
from pwm_fast.backends.select import Operation, kernels, serving

__all__ = ["Group", "GuardedStep", "step_kernels", "total_norm"]

# Not declared: nobody asks for its backend by itself.
_STEP, _MOMENTS = Operation("adam", "optimizer"), Operation("esnr", "reduction")


def step_kernels(params: Sequence[Tensor]) -> GuardedStep | None:
    """What takes a whole step for these parameters, None where no backend does.

    Parameters are float32 and contiguous: on a CPU it is one call, on a GPU two launches.
    """
    if not all(p.is_contiguous() for p in params):
        return None
    backend = serving(_STEP, Call(params))
    return None if backend.is_reference else kernels("optimizer", backend.name, "exact")


def total_norm(grads: Sequence[Tensor]) -> Tensor:
    """Euclidean norm of all gradients together, float64, at any scale.

    In float32 squares overflow where an entry is 1.9e19, and are lost below 1e-19; in float64 at
    1.4e154 and 1e-162.
    """
    if all(g.device.type == "cpu" for g in grads):
        backend = serving(_MOMENTS, Call(grads))
        if not backend.is_reference:
            # A single sample's signal is its sum of squares: in float64 as fast as PyTorch's
            # float32.
            moments = kernels("reduction", backend.name, "exact").moments
            return moments(grads, 1)[0].sum().sqrt()
    if all(g.dtype != torch.float64 for g in grads):
        norms = torch._foreach_norm(list(grads), 2.0, dtype=torch.float64)
        return torch.linalg.vector_norm(torch.stack(norms))
    exact = [g.double() for g in grads if g.numel()]
    if not exact:
        return grads[0].new_zeros(())
    largest = torch.stack(torch._foreach_norm(exact, math.inf)).amax()
    scale = torch.where((largest > 0.0) & (largest < math.inf), largest, 1.0)
    norms = torch._foreach_norm(torch._foreach_div(exact, scale), 2.0)
    return scale * torch.linalg.vector_norm(torch.stack(norms))
