"""Signal-to-noise ratio of first-order gradients over horizons and numbers of samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from pwm_fast import ops

# M gradient samples of an imagined horizon, each a tuple of tensors.
Gradients = Callable[[int, int], Sequence[Sequence[Tensor]]]


def gradient_esnr(
    gradients: Gradients, horizons: Sequence[int], samples: Sequence[int]
) -> list[dict[str, float]]:
    """ESNR (:func:`pwm_fast.ops.esnr`) for every horizon and number M of gradient samples.

    Of each horizon the largest M of gradients are computed once; the smaller numbers take the
    first of them.

    Args:
        gradients: called with a horizon and M.
        horizons: imagined steps.
        samples: numbers M, each at least 2.

    Returns:
        Rows with ``horizon``, ``samples``, ``signal`` (squared norm of the mean gradient),
        ``noise`` (mean squared distance from it), ``esnr``, ``esnr_db``, and ``esnr_debiased``,
        ``esnr_debiased_db``: without the ``noise / M`` that M samples add to the signal. The
        gradients' unit is that of the actor's loss over that of the parameters.
    """
    rows = []
    for horizon in horizons:
        drawn = gradients(horizon, max(samples))
        for m in samples:
            plain, debiased = ops.esnr(drawn[:m]), ops.esnr(drawn[:m], debias=True)
            rows.append(
                {
                    "horizon": horizon,
                    "samples": m,
                    "signal": plain.signal.item(),
                    "noise": plain.noise.item(),
                    "esnr": plain.ratio.item(),
                    "esnr_db": plain.db.item(),
                    "esnr_debiased": debiased.ratio.item(),
                    "esnr_debiased_db": debiased.db.item(),
                }
            )
    return rows
