"""Acting with a policy whose numbers may have gone out of range."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from pwm_fast.agent import PWM
from pwm_fast.envs import ActionNotFinite
from pwm_fast.run.checkpoint import CheckpointError


class PolicyNotFinite(RuntimeError):
    """A policy's actions are not finite.

    Args:
        found: where that begins, as :meth:`pwm_fast.agent.PWM.why_not_finite` says it.
    """

    def __init__(self, found: str | None) -> None:
        found = found or "the actions of some envs were not finite"
        super().__init__(f"the policy cannot act: {found}")


@contextmanager
def acting(agent: PWM, obs: Tensor, task: Tensor | None = None) -> Iterator[None]:
    """Inside, an environment takes actions that ``agent`` chose for ``obs`` of such tasks.

    On a GPU environments do not look at them: such an env ends as diverged.

    Raises:
        PolicyNotFinite: they are not finite.
    """
    try:
        yield
    except ActionNotFinite as error:
        raise PolicyNotFinite(agent.why_not_finite(obs, task)) from error


@contextmanager
def policy_of(path: Path | str | None) -> Iterator[None]:
    """Inside, the policy of a checkpoint acts.

    Raises:
        CheckpointError: its actions are not finite; the message names the file.
    """
    try:
        yield
    except PolicyNotFinite as error:
        raise CheckpointError(f"{path} cannot be used: {error}") from error
