"""The ensemble of state-value functions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pwm_fast import ops
from pwm_fast.models.layers import act_norm_mlp, run_act_norm
from pwm_fast.ops import Layer


class Critic(nn.Module):
    """One value function: an MLP of Linear, Mish, LayerNorm layers and a Linear of width 1."""

    def __init__(
        self, latent_dim: int, units: Sequence[int] = (400, 200), input_gain: float = 1.0
    ) -> None:
        super().__init__()
        self.critic = act_norm_mlp(latent_dim, units, 1, 2.0**0.5, input_gain)

    def forward(self, z: Tensor) -> Tensor:
        """Values ``[...]`` of latents ``[..., D]``."""
        return run_act_norm(self.critic, z).squeeze(-1)


class CriticEnsemble(nn.Module):
    """E critics whose parameters are stacked along a first axis, as in published files.

    ``params`` holds, in the order of one :class:`Critic`'s parameters, tensors ``[E, ...]``.

    Args:
        latent_dim: D.
        units: hidden widths.
        members: E.
        input_gain: factor on the first layer's initial weights.
    """

    def __init__(
        self,
        latent_dim: int,
        units: Sequence[int] = (400, 200),
        members: int = 3,
        input_gain: float = 1.0,
    ) -> None:
        super().__init__()
        critics = [Critic(latent_dim, units, input_gain) for _ in range(members)]
        self.params = nn.ParameterList(
            nn.Parameter(torch.stack([p.detach() for p in group]))
            for group in zip(*(c.parameters() for c in critics), strict=True)
        )
        self.members = members

    def layers(self) -> list[Layer]:
        """The parameters as the operations take them."""
        *hidden, weight, bias = self.params
        layers = [
            Layer(*group, act="mish")
            for group in zip(hidden[::4], hidden[1::4], hidden[2::4], hidden[3::4], strict=True)
        ]
        return [*layers, Layer(weight, bias)]

    def forward(self, z: Tensor) -> Tensor:
        """Values ``[E, ...]`` of latents ``[..., D]``."""
        return ops.mlp((z,), self.layers(), order="act_norm").squeeze(-1)

    def minimum(self, z: Tensor) -> Tensor:
        """The least of the members' values, ``[...]``."""
        return self(z).amin(0)
