"""Public layer operations."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pwm_fast.backends import select
from pwm_fast.backends.pointwise import mish as activate_mish
from pwm_fast.fused import calls
from pwm_fast.ops import _checks
from pwm_fast.ops.reference import layers as reference
from pwm_fast.ops.types import ACTIVATIONS, ORDERS, Activation, Layer, Order


def simnorm(x: Tensor, dim: int = 8, *, backend: str | None = None) -> Tensor:
    """Softmax over consecutive groups of the last axis (simplicial normalisation).

    Args:
        x: ``[..., D]``, any floating dtype; D a multiple of ``dim``.
        dim: group width V.
        backend: see :mod:`pwm_fast.backends`.

    Returns:
        ``[..., D]``: every group of V is non-negative and sums to 1.

    Raises:
        TypeError: ``x`` is not a floating tensor.
        ValueError: D is not a multiple of ``dim``.
        BackendError: the backend that was asked for cannot run this.

    Source: Lavoie et al. 2022 (arXiv 2204.00616); TD-MPC2 (arXiv 2310.16828), section 3.1.
    """
    _checks.vectors("x", x)
    _checks.simnorm_width("x", x.shape[-1], "dim", dim)
    call = select.Call([x], calls.without_width([x]))
    name = select.select("simnorm", backend, call)
    if name in calls.ROW_KERNELS:
        return calls.simnorm(name, x, dim)
    return reference.simnorm(x, dim)


def project_simplex(x: Tensor, dim: int = 8) -> Tensor:
    """Clamp at 0 and divide every group of the last axis by its sum, which becomes 1.

    A group without a positive entry stays 0.

    Args:
        x: ``[..., D]``, any floating dtype; D a multiple of ``dim``.
        dim: group width.

    Raises:
        TypeError: ``x`` is not a floating tensor.
        ValueError: D is not a multiple of ``dim``.
    """
    _checks.vectors("x", x)
    _checks.simnorm_width("x", x.shape[-1], "dim", dim)
    return reference.project_simplex(x, dim)


def mish(x: Tensor) -> Tensor:
    """``x tanh(softplus(x))``, elementwise (Misra 2019, arXiv 1908.08681).

    Args:
        x: any shape and floating dtype.

    Raises:
        TypeError: ``x`` is not a floating tensor.
    """
    _checks.floating("x", x)
    return activate_mish(x)


def layer_norm_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    act: Activation = "mish",
    simnorm_dim: int = 8,
    eps: float = 1e-5,
    backend: str | None = None,
) -> Tensor:
    """LayerNorm over the last axis followed by an activation.

    Args:
        x: ``[..., N]``, any floating dtype.
        weight: scale ``[N]``.
        bias: shift ``[N]``.
        act: ``"mish"`` (``x tanh(softplus(x))``), ``"simnorm"`` or ``"none"``.
        simnorm_dim: group width for ``act="simnorm"``.
        eps: added to the variance.
        backend: see :mod:`pwm_fast.backends`.

    Returns:
        ``[..., N]`` in the dtype of ``x``.

    Raises:
        TypeError: a tensor is not floating.
        ValueError: a shape, ``act`` or ``simnorm_dim`` does not fit.
        BackendError: the backend that was asked for cannot run this.
    """
    _checks.vectors("x", x)
    width = x.shape[-1]
    for name, vector in (("weight", weight), ("bias", bias)):
        _checks.floating(name, vector)
        if tuple(vector.shape) != (width,):
            raise ValueError(f"{name} must be [{width}], got {tuple(vector.shape)}")
    _checks.one_of("act", act, ACTIVATIONS)
    if act == "simnorm":
        _checks.simnorm_width("x", width, "simnorm_dim", simnorm_dim)
    call = select.Call([x, weight, bias], calls.without_width([x]))
    name = select.select("layer_norm_act", backend, call)
    if name in calls.ROW_KERNELS:
        return calls.layer_norm_act(name, x, weight, bias, act, simnorm_dim, eps)
    return reference.layer_norm_act(x, weight, bias, act, simnorm_dim, eps)


def linear_norm_act(x: Tensor, layer: Layer, *, backend: str | None = None) -> Tensor:
    """NormedLinear: ``act(LayerNorm(x W^T + b))``, the layer of PWM's and TD-MPC2's world models.

    Args:
        x: ``[..., K]``, any floating dtype.
        layer: parameters; without ``ln_weight`` it is Linear and activation.
        backend: see :mod:`pwm_fast.backends`.

    Returns:
        ``[..., N]``.

    Raises:
        TypeError: a tensor is not floating.
        ValueError: shapes or options of ``layer`` do not fit ``x``.
        BackendError: the backend that was asked for cannot run this.
    """
    _checks.vectors("x", x)
    _checks.layer("layer", layer, x.shape[-1], x.device)
    return _run((x,), (layer,), "norm_act", backend)


def linear_act_norm(x: Tensor, layer: Layer, *, backend: str | None = None) -> Tensor:
    """``LayerNorm(act(x W^T + b))``, the order of PWM's actor and critics; ensembles in one call.

    Args:
        x: ``[..., K]``; for an ensemble ``[B, K]`` (shared) or ``[E, B, K]`` (one per member).
        layer: ``weight [N, K]``, or ``[E, N, K]`` with vectors ``[E, N]`` for an ensemble.
        backend: see :mod:`pwm_fast.backends`.

    Returns:
        ``[..., N]``, or ``[E, B, N]`` for an ensemble.

    Raises:
        TypeError: a tensor is not floating.
        ValueError: shapes or options do not fit.
        BackendError: the backend that was asked for cannot run this.
    """
    _checks.vectors("x", x)
    _checks.floating("layer.weight", layer.weight)
    axes = layer.weight.dim()
    if axes not in (2, 3):
        raise ValueError(f"layer.weight must be [N, K] or [E, N, K], got {axes} axes")
    if axes == 3:
        members = layer.weight.shape[0]
        if x.dim() not in (2, 3) or (x.dim() == 3 and x.shape[0] != members):
            raise ValueError(
                f"x must be [B, K] or [{members}, B, K] for an ensemble of {members}, "
                f"got {tuple(x.shape)}"
            )
    _checks.layer("layer", layer, x.shape[-1], x.device, ensemble=axes == 3)
    return _run((x,), (layer,), "act_norm", backend, per_member=axes == 3 and x.dim() == 3)


def mlp(
    inputs: Sequence[Tensor],
    layers: Sequence[Layer],
    *,
    order: Order = "norm_act",
    backend: str | None = None,
) -> Tensor:
    """A stack of layers over logically concatenated inputs.

    Args:
        inputs: tensors ``[..., K_i]`` with one leading shape; their widths add up to the first
            layer's input width, in this order.
        layers: parameters of each layer, first to last; of an ensemble (``order="act_norm"``)
            weights ``[E, N, K]`` and vectors ``[E, N]``.
        order: ``"norm_act"`` for layers as :func:`linear_norm_act`, ``"act_norm"`` for layers as
            :func:`linear_act_norm`.
        backend: see :mod:`pwm_fast.backends`.

    Returns:
        ``[..., N]`` of the last layer; ``[E, ..., N]`` of an ensemble.

    Raises:
        TypeError: a tensor is not floating.
        ValueError: shapes, devices or options do not fit.
        BackendError: the backend that was asked for cannot run this.
    """
    if len(inputs) == 0:
        raise ValueError("inputs must hold at least one tensor")
    _checks.vectors("inputs[0]", inputs[0])
    for i, x in enumerate(inputs[1:], start=1):
        _checks.same_rows(f"inputs[{i}]", x, "inputs[0]", inputs[0])
    _checks.one_of("order", order, ORDERS)
    ensemble = order == "act_norm" and len(layers) > 0 and layers[0].weight.dim() == 3
    width = sum(x.shape[-1] for x in inputs)
    _checks.layers("layers", layers, width, inputs[0].device, ensemble=ensemble)
    return _run(inputs, layers, order, backend)


def _run(
    inputs: Sequence[Tensor],
    layers: Sequence[Layer],
    order: Order,
    backend: str | None,
    *,
    per_member: bool = False,
) -> Tensor:
    """An MLP; ``per_member``: the first axis of a layer's input are the ensemble's members."""
    reason = calls.unsupported(layers, order) or calls.without_width(inputs, layers)
    if per_member:
        reason = "the members of the ensemble have inputs of their own"
    elif layers[0].weight.dim() == 3 and inputs[0].numel() == 0:
        reason = "the batch of the ensemble is empty"
    call = select.Call([*inputs, *calls.layer_tensors(layers)], reason)
    name = select.select("mlp", backend, call)
    if name != "reference":
        return calls.mlp(name, inputs, layers, order)
    if order == "norm_act":
        return reference.mlp(inputs, layers)
    return (
        reference.linear_act_norm(inputs[0], layers[0])
        if per_member
        else (reference.act_norm_mlp(inputs, layers))
    )
