"""Nothing is timed before its result was compared with float64."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tests.helpers import assert_2x

Outputs = Mapping[str, Tensor | Sequence[Tensor]]

# Plain PyTorch is the unit that others' errors are measured in; its own is bounded here, in the
# relative L2 norm: it must compute the same thing as the truth.
SANE = {"published": 1e-4, "autocast": 0.1, "tf32": 0.02}


class Mismatch(Exception):
    """A result is wrong; the message says which and by how much."""


def flat(outputs: Outputs, key: str, scales: Sequence[Tensor] | None = None) -> Tensor:
    """One kind of output as a vector on the CPU, every tensor divided by its scale.

    So a gradient of a small parameter counts as much as one of a large.
    """
    parts = tensors(outputs, key)
    if scales is not None:
        parts = [x / s.to(x) for x, s in zip(parts, scales, strict=True)]
    return torch.cat([x.detach().cpu().flatten() for x in parts])


def tensors(outputs: Outputs, key: str) -> list[Tensor]:
    value = outputs[key]
    return [value] if isinstance(value, Tensor) else list(value)


def check(
    provider: str,
    found: Outputs,
    unit: Outputs,
    truth: Outputs,
    others: Sequence[tuple[Outputs, Outputs]] = (),
) -> None:
    """Compare a provider's outputs with the truth.

    ``published``, ``autocast`` and ``tf32`` must be sane (see :data:`SANE`). Everything else errs
    at most twice as much as ``unit`` (:func:`bench.providers.unit_of`): the rule of the tests, over
    each kind of output. ``others`` are more pairs of a unit and its truth.

    Raises:
        Mismatch: an output is wrong, has another shape, or is missing.
    """
    if set(found) != set(truth):
        raise Mismatch(f"outputs {sorted(found)} instead of {sorted(truth)}")
    for key in truth:
        want = [tuple(x.shape) for x in tensors(truth, key)]
        have = [tuple(x.shape) for x in tensors(found, key)]
        if have != want:
            raise Mismatch(f"{key}: shapes {have} instead of {want}")
        scales = _scales(truth, key)
        reference = flat(truth, key, scales).double()
        result = flat(found, key, scales).float()
        if not bool(torch.isfinite(result).all()):
            raise Mismatch(f"{key}: not finite")
        if provider in SANE:
            error = float((result.double() - reference).norm() / reference.norm())
            if not error <= SANE[provider]:
                raise Mismatch(f"{key}: relative error {error:.1e} exceeds {SANE[provider]:.0e}")
            continue
        nearby = []
        for other, its_truth in others:
            own = _scales(its_truth, key)
            nearby.append((flat(other, key, own).float(), flat(its_truth, key, own).double()))
        try:
            assert_2x(result, flat(unit, key, scales).float(), reference, key, nearby)
        except AssertionError as failure:
            raise Mismatch(str(failure)) from None


def _scales(truth: Outputs, key: str) -> list[Tensor]:
    return [x.abs().max().clamp_min(1e-30) for x in tensors(truth, key)]
