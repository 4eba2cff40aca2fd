"""The operator that packs layers: see :mod:`pwm_fast.fused.centre`.

See :mod:`pwm_fast.ops.library` for the conventions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pwm_fast.backends.specs import decode_layers
from pwm_fast.fused import centre
from pwm_fast.ops.library import define, filled, first_order_only, kernels, register_gradient


def _pack(
    tensors: list[Tensor], spec: str, pad: bool, backend: str
) -> tuple[list[Tensor], list[Tensor]]:
    return centre.pack(kernels(backend), decode_layers(spec), tensors, pad)


def _pack_fake(
    tensors: list[Tensor], spec: str, pad: bool, backend: str
) -> tuple[list[Tensor], list[Tensor]]:
    return centre.empty(kernels(backend), decode_layers(spec), tensors, pad)


define(
    "centred",
    "(Tensor[] tensors, str spec, bool pad, str backend) -> (Tensor[], Tensor[])",
    _pack,
    _pack_fake,
)


def _pack_backward(
    grads: list[Tensor | None], tensors: list[Tensor], spec: str, backend: str
) -> list[Tensor]:
    found = centre.pack_grads(kernels(backend), decode_layers(spec), grads, tensors)
    return filled(found, tensors[0])


def _pack_backward_fake(
    grads: list[Tensor | None], tensors: list[Tensor], spec: str, backend: str
) -> list[Tensor]:
    return [
        x.new_empty((0,) if g is None else x.shape) for g, x in zip(grads, tensors, strict=True)
    ]


define(
    "centred_backward",
    "(Tensor?[] grads, Tensor[] tensors, str spec, str backend) -> Tensor[]",
    _pack_backward,
    _pack_backward_fake,
)
first_order_only("centred_backward")


def _pack_setup(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.set_materialize_grads(False)
    tensors, ctx.spec, _, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _pack_grad(ctx: Any, grads: list[Tensor | None], _: Any) -> Any:
    found = torch.ops.pwm_fast.centred_backward(
        grads, list(ctx.saved_tensors), ctx.spec, ctx.backend
    )
    wanted = [None if g is None else x for g, x in zip(grads, found, strict=True)]
    return wanted, None, None, None


register_gradient("centred", _pack_grad, _pack_setup)
