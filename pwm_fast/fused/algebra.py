"""Switches of the algebra that makes the fused operations cheaper and changes only rounding."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from pwm_fast import scopes

PAD_TO = 64  # outputs a tile of tensor cores takes; also rows of 16-bit weights stay aligned


class Algebra(NamedTuple):
    """Which identities are used; None leaves it to where they pay (docs/performance.md).

    Attributes:
        hoist: run a rollout as one operator: what the first GEMM has of action, task and flow
            time once a macro step, weight gradients once over all steps. Without it every
            evaluation is an MLP of its own.
        fold: carry ``W1z z`` through the substeps where the velocity head is linear; also an
            argument of :class:`pwm_fast.ops.Flow`, which goes first.
        centre: take the mean over outputs off the weights before a LayerNorm, in packed copies, so
            that it has no mean to subtract.
        pad: also pad such layers with zeros to a multiple of 64 outputs.
        batch_heads: run the reward, termination and value heads once over all steps.
    """

    hoist: bool = True
    fold: bool | None = None
    centre: bool | None = None
    pad: bool | None = None
    batch_heads: bool = True


_DEFAULT = Algebra()


@contextmanager
def algebra(
    *,
    hoist: bool | None = None,
    fold: bool | None = None,
    centre: bool | None = None,
    pad: bool | None = None,
    batch_heads: bool | None = None,
) -> Iterator[None]:
    """Within the context, use or do not use identities; see :class:`Algebra`.

    What is not given stays as it is outside. It holds for the thread or asyncio task that enters
    it; a thread that is started inside begins with the defaults.

    Raises:
        ValueError: ``pad`` without ``centre``: a mean over padded features would be wrong.
    """
    given = {
        "hoist": hoist,
        "fold": fold,
        "centre": centre,
        "pad": pad,
        "batch_heads": batch_heads,
    }
    new = in_force()._replace(**{name: on for name, on in given.items() if on is not None})
    if new.pad and new.centre is False:
        raise ValueError("pad=True needs centred weights, got centre=False")
    with scopes.entered("algebra", new):
        yield


def in_force() -> Algebra:
    """The innermost context's switches."""
    return scopes.innermost("algebra", _DEFAULT)
