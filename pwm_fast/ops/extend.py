"""For code that builds on the operations: dynamics of your own, and training loops.

Dynamics of your own (:class:`pwm_fast.ops.Dynamics`) need :class:`Transitions`,
:class:`FusedStep`, :data:`RunNet`, :func:`check_net`, :func:`input_width` and
:func:`squared_error`.

A training loop may set the :func:`precision` of GEMMs, note with :func:`precisions_used`
which ones ran, keep packed weights between updates (:func:`keeping`), and record CUDA graphs
(:func:`capturing`). :func:`regression` gives loss and gradients of value functions without
autograd, :func:`window_gradients` those of a world model. :func:`discounted_return`,
:func:`discounted`, :func:`act`, :func:`moments`, :func:`squashed`, :func:`full_precision` and
:func:`at_least_fp32` are formulas that losses and policies share with the operations.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from pwm_fast.backends import select
from pwm_fast.backends.base import Call
from pwm_fast.backends.dtypes import at_least_fp32, full_precision
from pwm_fast.backends.select import PRECISIONS, precision, requested
from pwm_fast.fused.weight_cache import capturing, keeping
from pwm_fast.ops.dynamics import (
    Transitions,
    check_net,
    input_width,
    squared_error,
)
from pwm_fast.ops.imagine import act, moments, squashed
from pwm_fast.ops.mlp import RunNet
from pwm_fast.ops.regression import RegressionStep, regression
from pwm_fast.ops.returns import discounted, discounted_return
from pwm_fast.ops.types import FusedStep
from pwm_fast.ops.window_gradients import WindowGradients, window_gradients

__all__ = [
    "PRECISIONS",
    "FusedStep",
    "RegressionStep",
    "RunNet",
    "Transitions",
    "WindowGradients",
    "act",
    "at_least_fp32",
    "capturing",
    "check_net",
    "discounted",
    "discounted_return",
    "full_precision",
    "input_width",
    "keeping",
    "moments",
    "precision",
    "precisions_used",
    "regression",
    "requested",
    "squared_error",
    "squashed",
    "window_gradients",
]


@contextmanager
def precisions_used(found: set[str]) -> Iterator[None]:
    """Inside, add to ``found`` the precision that each GEMM runs in."""

    def note(operation: str, asked: str, taken: str | None, call: Call) -> None:
        op = select.OPERATIONS[operation]
        if op.family == "gemm" and taken is not None:
            found.add(select.precision_of(select.BACKENDS[taken], op, call).name)

    with select.observed(note):
        yield
