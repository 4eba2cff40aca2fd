"""What a device provides for a guarded step of Adam."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch import Tensor


class Group(NamedTuple):
    """Tensors that learn at one rate, contiguous float32 of equal sizes in each of four lists.

    Attributes:
        params: what is learnt.
        grads: their gradients.
        means: Adam's first moments.
        squares: its second moments.
        steps: steps taken by each, float32 ``[T]``.
        rate: the learning rate, one float32; on a CPU also one float64.
    """

    params: Sequence[Tensor]
    grads: Sequence[Tensor]
    means: Sequence[Tensor]
    squares: Sequence[Tensor]
    steps: Tensor
    rate: Tensor


class GuardedStep(Protocol):
    """A module, or an object, that clips, checks and takes a step."""

    def guarded_step(
        self,
        groups: Sequence[Group],
        options: Tensor,
        loss: Tensor,
        skipped: Tensor,
        in_a_row: Tensor,
        *,
        keep: bool = False,
    ) -> Tensor:
        """Clip by the norm of all gradients and take a step, or count that it was skipped.

        Where the norm or the loss is not finite, parameters, moments and step counts stay as they
        are.

        Args:
            groups: at least one, with at least one tensor each.
            options: both betas, epsilon and the largest norm, float64 ``[4]``.
            loss: one number.
            skipped: one int64, skips in all.
            in_a_row: one int64, skips since the last step.
            keep: leave the clipped gradients where the gradients were.

        Returns:
            The norm before clipping, one float32; infinite where float32 does not hold it, which
            skips nothing.

        Raises:
            ValueError: a tensor is not contiguous.
        """
