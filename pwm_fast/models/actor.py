"""The Gaussian policy."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pwm_fast import ops
from pwm_fast.hooks import why_not_itself
from pwm_fast.models.layers import (
    ADVICE,
    Skipped,
    act_norm_layers,
    act_norm_mlp,
    run_act_norm,
)
from pwm_fast.ops.extend import squashed

INITS = ("orthogonal", "torch")


class GaussianActor(nn.Module):
    """``a = tanh(mu(z) + std * noise)`` with a learned, state-independent ``std``.

    Args:
        latent_dim: D.
        action_dim: A.
        units: hidden widths; each layer is Linear, Mish, LayerNorm.
        init_logstd: log standard deviation at the start.
        min_logstd: its lower bound.
        input_gain: factor on the first layer's initial weights.
        init: ``"orthogonal"`` (weights of gain 1, biases 0) or ``"torch"`` (as ``torch.nn.Linear``
            draws both).
    """

    def __init__(
        self,
        latent_dim: int,
        action_dim: int,
        units: Sequence[int] = (400, 200, 100),
        init_logstd: float = -1.0,
        min_logstd: float = -1.427,
        input_gain: float = 1.0,
        init: str = "orthogonal",
    ) -> None:
        super().__init__()
        if init not in INITS:
            raise ValueError(f"init must be one of {', '.join(INITS)}, got {init!r}")
        gain = 1.0 if init == "orthogonal" else None
        self.mu_net = act_norm_mlp(latent_dim, units, action_dim, gain, input_gain)
        self.logstd = nn.Parameter(torch.full((action_dim,), float(init_logstd)))
        self.min_logstd = min_logstd
        self.action_dim = action_dim

    def std(self) -> Tensor:
        """Standard deviations before the tanh, ``[A]``."""
        return self.logstd.clamp_min(self.min_logstd).exp()

    def entropy(self, action: Tensor, noise: Tensor) -> Tensor:
        """``-log pi(a|z)`` of actions ``[..., A]`` that were drawn with ``noise``, ``[...]``.

        Its mean is the policy's entropy. ``1 - a^2`` is kept above 1e-6, as in SAC's code, so that
        it is finite where an action is at its bound.
        """
        density = 0.5 * noise.square() + self.std().log() + 0.5 * math.log(2.0 * math.pi)
        return (density + torch.log(1.0 - action.square() + 1e-6)).sum(-1)

    def policy(self) -> ops.Policy:
        """The parameters as the operations take them.

        Raises:
            Skipped: whole operations would skip what a module does (a hook, a Dropout).
        """
        reason = why_not_itself(self, GaussianActor.forward)
        if reason is not None:
            raise Skipped(f"{type(self).__name__} {reason}, {ADVICE}")
        return ops.Policy(act_norm_layers(self.mu_net), self.std())

    def forward(self, z: Tensor, noise: Tensor | None = None) -> Tensor:
        """Actions ``[..., A]`` in (-1, 1) of latents ``[..., D]``.

        Args:
            z: latents.
            noise: standard normal ``[..., A]``; None gives the deterministic action ``tanh(mu)``.
        """
        mu = run_act_norm(self.mu_net, z)
        return torch.tanh(mu) if noise is None else squashed(mu, self.std(), noise)
