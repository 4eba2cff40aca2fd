"""Input checks shared by the public operations: messages name the argument and what it was."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from pwm_fast.ops.types import ACTIVATIONS, METHODS, Layer


def floating(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"{name} must have a floating dtype, got {x.dtype}")


def not_one_tensor(name: str, x: object) -> None:
    """Iterating over a tensor would silently take its rows."""
    if isinstance(x, Tensor):
        raise TypeError(
            f"{name} must be a sequence of tensors, got a single one of shape {tuple(x.shape)}"
        )


def vectors(name: str, x: Tensor) -> None:
    """A floating tensor with a last axis to work on."""
    floating(name, x)
    if x.dim() == 0:
        raise ValueError(f"{name} must have at least one axis, got a scalar")


def same_device(name: str, x: Tensor, like_name: str, device: torch.device) -> None:
    if x.device != device:
        raise ValueError(f"{name} is on {x.device}, but {like_name} is on {device}")


def same_rows(name: str, x: Tensor, like_name: str, like: Tensor) -> None:
    """Both have the same shape but for the last axis, and live on one device."""
    vectors(name, x)
    if x.shape[:-1] != like.shape[:-1]:
        raise ValueError(
            f"{name} has leading shape {tuple(x.shape[:-1])}, "
            f"but {like_name} has {tuple(like.shape[:-1])}"
        )
    same_device(name, x, like_name, like.device)


def flow_time(tau: Tensor, like_name: str, like: Tensor) -> None:
    """A scalar, or one time for each row of ``like``, with or without a last axis of 1."""
    floating("tau", tau)
    rows = tuple(like.shape[:-1])
    if tau.dim() and tuple(tau.shape) not in (rows, (*rows, 1)):
        raise ValueError(f"tau must be a scalar, {rows} or {(*rows, 1)}, got {tuple(tau.shape)}")
    same_device("tau", tau, like_name, like.device)


def one_of(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def positive_int(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")


def method(value: str) -> None:
    one_of("method", value, METHODS)


def simnorm_width(name: str, width: int, dim_name: str, dim: int) -> None:
    positive_int(dim_name, dim)
    if width % dim:
        raise ValueError(
            f"{name} has width {width}, not divisible by the SimNorm group width {dim}"
        )


def layer(
    name: str,
    params: Layer,
    inputs: int,
    device: torch.device,
    *,
    ensemble: bool = False,
    lead: Sequence[int] | None = None,
) -> int:
    """Check one layer against its input width and device; return its output width.

    ``lead`` is the leading shape of its output, members first; None where no layer may drop out.
    """
    floating(f"{name}.weight", params.weight)
    if params.weight.dim() != (3 if ensemble else 2):
        wanted = "[E, N, K]" if ensemble else "[N, K]"
        raise ValueError(f"{name}.weight must be {wanted}, got {tuple(params.weight.shape)}")
    same_device(f"{name}.weight", params.weight, "the input", device)
    *members, width, expected = params.weight.shape
    if expected != inputs:
        raise ValueError(f"{name}.weight takes {expected} inputs, but {inputs} arrive")
    if (params.ln_weight is None) != (params.ln_bias is None):
        raise ValueError(f"{name}: ln_weight and ln_bias must be given together")
    for field in ("bias", "ln_weight", "ln_bias"):
        vector = getattr(params, field)
        if vector is None:
            continue
        floating(f"{name}.{field}", vector)
        if tuple(vector.shape) != (*members, width):
            raise ValueError(
                f"{name}.{field} must be {[*members, width]}, got {tuple(vector.shape)}"
            )
        same_device(f"{name}.{field}", vector, "the input", device)
    one_of(f"{name}.act", params.act, ACTIVATIONS)
    if params.act == "simnorm":
        simnorm_width(name, width, f"{name}.simnorm_dim", params.simnorm_dim)
    if params.drops:
        shape = None if lead is None else [*lead, width]
        dropout(f"{name}.dropout", params.dropout, shape, device)
    return width


def dropout(
    name: str,
    value: float | Tensor,
    shape: Sequence[int] | None,
    device: torch.device,
) -> None:
    """A rate, or a mask of ``shape``; neither where that is None."""
    if shape is None:
        given = f"a mask {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise ValueError(
            f"{name} must be 0 here, got {given}: only mlp, linear_norm_act and linear_act_norm "
            "drop out"
        )
    if isinstance(value, Tensor):
        floating(name, value)
        if list(value.shape) != list(shape):
            raise ValueError(
                f"{name} must be a rate in [0, 1] or a mask {list(shape)}, got {tuple(value.shape)}"
            )
        same_device(name, value, "the input", device)
    elif isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a rate or a mask, got {type(value).__name__}")
    elif not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} must be a rate in [0, 1], got {value!r}")


def layers(
    name: str,
    net: Sequence[Layer],
    inputs: int,
    device: torch.device,
    *,
    ensemble: bool = False,
    lead: Sequence[int] | None = None,
) -> int:
    """Check a stack of layers; return its output width. See :func:`layer`."""
    if len(net) == 0:
        raise ValueError(f"{name} must hold at least one layer")
    width = inputs
    for i, params in enumerate(net):
        width = layer(f"{name}[{i}]", params, width, device, ensemble=ensemble, lead=lead)
        if ensemble and params.weight.shape[0] != net[0].weight.shape[0]:
            raise ValueError(
                f"{name}[{i}].weight has {params.weight.shape[0]} members, "
                f"but {name}[0].weight has {net[0].weight.shape[0]}"
            )
    return width


def members(name: str, chosen: Sequence[int], count: int) -> list[int]:
    """Numbers of some of ``count`` members."""
    if not hasattr(chosen, "__len__"):
        kind = type(chosen).__name__
        raise TypeError(f"{name} must be a sequence of integers or a tensor, got {kind}")
    if len(chosen) == 0:
        raise ValueError(f"{name} must name at least one of the {count} members, got none")
    numbers = []
    for i, number in enumerate(chosen):
        if isinstance(number, bool) or not hasattr(number, "__index__"):
            raise TypeError(f"{name}[{i}] must be an integer, got {type(number).__name__}")
        numbers.append(operator.index(number))
        if not 0 <= numbers[-1] < count:
            raise ValueError(f"{name}[{i}] must be from 0 to {count - 1}, got {numbers[-1]}")
    return numbers


def value_range(bins: int, vmin: float, vmax: float) -> None:
    if bins < 2:
        raise ValueError(f"a two-hot head needs at least 2 bins, got {bins}")
    if not vmin < vmax:
        raise ValueError(f"vmin must be below vmax, got vmin={vmin}, vmax={vmax}")
