"""How the macro steps of a rollout are carried out on a device: candidates, and why not each.

The choice depends on sizes, specification, backend, precision and device alone, never on values. It
does not change what an operator keeps for its backward pass.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import torch

from pwm_fast.backends.precision import Precision

if TYPE_CHECKING:
    from pwm_fast.backends.specs import DynamicsSpec
    from pwm_fast.kernels.rollout import RolloutLayout

VARIABLE = "PWM_FAST_ARCHITECTURE"
NAMES = ("auto", "cluster", "persistent", "layers")


class Candidate(NamedTuple):
    """A way to run macro steps.

    Attributes:
        name: ``"cluster"``: weights in the registers and shared memory of thread-block clusters;
            ``"persistent"``: one launch keeps the weights in shared memory
            (:mod:`pwm_fast.kernels.rollout`); ``"layers"``: layer by layer, products fused with
            what follows them where that pays, element kernels elsewhere.
        reason: why it does not run, or None if it can.
    """

    name: str
    reason: str | None


class Sizes(NamedTuple):
    """What of a rollout's tensors matters.

    Attributes:
        batch: B.
        hidden: width of the first layer, with padding.
        last: width of the last hidden layer, with padding.
    """

    batch: int
    hidden: int
    last: int


def candidates(
    backend: str, precision: Precision, spec: DynamicsSpec, sizes: Sizes, device: torch.device
) -> list[Candidate]:
    """All ways, in the order of preference; the first without a reason is taken.

    Raises:
        ValueError: the environment variable ``PWM_FAST_ARCHITECTURE`` names none of them.
    """
    asked = os.environ.get(VARIABLE) or "auto"
    if asked not in NAMES:
        raise ValueError(f"{VARIABLE} must be one of {', '.join(NAMES)}, got {asked!r}")
    plan = _persistent(backend, precision, spec, sizes, device)
    found = [
        Candidate("cluster", "not built: this version has no such kernel"),
        Candidate("persistent", plan if isinstance(plan, str) else None),
        Candidate("layers", None),
    ]
    if asked == "auto":
        return found
    # The last one is never ruled out: it runs everything that the others do not.
    return [
        c._replace(reason=c.reason or f"{VARIABLE} is {asked}")
        if c.name not in (asked, "layers")
        else c
        for c in found
    ]


def architecture(
    backend: str, precision: Precision, spec: DynamicsSpec, sizes: Sizes, device: torch.device
) -> str:
    """The name of the way that is taken."""
    found = candidates(backend, precision, spec, sizes, device)
    return next(c.name for c in found if c.reason is None)


def persistent_plan(
    backend: str, precision: Precision, spec: DynamicsSpec, sizes: Sizes, device: torch.device
) -> RolloutLayout | None:
    """The layout of the persistent kernels if they are taken, else None."""
    if architecture(backend, precision, spec, sizes, device) != "persistent":
        return None
    plan = _persistent(backend, precision, spec, sizes, device)
    return None if isinstance(plan, str) else plan


def _persistent(
    backend: str, precision: Precision, spec: DynamicsSpec, sizes: Sizes, device: torch.device
) -> RolloutLayout | str:
    if backend != "triton":
        return f"it is for backend triton, this is {backend}"
    if not spec.fold:
        return "the velocity head is not folded into the first layer"
    hidden, head = spec.layers[:-1], spec.layers[-1]
    if len(hidden) != 2 or not head.plain:
        return f"it is for two hidden layers under a linear head, here are {len(hidden)}"
    if any(s.order != "norm_act" or not s.norm or s.act != "mish" for s in hidden):
        return "its hidden layers are Linear, LayerNorm and Mish"
    if not hidden[0].width or not hidden[1].width:
        return "it needs centred weights"
    if sizes.hidden % 64 or sizes.hidden != sizes.last:
        return (
            f"it needs two layers padded to the same multiple of 64 outputs, not to {sizes.hidden} "
            f"and {sizes.last}"
        )
    if precision.name == "exact":
        return "exact products of float32 do not run on tensor cores"
    from pwm_fast.kernels.launch import INTERPRETING
    from pwm_fast.kernels.rollout import choose_layout

    if device.type != "cuda" and not INTERPRETING:
        return f"it runs on CUDA, the tensors are on {device}"
    operand = precision.dtype(torch.float32)
    if device.type != "cuda":
        return choose_layout(sizes.batch, sizes.hidden, operand, 0, 0)
    index = device.index or 0
    return choose_layout(sizes.batch, sizes.hidden, operand, *_limits(index), _tuned(index))


@lru_cache(maxsize=16)
def _tuned(index: int) -> Mapping[str, Mapping[str, int]]:
    """Layouts measured on a GPU."""
    from pwm_fast.kernels import rollout, tuning

    def fits(key: str, entry: Mapping[str, int]) -> None:
        rollout.check_tuned(key, entry, *_limits(index))

    return tuning.entries(torch.cuda.get_device_name(index), "rollout", fits)


def _limits(index: int) -> tuple[int, int]:
    """Multiprocessors of a GPU, and bytes of shared memory that a program may have."""
    from pwm_fast.kernels.plan import device_limits

    return device_limits(torch.device("cuda", index))[1]
