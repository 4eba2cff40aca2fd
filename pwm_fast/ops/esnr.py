"""Public gradient signal-to-noise operation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pwm_fast.backends.base import Call
from pwm_fast.backends.esnr import TorchEsnr, moments
from pwm_fast.backends.select import check_has, declare, select
from pwm_fast.backends.transforms import derived
from pwm_fast.ops import _checks
from pwm_fast.ops.operator import Operator
from pwm_fast.ops.types import ESNR

declare("esnr", "reduction")
declare("esnr_update", "stream")


class _Esnr(Operator):
    """Signal and noise of each tensor, float64; ``grads`` holds sample after sample."""

    name, family, outputs, results = "esnr", "reduction", ("signal", "noise"), 2
    refused = ("grads",)

    @staticmethod
    def forward(k: Any, grads: list[Tensor], samples: int) -> tuple[Tensor, Tensor]:
        return k.moments(grads, samples)

    @classmethod
    def fake(cls, k: Any, a: Any) -> tuple[Tensor, Tensor]:
        signal = a.grads[0].new_empty(len(a.grads) // a.samples, dtype=torch.float64)
        return signal, torch.empty_like(signal)


class _Update(Operator):
    """Take a sample into a streamed estimate: see :class:`pwm_fast.backends.esnr.EsnrReduction`."""

    name, family, outputs = "esnr_update", "stream", ()
    mutates = ("sums", "squares")

    @staticmethod
    def forward(
        k: Any, grads: list[Tensor], origins: list[Tensor], sums: list[Tensor], squares: Tensor
    ) -> None:
        k.update(grads, origins, sums, squares)


class _Result(Operator):
    """Signal and noise of a streamed estimate."""

    name, family, outputs, results = "esnr_result", "stream", ("signal", "noise"), 2

    @staticmethod
    def forward(
        k: Any, origins: list[Tensor], sums: list[Tensor], squares: Tensor, samples: int
    ) -> tuple[Tensor, Tensor]:
        return k.result(origins, sums, squares, samples)

    @classmethod
    def fake(cls, k: Any, a: Any) -> tuple[Tensor, Tensor]:
        return torch.empty_like(a.squares), torch.empty_like(a.squares)


_esnr, _update, _result = _Esnr(), _Update(), _Result()


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
    choice = select("esnr", backend, Call(flat, reason))
    if choice.is_reference:
        signal, noise = moments(samples)
    else:
        signal, noise = _esnr(flat, len(samples), choice=choice)
    return _summarize(signal, noise, len(samples), eps, debias)


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
        check_has("esnr_update", backend)
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
        if derived(grads):
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
            choice = select("esnr_update", self.backend, Call([*grads, *self._origin]))
            state = (list(grads), self._origin, self._sum, self._squares)
            if choice.is_reference:
                TorchEsnr().update(*state)
            else:
                _update(*state, choice=choice)
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
        choice = select("esnr_update", self.backend, Call(self._origin))
        state = (self._origin, self._sum, self._squares, self.samples)
        if choice.is_reference:
            signal, noise = TorchEsnr().result(*state)
        else:
            signal, noise = _result(*state, choice=choice)
        return _summarize(signal, noise, self.samples, self.eps, debias)


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
        return _summarize(
            self._signal / self._weight, self._noise / self._weight, 1, self.eps, False
        )


def _summarize(signal: Tensor, noise: Tensor, samples: int, eps: float, debias: bool) -> ESNR:
    """The result of tensors' signals and noises ``[T]``."""
    total_signal, total_noise = signal.sum(), noise.sum()
    if debias:
        signal = (signal - noise / samples).clamp_min(0.0)
        total_signal = (total_signal - total_noise / samples).clamp_min(0.0)
    ratio = total_signal / total_noise.clamp_min(eps)
    return ESNR(
        total_signal,
        total_noise,
        ratio,
        10.0 * torch.log10(ratio),
        signal / noise.clamp_min(eps),
        signal,
        noise,
    )
