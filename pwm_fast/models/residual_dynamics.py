"""Residual dynamics: a flow's network and step without what makes it a flow."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from pwm_fast import ops
from pwm_fast.models.layers import MLP, mlp
from pwm_fast.models.world_model import LatentModel, register


@register("residual")
class ResidualWorldModel(LatentModel):
    """``z' = z + f(z, task, a)`` with a linear head, trained on the latent error as the baseline.

    The ablation between :class:`pwm_fast.models.WorldModel` and
    :class:`pwm_fast.models.FlowWorldModel`: it has the flow's head and start, and the baseline's
    loss. ``config.zero_velocity`` starts it as the identity.
    """

    def _build_transition(self, pair_dim: int) -> None:
        self._dynamics = mlp(pair_dim, self.config.units, self.latent_dim)

    def _init_transition(self) -> None:
        if self.config.zero_velocity:
            nn.init.zeros_(self._last_weight(self._dynamics))

    def _transition(self) -> MLP:
        return self._dynamics

    def _dynamics_of(self, layers: Sequence[ops.Layer]) -> ops.ResidualMLP:
        return ops.ResidualMLP(layers)
