"""Public gradient signal-to-noise operation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pwm_fast.backends import select
from pwm_fast.backends.esnr import TorchEsnr, moments
from pwm_fast.ops import _checks, library_esnr  # noqa: F401  registers the operators
from pwm_fast.ops.reference import esnr as reference
from pwm_fast.ops.types import ESNR


def esnr(
    grads: Tensor | Sequence[Sequence[Tensor]],
    *,
    eps: float = 1e-10,
    debias: bool = False,
    backend: str | None = None,
) -> ESNR:
    """Expected signal-to-noise ratio of M independent gradient samples.

    With ``mu`` their mean: ``ESNR = |mu|^2 / max(mean_i |g_i - mu|^2, eps)``. The noise is summed
    from centred samples, never as the difference of two totals, which cancels where the samples
    agree. All backends compute in float64 whatever the gradients are, so that their scale does not
    matter as long as ``eps`` does not: it is an absolute bound, as in the source, and gradients so
    small that the noise is below it have a smaller ratio. ``eps=0`` gives the ratio at any scale.
    The other backends read the samples once, in an order that depends on the sizes alone: no number
    of threads, no GPU and no launch changes a bit. ``native`` takes
    float32 on the CPU, ``cuda`` and ``triton`` take float32, float16 and bfloat16 on a GPU, where a
    CUDA graph can capture them.

    Args:
        grads: a stacked tensor ``[M, ...]``, or M samples, each a sequence of gradient tensors in
            the same order and shapes (as ``torch.autograd.grad`` returns them). M is at least 2.
        eps: lower bound of the denominator.
        debias: subtract ``noise / M``, what the sampling noise adds to ``|mu|^2``, from the signal
            (not below 0).
        backend: see :mod:`pwm_fast.backends`. Only the reference is differentiable.

    Returns:
        :class:`ESNR` of float64 tensors on the gradients' device: signal, noise, ratio, decibel,
        and the ratio per parameter tensor. No host synchronisation.

    Raises:
        TypeError: a gradient is not a floating tensor, or a sample is no sequence of them.
        ValueError: fewer than 2 samples, or samples of different shapes.
        BackendError: the backend that was asked for cannot run this.

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
    flat = [g for sample in samples for g in sample]
    needed = torch.is_grad_enabled() and any(g.requires_grad for g in flat)
    reason = "a gradient of the ratio is asked for" if needed else None
    chosen = select.select("esnr", backend, select.Call(flat, reason))
    if chosen == "reference":
        signal, noise = moments(samples)
    else:
        signal, noise = torch.ops.pwm_fast.esnr(flat, len(samples), chosen)
    return reference.summarize(signal, noise, len(samples), eps, debias)


