"""Formulas compute in float32 at least and round once, whatever their tensors and autocast are."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import reduce

import torch
from torch import Tensor


def autocasts(x: Tensor) -> bool:
    """Whether autocast is on for the device of ``x``; some, such as meta, cannot have it."""
    kind = x.device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def common_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The dtype that PyTorch promotes the tensors' to: that of a result."""
    return reduce(torch.promote_types, [x.dtype for x in tensors if x is not None])


def fp32_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The dtype to compute in: theirs, float32 for 16 bits."""
    return torch.promote_types(common_dtype(*tensors), torch.float32)


def at_least_fp32(x: Tensor) -> Tensor:
    """``x`` in the dtype to compute in."""
    return x.to(fp32_dtype(x))


def full_precision(x: Tensor) -> AbstractContextManager[object]:
    """Inside, autocast does not round what is computed on the device of ``x``."""
    if autocasts(x):
        return torch.autocast(x.device.type, enabled=False)
    return nullcontext()
