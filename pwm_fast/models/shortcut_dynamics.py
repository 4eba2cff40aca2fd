"""Flow dynamics that are told the size of their step."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from pwm_fast import ops
from pwm_fast.config import ModelLearningConfig
from pwm_fast.models.layers import MLP, mlp
from pwm_fast.models.world_model import LatentModel, register


@register("shortcut")
class ShortcutWorldModel(LatentModel):
    """Average velocities ``u(z, a, tau, task, d)`` over steps of size d: :class:`ops.Shortcut`.

    ``config.substeps`` Euler steps make a macro step; the head is linear.
    """

    def _build_transition(self, pair_dim: int) -> None:
        self._velocity = mlp(pair_dim + 2, self.config.units, self.latent_dim)

    def _init_transition(self) -> None:
        if self.config.zero_velocity:
            nn.init.zeros_(self._last_weight(self._velocity))

    def _transition(self) -> MLP:
        return self._velocity

    def _dynamics_of(self, layers: Sequence[ops.Layer]) -> ops.Shortcut:
        return ops.Shortcut(layers, self.config.substeps)

    def cautions(self, learning: ModelLearningConfig) -> list[str]:
        """What to warn of where the model is trained in that way."""
        found = super().cautions(learning)
        share = learning.consistency_share
        if share in (0.0, 1.0):
            lost = "sizes of steps" if share == 0.0 else "size 0, which the others build on,"
            found.append(f"alg.model_learning.consistency_share={share} leaves {lost} untrained")
        if learning.tau_sampling == "midpoint":
            found.append(
                "alg.model_learning.tau_sampling=midpoint trains no step that begins at tau = 0, "
                "where rollouts begin: an ablation"
            )
        return found

    def learned_dynamics(self, learning: ModelLearningConfig) -> ops.Shortcut:
        """As they are learned; see :meth:`pwm_fast.models.LatentModel.learned_dynamics`."""
        found = self._dynamics_of(self._transition().layers())
        return found._replace(
            substeps=learning.substeps or found.substeps,
            consistency=learning.consistency,  # type: ignore[arg-type]
            share=learning.consistency_share,
        )
