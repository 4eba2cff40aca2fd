"""Public gradient signal-to-noise operation."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pwm_fast.ops import _checks
from pwm_fast.ops.reference import esnr as reference
from pwm_fast.ops.types import ESNR


def esnr(
    grads: Tensor | Sequence[Sequence[Tensor]], *, eps: float = 1e-10, debias: bool = False
) -> ESNR:
    """Expected signal-to-noise ratio of M independent gradient samples.

    With ``mu`` their mean: ``ESNR = |mu|^2 / max(mean_i |g_i - mu|^2, eps)``. The noise is summed
    from centred samples in float64, never as the difference of two totals, which cancels where the
    samples agree.

    Args:
        grads: a stacked tensor ``[M, ...]``, or M samples, each a sequence of gradient tensors in
            the same order and shapes (as ``torch.autograd.grad`` returns them). M is at least 2.
        eps: lower bound of the denominator.
        debias: subtract ``noise / M``, what the sampling noise adds to ``|mu|^2``, from the signal
            (not below 0).

    Returns:
        :class:`ESNR` of float64 tensors on the gradients' device: signal, noise, ratio, decibel,
        and the ratio per parameter tensor. No host synchronisation.

    Raises:
        TypeError: a gradient is not a floating tensor, or a sample is no sequence of them.
        ValueError: fewer than 2 samples, or samples of different shapes.

    Source: Parmas et al. 2023, "Model-based reinforcement learning with scalable composite policy
    gradient estimators".
    """
    samples: Sequence[Sequence[Tensor]]
    if isinstance(grads, Tensor):
        _checks.floating("grads", grads)
        samples = [(g,) for g in grads.unbind(0)] if grads.dim() else []
    else:
        samples = []
        for i, sample in enumerate(grads):
            _checks.not_one_tensor(f"grads[{i}]", sample)
            samples.append(tuple(sample))
    if len(samples) < 2:
        raise ValueError(f"grads must hold at least 2 samples, got {len(samples)}")
    if len(samples[0]) == 0:
        raise ValueError("grads[0] must hold at least one gradient tensor, got none")
    for i, sample in enumerate(samples):
        for j, g in enumerate(sample):
            _checks.floating(f"grads[{i}][{j}]", g)
    wanted = [tuple(g.shape) for g in samples[0]]
    for i, sample in enumerate(samples):
        shapes = [tuple(g.shape) for g in sample]
        if shapes != wanted:
            raise ValueError(f"grads[{i}] must have the shapes of grads[0], {wanted}, got {shapes}")
    return reference.esnr(samples, eps, debias)
