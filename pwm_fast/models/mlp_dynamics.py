"""PWM's baseline dynamics."""

from __future__ import annotations

from collections.abc import Sequence

from pwm_fast import ops
from pwm_fast.models.layers import MLP, mlp
from pwm_fast.models.world_model import LatentModel, register


@register("mlp")
class WorldModel(LatentModel):
    """PWM's baseline: ``z' = F(z, task, a)``, an MLP that ends in SimNorm (arXiv 2407.02466).

    Of observations (``config.encoder`` is ``identity``) it ends in a linear layer.
    """

    def _build_transition(self, pair_dim: int) -> None:
        last: ops.Activation | None = "simnorm" if self.simplices else None
        self._dynamics = mlp(pair_dim, self.config.units, self.latent_dim, last=last)

    def _transition(self) -> MLP:
        return self._dynamics

    def _dynamics_of(self, layers: Sequence[ops.Layer]) -> ops.LatentMLP:
        return ops.LatentMLP(layers)
