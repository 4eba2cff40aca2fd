"""What an MLP keeps for its backward pass, whichever way runs it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pwm_fast.backends.base import Kernels
from pwm_fast.backends.specs import LayerParams, LayerSpec


def slots_of(specs: Sequence[LayerSpec], save: bool, wgrad: bool) -> list[dict[str, int]]:
    """Where each layer's buffers lie in ``saved``, by what they hold."""
    slots: list[dict[str, int]] = []
    n = 0
    for i, spec in enumerate(specs):
        names = []
        if save and not spec.plain:
            names.append("hat")
            if spec.norm:
                names += ["rstd"] if spec.order == "norm_act" else ["mean", "rstd"]
        inner = i < len(specs) - 1
        if save and ((wgrad and inner) or spec.act == "simnorm"):
            names.append("y")
        slots.append({name: n + j for j, name in enumerate(names)})
        n += len(names)
    return slots


def count_saved(specs: Sequence[LayerSpec], wgrad: bool) -> int:
    """How many buffers an MLP keeps."""
    return sum(len(slots) for slots in slots_of(specs, True, wgrad))


def saved_buffers(
    kernels: Kernels,
    specs: Sequence[LayerSpec],
    params: Sequence[LayerParams],
    evals: int,
    rows: int,
    save: bool,
    wgrad: bool,
) -> list[Tensor]:
    """The buffers that an MLP keeps, in order.

    What a GEMM takes or the backward pass normalises by is kept in the compute dtype; the
    statistics, and the last layer's output, in the state's.
    """
    like = params[0].weight
    state, compute = like.dtype, kernels.precision.dtype(like.dtype)
    buffers = []
    for i, (slots, p) in enumerate(zip(slots_of(specs, save, wgrad), params, strict=True)):
        if not slots:
            continue
        whole = (evals, rows, p.weight.shape[-2])
        for name in slots:
            shape = whole if name in ("hat", "y") else whole[:2]
            rounded = name == "hat" or (name == "y" and i < len(specs) - 1)
            buffers.append(like.new_empty(shape, dtype=compute if rounded else state))
    return buffers