class EsnrAccumulator:
    """ESNR of gradient samples that arrive one at a time, without keeping them.

    The first sample is kept as the origin; of the others the sum of their distances from it and
    their squared distances are kept (a shifted variance: with an origin among the samples nothing
    cancels). In float64, whatever the gradients are: 12 bytes a parameter of float32 ones. No host
    synchronisation.

    Args:
        eps: lower bound of the denominator.
        backend: see :mod:`pwm_fast.backends`.

    Raises:
        BackendError: there is no such backend; from :meth:`update`: it cannot run this.
    """

    def __init__(self, *, eps: float = 1e-10, backend: str | None = None) -> None:
        select.check_has("esnr_update", backend)
        self.eps, self.backend = eps, backend
        self.reset()

    def reset(self) -> None:
        """Forget all samples."""
        self.samples = 0
        self._origin: list[Tensor] = []
        self._sum: list[Tensor] = []
        self._squares = torch.zeros(0)

    @torch.inference_mode(False)  # the sums outlive the mode that this is called in
    @torch.no_grad()
    def update(self, grads: Sequence[Tensor]) -> None:
        """Take one sample: gradient tensors in the same order and shapes every time.

        Raises:
            TypeError: a gradient is not a floating tensor, or ``grads`` is no sequence of them.
            ValueError: no tensors, or shapes other than the first sample's.
            RuntimeError: a tensor has a tangent, or a ``torch.func`` transform is in force: sums
                that are kept would lose either.
        """
        _checks.not_one_tensor("grads", grads)
        if len(grads) == 0:
            raise ValueError("grads must hold at least one gradient tensor, got none")
        for j, g in enumerate(grads):
            _checks.floating(f"grads[{j}]", g)
        if select.transformed(grads):
            raise RuntimeError(
                "EsnrAccumulator keeps no derivatives: update it outside of forward-mode "
                "differentiation and torch.func transforms, or use ops.esnr"
            )
        if self.samples == 0:
            self._origin = [g.detach().clone(memory_format=torch.contiguous_format) for g in grads]
            self._sum = [torch.zeros_like(g, dtype=torch.float64) for g in self._origin]
            self._squares = grads[0].new_zeros(len(grads), dtype=torch.float64)
        else:
            wanted = [tuple(g.shape) for g in self._origin]
            shapes = [tuple(g.shape) for g in grads]
            if shapes != wanted:
                raise ValueError(
                    f"grads must have the first sample's shapes {wanted}, got {shapes}"
                )
            call = select.Call([*grads, *self._origin])
            chosen = select.select("esnr_update", self.backend, call)
            state = (list(grads), self._origin, self._sum, self._squares)
            if chosen == "reference":
                TorchEsnr().update(*state)
            else:
                torch.ops.pwm_fast.esnr_update(*state, chosen)
        self.samples += 1

    def mean(self) -> list[Tensor]:
        """Mean gradient of the samples so far.

        Raises:
            ValueError: there are none.
        """
        if self.samples == 0:
            raise ValueError("no sample has been taken yet")
        return [
            (o.double() + s / self.samples).to(o.dtype)
            for o, s in zip(self._origin, self._sum, strict=True)
        ]

    @torch.no_grad()
    def result(self, *, debias: bool = False) -> ESNR:
        """See :func:`esnr`.

        Raises:
            ValueError: fewer than 2 samples were taken.
        """
        if self.samples < 2:
            raise ValueError(f"ESNR needs at least 2 samples, got {self.samples}")
        chosen = select.select("esnr_update", self.backend, select.Call(self._origin))
        state = (self._origin, self._sum, self._squares, self.samples)
        if chosen == "reference":
            signal, noise = TorchEsnr().result(*state)
        else:
            signal, noise = torch.ops.pwm_fast.esnr_result(*state, chosen)
        return reference.summarize(signal, noise, self.samples, self.eps, debias)


class RunningEsnr:
    """Exponential moving average of signal and noise over training, and their ratio.

    Averaging the ratio itself would let single lucky estimates dominate.

    Args:
        decay: weight of the past in [0, 1).
        eps: lower bound of the denominator.

    Raises:
        ValueError: ``decay`` is out of range.
    """

    def __init__(self, decay: float = 0.9, *, eps: float = 1e-10) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"decay must lie in [0, 1), got {decay}")
        self.decay, self.eps = decay, eps
        self._signal: Tensor | None = None
        self._noise: Tensor | None = None
        self._weight: Tensor | float = 0.0

    def update(self, estimate: ESNR) -> ESNR:
        """Take a new estimate; return the smoothed one (bias of the start corrected).

        One with a tensor that is not finite is left out; before any other the result is NaN.
        """
        signal, noise = estimate.tensor_signal.detach(), estimate.tensor_noise.detach()
        sound = (signal.isfinite() & noise.isfinite()).all()
        old = torch.where(sound, self.decay, 1.0).double()
        new = 1.0 - old
        if self._signal is None or self._noise is None:
            self._signal, self._noise = torch.zeros_like(signal), torch.zeros_like(noise)
        self._signal = old * self._signal + torch.where(sound, new * signal, 0.0)
        self._noise = old * self._noise + torch.where(sound, new * noise, 0.0)
        self._weight = old * self._weight + new
        return reference.summarize(
            self._signal / self._weight, self._noise / self._weight, 1, self.eps, False
        )
