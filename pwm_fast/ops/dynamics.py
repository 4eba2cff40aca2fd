"""What rollouts and the world-model loss ask of latent dynamics, and dynamics of one evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from pwm_fast.backends.dtypes import at_least_fp32
from pwm_fast.ops import _checks
from pwm_fast.ops.coverage import can_fold
from pwm_fast.ops.mlp import RunNet
from pwm_fast.ops.types import FusedStep, Layer


class Transitions(NamedTuple):
    """Steps that dynamics are to learn, time first.

    Attributes:
        z: latents ``[H, B, D]`` that the steps start from.
        action: ``[H, B, A]``.
        following: ``[H, B, D]``, what a rollout made of them; None for dynamics that learn from
            the starts alone.
        target: the encoded successors ``[H, B, D]``, without gradient.
        task: task embeddings ``[H, B, E]``, or None.
        dtype: what errors are computed in, float32 at least.
        tau: flow times ``[H, B]`` in [0, 1], or None.
        start_noise: standard deviation of noise on ``z``, a number or a tensor that broadcasts.
        target_grad: let the gradient reach ``z`` through a target that depends on it.
        backend: that was asked for.
    """

    z: Tensor
    action: Tensor
    following: Tensor | None
    target: Tensor
    task: Tensor | None
    dtype: torch.dtype
    tau: Tensor | None = None
    start_noise: float | Tensor = 0.0
    target_grad: bool = True
    backend: str | None = None


@runtime_checkable
class Dynamics(Protocol):
    """Latent dynamics ``z' = F(z, a, task)``.

    :class:`LatentMLP` and :class:`pwm_fast.ops.Flow` are two. Whatever has these parts runs in
    :func:`pwm_fast.ops.latent_rollout`, :func:`pwm_fast.ops.imagine` and
    :func:`pwm_fast.ops.world_model_loss`; a ``NamedTuple`` of layers and options is best, whose
    tensors :func:`pwm_fast.explain` finds.
    """

    @property
    def net(self) -> Sequence[Layer]:
        """All layers that a step evaluates."""

    @property
    def learns_from_starts(self) -> bool:
        """The loss needs the latents that steps start from, and not what the steps make of them."""

    def check(self, z: Tensor, action: int, task: Tensor | None) -> None:
        """Raise ValueError where layers or options do not fit ``z [B, D]`` and that action width.

        :func:`check_net` does it for a network.
        """

    def step(
        self, z: Tensor, a: Tensor, task: Tensor | None, dtype: torch.dtype, run: RunNet
    ) -> Tensor:
        """The next latents, in plain PyTorch.

        Args:
            z: latents ``[..., D]``, perhaps in fp32 where ``dtype`` is 16-bit: what is carried from
                step to step need not be rounded.
            a: actions ``[..., A]``.
            task: task embeddings ``[..., E]``, or None.
            dtype: of the network's inputs.
            run: evaluates a network, ``run(inputs, layers, "norm_act")``.
        """

    def error(self, steps: Transitions) -> Tensor:
        """What is minimised at each step, ``[H, B]`` in ``steps.dtype``."""

    def fused(self) -> FusedStep | str:
        """The step for the fused passes, or why they do not cover it: then the reference runs."""


def check_net(net: Sequence[Layer], inputs: int, z: Tensor) -> None:
    """Raise ValueError if a network does not take ``inputs`` numbers to a latent as ``z``."""
    outputs = _checks.layers("dynamics.net", net, inputs, z.device)
    if outputs != z.shape[-1]:
        raise ValueError(f"dynamics.net has output width {outputs}, but z0 has {z.shape[-1]}")


def input_width(z: Tensor, action: int, task: Tensor | None) -> int:
    """D + A + E, after a look at whether ``task`` fits ``z``."""
    if task is None:
        return z.shape[-1] + action
    _checks.same_rows("task", task, "z0", z)
    return z.shape[-1] + action + task.shape[-1]


def noisy(z: Tensor, noise: float | Tensor) -> Tensor:
    """``z`` with normal noise of standard deviation ``noise``; nothing is drawn for a 0."""
    if isinstance(noise, Tensor):
        return torch.addcmul(z, torch.randn_like(z), noise.to(z.dtype))
    return torch.add(z, torch.randn_like(z), alpha=noise) if noise else z


def check_fold(net: Sequence[Layer], fold: bool | None) -> None:
    """Raise ValueError where a head is to be folded that cannot be."""
    if fold and not can_fold(net):
        raise ValueError("dynamics.fold needs a linear last layer behind at least one hidden layer")


def squared_error(ours: Tensor, target: Tensor, dtype: torch.dtype) -> Tensor:
    """Mean squared error over the last axis."""
    return (ours.to(dtype) - target.to(dtype)).square().mean(-1)


class LatentMLP(NamedTuple):
    """Dynamics in one evaluation, as PWM's and TD-MPC2's: the next latent is an MLP's output.

    Attributes:
        net: layers of the MLP; input ``[z, task, a]``, output width D.
    """

    net: Sequence[Layer]

    @property
    def learns_from_starts(self) -> bool:
        """See :class:`Dynamics`."""
        return False

    def check(self, z: Tensor, action: int, task: Tensor | None) -> None:
        """See :class:`Dynamics`."""
        check_net(self.net, input_width(z, action, task), z)

    def step(
        self, z: Tensor, a: Tensor, task: Tensor | None, dtype: torch.dtype, run: RunNet
    ) -> Tensor:
        """See :class:`Dynamics`."""
        x = z.to(dtype)
        return run((x, a) if task is None else (x, task, a), self.net, "norm_act")

    def error(self, steps: Transitions) -> Tensor:
        """The squared error of the rolled-out latents; see :class:`Dynamics`."""
        assert steps.following is not None
        return squared_error(steps.following, steps.target, steps.dtype)

    def fused(self) -> FusedStep:
        """See :class:`Dynamics`."""
        return FusedStep(self.net, task_first=True)


class ResidualMLP(NamedTuple):
    """Dynamics in one evaluation: the next latent is the latent plus an MLP's output.

    A flow's network and integration without what makes it a flow: it takes no flow time, and learns
    from the latents that it rolls out, as :class:`LatentMLP` does.

    Attributes:
        net: layers of the MLP; input ``[z, task, a]``, output width D.
        fold: see :class:`pwm_fast.ops.Flow`.
    """

    net: Sequence[Layer]
    fold: bool | None = None

    @property
    def learns_from_starts(self) -> bool:
        """See :class:`Dynamics`."""
        return False

    def check(self, z: Tensor, action: int, task: Tensor | None) -> None:
        """See :class:`Dynamics`."""
        check_fold(self.net, self.fold)
        check_net(self.net, input_width(z, action, task), z)

    def step(
        self, z: Tensor, a: Tensor, task: Tensor | None, dtype: torch.dtype, run: RunNet
    ) -> Tensor:
        """The sum in the dtype of ``z``, added up in float32 at least; see :class:`Dynamics`."""
        x = z.to(dtype)
        change = run((x, a) if task is None else (x, task, a), self.net, "norm_act")
        state = at_least_fp32(z)
        return (state + change.to(state.dtype)).to(z.dtype)

    def error(self, steps: Transitions) -> Tensor:
        """The squared error of the rolled-out latents; see :class:`Dynamics`."""
        assert steps.following is not None
        return squared_error(steps.following, steps.target, steps.dtype)

    def fused(self) -> FusedStep:
        """See :class:`Dynamics`."""
        return FusedStep(self.net, "residual", task_first=True, fold=self.fold)


#: The name of :class:`LatentMLP` in earlier versions; both are one class.
LatentMap = LatentMLP
