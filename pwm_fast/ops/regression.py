"""Regression of an ensemble of value functions, past autograd where that can be."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from pwm_fast.backends.base import Call
from pwm_fast.backends.select import kernels, select
from pwm_fast.backends.specs import split_params
from pwm_fast.backends.transforms import watched
from pwm_fast.fused import regression as fused
from pwm_fast.ops.coverage import layer_tensors, unsupported, without_width
from pwm_fast.ops.types import Layer
from pwm_fast.ops.weights import flat, specs_of

#: ``x [B, K]`` and ``targets [B]`` to the loss and the gradients, in the order of the parameters.
RegressionStep = Callable[[Tensor, Tensor], tuple[Tensor, list[Tensor]]]


def regression(layers: Sequence[Layer], x: Tensor) -> RegressionStep | None:
    """The mean squared error of an ensemble's values and its gradients, as one function.

    The backend is chosen here, once; the function reads the parameters anew in every call. Its
    gradients lie in buffers that the next call overwrites.

    Args:
        layers: of the members, ``act_norm`` ones and a Linear of width 1 (see
            :class:`pwm_fast.models.CriticEnsemble`): weights ``[E, N, K]``, vectors ``[E, N]``.
        x: ``[B, K]``, what the function will take, or as many rows.

    Returns:
        The function; None where the way through :func:`pwm_fast.ops.mlp` and autograd is to be
        taken: on GPUs, in reduced precision, on the reference, for other layers, and where somebody
        watches operators.

    Raises:
        BackendError: the backend that is asked for cannot run these layers.
    """
    tensors = layer_tensors(layers)
    if watched() or layers[0].weight.dim() != 3 or x.numel() == 0:
        return None
    reason = unsupported(layers, "act_norm") or without_width((x,), layers)
    choice = select("mlp", None, Call([x, *tensors], reason))
    if choice.is_reference or not all(t.is_contiguous() for t in tensors):
        return None
    specs = specs_of(layers, "act_norm")
    params = split_params(specs, flat(layers))
    own = kernels("gemm", choice.name, choice.precision.name)
    if not fused.covers(own, specs, params):
        return None
    return fused.regression(own, specs, params, x.shape[0])
