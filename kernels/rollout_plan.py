"""How a persistent rollout is laid out on a device: layouts, which of them fit, which is taken."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import triton

from pwm_fast.kernels import cost
from pwm_fast.kernels.launch import INTERPRETING

#: Ways to exchange: counters that say when data is there, or words of data that say it themselves
#: (:mod:`pwm_fast.kernels.rollout_exchange`).
EXCHANGES = ("flags", "words")


class RolloutLayout(NamedTuple):
    """How a rollout is laid out on a device.

    Attributes:
        bm: rows of a group.
        bn: features of a program.
        warps: of a program.
        chunks: independent parts of a GEMM's sum.
        exchange: how programs exchange, of :data:`EXCHANGES`.
    """

    bm: int
    bn: int
    warps: int
    chunks: int
    exchange: str = "flags"

    @property
    def name(self) -> str:
        """Short, and of its own among :data:`LAYOUTS`: ``"8x64 w4 words"``."""
        words = " words" if self.exchange == "words" else ""
        return f"{self.bm}x{self.bn} w{self.warps}{words}"


def shared_bytes(plan: RolloutLayout, padded: int, size: int) -> int:
    """Shared memory of a program: two slices of weights, one operand, a tile in another layout."""
    span = triton.next_power_of_2(padded)
    return (2 * plan.bn + plan.bm) * span * size + 8 * plan.bm * plan.bn


# In the order of preference: few rows a program before few features, because the exchanged bytes
# grow with the rows of all programs of a group. Of the same tile, first the layout with 4 warps: a
# warp's share of a GEMM is 16 features by 8 rows (of 8x32 and 8x64) or 16 rows by 8 features,
# and where there are fewer shares than warps, several warps read and multiply the same. With 8
# warps that is everything twice for 8x64 and 16x32, and four times for 8x32. That 4 are faster is
# an estimate. Tiles of more rows spill hundreds of bytes a thread with 4.
_WIDE = ((8, 64, 4, 4), (8, 64, 8, 4), (16, 64, 8, 4), (32, 64, 8, 2))
_NARROW = ((8, 32, 4, 4), (8, 32, 8, 4), (16, 32, 4, 4), (16, 32, 8, 4), (32, 32, 8, 2))
# With words: of each tile the layout in which a thread holds few enough of them not to spill. They
# come after all others, so that only a measurement on the GPU chooses them.
_WORDS = ((8, 64, 4, 4), (16, 64, 8, 4), (8, 32, 4, 4), (16, 32, 8, 4))
LAYOUTS = (
    *(RolloutLayout(*layout) for layout in (*_WIDE, *_NARROW)),
    *(RolloutLayout(*layout, "words") for layout in _WORDS),
)


def why_not(
    plan: RolloutLayout, batch: int, padded: int, size: int, sms: int, shared: int
) -> str | None:
    """Why a layout does not fit a device of so many multiprocessors and bytes of shared memory."""
    if padded % plan.bn:
        return f"width {padded} is no multiple of {plan.bn}"
    programs = -(-batch // plan.bm) * (padded // plan.bn)
    if programs > sms:
        return (
            f"{batch} rows of {padded} features take {programs} programs ({plan.bm} rows x "
            f"{plan.bn} features each), which must run at once on {sms} multiprocessors"
        )
    if size == 4 and plan.bm > 16:
        return f"{plan.bm} rows of float32 operands a program spill 300 bytes a thread"
    need = shared_bytes(plan, padded, size)
    if need > shared:
        return (
            f"two slices of {plan.bn} x {padded} weights take {need} bytes of shared memory, the "
            f"device has {shared}"
        )
    return None


def modelled_time(layout: RolloutLayout, padded: int, element: int) -> float:
    """Microseconds that the model gives a forward evaluation of the persistent rollout.

    Args:
        layout: of its programs.
        padded: Up.
        element: bytes of an operand's number.
    """
    # A warp multiplies shares of 16 by 8, whose operands it reads from shared memory; with fewer
    # shares than warps some are computed more than once.
    shares = max(layout.bm * layout.bn // (16 * 8), layout.warps)
    bytes_read = shares * (16 + 8) * padded * element
    clock = cost.CONSTANTS["clock"].value * 1e3  # cycles a microsecond
    gemm = bytes_read / (cost.CONSTANTS["shared"].value * clock)
    travels = 2 * element if layout.exchange == "words" else element
    data = layout.bm * padded * travels / cost.INGRESS
    # Two layers, each with a GEMM and two barriers, of which one is about all activations.
    return (
        2 * (gemm + 2 * cost.CONSTANTS[layout.exchange].value + data) + cost.CONSTANTS["rest"].value
    )


def tuning_key(batch: int, padded: int, dtype: torch.dtype) -> str:
    """Under what a tuned file keeps the layout of these sizes, for kernel ``"rollout"``."""
    return f"{str(dtype).removeprefix('torch.')} B{batch} U{padded}"


def check_tuned(key: str, entry: Mapping[str, Any], sms: int, shared: int) -> None:
    """Raise ValueError where a tuned layout does not fit the sizes of its key, or the device."""
    dtype, batch, padded = key.split()
    compute = getattr(torch, dtype)
    _tuned_layout(entry, int(batch[1:]), int(padded[1:]), compute, sms, shared)


def choose_layout(
    batch: int,
    padded: int,
    dtype: torch.dtype,
    sms: int,
    shared: int,
    tuned: Mapping[str, Mapping[str, Any]] | None = None,
) -> RolloutLayout | str:
    """The layout for B rows of Up features, or why there is none.

    Args:
        batch: B.
        padded: Up.
        dtype: of the weights.
        sms: multiprocessors; every program needs one of its own, as they wait for each other.
        shared: bytes of shared memory that a program may have.
        tuned: layouts measured on the GPU, by :func:`tuning_key`: the fields of a
            :class:`RolloutLayout` (``exchange`` may be left out), or ``{"bm": 0}`` where layer by
            layer was faster.

    Raises:
        ValueError: a tuned layout is none, or does not fit.
    """
    if batch < 1:
        return "there are no rows"
    entry = (tuned or {}).get(tuning_key(batch, padded, dtype))
    if entry is not None and not INTERPRETING:
        return _tuned_layout(entry, batch, padded, dtype, sms, shared)
    if INTERPRETING:  # programs run one after another: one a group
        if triton.next_power_of_2(padded) != padded:
            return f"Triton's interpreter needs a power of two for a width, got {padded}"
        return RolloutLayout(8 if batch < 16 else 16, padded, 4, 2)
    found = {p: why_not(p, batch, padded, dtype.itemsize, sms, shared) for p in LAYOUTS}
    fitting = (p for p, reason in found.items() if reason is None)
    return next(fitting, str(found[LAYOUTS[0]]))


def _tuned_layout(
    entry: Mapping[str, Any], batch: int, padded: int, dtype: torch.dtype, sms: int, shared: int
) -> RolloutLayout | str:
    if dict(entry) == {"bm": 0}:
        return "layer by layer was measured to be faster"
    fields = RolloutLayout._fields
    if set(entry) | {"exchange"} != set(fields):
        raise ValueError(f"a tuned rollout has {', '.join(fields)}, got {dict(entry)}")
    layout = RolloutLayout(**entry)
    if layout not in LAYOUTS:
        known = ", ".join(str(tuple(p)) for p in LAYOUTS)
        raise ValueError(f"a tuned rollout must be one of {known}, got {tuple(layout)}")
    wrong = why_not(layout, batch, padded, dtype.itemsize, sms, shared)
    if wrong is not None:
        raise ValueError(f"the tuned rollout {layout} does not fit: {wrong}")
    return layout
