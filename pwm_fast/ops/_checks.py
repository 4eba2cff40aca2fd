"""Input checks shared by the public operations: messages name the argument and what it was."""

from __future__ import annotations

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
    name: str, params: Layer, inputs: int, device: torch.device, *, ensemble: bool = False
) -> int:
    """Check one layer against its input width and device; return its output width."""
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
    return width


def layers(
    name: str,
    net: Sequence[Layer],
    inputs: int,
    device: torch.device,
    *,
    ensemble: bool = False,
) -> int:
    """Check a stack of layers; return its output width."""
    if len(net) == 0:
        raise ValueError(f"{name} must hold at least one layer")
    width = inputs
    for i, params in enumerate(net):
        width = layer(f"{name}[{i}]", params, width, device, ensemble=ensemble)
    return width


def value_range(bins: int, vmin: float, vmax: float) -> None:
    if bins < 2:
        raise ValueError(f"a two-hot head needs at least 2 bins, got {bins}")
    if not vmin < vmax:
        raise ValueError(f"vmin must be below vmax, got vmin={vmin}, vmax={vmax}")
