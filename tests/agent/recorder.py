"""A stand-in for CUDA graphs on the CPU: the same rules, kept by Python.

Recording computes nothing (whatever the function changed is put back) and must not wait for the
device. A replay reads and writes the tensors of the recording: the function runs again on the
recording's inputs, and its results go to where the recorded ones lie. Only what Python does beside
tensors is repeated, which a graph would not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from pwm_fast.agent import PWM
from tests.agent.no_sync import no_sync

T = TypeVar("T")


class EmulatedGraphs:
    """Set ``agent`` before the first update."""

    agent: PWM

    def run(self, function: Callable[[], T]) -> T:
        """Compute."""
        return function()

    def record(self, function: Callable[[], list[Tensor]]) -> Callable[[], None]:
        """Record."""
        state, random = tensors_of(self.agent), torch.get_rng_state()
        before = [x.detach().clone() for x in state]
        with no_sync():
            outputs = [x.detach() for x in function()]
        with torch.no_grad():
            for x, old in zip(state, before, strict=True):
                x.copy_(old)
            for x in outputs:
                x.fill_(float("nan") if x.is_floating_point() else -1)
        torch.set_rng_state(random)

        def replay() -> None:
            with no_sync():
                results = function()
            for x, result in zip(outputs, results, strict=True):
                x.copy_(result.detach())

        return replay


def tensors_of(agent: PWM) -> list[Tensor]:
    """All tensors that an update changes."""
    found: list[Tensor] = []
    for module in agent._modules().values():
        found += [*module.parameters(), *module.buffers()]
    for optimizer in agent.optimizers.values():
        found += [optimizer.skipped, optimizer.skipped_in_a_row]
        for values in optimizer.adam.state.values():
            found += [v for v in values.values() if isinstance(v, Tensor)]
    return found


def make_captured(make: Callable[..., PWM], *args: Any, **kwargs: Any) -> PWM:
    """An agent whose updates are recorded and replayed on the CPU."""
    recorder = EmulatedGraphs()
    recorder.agent = make(*args, recorder=recorder, **kwargs)
    return recorder.agent
